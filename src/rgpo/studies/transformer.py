"""A decoder-only transformer of about 100k parameters, for studies on language tasks.

Small enough to be trained hundreds of times on a CPU; at this size its own loop over tokens, with
cached keys and values, samples ten times faster than a general generation library.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, (B, heads, T, width / heads)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer."""

    vocabulary: int
    length: int
    """Longest sequence."""

    width: int = 64
    layers: int = 2
    heads: int = 4


class Transformer(nn.Module):
    """Pre-norm blocks, learned positions, causal attention, untied output."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape, d = shape, shape.width
        self.tokens = nn.Embedding(shape.vocabulary, d)
        self.positions = nn.Embedding(shape.length, d)
        self.blocks = nn.ModuleList(_Block(d, shape.heads) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = nn.Linear(d, shape.vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                scale = 0.02 / math.sqrt(2 * shape.layers) if residual else 0.02
                nn.init.normal_(parameter, std=scale, generator=generator)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits (B, T, V) for tokens (B, T), and the cache of all tokens so far.

        With a cache the tokens continue those it holds, one at a time.
        """
        start = 0 if cache is None else cache[0][0].shape[2]
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        kept: Cache = []
        for number, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[number])
            kept.append(pair)
        return self.head(self.norm(x)), kept

    @torch.no_grad()
    def sample(self, prompts: Tensor, length: int, noise: Tensor | None = None) -> Tensor:
        """Continue prompts (B, P) by `length` tokens each: (B, length).

        At temperature 1, by the Gumbel trick with `noise` (B, length, V) uniform in (0, 1); None:
        greedily.
        """
        found, cache = self(prompts)
        chosen: list[Tensor] = []
        for t in range(length):
            scores = found[:, -1]
            if noise is not None:
                scores = scores - torch.log(-torch.log(noise[:, t]))
            chosen.append(scores.argmax(-1, keepdim=True))
            if t + 1 < length:
                found, cache = self(chosen[-1], cache)
        return torch.cat(chosen, -1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention and MLP on (B, T, width); keys and values of all tokens so far."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        x = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return x, (key, value)
