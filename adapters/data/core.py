"""Shared pieces of the generators: examples, vocabularies and slot filling."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Pool = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One question (without the instruction) and its reference answer."""

    text: str
    answer: str
    seen_template: bool = True


@dataclass(frozen=True)
class Vocab:
    """Values of a slot: `train` ones for training, `heldout` ones never seen in it."""

    train: Pool
    heldout: Pool

    def pool(self, heldout: bool) -> Pool:
        return self.heldout if heldout else self.train


class Slots(dict[str, str]):
    """Slot values drawn on first use, so that a text and its answer agree.

    A trailing digit asks for another value of the same kind: `{day2}` differs from `{day}`.
    """

    def __init__(self, rng: random.Random, vocabs: Mapping[str, Vocab], heldout: bool) -> None:
        super().__init__()
        self._rng, self._vocabs, self._heldout = rng, vocabs, heldout

    def __missing__(self, key: str) -> str:
        pool = self._vocabs[key.rstrip("0123456789")].pool(self._heldout)
        used = set(self.values())
        self[key] = self._rng.choice([value for value in pool if value not in used])
        return self[key]

    def fill(self, template: str) -> str:
        """The template with its slots replaced and its first letter in upper case."""
        text = template.format_map(self)
        return text[:1].upper() + text[1:]


def maybe(rng: random.Random, pool: Pool, probability: float) -> str:
    """An element of the pool with the given probability, otherwise nothing."""
    return rng.choice(pool) if rng.random() < probability else ""


def join(*parts: str) -> str:
    """The parts that are not empty, separated by spaces."""
    return " ".join(part for part in parts if part)


def build(make: Callable[[random.Random, bool], Example], count: int, seed: int, heldout: bool) -> list[Example]:
    """`count` examples with distinct texts, the same ones for the same seed."""
    rng = random.Random(f"{seed}-{'heldout' if heldout else 'train'}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = make(rng, heldout)
        found.setdefault(example.text, example)
    return list(found.values())
