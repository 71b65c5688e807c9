"""Lays out the work of a step as one packed row of tokens, and describes it to attention and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from server.engine.scheduler import Work
from server.lora.layers import LoraBatch
from server.lora.weights import AdapterWeights
from server.model.attention import AttentionBatch, DecodeGroup, PrefillChunk
from server.model.kv import BlockTable, KVPool

Tensors = Callable[[list[int]], torch.Tensor]

# Without kernels, a decode row joins a group of longer rows while at least this share of the group's keys is its own.
_FILL = 0.7


@dataclass
class Batch:
    """One step. `ids`, `positions` [1, tokens]; `logits_at` [rows]: the packed places of the tokens to sample
    after (one of no use where nothing is sampled)."""

    work: list[Work]
    ids: torch.Tensor
    positions: torch.Tensor
    logits_at: torch.Tensor
    sampled: list[Work]
    attention: AttentionBatch
    lora: LoraBatch | None
    fresh: torch.Tensor | None


def build(work: Seq[Work], pool: KVPool, device: torch.device, *, lora: bool = True) -> Batch:
    """Tokens are ordered base first, then by adapter, so that each adapter is one run. Without `lora` nobody has one:
    the step is a merged lane's."""
    ordered = sorted(work, key=_place)
    starts, end = [], 0
    for item in ordered:
        starts.append(end)
        end += item.count
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last: list[int] = []
    for item, start in zip(ordered, starts, strict=True):
        sequence, first = item.sequence, item.sequence.computed
        ids += sequence.tokens[first : first + item.count]
        positions += range(first, first + item.count)
        slots += _slots(sequence.blocks, first, item.count, pool.block_size)
        if item.samples:
            last.append(start + item.count - 1)
    tensor = _to(device)
    groups, chunks = _attention(ordered, starts, pool, tensor)
    fresh = [block for item in ordered for block in item.fresh]
    return Batch(
        work=ordered,
        ids=tensor(ids)[None],
        positions=tensor(positions)[None],
        logits_at=tensor(last or [0]),
        sampled=[item for item in ordered if item.samples],
        attention=AttentionBatch(pool, tensor(slots), groups, chunks),
        lora=_lora(ordered, starts, end, pool.kernels is not None, tensor) if lora else None,
        fresh=tensor(fresh) if fresh else None,
    )


def _place(item: Work) -> str:
    weights = item.sequence.request.weights
    return weights.key if weights is not None else ""


def _to(device: torch.device) -> Tensors:
    return lambda values: torch.tensor(values, dtype=torch.long, device=device)


def _slots(blocks: list[int], first: int, count: int, size: int) -> list[int]:
    return [blocks[at // size] * size + at % size for at in range(first, first + count)]


def _attention(
    ordered: list[Work], starts: list[int], pool: KVPool, tensor: Tensors
) -> tuple[list[DecodeGroup], list[PrefillChunk]]:
    decodes, chunks = [], []
    for item, start in zip(ordered, starts, strict=True):
        # A prompt's token is a chunk even if it comes alone: its sums must not depend on where the chunks end.
        if item.count == 1 and item.sequence.computed >= item.sequence.prompt_length:
            decodes.append((start, item))
        else:
            context = item.sequence.computed
            blocks = -(-(context + item.count) // pool.block_size)
            table = BlockTable(tensor(item.sequence.blocks[:blocks]))
            chunks.append(PrefillChunk(start, start + item.count, context, table))
    groups = [decodes] if pool.kernels is not None and decodes else _by_length(decodes)
    return [_group(rows, pool, tensor) for rows in groups], chunks


def _by_length(decodes: list[tuple[int, Work]]) -> list[list[tuple[int, Work]]]:
    """Groups of rows of similar context, so that little of a gathered table is padding."""
    groups: list[list[tuple[int, Work]]] = []
    for row in sorted(decodes, key=lambda row: -row[1].sequence.computed):
        longest = groups[-1][0][1].sequence.computed + 1 if groups else 0
        if groups and row[1].sequence.computed + 1 >= _FILL * longest:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _group(rows: list[tuple[int, Work]], pool: KVPool, tensor: Tensors) -> DecodeGroup:
    width = max(item.sequence.computed // pool.block_size + 1 for _, item in rows)
    table: list[int] = []
    for _, item in rows:
        blocks = item.sequence.blocks[: item.sequence.computed // pool.block_size + 1]
        table += blocks + [pool.null_block] * (width - len(blocks))
    return DecodeGroup(
        tokens=tensor([start for start, _ in rows]),
        tables=tensor(table).int().view(len(rows), width),
        positions=tensor([item.sequence.computed for _, item in rows]),
        length=width * pool.block_size,
    )


def _lora(ordered: list[Work], starts: list[int], tokens: int, kernels: bool, tensor: Tensors) -> LoraBatch | None:
    runs = _runs(ordered, starts)
    if not runs:
        return None
    if not kernels:
        return LoraBatch(runs)
    addresses = [0] * tokens
    for start, end, adapter in runs:
        assert adapter.addresses is not None
        addresses[start:end] = [adapter.addresses.data_ptr()] * (end - start)
    return LoraBatch(runs, tensor(addresses))


def _runs(ordered: list[Work], starts: list[int]) -> list[tuple[int, int, AdapterWeights]]:
    """(start, end, adapter) of packed tokens, neighbours of one adapter taken together."""
    runs: list[tuple[int, int, AdapterWeights]] = []
    for item, start in zip(ordered, starts, strict=True):
        weights, end = item.sequence.request.weights, start + item.count
        if weights is None:
            continue
        if runs and runs[-1][2] is weights:
            start = runs.pop()[0]
        runs.append((start, end, weights))
    return runs
