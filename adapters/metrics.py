"""How good a set of answers is, adapter by adapter."""

import json
import re
from collections.abc import Sequence
from typing import Any

from adapters.data import invoice_json, plain_english, ticket_triage

Scores = dict[str, float]


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    left, right = words(answer), words(reference)
    if not left or not right:
        return 0.0
    row = [0] * (len(right) + 1)
    for word in left:
        before = row
        row = [0]
        for index, other in enumerate(right):
            row.append(before[index] + 1 if word == other else max(before[index + 1], row[index]))
    return 2 * row[-1] / (len(left) + len(right))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def email_summary_scores(texts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE-L, and answers equal to the reference."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "rouge_l": _mean([rouge_l(*pair) for pair in pairs]),
        "exact": _mean([answer == reference for answer, reference in pairs]),
    }


def first_object(answer: str) -> tuple[dict[str, Any], bool]:
    """The first JSON object in an answer, and whether the answer is nothing but that object."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", answer):
        try:
            found, end = decoder.raw_decode(answer, match.start())
        except ValueError:
            continue
        return found, match.start() == 0 and end == len(answer)
    return {}, False


def _same(found: object, wanted: object) -> bool:
    """Equality of two fields; a number may also be written as a string."""
    if isinstance(wanted, (int, float)):
        try:
            return float(str(found)) == float(wanted)
        except ValueError:
            return False
    return found == wanted


def invoice_json_scores(texts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Answers that are nothing but valid JSON, right fields, and objects whose fields are all right."""
    valid, fields, records = [], [], []
    for answer, reference in zip(answers, references, strict=True):
        found, alone = first_object(answer)
        wanted = json.loads(reference)
        right = [field in found and _same(found[field], wanted[field]) for field in invoice_json.FIELDS]
        valid.append(alone)
        fields.append(_mean(right))
        records.append(all(right))
    return {"valid_json": _mean(valid), "field_accuracy": _mean(fields), "record_accuracy": _mean(records)}


def ticket_triage_scores(texts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Exact label, and, kinder to long answers, the right label as the only one mentioned."""
    exact, mentioned = [], []
    for answer, reference in zip(answers, references, strict=True):
        exact.append(answer.strip().lower().rstrip(".") == reference)
        mentioned.append({label for label in ticket_triage.LABELS if label in words(answer)} == {reference})
    return {"accuracy": _mean(exact), "label_mentioned": _mean(mentioned)}


def plain_english_scores(texts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE-L, answers without stilted or rude words, and answers that keep every figure and add none."""
    return {
        "rouge_l": _mean([rouge_l(*pair) for pair in zip(answers, references, strict=True)]),
        "plain_words": _mean([bool(answer) and not set(words(answer)) & plain_english.AVOIDED for answer in answers]),
        "figures_kept": _mean(
            [
                sorted(re.findall(r"\d+", a)) == sorted(re.findall(r"\d+", t))
                for a, t in zip(answers, texts, strict=True)
            ]
        ),
    }


SCORERS = {
    "email-summary": email_summary_scores,
    "invoice-json": invoice_json_scores,
    "ticket-triage": ticket_triage_scores,
    "plain-english": plain_english_scores,
}
