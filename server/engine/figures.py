"""The engine's figures, as its parts have them after a step."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.loading import AdapterLoader
from server.engine.merging import MergedCopies
from server.engine.scheduler import Scheduler
from server.engine.stats import Stats


@dataclass(slots=True)
class Figures(Stats):
    """Filled in by the engine's thread, read by all others."""

    def take(self, scheduler: Scheduler, loader: AdapterLoader, merged: MergedCopies) -> None:
        """Takes over what the parts count themselves."""
        bank = loader.bank
        self.running, self.waiting, self.loading = len(scheduler.running), len(scheduler.waiting), len(loader)
        self.blocks_used, self.preemptions = scheduler.pool.used, scheduler.preemptions
        self.shares = scheduler.shares.figures()
        self.resident, self.slot_bytes = bank.resident(), bank.bytes
        self.slot_references, self.slot_evictions, self.slot_loads = bank.references, bank.evictions, bank.loads
        self.slot_hits, self.slot_misses, self.load_failures = loader.hits, loader.misses, loader.failures
        self.prefix_queries, self.prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        self.load_seconds, self.wanted = loader.seconds, loader.lacking
        self.prefetches = dict(loader.prefetches)
        self.lane_notes = merged.notes
        if merged or self.copies or self.merged_bytes:
            merged.count()
            self.copies, self.merged_bytes = merged.figures(), merged.nbytes
            self.asked_bytes = merged.asked()
            self.merged_byte_seconds, self.lane_changes = merged.byte_seconds, dict(merged.changes)
