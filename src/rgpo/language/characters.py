"""Small models from scratch: a Llama whose tokens are characters, or words of a closed list."""

import string
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PRINTABLE = string.printable[:95]
"""ASCII without control characters."""


def character_tokenizer(alphabet: str = PRINTABLE) -> PreTrainedTokenizerFast:
    """A token is a character; others are <unk>."""
    fast = _tokens(alphabet)
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return _finished(fast)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token is a word between spaces; others are <unk>."""
    fast = _tokens(words)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(fast)


def small_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any
) -> LlamaForCausalLM:
    """Random Llama of width 128 and 3 layers, 0.6 million parameters; `changes` to its config."""
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    ids = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos"))}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes | changes))


def _tokens(names: Sequence[str]) -> Tokenizer:
    vocabulary = {name: i for i, name in enumerate((*SPECIAL, *names))}
    return Tokenizer(models.WordLevel(vocabulary, "<unk>"))


def _finished(fast: Tokenizer) -> PreTrainedTokenizerFast:
    special = {f"{name[1:-1]}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **special)
