"""Models of about 100k parameters and a character tokenizer, built on the fly, offline."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from rgpo.language.characters import character_tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+=?"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer():
    """A token is a character."""
    return character_tokenizer(CHARACTERS)


def policy(folder=None, seed=0, **changes):
    """A random Llama; saved to `folder` and given as a path where there is one."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(CHARACTERS) + 4, **SIZES | changes)
    return _saved(LlamaForCausalLM(config), folder)


def mixture(folder, seed=0):
    """A random mixture of experts."""
    torch.manual_seed(seed)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    config = MixtralConfig(
        vocab_size=len(CHARACTERS) + 4, router_aux_loss_coef=0.5, **SIZES | experts
    )
    return _saved(MixtralForCausalLM(config), folder)


def reward_model(seed=1, **changes):
    """A random classifier with one label."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{"vocab_size": len(CHARACTERS) + 4, "num_labels": 1} | SIZES | changes)
    return LlamaForSequenceClassification(config)


def encoder(vocab_size):
    """A random model that reads in both directions."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return BertModel(config)


def prompts(count=16):
    """Short texts of unequal length."""
    return Dataset.from_dict({"prompt": [f"say {i * i}=" for i in range(count)]})


def vowels(completions, **_):
    """Share of vowels: a reward that any model can raise."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def _saved(model, folder):
    if folder is None:
        return model
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
