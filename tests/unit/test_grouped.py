"""Linears joined into one product give what they gave one by one, in whatever order and with whatever input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.core import BaseInfo, LinearShape

pytest.importorskip("triton", reason="triton is not installed")

from server.lora.grouped import install
from server.lora.groups import grouped


class Layer(nn.Module):
    """Attention and MLP linears by the usual names; k_proj alone has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12, False), nn.Linear(8, 4), nn.Linear(8, 4, False)
        self.o_proj = nn.Linear(12, 8, False)
        self.gate_proj, self.up_proj = nn.Linear(8, 6), nn.Linear(8, 6)


def info_of(model: nn.Module) -> BaseInfo:
    linears = {
        name: LinearShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return BaseInfo("tiny", frozenset(), "sha256:0", "llama", "L", linears)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"layer": Layer()}).requires_grad_(False)


class Noted:
    """A LoRA batch that adds one to every output and notes the groups that it was asked for."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, ...]] = []

    def add(self, names: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        self.groups.append(names)
        y += 1


def test_what_is_joined(model: nn.Module) -> None:
    assert grouped(info_of(model)) == [
        ("layer.q_proj", "layer.k_proj", "layer.v_proj"),
        ("layer.o_proj",),
        ("layer.gate_proj", "layer.up_proj"),
    ]
    layer: Any = model["layer"]  # type: ignore[index]
    layer.up_proj = nn.Linear(9, 6)  # of another input
    layer.v_proj = nn.Identity()
    assert all(len(names) == 1 for names in grouped(info_of(model)))


def test_a_transposed_linear_is_itself() -> None:
    model: Any = nn.ModuleDict({"c_attn": Conv1D(6, 4)}).requires_grad_(False)
    x, wanted = torch.randn(3, 4), model["c_attn"]
    wanted = wanted(x)
    install(model, BaseInfo("t", frozenset(), "", "gpt2", "G", {"c_attn": LinearShape(4, 6)}))
    torch.testing.assert_close(model["c_attn"](x), wanted)


@pytest.mark.parametrize("order", [("q", "k", "v"), ("v", "q", "k"), ("k", "k", "q"), ("q", "q", "v")])
def test_any_order_of_calls(model: nn.Module, order: tuple[str, ...]) -> None:
    layer: Any = model["layer"]  # type: ignore[index]
    x, other = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    plain = {name: getattr(layer, f"{name}_proj") for name in "qkv"}
    wanted = [(plain[name](x), plain[name](other)) for name in order]
    install(model, info_of(model))
    for name, (one, _) in zip(order, wanted, strict=True):
        torch.testing.assert_close(getattr(layer, f"{name}_proj")(x), one)
    for name, (one, two) in zip(order, wanted, strict=True):
        torch.testing.assert_close(getattr(layer, f"{name}_proj")(other), two)
        torch.testing.assert_close(getattr(layer, f"{name}_proj")(x), one)


def test_adapters_are_added_once_for_the_group(model: nn.Module) -> None:
    layer: Any = model["layer"]  # type: ignore[index]
    x = torch.randn(1, 5, 8)
    wanted = [linear(x) + 1 for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    batch: Any = Noted()
    install(model, info_of(model)).batch = batch
    got = [linear(x) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert batch.groups == [("layer.q_proj", "layer.k_proj", "layer.v_proj")]
    layer.q_proj(x)  # a new step with the very same tensor computes anew
    assert len(batch.groups) == 2


def test_nothing_is_held_once_all_have_asked(model: nn.Module) -> None:
    layer: Any = model["layer"]  # type: ignore[index]
    install(model, info_of(model))
    x = torch.randn(1, 5, 8)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name)(x)
    group = layer.q_proj.shared
    assert group._input is None
    assert not group._parts
