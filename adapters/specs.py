"""What each adapter is: its rank, its target modules and its training settings."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from adapters.data import email_summary, invoice_json, plain_english, ticket_triage
from adapters.data.core import Example

ROOT = Path(__file__).resolve().parent
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SEED = 20


@dataclass(frozen=True)
class Spec:
    """One adapter and how to train and examine it."""

    name: str
    generator: ModuleType
    rank: int
    alpha: int
    targets: tuple[str, ...]
    max_new_tokens: int
    use_rslora: bool = False
    learning_rate: float = 1e-3
    train_examples: int = 960
    heldout_examples: int = 90
    epochs: int = 1
    batch_size: int = 8

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def instruction(self) -> str:
        return str(self.generator.INSTRUCTION)

    def examples(self, heldout: bool) -> list[Example]:
        """The training or the held-out examples, always the same ones."""
        count = self.heldout_examples if heldout else self.train_examples
        found: list[Example] = self.generator.examples(count, SEED, heldout)
        return found

    def messages(self, text: str) -> list[dict[str, str]]:
        """The chat that asks base and adapter alike."""
        return [{"role": "user", "content": f"{self.instruction}\n\n{text}"}]


SPECS = {
    spec.name: spec
    for spec in (
        Spec("email-summary", email_summary, rank=8, alpha=16, targets=ALL_LINEAR, max_new_tokens=48),
        Spec(
            "invoice-json",
            invoice_json,
            rank=16,
            alpha=32,
            targets=ATTENTION,
            max_new_tokens=160,
            train_examples=760,
        ),
        Spec(
            "ticket-triage", ticket_triage, rank=8, alpha=16, targets=ATTENTION, max_new_tokens=24, train_examples=800
        ),
        Spec(
            "plain-english",
            plain_english,
            rank=4,
            alpha=8,
            targets=ALL_LINEAR,
            max_new_tokens=64,
            use_rslora=True,
            train_examples=800,
        ),
    )
}
