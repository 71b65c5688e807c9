"""The device tier: a fixed number of slots, each holding one adapter; lora/eviction.py says which goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.lora.eviction import LeastRecent, Order, reload_cost
from server.lora.weights import AdapterWeights


@dataclass
class Slot:
    """One place on the device. `weights` is None while the adapter is on its way; `references` are live requests."""

    digest: str
    weights: AdapterWeights | None = None
    references: int = 0
    draining: bool = False


class Bank:
    """Owned by the engine's thread, hence no lock. An adapter is found by its content digest and by nothing else.

    `evicted` is called with the digest of each adapter that leaves.
    """

    def __init__(self, slots: int, order: Order | None = None, evicted: Callable[[str], None] = lambda digest: None):
        self.capacity, self._evicted = slots, evicted
        self._slots: dict[str, Slot] = {}
        self._order = order or LeastRecent()
        self.loads = self.evictions = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def bytes(self) -> int:
        """Bytes of the adapters on the device."""
        return sum(slot.weights.nbytes for slot in self._slots.values() if slot.weights)

    @property
    def references(self) -> int:
        """Live references over all slots; 0 when the engine is idle."""
        return sum(slot.references for slot in self._slots.values())

    def digests(self) -> frozenset[str]:
        """What is resident and ready."""
        return frozenset(digest for digest, slot in self._slots.items() if slot.weights)

    def holds(self, digest: str) -> bool:
        """Whether the adapter is resident or on its way."""
        return digest in self._slots

    def awaits(self, digest: str) -> bool:
        """Whether the adapter has a slot and is on its way there."""
        slot = self._slots.get(digest)
        return slot is not None and slot.weights is None

    def acquire(self, digest: str) -> AdapterWeights | None:
        """Takes one reference and returns the weights, or None: not here, not here yet, or being drained."""
        slot = self._slots.get(digest)
        if slot is None or slot.weights is None or slot.draining:
            return None
        slot.references += 1
        self._order.use(digest, reload_cost(slot.weights.nbytes))
        return slot.weights

    def release(self, digest: str) -> None:
        """Gives one reference back."""
        slot = self._slots[digest]
        if slot.references < 1:
            raise AssertionError(f"{digest} released more often than acquired")
        slot.references -= 1

    def reserve(self, digest: str) -> bool:
        """Makes room for an adapter about to be loaded; False when every slot is referenced or on its way."""
        if len(self._slots) >= self.capacity:
            idle = [slot for slot in self._slots.values() if slot.weights and not slot.references]
            if not idle:
                return False
            # A draining slot was emptied for a starved request: it goes before all others.
            victim = min(idle, key=lambda slot: (not slot.draining, self._order.rank(slot.digest)))
            del self._slots[victim.digest]
            self._order.leave(victim.digest)
            self._evicted(victim.digest)
            self.evictions += 1
        self._slots[digest] = Slot(digest)
        return True

    def fill(self, digest: str, weights: AdapterWeights) -> None:
        """The reserved slot's adapter has arrived."""
        self._slots[digest].weights = weights
        self._order.use(digest, reload_cost(weights.nbytes))
        self.loads += 1

    def abandon(self, digest: str) -> None:
        """The reserved slot's adapter could not be loaded."""
        slot = self._slots.get(digest)
        if slot is not None and slot.weights is None:
            del self._slots[digest]

    def drain_one(self) -> None:
        """Closes the slot with the fewest references to newcomers, so that it falls free; at most one at a time."""
        ready = [slot for slot in self._slots.values() if slot.weights]
        if ready and not any(slot.draining for slot in self._slots.values()):
            min(ready, key=lambda slot: (slot.references, self._order.rank(slot.digest))).draining = True

    def reopen(self) -> bool:
        """Nobody starves any more: a slot that was being drained takes requests again. Whether there was one."""
        draining = [slot for slot in self._slots.values() if slot.draining]
        for slot in draining:
            slot.draining = False
        return bool(draining)
