"""Chooses the next token of every row at once.

A row's random number is a function of its seed, its index among the request's answers and the token's position, and
of nothing else: what else is in the batch, or a preemption in between, does not change which number it draws.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.messages import Sampling, TokenLogprob

_FIRST_LOOK = 1024  # likeliest tokens that top_p is tried on before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class Row:
    """What choosing one token needs to know: `tokens` is prompt then output, of which `prompt` are the prompt."""

    sampling: Sampling
    index: int
    tokens: list[int]
    prompt: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen for a row. Not `finite`: the row's logits were NaN or infinite and the token means nothing."""

    token: int
    finite: bool
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, rows: Seq[Row]) -> list[Choice]:
    """logits [rows, vocabulary], float32 -> one choice a row."""
    raw = logits
    if any(_penalised(row.sampling) for row in rows):
        logits = logits.clone()
        _penalise(logits, rows)
    best = logits.argmax(-1)
    # A NaN wins argmax, so the best value tells whether any value of the row was NaN or +inf (or all were -inf).
    finite = torch.isfinite(logits.gather(1, best[:, None])[:, 0]).tolist()
    tokens = best.tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    if drawn:
        picked = _draw(logits[drawn] if len(drawn) < len(rows) else logits, [rows[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[i] = token
    logprobs = _logprobs(raw, rows, tokens)
    return [Choice(*one) for one in zip(tokens, finite, logprobs, strict=True)]


def uniform(seeds: np.ndarray, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row from (seed, index, position), by SplitMix64 (Steele et al. 2014)."""
    state = _mix(_mix(_mix(seeds.astype(np.uint64)) + indices.astype(np.uint64)) + positions.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _penalised(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def _penalise(logits: torch.Tensor, rows: Seq[Row]) -> None:
    """In place. Repetition: over prompt and output (Keskar et al. 2019); presence and frequency: over the output."""
    for i, row in enumerate(rows):
        s = row.sampling
        if s.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(np.asarray(row.tokens, dtype=np.int64))).to(logits.device)
            values = logits[i, seen]
            penalty = s.repetition_penalty
            logits[i, seen] = torch.where(values < 0, values * penalty, values / penalty)
        output = row.tokens[row.prompt :]
        if output and (s.presence_penalty or s.frequency_penalty):
            ids, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
            cost = torch.from_numpy(s.presence_penalty + s.frequency_penalty * counts)
            logits[i, torch.from_numpy(ids).to(logits.device)] -= cost.to(logits)


def _draw(logits: torch.Tensor, rows: Seq[Row]) -> list[int]:
    """Temperature, then top_k, top_p and min_p (the order of transformers), then one draw a row."""
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=logits.device)
    temperature.clamp_(min=torch.finfo(torch.float32).tiny)
    # The difference to the best is what counts, and keeps a tiny temperature from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    numbers = uniform(
        np.array([row.sampling.seed for row in rows], dtype=np.uint64),
        np.array([row.index for row in rows]),
        np.array([len(row.tokens) for row in rows]),
    )
    u = torch.from_numpy(numbers).to(logits.device)
    narrow = [i for i, row in enumerate(rows) if row.sampling.top_k > 0 or row.sampling.top_p < 1]
    wide = sorted(set(range(len(rows))) - set(narrow))
    tokens = [0] * len(rows)
    for part, order in ((narrow, True), (wide, False)):
        if part:
            chosen = (_draw_sorted if order else _draw_plain)(scaled[part], u[part], [rows[i].sampling for i in part])
            for i, token in zip(part, chosen.tolist(), strict=True):
                tokens[i] = token
    return tokens


def _draw_plain(scaled: torch.Tensor, u: torch.Tensor, settings: Seq[Sampling]) -> torch.Tensor:
    return _invert(_min_p(scaled.exp(), settings), u)


def _draw_sorted(scaled: torch.Tensor, u: torch.Tensor, settings: Seq[Sampling]) -> torch.Tensor:
    """Rows with top_k or top_p: the least value that stays is found from the likeliest down, through part of the
    vocabulary where it is enough; then all below it is hidden. Equal values stay or go together, as in
    transformers' top_k: how a sort orders them depends on what else is in the batch, and a choice must not."""
    vocabulary = scaled.shape[1]
    top_k = torch.tensor([min(s.top_k or vocabulary, vocabulary) for s in settings], device=scaled.device)
    top_p = torch.tensor([s.top_p for s in settings], device=scaled.device, dtype=torch.float64)
    size = min(vocabulary, max(min(s.top_k or _FIRST_LOOK, vocabulary) for s in settings))
    values = scaled.topk(size, dim=-1).values
    total = scaled.exp().sum(-1, dtype=torch.float64)
    if size < vocabulary and bool(((top_k > size) & (values.exp().sum(-1, dtype=torch.float64) < top_p * total)).any()):
        values = scaled.sort(dim=-1, descending=True).values
    weights = values.exp().to(torch.float64)
    ranks = torch.arange(values.shape[1], device=scaled.device)
    weights = weights.masked_fill(ranks[None] >= top_k[:, None], 0)
    total = torch.where(top_k < vocabulary, weights.sum(-1), total)
    before = weights.cumsum(-1) - weights  # a token stays while what lies before it has not reached top_p
    stays = (before < top_p[:, None] * total[:, None]) & (weights > 0)
    last = stays.sum(-1).clamp_(min=1) - 1
    least = values.gather(1, last[:, None])
    return _invert(_min_p(scaled.exp().masked_fill_(scaled < least, 0), settings), u)


def _min_p(weights: torch.Tensor, settings: Seq[Sampling]) -> torch.Tensor:
    """Drops what is less likely than min_p times the likeliest. The likeliest weight is exp(0) = 1."""
    if not any(s.min_p > 0 for s in settings):
        return weights
    least = torch.tensor([s.min_p for s in settings], device=weights.device, dtype=weights.dtype)
    return weights.masked_fill(weights < least[:, None], 0)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of `weights` [rows, n] first exceeds u [rows] times its total."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    return index.clamp_(max=weights.shape[1] - 1)


def _logprobs(logits: torch.Tensor, rows: Seq[Row], tokens: list[int]) -> list[TokenLogprob | None]:
    """Of the model's own distribution, before penalties, temperature and filters."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return result
    table = logits[wanted].log_softmax(-1)
    chosen = table.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device))[:, 0].tolist()
    most = max(rows[i].sampling.logprobs or 0 for i in wanted)
    values, ids = (part.tolist() for part in table.topk(most, dim=-1))
    for at, i in enumerate(wanted):
        k = rows[i].sampling.logprobs or 0
        top = tuple(zip(ids[at][:k], values[at][:k], strict=True))
        result[i] = TokenLogprob(tokens[i], chosen[at], top)
    return result
