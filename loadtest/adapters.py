"""The adapters that a workload needs: random, deterministic, with a large effect, and made without loading a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from loadtest.dialects import authorization
from loadtest.workload import Workload

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": ATTENTION, "linear": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}
SCALE = 0.02  # standard deviation of A and B: answers differ from the base's from the first tokens on
POOL = 1 << 23  # values that every adapter is cut from
PAGE = 1000
AT_ONCE = 2


class UnfitBase(ValueError):
    """The base has none of the modules that the adapters are to change."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a workload. The name says everything that its bytes follow from, but for the base."""

    index: int
    rank: int
    targets: str

    @property
    def name(self) -> str:
        """What it is registered as."""
        return f"lt-{self.targets}-r{self.rank}-{self.index:05d}"

    def config(self) -> bytes:
        """`adapter_config.json`."""
        return json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": self.rank,
                "lora_alpha": 2 * self.rank,
                "target_modules": list(TARGETS[self.targets]),
                "lora_dropout": 0.0,
                "bias": "none",
                "inference_mode": True,
            }
        ).encode()

    def weights(self, base: Path) -> bytes:
        """`adapter_model.safetensors` in float16. Every adapter is another stretch of the same random values."""
        tensors, at = {}, 0
        pool, start = _pool(), self.index * 4099 + self.rank * 131
        for module, (out, into) in shapes(base, self.targets).items():
            for part, shape in (("A", (self.rank, into)), ("B", (out, self.rank))):
                size = shape[0] * shape[1]
                values = np.take(pool, np.arange(start + at, start + at + size), mode="wrap")
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values.reshape(shape)
                at += size
        return save(tensors)


def of(workload: Workload) -> list[Adapter]:
    """The adapters of a workload, the likeliest first."""
    ranks = workload.ranks
    return [Adapter(at, ranks[at % len(ranks)], workload.targets) for at in range(workload.adapters)]


@cache
def shapes(base: Path, targets: str) -> dict[str, tuple[int, int]]:
    """(out, in) of each target module, read from the headers of the base's safetensors files.

    Raises UnfitBase when the base has no module of that name.
    """
    found = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                module = key.removesuffix(".weight")
                if module.rpartition(".")[2] in TARGETS[targets]:
                    out, into = tensors.get_slice(key).get_shape()
                    found[module] = (out, into)
    if not found:
        raise UnfitBase(f"no safetensors file of {base.name} has a {' or '.join(TARGETS[targets])}")
    return found


def write(adapters: list[Adapter], base: Path, folder: Path) -> list[Path]:
    """Puts each adapter into a directory of its own, where PEFT finds it; those that are there stay."""
    paths = [folder / adapter.name for adapter in adapters]
    for adapter, path in zip(adapters, paths, strict=True):
        if not (path / "adapter_config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            (path / "adapter_model.safetensors").write_bytes(adapter.weights(base))
            (path / "adapter_config.json").write_bytes(adapter.config())
    return paths


def register(
    url: str, adapters: list[Adapter], base: Path, tick: Callable[[], None] = lambda: None, key: str | None = None
) -> int:
    """Uploads to a onebase server what it does not have yet; the number uploaded. `tick` is called after each adapter.

    Raises httpx.HTTPError when the server refuses one or does not answer.
    """
    headers = authorization(key)
    with httpx.Client(base_url=url, timeout=300, headers=headers) as http, ThreadPoolExecutor(AT_ONCE) as pool:
        there = set(_registered(http))
        new = [adapter for adapter in adapters if adapter.name not in there]

        def put(adapter: Adapter) -> None:
            upload(http, adapter.name, adapter.config(), adapter.weights(base))
            tick()

        for _ in range(len(adapters) - len(new)):
            tick()
        for _ in pool.map(put, new):
            pass
    return len(new)


def upload(http: httpx.Client, name: str, config: bytes, weights: bytes) -> None:
    """One `PUT /adapters/<name>`."""
    files = {
        "config": ("adapter_config.json", config),
        "weights": ("adapter_model.safetensors", weights),
    }
    response = http.put(f"/adapters/{quote(name, safe='')}", files=files)
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{name}: {response.status_code} {response.text[:300]}", request=response.request, response=response
        )


def _registered(http: httpx.Client) -> Iterator[str]:
    after: str | None = None
    while True:
        page = http.get("/adapters", params={"limit": str(PAGE)} | ({"after": after} if after else {}))
        page.raise_for_status()
        body = page.json()
        yield from (row["name"] for row in body["data"])
        after = body["next"]
        if after is None:
            return


@cache
def _pool() -> NDArray[np.float16]:
    rng = np.random.default_rng(20_240_607)
    return (rng.standard_normal(POOL, np.float32) * SCALE).astype(np.float16)
