"""A Llama of a given shape with random weights, made where it runs, and random adapters for it; no download."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from server.core import BaseInfo
from server.lora.weights import AdapterWeights, LoraPair
from server.model import attention
from server.model.loader import Base, is_linear, linear_shape

_EIGHT_B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHAPES = {"8b": _EIGHT_B, "tiny": _TINY}
_CONTENTS = 8  # different adapters; more would only take more RAM


def make_base(shape: str, device: torch.device, dtype: torch.dtype) -> Base:
    """The base, as load_base would describe it. Its weights are small, so that no value overflows in 16 bits."""
    torch.manual_seed(7)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, initializer_range=0.02)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model = model.to(device).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {n: linear_shape(m) for n, m in model.named_modules() if is_linear(m) and m is not head}
    return Base(
        model=model,
        tokenizer=_tokenizer(config.vocab_size),
        info=BaseInfo(f"random-{shape}", frozenset(), "sha256:0", "llama", type(model).__name__, linears),
        dtype=dtype,
        device=device,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        eos_ids=frozenset(),
        kv_shapes=attention.probe(model).shapes,
        longest_token=16,
    )


def weight_bytes(base: Base) -> int:
    """Bytes of weights that a decode step reads: all but the embedding's table. To be asked before an engine has it."""
    table = base.model.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in base.model.parameters()) - int(table.nbytes)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Bytes, and as many further tokens as the vocabulary has room for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"<{number}>" for number in range(size - len(alphabet))]
    inner = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class Adapters:
    """The RAM tier: any digest has an adapter of rank `rank` on all linear layers. A few contents serve all digests:
    copying them to the device costs the same, and a thousand of an 8B model's would not fit in RAM."""

    def __init__(self, base: Base, rank: int):
        self._contents = [self._random(base, rank) for _ in range(_CONTENTS)]
        self.nbytes = self._contents[0].nbytes

    def fetch(self, digest: str) -> AdapterWeights:
        """What the engine's loaders call."""
        content = self._contents[int(digest) % _CONTENTS]
        return AdapterWeights(digest, content.modules, content.rank, content.nbytes)

    @staticmethod
    def _random(base: Base, rank: int) -> AdapterWeights:
        def tensor(columns: int, spread: float) -> torch.Tensor:
            made = torch.randn(rank, columns, device=base.device, dtype=torch.float32) * spread
            return made.to(base.dtype).cpu()

        pairs = {
            name: LoraPair(tensor(shape.in_features, 0.02), tensor(shape.out_features, 0.02))
            for name, shape in base.info.linears.items()
        }
        return AdapterWeights("", pairs, rank, sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()))


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random token ids, different for every seed."""
    chooser = random.Random(seed)
    return [tuple(chooser.randrange(vocabulary) for _ in range(length)) for _ in range(count)]
