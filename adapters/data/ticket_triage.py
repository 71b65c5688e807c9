"""Support tickets with the one label that says who should answer them."""

import random

from adapters.data import core
from adapters.data.core import Example, Slots
from adapters.data.ticket_templates import ASIDES, HELDOUT_TICKETS, TICKETS, VOCABS

INSTRUCTION = (
    "Classify this support ticket as one of: billing, bug, account, shipping, feature, other. "
    "Answer with the label only."
)
LABELS = tuple(TICKETS)

OPENERS = (
    "Hi,", "Hello,", "Hello team,", "Dear support,", "Hey there,", "Good morning,", "To whom it may concern,",
    "Hi all,",
)  # fmt: skip
CLOSERS = (
    "Thanks!", "Please advise.", "Best, {name}", "Looking forward to your answer.", "Kind regards, {name}", "Cheers",
    "Can you help?", "{name}",
)  # fmt: skip


def _make(rng: random.Random, heldout: bool) -> Example:
    label = rng.choice(LABELS)
    slots = Slots(rng, VOCABS, heldout)
    core_text = slots.fill(rng.choice((HELDOUT_TICKETS if heldout else TICKETS)[label]))
    aside = slots.fill(core.maybe(rng, ASIDES.pool(heldout), 0.45))
    opener = core.maybe(rng, OPENERS, 0.5)
    closer = core.maybe(rng, CLOSERS, 0.5).format_map(slots)
    body = (core_text, aside) if rng.random() < 0.6 else (aside, core_text)
    return Example(core.join(opener, *body, closer), label, seen_template=not heldout)


def examples(count: int, seed: int, heldout: bool) -> list[Example]:
    """Distinct tickets with their labels."""
    return core.build(_make, count, seed, heldout)
