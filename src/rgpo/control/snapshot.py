"""The exact state of a Gymnasium environment as JSON, so that stepping continues bit for bit.

What is saved: the attributes of every wrapper and of the environment itself that are plain data
(None, bool, int, float, str, bytes, NumPy arrays and scalars, and lists, tuples, sets, dicts and
deques of these), NumPy random generators, MuJoCo's `MjData`, and the state of the Arcade Learning
Environment without sticky actions. Two names for one object stay two names for one object.
Anything else that could change makes the environment `Uncapturable`: an honest no is better than
a run that almost continues.

Not seen, and so not saved: global random generators, class attributes, closures, C++ objects
behind functions.
"""

import base64
import hashlib
import math
import sys
from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from rgpo.errors import RgpoError

# What the constructor was given, or built once from it (`_action_set`: enums of ale-py).
_CONSTANT_NAMES = {"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "_action_set"}
_CONSTANT_TYPES = (
    gym.Space, EnvSpec, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, np.dtype,
)  # fmt: skip
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


class Uncapturable(Exception):  # noqa: N818  (a finding, not an error)
    """Says which attribute of an environment cannot be saved."""


def capture(env: gym.Env) -> list[dict[str, Any]]:
    """The state of `env`, outermost wrapper first, as JSON (strict: no NaN, no infinity).

    Raises Uncapturable, naming the attribute.
    """
    encoder = _Encoder()
    return [
        {
            "layer": type(layer).__name__,
            "attributes": {
                name: encoder.named(f"{type(layer).__name__}.{name}", value)
                for name, value in _state_attributes(layer)
            },
        }
        for layer in _layers(env)
    ]


def restore(env: gym.Env, saved: list[dict[str, Any]]) -> None:
    """Put `env`, made with the same arguments, into the state that `capture` returned.

    Raises RgpoError if the wrappers are not the same.
    """
    layers = list(_layers(env))
    names = [type(layer).__name__ for layer in layers]
    if names != [layer["layer"] for layer in saved]:
        raise RgpoError(
            "The saved environment state does not fit this environment "
            f"({' > '.join(layer['layer'] for layer in saved)} was saved, {' > '.join(names)} is "
            "here): resume with the same environment arguments and package versions."
        )
    decoder = _Decoder()
    for layer, state in zip(layers, saved, strict=True):
        attributes = vars(layer)
        for name in [name for name, _ in _state_attributes(layer)]:
            if name not in state["attributes"]:
                del attributes[name]
        for name, value in state["attributes"].items():
            attributes[name] = decoder.decode(value, attributes.get(name))


def model_digest(env: gym.Env) -> str:
    """A hash of the environment's MuJoCo model, empty without one.

    `capture` takes the model as constant; an environment that randomises it shows itself here.
    """
    mujoco = sys.modules.get("mujoco")
    model = getattr(env.unwrapped, "model", None)
    if mujoco is None or not isinstance(model, mujoco.MjModel):
        return ""
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return hashlib.sha256(buffer).hexdigest()


def _layers(env: gym.Env) -> Iterator[gym.Env]:
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def _state_attributes(layer: gym.Env) -> Iterator[tuple[str, Any]]:
    constants = (*_CONSTANT_TYPES, *_optional_types("MjModel", "MujocoRenderer"))
    for name, value in vars(layer).items():
        is_inner = name == "env" and isinstance(layer, gym.Wrapper)
        if not (is_inner or name in _CONSTANT_NAMES or isinstance(value, constants)):
            yield name, value


def _optional_types(*names: str) -> tuple[type, ...]:
    """Types of packages that need not be there; a value of one means that it was imported."""
    homes = {
        "MjModel": "mujoco",
        "MjData": "mujoco",
        "MujocoRenderer": "gymnasium.envs.mujoco.mujoco_rendering",
        "ALEInterface": "ale_py",
    }
    modules = [(name, sys.modules.get(homes[name])) for name in names]
    return tuple(getattr(module, name) for name, module in modules if module is not None)


class _Encoder:
    """Python values as JSON; remembers what it met, so that shared objects are saved once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}  # holds the object: its id must stay taken
        self._owners: set[int] = set()

    def named(self, name: str, value: Any) -> Any:
        try:
            return self.encode(value)
        except Uncapturable as problem:
            raise Uncapturable(f"{name} {problem}") from None

    def encode(self, value: Any) -> Any:
        if value is None or type(value) in {bool, int, str}:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if type(value) is bytes:
            return {"bytes": _text(value)}
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return {"scalar": _text(value.tobytes()), "dtype": value.dtype.str}
        if id(value) in self._seen:
            return {"same": self._seen[id(value)][0]}
        number = len(self._seen)
        self._seen[id(value)] = (number, value)
        return {"number": number} | self._encode_object(value)

    def _encode_object(self, value: Any) -> dict[str, Any]:
        kind = type(value).__name__
        if type(value) is np.ndarray:
            return self._encode_array(value)
        if type(value) is dict:
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return {"kind": "dict", "items": pairs}
        if type(value) in _CONTAINERS.values():
            extra = {"maxlen": value.maxlen} if type(value) is deque else {}
            return {"kind": kind, "items": [self.encode(item) for item in value]} | extra
        if type(value) is np.random.Generator:
            return {"kind": "generator", "state": self.encode(value.bit_generator.state)}
        if isinstance(value, _optional_types("MjData")):
            return {"kind": "mujoco", "state": self.encode(_mujoco_state(value))}
        if isinstance(value, _optional_types("ALEInterface")):
            if value.getFloat("repeat_action_probability") > 0:
                raise Uncapturable("repeats actions at random and does not tell the last one")
            return {"kind": "ale", "state": _text(value.cloneState(include_rng=True).serialize())}
        raise Uncapturable(f"holds {type(value).__module__}.{kind}")

    def _encode_array(self, array: np.ndarray) -> dict[str, Any]:
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if array.dtype.hasobject or not (owner.base is None or isinstance(owner.base, bytes)):
            raise Uncapturable("holds an array of objects or a view of foreign memory")
        if id(owner) in self._owners:
            raise Uncapturable("holds an array that shares its memory with another one")
        self._owners.add(id(owner))
        return {
            "kind": "array",
            "data": _text(array.tobytes()),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "order": "F" if array.flags.fnc else "C",  # summation order depends on it
        }


class _Decoder:
    """The inverse of `_Encoder`, over the same sequence of values."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def decode(self, value: Any, present: Any = None) -> Any:
        """The value; `present` is what stands in its place and is changed if it is foreign."""
        if not isinstance(value, dict):
            return value
        if "float" in value:
            return float(value["float"])
        if "bytes" in value:
            return _bytes(value["bytes"])
        if "scalar" in value:
            return np.frombuffer(_bytes(value["scalar"]), value["dtype"])[0]
        if "same" in value:
            return self._seen[value["same"]]
        return self._decode_object(value, present)

    def _decode_object(self, value: dict[str, Any], present: Any) -> Any:
        kind, number = value["kind"], value["number"]
        if kind in {"dict", "list", "set", "deque"}:  # may hold themselves: noted, then filled
            return self._fill(value)
        if kind in {"tuple", "frozenset"}:
            result = _CONTAINERS[kind](self.decode(item) for item in value["items"])
        elif kind == "array":
            flat = np.frombuffer(_bytes(value["data"]), value["dtype"])
            result = np.array(flat.reshape(value["shape"]), order=value["order"])
        elif kind == "generator":
            result = _generator(self.decode(value["state"]))
        elif kind == "mujoco":
            result = _set_mujoco_state(present, self.decode(value["state"]))
        else:
            result = _set_ale_state(present, _bytes(value["state"]))
        self._seen[number] = result
        return result

    def _fill(self, value: dict[str, Any]) -> Any:
        kind, items = value["kind"], value["items"]
        result: Any = {"dict": dict, "list": list, "set": set, "deque": deque}[kind]()
        if kind == "deque":
            result = deque(maxlen=value["maxlen"])
        self._seen[value["number"]] = result
        for item in items:
            if kind == "dict":
                result[self.decode(item[0])] = self.decode(item[1])
            elif kind == "set":
                result.add(self.decode(item))
            else:
                result.append(self.decode(item))
        return result


def _generator(state: dict[str, Any]) -> np.random.Generator:
    kinds = {"PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"}
    if state["bit_generator"] not in kinds:
        raise RgpoError(f"The saved random generator {state['bit_generator']} is not NumPy's.")
    bits = getattr(np.random, state["bit_generator"])()
    bits.state = state
    return np.random.Generator(bits)


def _mujoco_state(data: Any) -> dict[str, np.ndarray]:
    """MuJoCo's integration state and every derived array of fixed size.

    The derived ones (positions of bodies, contact forces, ...) belong to the last evaluation of
    the dynamics, not to the present positions, and environments read them before the next step
    (Ant and Humanoid compute their velocity from them): a fresh `mj_forward` would give others.
    Arrays of the arena (constraints, contacts) have no fixed size and are recomputed by a step.
    """
    import mujoco

    signature = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(data.model, signature))
    mujoco.mj_getState(data.model, data, integration, signature)
    fixed = _arrays(mujoco.MjData(data.model))
    arrays = {
        name: array.copy()
        for name, array in _arrays(data).items()
        if name in fixed and fixed[name].shape == array.shape
    }
    return {"": integration} | arrays


def _set_mujoco_state(data: Any, state: dict[str, np.ndarray]) -> Any:
    import mujoco

    mujoco.mj_resetData(data.model, data)
    mujoco.mj_setState(data.model, data, state.pop(""), mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in state.items():
        getattr(data, name)[...] = array
    return data


def _arrays(data: Any) -> dict[str, np.ndarray]:
    named = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    return {k: v for k, v in named.items() if isinstance(v, np.ndarray) and v.size}


def _set_ale_state(ale: Any, serialised: bytes) -> Any:
    import ale_py

    state = ale_py.ALEState.__new__(ale_py.ALEState)
    state.__setstate__(serialised)
    ale.restoreState(state)
    return ale


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
