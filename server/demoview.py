"""What `make demo` shows: questions and answers with their cost, and each tenant's bill."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

Answers = dict[tuple[str, str | None], dict[str, Any]]  # by the question's adapter and by who answered (None: the base)
QUESTION_CHARS, ANSWER_CHARS = 240, 280  # shown of each


def answers_table(asked: list[tuple[str, str]], answers: Answers, whose: dict[str, str]) -> Table:
    """Two rows a question (its adapter, its text): what the base says, what the adapter says. `whose` is the tenant."""
    shown = Table(title="The same question to the base and to its adapter", title_justify="left", expand=True)
    shown.caption, shown.caption_justify = "tokens: prompt + answer; cost: micro-dollars", "left"
    shown.add_column("tenant", no_wrap=True)
    for name, ratio in (("question", 7), ("answer", 9)):
        shown.add_column(name, ratio=ratio, overflow="fold")
    for name in ("adapter", "lane"):
        shown.add_column(name, no_wrap=True)
    for name in ("tokens", "cost"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, text in asked:
        for adapter in (None, name):
            body = answers[name, adapter]
            usage = body["usage"]
            shown.add_row(
                whose[name],
                Text(shorten(text, QUESTION_CHARS) if adapter is None else "(the same question)"),
                Text(shorten(body["choices"][0]["text"], ANSWER_CHARS)),
                Text(adapter or "(base)"),
                body["adapter"]["lane"],
                f"{usage['prompt_tokens']} + {usage['completion_tokens']}",
                str(usage["cost_microusd"]),
                end_section=adapter is not None,
            )
    return shown


def bill_table(invoice: dict[str, Any]) -> Table:
    """A line for each adapter and kind of charge, and their sum."""
    title = f"{invoice['tenant']}'s bill of {invoice['month']}"
    shown = Table(title=title, title_justify="left", show_footer=True)
    shown.add_column("adapter", f"{invoice['requests']} requests")
    shown.add_column("kind")
    shown.add_column("quantity", f"{invoice['total']} {invoice['currency']}", justify="right")
    shown.add_column("micro-dollars", str(invoice["total_microusd"]), justify="right")
    for line in invoice["lines"]:
        quantity = f"{line['quantity']} {line['unit']}"
        shown.add_row(Text(line["adapter"] or "the base"), line["kind"], quantity, str(line["amount_microusd"]))
    return shown


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters, cut between words."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rsplit(" ", 1)[0] + "…"
