"""A workload as data: one TOML or JSON file says everything, and the same file gives the same requests."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass as plain
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from loadtest.arrivals import Arrivals, Gamma
from loadtest.lengths import Lengths, read_pairs
from loadtest.popularity import STRICT, Identical, Popularity

FOLDER = Path(__file__).parent / "workloads"
TOKEN_IDS = (100, 40_000)  # plain tokens of every usual vocabulary


class BadWorkload(Exception):
    """A workload that cannot be read; the message names the file and the field."""


@dataclass(frozen=True, config=STRICT)
class Objective:
    """What a good answer is: the first token in time, and a mean time between tokens that is not too long."""

    ttft_ms: float = Field(gt=0, description="most milliseconds to the first token")
    gap_ms: float = Field(gt=0, description="most milliseconds between tokens, on average over the answer")


@dataclass(frozen=True, config=STRICT)
class Workload:
    """What is asked of a server."""

    arrivals: Arrivals = Field(description="when requests are sent")
    about: str = Field("", max_length=500, description="what it is for; the title of the report")
    adapters: int = Field(0, ge=0, le=100_000, description="number of adapters; 0: every request is for the base")
    ranks: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (8,), min_length=1, max_length=64, description="their ranks, in turn"
    )
    targets: Literal["attention", "linear"] = Field(
        "attention", description="what they change: the attention's projections, or every linear of a block"
    )
    popularity: Popularity = Field(Identical("identical"), description="which adapter a request asks for")
    prompt_tokens: Lengths | None = Field(None, description="lengths of prompts")
    output_tokens: Lengths | None = Field(None, description="lengths of answers")
    lengths_file: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="JSON lines with `prompt_tokens` and `output_tokens`, beside this file; instead of the two",
    )
    requests: int = Field(256, ge=1, le=1_000_000, description="how many")
    seconds: float = Field(600.0, gt=0, le=86_400, description="after this nothing more is sent")
    warmup: int = Field(
        0, ge=0, le=10_000, description="short requests before, one for each of the likeliest adapters; not counted"
    )
    token_ids: tuple[int, int] = Field(
        TOKEN_IDS, description="prompts are random ids from the first to below the second"
    )
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    slo: Objective | None = Field(None, description="what counts as a good answer")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        either = self.prompt_tokens is not None and self.output_tokens is not None
        neither = self.prompt_tokens is None and self.output_tokens is None
        if not (neither if self.lengths_file is not None else either):
            raise ValueError("give prompt_tokens and output_tokens, or lengths_file in their place")
        if not 0 <= self.token_ids[0] < self.token_ids[1]:
            raise ValueError("token_ids: the first is not below the second")
        return self


@plain(frozen=True, slots=True)
class Request:
    """One request of a plan. `due` is seconds from the start, None in a closed loop; `adapter` None is the base."""

    index: int
    due: float | None
    adapter: int | None
    prompt_tokens: int
    output_tokens: int
    seed: int
    token_ids: tuple[int, int] = TOKEN_IDS

    def prompt(self) -> list[int]:
        """Random token ids, of which no other request has the same, so that no prefix cache helps."""
        rng = np.random.default_rng((self.seed, self.index))
        ids: list[int] = rng.integers(*self.token_ids, self.prompt_tokens).tolist()
        return ids


def load(name: str) -> Workload:
    """A shipped workload by its name, or one from a `.toml` or `.json` file. Raises BadWorkload."""
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        path = FOLDER / f"{name}.toml"
        if not path.is_file():
            raise BadWorkload(f"no workload {name!r}; there are {', '.join(shipped())}, or give a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as fault:
        raise BadWorkload(f"{path.name}: {fault}") from None
    workload = parse(data, path.name)
    if workload.lengths_file is not None:
        return change(workload, lengths_file=str(path.parent / workload.lengths_file))
    return workload


def parse(data: Any, where: str = "workload") -> Workload:
    """Checks what was read. Raises BadWorkload with one line for each field at fault."""
    try:
        return TypeAdapter(Workload).validate_json(json.dumps(data))
    except ValidationError as fault:
        raise _told(fault, where) from None


def change(workload: Workload, **fields: Any) -> Workload:
    """The same with other values. Raises BadWorkload."""
    try:
        return replace(workload, **fields)
    except ValidationError as fault:
        raise _told(fault, "options") from None


def shipped() -> list[str]:
    """Names of the workloads beside this module."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def plan(workload: Workload) -> list[Request]:
    """Every request of a workload, in the order of sending. Each aspect has a generator of its own: a plan of more
    requests begins with the same ones. Raises BadWorkload when the file of lengths cannot be read.
    """
    adapters, times, prompts, outputs = (
        np.random.default_rng(one) for one in np.random.SeedSequence(workload.seed).spawn(4)
    )
    count = workload.requests
    if workload.prompt_tokens is not None and workload.output_tokens is not None:
        lengths = list(
            zip(workload.prompt_tokens.draw(prompts, count), workload.output_tokens.draw(outputs, count), strict=True)
        )
    else:
        lengths = _from_file(Path(workload.lengths_file or ""), count)
    chosen: list[int | None] = [None] * count
    if workload.adapters:
        chosen = workload.popularity.draw(adapters, workload.adapters, count).tolist()
    due = workload.arrivals.due(times, count)
    return [Request(at, due[at], chosen[at], *lengths[at], workload.seed, workload.token_ids) for at in range(count)]


def warm(workload: Workload) -> list[Request]:
    """The short requests before: they bring the likeliest adapters to the device and wake the server up."""
    number = [at % workload.adapters if workload.adapters else None for at in range(workload.warmup)]
    return [Request(at, None, number[at], 8, 2, workload.seed + 1, workload.token_ids) for at in range(workload.warmup)]


def streams(workload: Workload) -> int | None:
    """Requests open at a time in a closed loop; None where requests have times of their own."""
    return None if isinstance(workload.arrivals, Gamma) else workload.arrivals.streams


def _from_file(path: Path, count: int) -> list[tuple[int, int]]:
    try:
        pairs = read_pairs(path)
    except (OSError, ValueError) as fault:
        raise BadWorkload(f"lengths_file: {fault}") from None
    return [pairs[at % len(pairs)] for at in range(count)]


def _told(fault: ValidationError, where: str) -> BadWorkload:
    lines = [
        f"{where}: {'.'.join(map(str, one['loc'])) or 'as a whole'}: {one['msg'].removeprefix('Value error, ')}"
        for one in fault.errors()
    ]
    return BadWorkload("\n".join(lines))
