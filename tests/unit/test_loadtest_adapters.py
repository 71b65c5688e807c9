"""The adapters of a workload: their shapes, their bytes, and that PEFT takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from loadtest import adapters
from loadtest.adapters import Adapter
from loadtest.workload import parse
from tests.families import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("loadtest") / "base")


def test_ranks_take_turns_and_names_say_what_they_are() -> None:
    workload = parse(
        {
            "adapters": 3,
            "ranks": [8, 16],
            "arrivals": {"kind": "closed", "streams": 1},
            "prompt_tokens": {"kind": "fixed", "tokens": 1},
            "output_tokens": {"kind": "fixed", "tokens": 1},
        }
    )
    names = [adapter.name for adapter in adapters.of(workload)]
    assert names == ["lt-attention-r8-00000", "lt-attention-r16-00001", "lt-attention-r8-00002"]


@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_peft_takes_one_and_it_changes_what_the_base_says(base: Path, targets: str, tmp_path: Path) -> None:
    (path,) = adapters.write([Adapter(5, 4, targets)], base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, path)(ids).logits
    assert (before - after).abs().max() > 1e-3
    modules = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in load(Adapter(5, 4, targets).weights(base))}
    assert modules == set(adapters.TARGETS[targets])


def test_bytes_are_the_same_every_time_and_differ_between_adapters(base: Path) -> None:
    made = [Adapter(at, rank, "attention").weights(base) for at in range(40) for rank in (4, 8)]
    again = [Adapter(at, rank, "attention").weights(base) for at in range(40) for rank in (4, 8)]
    assert made == again
    assert len(set(made)) == 80


def test_written_ones_stay(base: Path, tmp_path: Path) -> None:
    (path,) = adapters.write([Adapter(0, 4, "attention")], base, tmp_path)
    (path / "adapter_model.safetensors").write_bytes(b"mine")
    adapters.write([Adapter(0, 4, "attention")], base, tmp_path)
    assert (path / "adapter_model.safetensors").read_bytes() == b"mine"
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4


def test_a_base_without_such_modules_is_refused(tmp_path: Path) -> None:
    base = save_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(adapters.UnfitBase, match="q_proj"):
        adapters.shapes(base, "attention")
