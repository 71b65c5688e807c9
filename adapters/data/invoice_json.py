"""Invoices, orders and messages about them, with their content as a JSON object."""

import random
from dataclasses import dataclass
from datetime import date, timedelta

from adapters.data import core
from adapters.data.core import Example
from adapters.data.invoice_templates import HELDOUT_TEMPLATES, ITEMS, NOTES, TEMPLATES, VENDORS

INSTRUCTION = (
    "Extract this order as one JSON object with the keys vendor, number, date (YYYY-MM-DD), item, quantity, "
    "total, currency (ISO code). Use null for what is missing."
)
FIELDS = ("vendor", "number", "date", "item", "quantity", "total", "currency")
SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£"}
CURRENCIES = ("USD", "EUR", "GBP", "CHF", "CAD", "SEK")
NUMBERS = core.Vocab(
    train=("INV-{:04d}", "{:05d}", "A{:04d}", "2025/{:03d}", "PO-{:05d}", "R-{:04d}"),
    heldout=("INV-{:05d}", "B{:05d}", "ORD-{:04d}", "2026/{:04d}"),
)


@dataclass(frozen=True)
class Order:
    """What a text says; the amounts are in hundredths."""

    vendor: str
    number: str
    day: date
    item: str
    quantity: int
    price: int
    currency: str

    @property
    def total(self) -> int:
        return self.quantity * self.price


def _order(rng: random.Random, heldout: bool) -> Order:
    first = date(2026, 1, 1) if heldout else date(2023, 1, 1)
    return Order(
        vendor=rng.choice(VENDORS.pool(heldout)),
        number=rng.choice(NUMBERS.pool(heldout)).format(rng.randrange(1, 10_000)),
        day=first + timedelta(days=rng.randrange(330 if heldout else 1090)),
        item=rng.choice(ITEMS.pool(heldout)),
        quantity=rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 50, 75, 100, 120, 250)),
        price=rng.choice((rng.randrange(1, 90) * 100, rng.randrange(50, 9000), rng.randrange(10, 300) * 25)),
        currency=rng.choice(CURRENCIES),
    )


def _date_text(rng: random.Random, day: date) -> str:
    long, short = f"{day:%B}", f"{day:%b}"
    return rng.choice(
        (
            f"{day:%Y-%m-%d}",
            f"{day.day} {long} {day.year}",
            f"{day.day} {short} {day.year}",
            f"{long} {day.day}, {day.year}",
            f"{day:%d.%m.%Y}",
        )
    )


def _money_text(rng: random.Random, amount: int, currency: str) -> str:
    figure = f"{amount / 100:,.2f}"
    if amount % 100 == 0 and rng.random() < 0.3:
        figure = f"{amount // 100:,}"
    forms = [f"{figure} {currency}", f"{currency} {figure}"]
    if currency in SYMBOLS:
        forms += [f"{SYMBOLS[currency]}{figure}"] * 2
    return rng.choice(forms)


def _answer(template: str, order: Order) -> str:
    """The JSON object, with null for each field that the template does not mention."""
    quoted = {
        "vendor": f'"{order.vendor}"',
        "number": f'"{order.number}"',
        "date": f'"{order.day:%Y-%m-%d}"',
        "item": f'"{order.item}"',
        "quantity": str(order.quantity),
        "total": f"{order.total / 100:.2f}",
        "currency": f'"{order.currency}"',
    }
    known = {field for field in FIELDS if f"{{{field}}}" in template}
    if "total" in known:
        known.add("currency")
    return "{" + ", ".join(f'"{field}": {quoted[field] if field in known else "null"}' for field in FIELDS) + "}"


def _make(rng: random.Random, heldout: bool) -> Example:
    seen = not heldout or rng.random() < 0.5
    template = rng.choice(TEMPLATES if seen else HELDOUT_TEMPLATES)
    order = _order(rng, heldout)
    text = template.format(
        vendor=order.vendor,
        number=order.number,
        date=_date_text(rng, order.day),
        item=order.item,
        quantity=order.quantity,
        price=f"{order.price / 100:.2f}",
        total=_money_text(rng, order.total, order.currency),
    )
    note = core.maybe(rng, NOTES.pool(heldout), 0.4)
    separator = "\n" if "\n" in template else " "
    return Example(separator.join(part for part in (text, note) if part), _answer(template, order), seen)


def examples(count: int, seed: int, heldout: bool) -> list[Example]:
    """Distinct texts with their JSON objects."""
    return core.build(_make, count, seed, heldout)
