"""Which cache block is whose: blocks are handed out, shared, and known after their sequences have ended.

A full block is known by its tokens and the block before it, so that known blocks form a tree whose paths are
prefixes of sequences; tokens are compared, not hashes of them. A sequence holds every block of its path. It gives them
back last first, and where a block that it computed is known already, it goes on with that one: so of the blocks that
nobody holds, the least recently used never has a known block behind it, and is forgotten first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from octavo.engines.torch.batch import BLOCK

# What is before a sequence's first block.
ROOT = -1


class Blocks:
    """The blocks of a cache: free ones, known ones that nobody holds (cached), and those in use."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        # Known blocks that nobody holds, the least recently used first.
        self._idle: dict[int, None] = {}
        self._known: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}

    @property
    def free(self) -> int:
        """How many hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """How many are known and held by nobody."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """How many somebody holds."""
        return self.total - len(self._free) - len(self._idle)

    def available(self, besides: Sequence[int] = ()) -> int:
        """How many can be taken once ``besides`` are held."""
        idle = sum(not self._holders[block] for block in besides)
        return len(self._free) + len(self._idle) - idle

    def known(self, tokens: Sequence[int], start: int = 0, parent: int = ROOT) -> list[int]:
        """The known blocks that a sequence can go on with.

        Args:
            tokens: of the sequence. The last is left to compute: its hidden state is wanted.
            start: of its blocks, the first that is looked for.
            parent: the block before that.
        """
        found: list[int] = []
        for index in range(start, (len(tokens) - 1) // BLOCK):
            block = self._known.get(_key(parent, tokens, index))
            if block is None:
                break
            found.append(block)
            parent = block
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """Share known blocks."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Hold blocks for new tokens; there must be as many available."""
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back blocks, in the order they have in their sequence."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def remember(self, block: int, tokens: Sequence[int], index: int, parent: int) -> int:
        """Make a held block known that is full and computed.

        Args:
            block: the sequence's block ``index``.
            tokens: of the sequence.
            index: of the block.
            parent: the block before it; known.

        Returns:
            The block to go on with: if another one has the same tokens, that one is held instead.
        """
        key = _key(parent, tokens, index)
        known = self._known.setdefault(key, block)
        if known == block:
            self._keys[block] = key
        else:
            self.hold([known])
            self.release([block])
        return known

    def _forget(self, block: int) -> None:
        del self._idle[block]
        del self._known[self._keys.pop(block)]
        self._free.append(block)


def _key(parent: int, tokens: Sequence[int], index: int) -> tuple[int, bytes]:
    return parent, array("q", tokens[index * BLOCK : (index + 1) * BLOCK]).tobytes()
