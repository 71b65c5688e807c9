"""The block accounts against a simple model, through any history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.blocks import BlockPool, chain, chain_seed

SIZE = 2  # tokens a block
SEEDS = [chain_seed(b"base", adapter, salt) for adapter in (b"", b"one") for salt in (b"", b"tenant")]
# Few different prompts, so that histories share beginnings often.
PROMPTS = st.tuples(st.sampled_from(SEEDS), st.lists(st.sampled_from([0, 1]), max_size=7))


def chain_of(seed: bytes, tokens: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    for at in range(len(tokens) // SIZE):
        hashes.append(chain(hashes[-1] if hashes else seed, tokens[at * SIZE : (at + 1) * SIZE]))
    return hashes


class Accounts(RuleBasedStateMachine):
    """What the pool must do, said simply: per block its holders and what it holds, and a list of idle ones by age."""

    @initialize(count=st.integers(1, 8))
    def start(self, count: int) -> None:
        self.pool = BlockPool(count, SIZE)
        self.references = [0] * count
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block -> seed and all tokens up to its end
        self.idle: list[int] = []  # with content, the next to be evicted first
        self.held: list[tuple[list[int], bytes, list[int]]] = []  # sequences: blocks, seed, tokens

    @rule(prompt=PROMPTS)
    def place(self, prompt: tuple[bytes, list[int]]) -> None:
        """What the scheduler does: share what is known, allocate the rest, all or nothing."""
        seed, tokens = prompt
        shared = self.pool.match(chain_of(seed, tokens))
        for at, block in enumerate(shared):
            assert self.content[block] == (seed, tuple(tokens[: (at + 1) * SIZE])), "a match of another chain"
        known = set(self.content.values())
        following = (len(shared) + 1) * SIZE
        assert following > len(tokens) or (seed, tuple(tokens[:following])) not in known, "a longer match was there"
        for block in shared:
            self.references[block] += 1
            if block in self.idle:
                self.idle.remove(block)
        missing = self.pool.needed(len(tokens)) - len(shared)
        fresh = self.allocate(missing)
        if fresh is None:
            self.release(shared)
        else:
            self.held.append((shared + fresh, seed, tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks, seed, tokens = data.draw(st.sampled_from(self.held))
        for number, key in enumerate(chain_of(seed, tokens)):
            self.pool.publish(blocks[number], key)
            content = (seed, tuple(tokens[: (number + 1) * SIZE]))
            if blocks[number] not in self.content and content not in self.content.values():
                self.content[blocks[number]] = content

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.held) - 1))
        self.release(self.held.pop(number)[0])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        blocks, _, tokens = data.draw(st.sampled_from(self.held))
        fresh = self.allocate(1) if self.pool.needed(len(tokens) + 1) > len(blocks) else []
        if fresh is not None:
            blocks += fresh
            tokens += [data.draw(st.sampled_from([0, 1]))]

    @rule(data=st.data())
    def release_once_too_often(self, data: st.DataObject) -> None:
        free = [block for block, count in enumerate(self.references) if not count]
        if free:
            with pytest.raises(AssertionError, match="more often"):
                self.pool.release([data.draw(st.sampled_from(free))])

    def allocate(self, count: int) -> list[int] | None:
        free = self.references.count(0)
        blank = free - len(self.idle)
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None
            return None
        assert blocks is not None
        assert len(set(blocks)) == count
        assert not any(self.references[block] for block in blocks), "handed out a block that somebody holds"
        evicted = self.idle[: max(count - blank, 0)]
        assert set(blocks) & set(self.idle) == set(evicted), "blank ones first, then the least recently used"
        del self.idle[: len(evicted)]
        for block in blocks:
            self.references[block] = 1
            self.content.pop(block, None)
        return blocks

    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in reversed(blocks):  # the beginning of a prompt is the last to go
            self.references[block] -= 1
            if not self.references[block] and block in self.content:
                self.idle.append(block)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "pool"):
            free = self.references.count(0)
            assert self.pool.available == free
            assert self.pool.used == self.pool.count - free
            assert self.pool.used + self.pool.available == self.pool.count
            held = [block for blocks, _, _ in self.held for block in blocks]
            assert self.references == [held.count(block) for block in range(self.pool.count)]


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, SIZE)
    assert pool.allocate(3) is not None
    assert pool.allocate(2) is None
    assert (pool.available, pool.used) == (1, 3)
    assert pool.allocate(0) == []
    assert pool.allocate(1) is not None


def test_a_prompts_beginning_outlives_its_end() -> None:
    pool = BlockPool(3, SIZE)
    hashes = chain_of(SEEDS[0], [0, 1, 1, 0, 0, 0])
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, key in zip(blocks, hashes, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    taken = pool.allocate(1)
    assert taken == blocks[2:]
    assert pool.match(hashes) == blocks[:2]


def test_of_two_equal_blocks_the_first_is_kept_and_the_other_becomes_blank() -> None:
    pool = BlockPool(3, SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    [key] = chain_of(SEEDS[0], [1, 1])
    pool.publish(first[0], key)
    pool.publish(second[0], key)
    pool.release(second)
    pool.release(first)
    assert pool.match([key]) == first
    assert pool.allocate(2) is not None, "the double and the untouched one"
    assert pool.match([key]) == first


def test_a_failing_release_of_a_double_entry_raises() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    assert blocks is not None
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks * 2)


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_seeds_are_equal_only_if_every_part_is(left: list[bytes], right: list[bytes]) -> None:
    """`ab` + `c` is not `a` + `bc`: a tenant's salt cannot be chosen so as to meet another's."""
    assert (chain_seed(*left) == chain_seed(*right)) == (left == right)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_a_chain_names_its_tokens_and_all_before_them(left: list[int], right: list[int]) -> None:
    assert (chain(SEEDS[0], left) == chain(SEEDS[0], right)) == (left == right)
    assert chain(SEEDS[0], left) != chain(SEEDS[1], left)
    assert chain(chain(SEEDS[0], left), right) != chain(chain(SEEDS[1], left), right)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (2, 1), (3, 2), (16, 8)])
def test_blocks_needed(tokens: int, blocks: int) -> None:
    assert BlockPool(1, SIZE).needed(tokens) == blocks
