"""Stilted or rude messages with a plain and polite version."""

import random

from adapters.data import core
from adapters.data.core import Example, Slots
from adapters.data.plain_templates import (
    FORMAL,
    FORMAL_TAILS,
    HELDOUT_FORMAL,
    HELDOUT_RUDE,
    RUDE,
    RUDE_TAILS,
    VOCABS,
    Pair,
)

INSTRUCTION = "Rewrite this in plain, polite English."

_STILTED = """
    hereby herewith aforementioned thereof therein hereinafter pursuant notwithstanding forthwith commence
    commencement terminate endeavour undersigned remit furnish utilise utilize prior subsequent heretofore hitherto
    aforesaid shall inasmuch deemed expedite ascertain acceded possession prohibited mandatory lodged obliged
    effected vacated incumbent refrain
"""
_RUDE = """
    slobs junk awful filthy sick dare wasting damn hell idiot idiots stupid crap rubbish pathetic moron useless
    ridiculous shut dumb lazy clueless bloody nonsense
"""
AVOIDED = frozenset(_STILTED.split() + _RUDE.split())


def _choose(rng: random.Random, heldout: bool) -> tuple[Pair, Pair, bool]:
    """The pair for the main sentence, the one for the sentence after it, and whether training sees the former."""
    seen = not heldout or rng.random() < 0.4
    if rng.random() < 0.6:
        return rng.choice(FORMAL if seen else HELDOUT_FORMAL), rng.choice(FORMAL_TAILS), seen
    return rng.choice(RUDE if seen else HELDOUT_RUDE), rng.choice(RUDE_TAILS), seen


def _make(rng: random.Random, heldout: bool) -> Example:
    main, tail, seen = _choose(rng, heldout)
    pairs = [main, tail] if rng.random() < 0.5 else [main]
    slots = Slots(rng, VOCABS, heldout)
    text, answer = (" ".join(slots.fill(pair[side]) for pair in pairs) for side in (0, 1))
    return Example(text, answer, seen)


def examples(count: int, seed: int, heldout: bool) -> list[Example]:
    """Distinct messages with their plain versions."""
    return core.build(_make, count, seed, heldout)
