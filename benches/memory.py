"""The memory that every rival merges: one data set for each case, the same for the same seed.

A `Memory` is one private anonymous mapping (the demo's: several), filled in place in small pieces,
so that 16 GiB need little more than 16 GiB. It can be changed as its case says, and knows the sum
of each page, so that at the end every page is read back and compared.

Huge pages are off: each of these cases is about pages, and a rival that splits huge pages while
another finds them split already would be measured by its turn. `HUGE` has cases of their own.

Pages differ in their first words, as real pages do, but for the case that is made to be different
there.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
WORDS = PAGE // 8
#: Bytes made, moved or summed at a time: fits a cache of the second level, twice.
PIECE = 1 << 20
COPIES = 4

Pages = NDArray[np.uint64]  # one row a page


@dataclass(frozen=True)
class Case:
    """A data set: how it is called, what it is, and how it is made."""

    name: str
    title: str
    build: Callable[[Memory], None]
    #: Whether ksmd gets `use_zero_pages`, which we have by default.
    zero_pages: bool = False
    #: CPU seconds of ksmd / ours, at 1 GiB, that issue 4 asks for.
    target: float | None = None


class Memory:
    """The pages of a case. `arrays` is what a rival is given, in order."""

    def __init__(self, case: Case, mib: int, seed: int) -> None:
        self.case, self.mib, self.seed = case, mib, seed
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.arrays: list[Pages] = []
        #: Pages that the program writes between any two passes.
        self.volatile = np.empty(0, dtype=np.int64)
        #: How many pages less there could be, if nobody missed any.
        self.redundant = 0
        case.build(self)
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        self.sums = np.concatenate([sums for array in self.arrays for sums in _sums(array)])
        self._word = 2 * WORDS // 3
        self._fresh = np.random.Generator(np.random.SFC64(seed + 1))

    @property
    def pages(self) -> int:
        return int(self.starts[-1])

    def map(self, pages: int, huge: bool = False) -> Pages:
        """A mapping of its own, with nothing in it yet."""
        memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:  # noqa: SIM105
            memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        except OSError:
            pass  # A kernel without huge pages has nothing to forbid.
        return np.frombuffer(memory, dtype=np.uint64).reshape(pages, WORDS)

    def fill(self, pages: Pages) -> None:
        """Makes every page unlike any other."""
        flat = pages.reshape(-1)
        for at in range(0, flat.size, PIECE // 8):
            piece = flat[at : at + PIECE // 8]
            piece[:] = np.frombuffer(self.random.bytes(piece.nbytes), dtype=np.uint64)

    def repeat(self, rows: NDArray[np.uint64], groups: NDArray[np.int64]) -> None:
        """Makes the rows (pages or runs of them) of each group equal to its first one."""
        step = max(1, PIECE // rows[0].nbytes)
        for at in range(0, len(groups), step):
            some = groups[at : at + step]
            rows[some[:, 1:]] = rows[some[:, :1]]

    def churn(self) -> None:
        """Writes one word of each volatile page."""
        self._add(self.volatile, np.ones(self.volatile.size, dtype=np.uint64))

    def change(self, share: float) -> int:
        """Gives this share of all pages, chosen anew each time, contents of their own."""
        count = max(1, int(self.pages * share))
        chosen = np.sort(self._fresh.choice(self.pages, count, replace=False))
        odd = self._fresh.integers(1, 1 << 62, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._add(chosen, odd)
        return count

    def _add(self, chosen: NDArray[np.int64], by: NDArray[np.uint64]) -> None:
        self.sums[chosen] += by
        for number, array in enumerate(self.arrays):
            low, high = np.searchsorted(chosen, self.starts[number : number + 2])
            array[chosen[low:high] - self.starts[number], self._word] += by[low:high]

    def wrong(self) -> int:
        """Reads every page; how many are not what was last written there."""
        wrong = at = 0
        for array in self.arrays:
            for sums in _sums(array):
                wrong += int(np.count_nonzero(sums != self.sums[at : at + sums.size]))
                at += sums.size
        return wrong


def _sums(pages: Pages) -> Iterator[NDArray[np.uint64]]:
    step = PIECE // PAGE
    for at in range(0, len(pages), step):
        yield np.add.reduce(pages[at : at + step], axis=1, dtype=np.uint64)


# ------------------------------------------------------------------------------------ the data sets


def _runs(length: int) -> Callable[[Memory], None]:
    """Half of all runs of `length` pages have four copies each, the others are unique."""

    def build(memory: Memory) -> None:
        pages = memory.map((memory.mib << 20) // PAGE)
        memory.fill(pages)
        rows = pages[: len(pages) // length * length].reshape(-1, length * WORDS)
        groups = max(1, len(rows) // 2 // COPIES)
        chosen = memory.random.permutation(len(rows))[: groups * COPIES]
        memory.repeat(rows, chosen.reshape(groups, COPIES))
        memory.redundant = groups * (COPIES - 1) * length
        memory.arrays = [pages]

    return build


def _unique(memory: Memory) -> None:
    pages = memory.map((memory.mib << 20) // PAGE)
    memory.fill(pages)
    memory.arrays = [pages]


def _zero(memory: Memory) -> None:
    _unique(memory)
    [pages] = memory.arrays
    chosen = np.sort(memory.random.permutation(len(pages))[: len(pages) // 2])
    for at in range(0, len(chosen), PIECE // PAGE):
        pages[chosen[at : at + PIECE // PAGE]] = 0
    memory.redundant = len(chosen)


def _arcangeli(memory: Memory) -> None:
    pages = memory.map((memory.mib << 20) // PAGE)
    one = memory.random.integers(0, 1 << 63, WORDS, dtype=np.uint64)
    last = memory.random.permutation(len(pages)).astype(np.uint64)
    for at in range(0, len(pages), PIECE // PAGE):
        piece = pages[at : at + PIECE // PAGE]
        piece[:] = one
        # Big-endian, so that byte order is an order of numbers and trees get no easy shape from it.
        piece[:, -1] = (last[at : at + PIECE // PAGE] + np.uint64(1)).byteswap()
    memory.arrays = [pages]


def _instagram(memory: Memory) -> None:
    """What Meta counted on its hosts: 129,547 shared, 5,119,146 sharing, 1,760,924 unshared and
    10,761,341 volatile pages, of one process and 32 or more workers for each host.
    """
    shared, sharing, unshared, volatile = 129_547, 5_119_146, 1_760_924, 10_761_341
    pages = memory.map((memory.mib << 20) // PAGE)
    memory.fill(pages)
    kinds = memory.random.permutation(len(pages))
    whole = shared + sharing + unshared + volatile
    sharers = round(sharing / shared) + 1
    groups = max(1, len(pages) * (shared + sharing) // whole // sharers)
    memory.repeat(pages, kinds[: groups * sharers].reshape(groups, sharers))
    memory.redundant = groups * (sharers - 1)
    changing = len(pages) * volatile // whole
    memory.volatile = np.sort(kinds[len(kinds) - changing :])
    workers = 32
    cuts = [len(pages) * number // workers for number in range(workers + 1)]
    memory.arrays = [pages[low:high] for low, high in itertools.pairwise(cuts)]


def _huge(percent: int) -> Callable[[Memory], None]:
    """Backed by huge pages; so many per cent of the pages, anywhere, come in four copies."""

    def build(memory: Memory) -> None:
        pages = memory.map((memory.mib << 20) // PAGE, huge=True)
        memory.fill(pages)
        groups = len(pages) * percent // 100 // COPIES
        chosen = memory.random.permutation(len(pages))[: groups * COPIES]
        memory.repeat(pages, chosen.reshape(groups, COPIES))
        memory.redundant = groups * (COPIES - 1)
        memory.arrays = [pages]

    return build


def _demo(memory: Memory) -> None:
    """The memory of `pagemerge demo`: files and tables as 8 workers of a server have them."""
    from pagemerge._demo import Memory as Demo

    workers = 8
    made = Demo.build(workers, max(1, memory.mib // workers))
    for array in made.arrays():
        data = array.view(np.uint8)
        whole = data[: data.size // PAGE * PAGE]
        memory.arrays.append(whole.view(np.uint64).reshape(-1, WORDS))
    distinct = {
        hashlib.blake2b(row, digest_size=16).digest() for array in memory.arrays for row in array
    }
    zeroes = sum(int(np.count_nonzero(~array.any(axis=1))) for array in memory.arrays)
    pages = sum(len(array) for array in memory.arrays)
    memory.redundant = pages - len(distinct) + (zeroes > 0)


CASES = {
    case.name: case
    for case in (
        Case("scattered", "half duplicates (4 copies), scattered pages", _runs(1), target=1.5),
        Case("runs16", "half duplicates (4 copies), runs of 16 pages", _runs(16), target=4),
        Case("runs512", "half duplicates (4 copies), runs of 512 pages", _runs(512), target=7),
        Case("unique", "all pages unique", _unique, target=8),
        Case("zero", "half zero pages, half unique", _zero, zero_pages=True, target=4),
        Case("arcangeli", "all pages equal but for the last word", _arcangeli, target=20),
        Case("instagram", "32 workers: 61 % volatile, 40 sharers each", _instagram),
        Case("demo", "the demo's real files, 8 workers", _demo, zero_pages=True),
    )
}

HUGE = {
    case.name: case
    for case in (
        Case(f"huge{percent}", f"huge pages, {percent} % duplicates (4 copies)", _huge(percent))
        for percent in (0, 1, 50, 100)
    )
}
