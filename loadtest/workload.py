"""The adapters and prompts that every side of a comparison gets."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def make_adapters(
    base: Path, folder: Path, count: int, *, rank: int = 8, targets: tuple[str, ...] = ATTENTION
) -> list[Path]:
    """`count` random adapters under `folder`, made once: a large effect, values from a normal distribution."""
    paths = [folder / f"r{rank}-{len(targets)}-{at:02d}" for at in range(count)]
    for at, path in enumerate(paths):
        if (path / "adapter_model.safetensors").exists():
            continue
        torch.manual_seed(at)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter.data, std=0.02)
        model.save_pretrained(str(path))
    return paths


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, different for every seed so that no cache helps."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 40_000) for _ in range(length)] for _ in range(count)]
