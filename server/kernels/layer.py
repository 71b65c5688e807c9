"""A decoder layer as one call: what layer.cpp is told of the layer once, and of each step.

The structures hold addresses; whoever makes one keeps what it points to.
"""

from __future__ import annotations

import ctypes

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

# What the time of a call is spent on; norms and the like are "pointwise".
LAYER_PARTS = ("linears", "lora", "attention", "pointwise")


class Norm(ctypes.Structure):
    """An RMS norm as `Kernels.rms_norm` computes it; without a weight there is none."""

    _fields_ = (("weight", _POINTER), ("eps", _FLOAT), ("offset", _FLOAT))


class Linears(ctypes.Structure):
    """Linears of one input: the records of their `Products`, at most three."""

    _fields_ = (("products", _POINTER), ("count", _INT), ("steps", _INT), ("ins", _INT))


class Layer(ctypes.Structure):
    """One layer. `query` and `key` norm each head; the pool's keys and values [kv_heads, pool_tokens, dim]."""

    _fields_ = (
        *((name, Norm) for name in ("before", "after", "query", "key")),
        *((name, Linears) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INT) for name in ("heads", "kv_heads", "dim", "pool_tokens", "block", "window")),
        ("scale", _FLOAT),
    )

    def numbers(self, tokens: int, hidden: int, inner: int) -> int:
        """How many numbers a step of so many tokens needs for what lies between input and output."""
        return tokens * (hidden + max((2 * self.heads + 2 * self.kv_heads) * self.dim, 2 * inner))


class Step(ctypes.Structure):
    """What all layers of a step share: angles [tokens, rotary]; slots [tokens], where keys and values go; adapters
    [tokens], the addresses of their tables, or none; the rows of one token as for `Kernels.decode`, the others as for
    `Kernels.prefill`; room for `Layer.numbers`."""

    _fields_ = (
        ("tokens", _INT),
        *((name, _POINTER) for name in ("cosine", "sine")),
        ("rotary", _INT),
        *((name, _POINTER) for name in ("slots", "adapters", "tables")),
        ("width", _INT),
        *((name, _POINTER) for name in ("positions", "places")),
        ("decodes", _INT),
        ("chunks", _POINTER),
        ("chunk_count", _INT),
        ("room", _POINTER),
    )
