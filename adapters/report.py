"""The generated parts of `adapters/README.md`: held-out table, training table and examples."""

import json
import re
from typing import Any

from adapters.specs import ROOT, SPECS, Spec

RESULTS = ROOT / "results.json"
README = ROOT / "README.md"

METRICS = {
    "rouge_l": "ROUGE-L",
    "exact": "same as reference",
    "valid_json": "valid JSON",
    "field_accuracy": "fields right",
    "record_accuracy": "records right",
    "accuracy": "exact label",
    "label_mentioned": "only right label mentioned",
    "plain_words": "no stilted or rude word",
    "figures_kept": "figures kept",
}


def read_results() -> dict[str, Any]:
    """What the evaluation has found so far."""
    if not RESULTS.exists():
        return {}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def _percent(scores: dict[str, dict[str, float]], group: str, metric: str) -> str:
    return f"{100 * scores[group][metric]:.1f}" if group in scores else "-"


def heldout_table(results: dict[str, Any]) -> str:
    """Base against adapter, metric by metric, in percent."""
    lines = [
        "| adapter | held-out examples | metric (%) | base | adapter | adapter, known wording | adapter, new wording |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        base, adapter = result["base"]["scores"], result["adapter"]["scores"]
        for metric in adapter["all"]:
            cells = [_percent(adapter, group, metric) for group in ("known_wording", "new_wording")]
            lines.append(
                f"| {name} | {result['adapter']['heldout']} | {METRICS[metric]} | {_percent(base, 'all', metric)} "
                f"| **{_percent(adapter, 'all', metric)}** | {cells[0]} | {cells[1]} |"
            )
    return "\n".join(lines)


def _training_row(spec: Spec) -> str:
    notes = json.loads((spec.folder / "training.json").read_text(encoding="utf-8"))
    size = (spec.folder / "adapter_model.safetensors").stat().st_size / 1e6
    targets = "all linear layers" if "up_proj" in spec.targets else "attention (q, k, v, o)"
    scaling = "alpha / sqrt(r)" if spec.use_rslora else "alpha / r"
    return (
        f"| {spec.name} | {spec.rank} | {spec.alpha} | {scaling} | {targets} | {size:.2f} MB | {notes['examples']} "
        f"| {notes['steps']} | {notes['seconds']} | {notes['final_loss']:.4f} |"
    )


def training_table() -> str:
    """Shape, size and training of each adapter."""
    lines = [
        "| adapter | r | alpha | scaling | targets | size | examples | steps | seconds | final loss |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join(lines + [_training_row(spec) for spec in SPECS.values()])


def _quoted(text: str) -> str:
    return f"```text\n{text}\n```"


def examples(results: dict[str, Any]) -> str:
    """The demo question of each adapter with both answers."""
    parts = []
    for name, result in results.items():
        demo = json.loads((SPECS[name].folder / "demo.json").read_text(encoding="utf-8"))
        parts += [
            f"### {name}",
            _quoted(demo["messages"][0]["content"]),
            f"Base (at most {demo['max_tokens']} tokens):",
            _quoted(result["base"]["demo_answer"]),
            "Adapter:",
            _quoted(result["adapter"]["demo_answer"]),
        ]
    return "\n\n".join(parts)


def _replace(page: str, marker: str, content: str) -> str:
    start, end = f"<!-- {marker}:start -->", f"<!-- {marker}:end -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", page)


def refresh() -> None:
    """Write the current results into the README."""
    found = read_results()
    results = {name: found[name] for name in SPECS if name in found}
    page = README.read_text(encoding="utf-8")
    page = _replace(page, "heldout", heldout_table(results))
    page = _replace(page, "training", training_table())
    page = _replace(page, "examples", examples(results))
    README.write_text(page, encoding="utf-8")
