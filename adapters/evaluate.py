"""Examine base and stored adapters: `python -m adapters.evaluate email-summary|all [--base DIR]`.

Writes `adapters/results.json` and refreshes the tables and examples of `adapters/README.md`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapters.data.core import Example
from adapters.metrics import SCORERS
from adapters.modeling import LanguageModel, answer_all, encode_prompt, generate, load_base, resolve_base
from adapters.report import RESULTS, read_results, refresh
from adapters.specs import SPECS, Spec


def scores(spec: Spec, examples: list[Example], answers: list[str]) -> dict[str, dict[str, float]]:
    """The metrics over all examples and over those whose wording training has and has not seen."""
    numbered = list(enumerate(examples))
    groups = {
        "all": [index for index, _ in numbered],
        "known_wording": [index for index, example in numbered if example.seen_template],
        "new_wording": [index for index, example in numbered if not example.seen_template],
    }
    return {
        group: {
            metric: round(value, 4)
            for metric, value in SCORERS[spec.name](
                [examples[index].text for index in chosen],
                [answers[index] for index in chosen],
                [examples[index].answer for index in chosen],
            ).items()
        }
        for group, chosen in groups.items()
        if chosen
    }


def heldout(spec: Spec) -> list[Example]:
    """The held-out examples, less any whose text also occurs in training."""
    known = {example.text for example in spec.examples(heldout=False)}
    return [example for example in spec.examples(heldout=True) if example.text not in known]


def examine(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, spec: Spec) -> dict[str, Any]:
    """Scores on the held-out examples, the seconds they took, and the answer to the demo question."""
    examples = heldout(spec)
    start = time.perf_counter()
    answers = answer_all(model, tokenizer, spec, [example.text for example in examples])
    seconds = round(time.perf_counter() - start)
    demo = json.loads((spec.folder / "demo.json").read_text(encoding="utf-8"))
    prompt = encode_prompt(tokenizer, demo["messages"])
    return {
        "heldout": len(examples),
        "seconds": seconds,
        "scores": scores(spec, examples, answers),
        "demo_answer": generate(model, tokenizer, [prompt], demo["max_tokens"])[0],
    }


def evaluate(spec: Spec, base: Path) -> dict[str, Any]:
    """The base and the adapter, read from its stored weights, on the same questions in float32."""
    model, tokenizer = load_base(base, torch.float32)
    alone = examine(model, tokenizer, spec)
    adapted = PeftModel.from_pretrained(model, str(spec.folder)).eval()
    return {"base": alone, "adapter": examine(adapted, tokenizer, spec)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*SPECS, "all"])
    parser.add_argument("--base", type=Path, default=None, help="directory of the base model")
    arguments = parser.parse_args()
    base = resolve_base(arguments.base)
    for spec in SPECS.values() if arguments.name == "all" else [SPECS[arguments.name]]:
        results = read_results()
        results[spec.name] = evaluate(spec, base)
        RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(results[spec.name], indent=2, ensure_ascii=False))
    refresh()


if __name__ == "__main__":
    main()
