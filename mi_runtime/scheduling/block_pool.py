"""The pool of KV blocks: which are in use, and which hold a prefix that can be reused.

The pool knows block numbers, reference counts and keys. It holds no KV tensors and does not know
sequences. A block is in exactly one of three states:

    free        its content is worthless
    referenced  one or more block tables hold it
    cached      no table holds it; its content stays under its key until the block is needed

so that `free + referenced + cached == total`. A key names the content of a full block: the digest
of everything that the KV in it depends on, chained from a root of (engine fingerprint, dial, cache
salt) over the token ids of every block up to and including this one. Digests are cryptographic,
because a collision would give one caller the KV of another.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from mi_runtime.request import Dial

DIGEST_BYTES = 32


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each. Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int, fingerprint: str = "") -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._fingerprint = fingerprint
        self._references = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """The number of blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def referenced(self) -> int:
        return self.num_blocks - self.available

    def blocks_for(self, tokens: int) -> int:
        """Returns the number of blocks that the KV of `tokens` tokens needs."""
        return -(-tokens // self.block_size)

    def root_key(self, dial: Dial, cache_salt: str) -> bytes:
        """Returns the key from which the chain of a sequence's block keys starts."""
        # repr is exact for floats and unambiguous for strings.
        root = repr((self._fingerprint, dial, cache_salt))
        return blake2b(root.encode(), digest_size=DIGEST_BYTES).digest()

    def next_key(
        self, previous: bytes, tokens: Sequence[int], switched: tuple[Dial, int] | None = None
    ) -> bytes:
        """Returns the key of the full block of `tokens` that follows the key `previous`.

        `switched` is (dial, offset) where the block's tokens from this offset on are computed under
        that other dial.
        """
        assert len(tokens) == self.block_size
        content = previous + array("I", tokens).tobytes()
        if switched is not None:
            content += repr(switched).encode()
        return blake2b(content, digest_size=DIGEST_BYTES).digest()

    def find(self, key: bytes) -> int | None:
        """Returns the block, referenced or cached, that holds the content of `key`."""
        return self._block_of.get(key)

    def allocate(self) -> int:
        """Takes a block, of undefined content, with one reference. One must be `available`."""
        assert self.available, "no block is available"
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        return block

    def acquire(self, found: Sequence[int], fresh: int) -> list[int] | None:
        """Returns a block table: the blocks `found`, shared, followed by `fresh` new ones.

        Returns None and takes nothing if there are not enough blocks.
        """
        revived = sum(self._references[block] == 0 for block in found)
        if revived + fresh > self.available:
            return None
        for block in found:  # before the first eviction, which could take one of them
            self._share(block)
        return [*found, *(self.allocate() for _ in range(fresh))]

    def release(self, block_table: Sequence[int]) -> None:
        """Drops one reference of each block.

        It starts at the end, so that the tail of a chain is evicted before its head.
        """
        for block in reversed(block_table):
            assert self._references[block] > 0, f"block {block} is released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._retire(block)

    def register(self, block: int, key: bytes) -> None:
        """Makes `find` return this block, which now holds all the KV that `key` names.

        If another block already has this content (two sequences computed it at once), that one
        stays the shared one and this one stays private to its holder.
        """
        assert self._references[block] > 0
        assert self._key_of[block] is None
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, block_table: Sequence[int]) -> None:
        """Stops `find` from returning the blocks that only this table holds."""
        for block in block_table:
            key = self._key_of[block]
            if key is not None and self._references[block] == 1:
                del self._block_of[key]
                self._key_of[block] = None

    def check_integrity(self) -> None:
        """Asserts every invariant of the pool, in O(blocks)."""
        free, cached = set(self._free), set(self._cached)
        referenced = {block for block, count in enumerate(self._references) if count > 0}
        assert min(self._references) >= 0
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(referenced) + len(cached) == self.num_blocks
        assert free | referenced | cached == set(range(self.num_blocks))
        assert self.referenced == len(referenced)
        keys = {key: block for block, key in enumerate(self._key_of) if key is not None}
        assert keys == self._block_of, "a key and its block disagree"
        assert cached <= set(keys.values()), "a cached block has no key"
        assert not free & set(keys.values()), "a free block has a key"

    def reference_count(self, block: int) -> int:
        return self._references[block]

    def _share(self, block: int) -> None:
        assert self._key_of[block] is not None
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _retire(self, block: int) -> None:
        if self._key_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        return block
