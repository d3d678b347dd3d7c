"""The block pool shares, caches and evicts blocks as a reference does that scans for everything."""

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mi_runtime.request import Dial
from mi_runtime.scheduling.block_pool import BlockPool

ANY_DIAL = Dial(0.5)


def pool(num_blocks: int = 4, block_size: int = 2, fingerprint: str = "pair") -> BlockPool:
    return BlockPool(num_blocks, block_size, fingerprint)


def table_of(blocks: BlockPool, *keys: bytes) -> list[int]:
    """Returns a new block table with the content of `keys`."""
    table = blocks.acquire([], len(keys))
    assert table is not None
    for block, key in zip(table, keys, strict=True):
        blocks.register(block, key)
    return table


def test_a_new_pool_is_all_free() -> None:
    blocks = pool(4)
    assert (blocks.free, blocks.referenced, blocks.cached) == (4, 0, 0)
    blocks.check_integrity()


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
def test_tokens_need_as_many_blocks_as_they_begin(tokens: int, expected: int) -> None:
    assert pool(block_size=2).blocks_for(tokens) == expected


def test_a_released_block_without_content_is_free_again() -> None:
    blocks = pool()
    blocks.release([blocks.allocate()])
    assert (blocks.free, blocks.cached) == (4, 0)


def test_a_released_block_with_content_is_cached_and_can_be_shared_again() -> None:
    blocks = pool()
    table = table_of(blocks, b"a")
    blocks.release(table)
    assert (blocks.free, blocks.referenced, blocks.cached) == (3, 0, 1)
    assert blocks.find(b"a") == table[0]
    assert blocks.acquire(table, 1) is not None
    assert (blocks.free, blocks.referenced, blocks.cached) == (2, 2, 0)
    blocks.check_integrity()


def test_a_shared_block_stays_referenced_until_its_last_release() -> None:
    blocks = pool()
    table = table_of(blocks, b"a")
    assert blocks.acquire(table, 0) == table
    blocks.release(table)
    assert blocks.referenced == 1
    blocks.release(table)
    assert (blocks.referenced, blocks.cached) == (0, 1)


def test_the_least_recently_used_content_is_evicted_first() -> None:
    blocks = pool(2)
    first, second = table_of(blocks, b"a", b"b")
    blocks.release([first])
    blocks.release([second])
    blocks.release(blocks.acquire([first], 0) or [])  # used again: now "b" is the older one
    blocks.allocate()
    assert blocks.find(b"a") is not None
    assert blocks.find(b"b") is None
    blocks.check_integrity()


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    blocks = pool(3)
    blocks.release(table_of(blocks, b"head", b"middle", b"tail"))
    blocks.allocate()
    assert blocks.find(b"tail") is None
    blocks.allocate()
    assert blocks.find(b"middle") is None
    assert blocks.find(b"head") is not None


def test_free_blocks_are_used_before_content_is_evicted() -> None:
    blocks = pool(2)
    blocks.release(table_of(blocks, b"a"))
    blocks.allocate()
    assert blocks.find(b"a") is not None


def test_a_table_that_does_not_fit_takes_no_block() -> None:
    blocks = pool(3)
    blocks.release(table_of(blocks, b"a"))
    found = [blocks.find(b"a") or 0]
    assert blocks.acquire(found, 3) is None
    assert (blocks.free, blocks.referenced, blocks.cached) == (2, 0, 1)


def test_new_blocks_never_evict_the_blocks_found_for_the_same_table() -> None:
    blocks = pool(3)
    found = table_of(blocks, b"a", b"b")
    blocks.release(found)
    table = blocks.acquire(found, 1)
    assert table is not None
    assert table[:2] == found
    assert len(set(table)) == 3
    blocks.check_integrity()


def test_the_second_block_of_the_same_content_stays_private() -> None:
    blocks = pool()
    shared = table_of(blocks, b"a")
    private = table_of(blocks, b"a")
    assert blocks.find(b"a") == shared[0]
    blocks.release(private)
    assert (blocks.free, blocks.cached) == (3, 0)
    blocks.release(shared)
    assert (blocks.free, blocks.cached) == (3, 1)
    blocks.check_integrity()


def test_forgotten_content_is_not_found_and_its_blocks_become_free() -> None:
    blocks = pool()
    table = table_of(blocks, b"a", b"b")
    blocks.forget(table)
    assert blocks.find(b"a") is None
    blocks.release(table)
    assert (blocks.free, blocks.cached) == (4, 0)
    blocks.check_integrity()


def test_shared_content_is_not_forgotten() -> None:
    blocks = pool()
    table = table_of(blocks, b"a")
    shared = blocks.acquire(table, 1)
    assert shared is not None
    blocks.forget(shared)
    assert blocks.find(b"a") == table[0]
    blocks.check_integrity()


def test_releasing_a_block_twice_fails_an_assertion() -> None:
    blocks = pool()
    table = [blocks.allocate()]
    blocks.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(table)


def test_allocating_from_an_exhausted_pool_fails_an_assertion() -> None:
    blocks = pool(1)
    blocks.allocate()
    with pytest.raises(AssertionError, match="no block"):
        blocks.allocate()


def test_keys_differ_in_everything_that_kv_depends_on() -> None:
    blocks, other_pair = pool(), pool(fingerprint="other pair")
    roots = {
        blocks.root_key(Dial(0.5), ""),
        blocks.root_key(Dial(0.51), ""),
        blocks.root_key(Dial(0.5), "salt"),
        other_pair.root_key(Dial(0.5), ""),
    }
    chains = {blocks.next_key(root, tokens) for root in roots for tokens in [(1, 2), (2, 1)]}
    followers = {blocks.next_key(key, (1, 2)) for key in chains}
    assert len(roots | chains | followers) == 4 + 8 + 8


def test_keys_are_the_same_for_the_same_content() -> None:
    one, two = pool(), pool()
    root = one.root_key(ANY_DIAL, "salt")
    assert root == two.root_key(Dial(0.5), "salt")
    assert one.next_key(root, [1, 2]) == two.next_key(root, (1, 2))


def test_a_salt_of_any_text_makes_a_key() -> None:
    blocks = pool()
    salts = ["", "'", "\\'", "\ud800", "λ", "', '"]
    assert len({blocks.root_key(ANY_DIAL, salt) for salt in salts}) == len(salts)


# --- Random use against a reference -------------------------------------------------------------


@dataclass
class SlowBlock:
    references: int
    key: bytes | None = None
    released: int = 0  # when it last became unreferenced

    @property
    def is_cached(self) -> bool:
        return self.references == 0 and self.key is not None


class PoolAgainstReference(RuleBasedStateMachine):
    """The reference keeps a list of the blocks in use or cached, and scans it for everything."""

    SIZE = 5
    keys = st.sampled_from([bytes([letter]) for letter in b"abcdefgh"])

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(self.SIZE)
        self.reference: list[SlowBlock] = []
        self.tables: list[list[tuple[int, SlowBlock]]] = []
        self.clock = count(1)

    def reference_find(self, key: bytes) -> SlowBlock | None:
        return next((block for block in self.reference if block.key == key), None)

    def reference_allocate(self) -> SlowBlock:
        if len(self.reference) == self.SIZE:
            cached = [block for block in self.reference if block.is_cached]
            self.reference.remove(min(cached, key=lambda block: block.released))
        self.reference.append(SlowBlock(references=1))
        return self.reference[-1]

    @rule(wanted=st.lists(keys, max_size=4, unique=True), fresh=st.integers(0, 4))
    def acquire(self, wanted: list[bytes], fresh: int) -> None:
        found = [number for key in wanted if (number := self.pool.find(key)) is not None]
        shared = [block for key in wanted if (block := self.reference_find(key)) is not None]
        held = sum(block.references > 0 for block in self.reference)
        revived = sum(block.references == 0 for block in shared)
        table = self.pool.acquire(found, fresh)
        if held + revived + fresh > self.SIZE:
            assert table is None
            return
        assert table is not None
        for block in shared:
            block.references += 1
        values = [*shared, *(self.reference_allocate() for _ in range(fresh))]
        self.tables.append(list(zip(table, values, strict=True)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release([number for number, _ in table])
        for _, block in reversed(table):
            block.references -= 1
            block.released = next(self.clock)
        self.reference = [block for block in self.reference if block.references or block.key]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.forget([number for number, _ in table])
        for _, block in table:
            if block.references == 1:
                block.key = None

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=keys)
    def register(self, data: st.DataObject, key: bytes) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        without_key = [(number, block) for number, block in table if block.key is None]
        if not without_key:
            return
        number, block = without_key[0]
        self.pool.register(number, key)
        if self.reference_find(key) is None:
            block.key = key

    @invariant()
    def agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.referenced == sum(block.references > 0 for block in self.reference)
        assert self.pool.cached == sum(block.is_cached for block in self.reference)
        for letter in b"abcdefgh":
            key = bytes([letter])
            assert (self.pool.find(key) is None) == (self.reference_find(key) is None)
        for table in self.tables:
            for number, block in table:
                assert self.pool.reference_count(number) == block.references
                assert block.key is None or self.pool.find(block.key) == number


PoolAgainstReference.TestCase.settings = settings(stateful_step_count=40)
TestPoolAgainstReference = PoolAgainstReference.TestCase
