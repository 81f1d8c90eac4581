import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.checkpoint import generator_state, load, newest, prune, restore_generator, save


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(64, generator=generator)
    return {
        "policy.weight": flat[:12].view(3, 4),
        "policy.weight.T": flat[:12].view(3, 4).T,  # not contiguous, same memory
        "policy.bias": flat[10:20],  # overlaps the first
        "half": flat.bfloat16(),
        "count": torch.tensor(3),
        "torch_rng": generator.get_state(),
    }


STATE = {"rng": 2**127 + 12345, "third": 1 / 3, "tiny": 5e-324, "names": ["a", None, True]}


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 123, tensors(), STATE)
    assert path == tmp_path / "update-000123.json"
    found = load(path)
    assert found.update == 123
    assert found.path == path
    assert found.state == STATE
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_keeps_the_newest_and_sorts_by_number(tmp_path):
    for update in (5, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, update, tensors(), {})
    prune(tmp_path, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"update-{n}.{e}" for n in (1000000, 1000001) for e in ("json", "safetensors")]
    assert newest(tmp_path)[0].update == 1_000_001


def test_truncated_what_is_newer_and_whole_is_gone(tmp_path):
    paths = [save(tmp_path, update, tensors(), {}) for update in (1, 2, 3, 3, 4)]
    half_json(paths[-1])
    checkpoint.truncate_after(tmp_path, 2)
    assert sorted(tmp_path.glob("*.json")) == [paths[0], paths[1], paths[4]]
    assert newest(tmp_path)[0].update == 2


def test_newest_at_most(tmp_path):
    for update in (10, 20, 30):
        save(tmp_path, update, tensors(), {})
    assert newest(tmp_path, at_most=29)[0].update == 20
    assert newest(tmp_path, at_most=30)[0].update == 30
    with pytest.raises(RgpoError, match="no whole checkpoint"):
        newest(tmp_path, at_most=9)


def half_tensors(path):
    file = path.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return file


def flipped_tensors(path):
    file = path.with_suffix(".safetensors")
    flip_bit(file, file.stat().st_size - 5)
    return file


def no_tensors(path):
    path.with_suffix(".safetensors").unlink()
    return path.with_suffix(".safetensors")


def half_json(path):
    path.write_bytes(path.read_bytes()[:-20])
    return path


def empty_json(path):
    path.write_bytes(b"")
    return path


def flipped_digit_in_the_state(path):
    flip_bit(path, path.read_bytes().index(b"2345"))
    json.loads(path.read_bytes())  # still JSON, still the right tensors: only the checksum knows
    return path


def no_json(path):
    path.unlink()
    return path


def another_ones_tensors(path):
    file = path.with_suffix(".safetensors")
    file.write_bytes(path.with_name("update-000002.safetensors").read_bytes())
    return file


DAMAGES = [
    half_tensors,
    flipped_tensors,
    no_tensors,
    half_json,
    empty_json,
    flipped_digit_in_the_state,
    no_json,
    another_ones_tensors,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_skipped_and_left_alone(tmp_path, damage):
    save(tmp_path, 1, tensors(1), {"rng": 12345})
    save(tmp_path, 2, tensors(2), {"rng": 12345})
    path = save(tmp_path, 3, tensors(3), {"rng": 12345})
    named = damage(path)
    with pytest.raises(RgpoError, match=str(named)):
        load(path)
    found, skipped = newest(tmp_path)
    assert found.update == 2
    assert len(skipped) == 1
    assert str(named) in skipped[0]

    damaged = {file: file.read_bytes() for file in tmp_path.glob("update-000003.*")}
    again = save(tmp_path, 3, tensors(4), {"rng": 1})  # would collide
    prune(tmp_path, keep=1)
    assert again.name == "update-000003.1.json"
    assert {file: file.read_bytes() for file in damaged} == damaged
    assert newest(tmp_path)[0].path == again
    assert not list(tmp_path.glob("update-000002*"))


def test_any_flipped_bit_of_the_json_is_found_or_harmless(tmp_path):
    path = save(tmp_path, 3, {"w": torch.ones(1)}, {"a": [0.1, None, "b"], "c": 2**70})
    whole, expected = path.read_bytes(), load(path)
    found = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            assert load(path).state == expected.state
        except RgpoError:
            found += 1
    assert found > 0.9 * 8 * len(whole)


def test_only_whole_ones_count_as_kept(tmp_path):
    paths = [save(tmp_path, update, tensors(), {}) for update in (1, 2, 3, 4)]
    half_tensors(paths[1])
    prune(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.glob("*.json"))
    assert left == ["update-000002.json", "update-000003.json", "update-000004.json"]


def test_without_a_whole_checkpoint_the_error_names_every_one(tmp_path):
    with pytest.raises(RgpoError, match=f"no whole checkpoint in {tmp_path}: start a new run"):
        newest(tmp_path)
    half_json(save(tmp_path, 1, tensors(), {}))
    half_tensors(save(tmp_path, 2, tensors(), {}))
    with pytest.raises(RgpoError, match=r"update-000002\.safetensors .*update-000001\.json "):
        newest(tmp_path)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_poisoned_is_saved(tmp_path, poison):
    bad = tensors() | {"moments": torch.tensor([1.0, poison]).bfloat16()}
    with pytest.raises(RgpoError, match="Not saving update 7: moments holds NaN or infinity"):
        save(tmp_path, 7, bad, {})
    with pytest.raises(RgpoError, match=r"Not saving update 7: best\.1 holds"):
        save(tmp_path, 7, tensors(), {"best": [1.0, poison]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: "a"}])
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match="does not survive JSON"):
        save(tmp_path, 1, tensors(), state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937"])
def test_generators_continue_through_json(kind):
    rng = np.random.Generator(getattr(np.random, kind)(np.random.SeedSequence(3)))
    rng.spawn(1)
    rng.integers(5, dtype=np.uint32)  # leaves half a word in the buffer
    state = json.loads(json.dumps(generator_state(rng)))
    again = restore_generator(state)
    assert (
        again.integers(9, size=3, dtype=np.uint32).tolist()
        == rng.integers(9, size=3, dtype=np.uint32).tolist()
    )
    assert again.normal(size=5).tolist() == rng.normal(size=5).tolist()
    assert again.spawn(1)[0].random() == rng.spawn(1)[0].random()


def test_an_unknown_generator_is_told():
    state = generator_state(np.random.default_rng(0))
    state["bit_generator"]["bit_generator"] = "default_rng"
    with pytest.raises(RgpoError, match="has no bit generator 'default_rng'"):
        restore_generator(state)


# One interpreter forks the victims, because importing torch takes longer than all the kills.
KILL_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from rgpo.runs.checkpoint import newest, prune, save
torch.set_num_threads(1)
folder = Path(sys.argv[1])
update, caught = 0, 0
start = time.monotonic()
save(folder, update, {"w": torch.zeros(100_000)}, {"update": 0})
save(folder, update, {"w": torch.zeros(100_000)}, {"update": 0})
seconds = (time.monotonic() - start) / 2
for attempt in range(60):
    victim = os.fork()
    if victim == 0:
        while True:
            update += 1
            save(folder, update, {"w": torch.full((100_000,), float(update))}, {"update": update})
            prune(folder, 3)
    time.sleep(random.Random(attempt).uniform(0.1, 4) * seconds)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    caught += bool(list(folder.glob(".*.tmp")))
    found, skipped = newest(folder)
    assert found.update >= update, (found.update, update)
    assert found.state == {"update": found.update}
    assert (found.tensors["w"] == found.update).all()
    update = found.update
assert update > 0
print(caught)
"""


def test_kill_9_while_saving_never_loses_the_newest(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_SAVING, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill fell into the middle of a write"


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from rgpo.errors import RgpoError
from rgpo.runs.checkpoint import save
folder, limit, extra = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save(folder, 2, {"w": torch.ones(1000)}, {"text": "x" * extra})
except RgpoError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "extra", "file"), [(2000, 0, "safetensors"), (6000, 9000, "json")]
)
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, limit, extra, file):
    first = save(tmp_path, 1, {"w": torch.zeros(1000)}, {})
    before = set(tmp_path.iterdir())
    arguments = [tmp_path, str(limit), str(extra)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True
    )
    assert f"Could not write {tmp_path}/update-000002.{file} (File too large)" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert set(tmp_path.iterdir()) == before
    assert newest(tmp_path)[0].path == first


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    path = save(tmp_path, 1, tensors(), {})
    path.unlink()
    path.mkdir()
    with pytest.raises(RgpoError, match=r"update-000001\.json cannot be read"):
        checkpoint.load(path)
