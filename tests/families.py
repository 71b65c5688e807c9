"""Small random models of the real families, and the oracle: transformers and PEFT by themselves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A model family: how to make its configuration, and what LoRA can be put on."""

    config: Any
    attention: list[str]
    mlp: list[str]

    @property
    def linears(self) -> list[str]:
        return self.attention + self.mlp


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True), ATTENTION, MLP),
    "mistral": Family(MistralConfig(**_COMMON, head_dim=16, sliding_window=12), ATTENTION, MLP),
    "qwen2": Family(Qwen2Config(**_COMMON), ATTENTION, MLP),
    "qwen3": Family(Qwen3Config(**_COMMON, head_dim=32), ATTENTION, MLP),
    "gemma": Family(
        GemmaConfig(**{**_COMMON, "num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=24), ATTENTION, MLP
    ),
    "phi3": Family(Phi3Config(**_COMMON), ["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]),
    "gpt2": Family(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
        ),
        ["c_attn"],
        ["c_fc", "mlp.c_proj"],
    ),
}


def save_model(family: str, folder: Path) -> Path:
    """A random model of `family` with a byte-level tokenizer, as a directory."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # spread the logits, so that greedy ties are rare
            if parameter.dim() > 1:
                parameter.mul_(2.5 if "emb" not in name and "wte" not in name and "wpe" not in name else 1.0)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: at for at, piece in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"<extra{len(vocabulary)}>"] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_adapter(base: Path, folder: Path, *, seed: int, std: float = 0.15, **config: Any) -> Path:
    """A random PEFT adapter with a large effect; `config` is LoraConfig's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


class Oracle:
    """transformers, and PEFT on it, one request at a time."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.float32):
        self.base, self.dtype = base, dtype
        self._models: dict[Path | None, Any] = {}
        self._merged: dict[Path, Any] = {}

    def model(self, adapter: Path | None) -> Any:
        if adapter not in self._models:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype, attn_implementation="eager")
            self._models[adapter] = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        return self._models[adapter]

    def merged(self, adapter: Path | None) -> Any:
        """The base with the adapter merged in by PEFT; its own weights, no LoRA."""
        if adapter is None:
            return self.model(None)
        if adapter not in self._merged:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype, attn_implementation="eager")
            self._merged[adapter] = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
        return self._merged[adapter]

    def forget(self) -> None:
        self._models.clear()
        self._merged.clear()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], tokens: int, adapter: Path | None) -> list[int]:
        """The greedy continuation; EOS does not end it."""
        ids = torch.tensor([prompt])
        out = self.model(adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], continuation: list[int], adapter: Path | None) -> torch.Tensor:
        """Teacher-forced log-probabilities [len(continuation), vocabulary]."""
        return _forced(self.model(adapter), prompt, continuation)

    @torch.inference_mode()
    def merged_logprobs(self, prompt: list[int], continuation: list[int], adapter: Path | None) -> torch.Tensor:
        """The same of `merged`."""
        return _forced(self.merged(adapter), prompt, continuation)


def _forced(model: Any, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + continuation])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]


_numbers = itertools.count()


def fresh(folder: Path, name: str) -> Path:
    """A path that nothing uses yet."""
    return folder / f"{name}-adapter-{next(_numbers)}"


def adapter_bytes(folder: Path) -> tuple[bytes, bytes]:
    """Config and weights of an adapter directory."""
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def config_of(folder: Path) -> dict[str, Any]:
    """An adapter directory's configuration."""
    return json.loads((folder / "adapter_config.json").read_text())
