"""Loading the base, turning chats into tokens and answering them in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from adapters.specs import Spec

THREADS = 2
# The libraries' own annotations do not cover generation and wrapped models.
LanguageModel = Any


def resolve_base(base: Path | None) -> Path:
    """The directory of the base model: the given one, or the one that the server unpacks."""
    if base is not None:
        return base
    from server.model.bundled import materialise

    return materialise()


def load_base(base: Path, dtype: torch.dtype) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """The base model, frozen by being in evaluation mode, and its tokenizer."""
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    return model, tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a chat, up to the point where the answer starts."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The tokens of an answer with the one that ends it."""
    return list(tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"])


def answer_all(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, spec: Spec, texts: Sequence[str], batch_size: int = 25
) -> list[str]:
    """Greedy answers to the adapter's question about each text."""
    prompts = [encode_prompt(tokenizer, spec.messages(text)) for text in texts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = generate(model, tokenizer, [prompts[index] for index in chosen], spec.max_new_tokens)
        for index, answer in zip(chosen, found, strict=True):
            answers[index] = answer
    return answers


def generate(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of the prompts, without special tokens."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    fresh = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]
