"""The device tier: a fixed number of slots, each holding one adapter; lora/eviction.py says which goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.lora.eviction import LeastRecent, Order, reload_cost
from server.lora.weights import AdapterWeights


@dataclass
class Slot:
    """One place on the device. `weights` is None while the adapter is on its way; `references` are live requests."""

    key: str
    weights: AdapterWeights | None = None
    references: int = 0
    draining: bool = False


class Bank:
    """Owned by the engine's thread, hence no lock. An adapter is found by its key (`AdapterRef.key`), by nothing else.

    `evicted` is called with the key of each adapter that leaves.
    """

    def __init__(self, slots: int, order: Order | None = None, evicted: Callable[[str], None] = lambda key: None):
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

    def resident(self) -> frozenset[str]:
        """What is resident and ready."""
        return frozenset(key for key, slot in self._slots.items() if slot.weights)

    def holds(self, key: str) -> bool:
        """Whether the adapter is resident or on its way."""
        return key in self._slots

    def awaits(self, key: str) -> bool:
        """Whether the adapter has a slot and is on its way there."""
        slot = self._slots.get(key)
        return slot is not None and slot.weights is None

    def acquire(self, key: str) -> AdapterWeights | None:
        """Takes one reference and returns the weights, or None: not here, not here yet, or being drained."""
        slot = self._slots.get(key)
        if slot is None or slot.weights is None or slot.draining:
            return None
        slot.references += 1
        self._order.use(key, reload_cost(slot.weights.nbytes))
        return slot.weights

    def release(self, key: str) -> None:
        """Gives one reference back."""
        slot = self._slots[key]
        if slot.references < 1:
            raise AssertionError(f"{key} released more often than acquired")
        slot.references -= 1

    def reserve(self, key: str) -> bool:
        """Makes room for an adapter about to be loaded; False when every slot is referenced or on its way."""
        if len(self._slots) >= self.capacity:
            idle = [slot for slot in self._slots.values() if slot.weights and not slot.references]
            if not idle:
                return False
            # A draining slot was emptied for a starved request: it goes before all others.
            victim = min(idle, key=lambda slot: (not slot.draining, self._order.rank(slot.key)))
            del self._slots[victim.key]
            self._order.leave(victim.key)
            self._evicted(victim.key)
            self.evictions += 1
        self._slots[key] = Slot(key)
        return True

    def fill(self, key: str, weights: AdapterWeights) -> None:
        """The reserved slot's adapter has arrived."""
        self._slots[key].weights = weights
        self._order.use(key, reload_cost(weights.nbytes))
        self.loads += 1

    def abandon(self, key: str) -> None:
        """The reserved slot's adapter could not be loaded."""
        slot = self._slots.get(key)
        if slot is not None and slot.weights is None:
            del self._slots[key]

    def drain_one(self) -> None:
        """Closes the slot with the fewest references to newcomers, so that it falls free; at most one at a time."""
        ready = [slot for slot in self._slots.values() if slot.weights]
        if ready and not any(slot.draining for slot in self._slots.values()):
            min(ready, key=lambda slot: (slot.references, self._order.rank(slot.key))).draining = True

    def reopen(self) -> bool:
        """Nobody starves any more: a slot that was being drained takes requests again. Whether there was one."""
        draining = [slot for slot in self._slots.values() if slot.draining]
        for slot in draining:
            slot.draining = False
        return bool(draining)
