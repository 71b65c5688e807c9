"""Train one adapter or all of them: `python -m adapters.train email-summary|all [--base DIR]`."""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from adapters.modeling import LanguageModel, encode_answer, encode_prompt, load_base, resolve_base
from adapters.specs import BASE_ID, SEED, SPECS, Spec

WARMUP = 0.06
Pair = tuple[list[int], list[int]]


def encode(spec: Spec, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The training examples as prompt tokens and answer tokens."""
    return [
        (encode_prompt(tokenizer, spec.messages(example.text)), encode_answer(tokenizer, example.answer))
        for example in spec.examples(heldout=False)
    ]


def batches(pairs: list[Pair], spec: Spec) -> list[list[Pair]]:
    """Shuffled batches of examples of similar length, for all epochs."""
    rng = random.Random(SEED)
    found: list[list[Pair]] = []
    for _ in range(spec.epochs):
        ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]) + rng.random())
        epoch = [ordered[start : start + spec.batch_size] for start in range(0, len(ordered), spec.batch_size)]
        rng.shuffle(epoch)
        found += epoch
    return found


def loss_of(model: LanguageModel, batch: list[Pair], pad: int) -> torch.Tensor:
    """Cross entropy over the answer tokens; only their positions go through the output layer."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    tokens = torch.full((len(batch), width), pad)
    is_answer = torch.zeros((len(batch), width), dtype=torch.bool)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        is_answer[row, len(prompt) : end] = True
    language_model = model.get_base_model()
    hidden = language_model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    logits = language_model.lm_head(hidden[:, :-1][is_answer[:, 1:]])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][is_answer[:, 1:]])


def rate_at(step: int, total: int) -> float:
    """Share of the full learning rate: linear warm-up, then half a cosine."""
    warmup = max(1, int(total * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def fit(model: LanguageModel, pairs: list[Pair], spec: Spec, pad: int) -> list[float]:
    """Train the adapter in place; the loss of every step."""
    planned = batches(pairs, spec)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, len(planned)))
    losses: list[float] = []
    for batch in track(planned, description=spec.name):
        loss = loss_of(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def store(model: LanguageModel, spec: Spec) -> None:
    """Save configuration and float16 weights, without the generated model card."""
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    model.save_pretrained(str(spec.folder))
    (spec.folder / "README.md").unlink(missing_ok=True)
    path = spec.folder / "adapter_model.safetensors"
    halves = {name: weight.to(torch.float16).contiguous() for name, weight in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})


def train(spec: Spec, base: Path) -> None:
    """Train and store one adapter together with a note on how the training went."""
    torch.manual_seed(SEED)
    model, tokenizer = load_base(base, torch.bfloat16)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        use_rslora=spec.use_rslora,
        lora_dropout=0.0,
        bias="none",
    )
    adapted = get_peft_model(model, config)
    pairs = encode(spec, tokenizer)
    start = time.perf_counter()
    losses = fit(adapted, pairs, spec, tokenizer.pad_token_id)
    seconds = round(time.perf_counter() - start)
    store(adapted, spec)
    last = losses[-20:]
    notes = {
        "examples": len(pairs),
        "steps": len(losses),
        "seconds": seconds,
        "final_loss": round(sum(last) / len(last), 4),
    }
    (spec.folder / "training.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    print(spec.name, notes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*SPECS, "all"])
    parser.add_argument("--base", type=Path, default=None, help="directory of the base model")
    arguments = parser.parse_args()
    base = resolve_base(arguments.base)
    for spec in SPECS.values() if arguments.name == "all" else [SPECS[arguments.name]]:
        train(spec, base)


if __name__ == "__main__":
    main()
