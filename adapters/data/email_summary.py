"""E-mails with a one-line summary."""

import random

from adapters.data import core
from adapters.data.core import Example, Slots
from adapters.data.email_templates import HELDOUT_SCENARIOS, NOISE, SCENARIOS, VOCABS, Scenario

INSTRUCTION = "Summarise this e-mail in one line."

OPENERS = ("Hi {reader},", "Dear {reader},", "Hello {reader},", "{reader},", "Good morning {reader},", "Hi all,")
GREETINGS = (
    "I hope you are well.", "Hope you had a good weekend.", "Thanks for the call earlier.", "Just a quick note.",
    "Sorry for the late message.", "It was good to see you last week.", "Quick one from me.", "I'll keep this short.",
)  # fmt: skip
CLOSERS = ("Best,", "Kind regards,", "Thanks,", "Cheers,", "Many thanks,", "Best wishes,", "See you,")


def _choose(rng: random.Random, heldout: bool) -> tuple[Scenario, str, bool]:
    """A scenario, one of its wordings, and whether training may see that wording."""
    if not heldout or rng.random() < 0.5:
        scenario = rng.choice(SCENARIOS)
        return scenario, rng.choice(scenario.bodies), True
    if rng.random() < 0.5:
        scenario = rng.choice(SCENARIOS)
        return scenario, rng.choice(scenario.heldout_bodies), False
    scenario = rng.choice(HELDOUT_SCENARIOS)
    return scenario, rng.choice(scenario.heldout_bodies), False


def _make(rng: random.Random, heldout: bool) -> Example:
    scenario, body, seen = _choose(rng, heldout)
    slots = Slots(rng, VOCABS, heldout)
    noise = core.maybe(rng, NOISE.pool(heldout), 0.5)
    before, after = ("", noise) if rng.random() < 0.6 else (noise, "")
    paragraph = core.join(core.maybe(rng, GREETINGS, 0.5), before, slots.fill(body), after)
    subject = f"Subject: {slots.fill(rng.choice(scenario.subjects))}\n\n" if rng.random() < 0.6 else ""
    opener = rng.choice(OPENERS).format_map(slots)
    text = f"{subject}{opener}\n\n{paragraph}\n\n{rng.choice(CLOSERS)}\n{slots['name']}"
    return Example(text, slots.fill(scenario.summary), seen)


def examples(count: int, seed: int, heldout: bool) -> list[Example]:
    """Distinct e-mails with their summaries."""
    return core.build(_make, count, seed, heldout)
