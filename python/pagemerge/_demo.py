"""What ``pagemerge demo`` does: the memory of a pre-fork server, merged and checked.

Each worker holds private copies of the same real data: this Python's standard library and shared
objects as read from disk, and arrays made from them. Besides, each has pages that only it has, and
pages that are all zero.
"""

from __future__ import annotations

import mmap
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagemerge._core import PAGE_SIZE, Engine, memory_usage

Array = NDArray[Any]

# Bytes compared at a time.
PIECE = 1 << 20
# Parts of a worker's memory.
FILES, TABLE, ZERO = 0.45, 0.35, 0.12


def _files() -> Iterator[Path]:
    """Real files that any machine with Python has, in an order that does not change."""
    libraries = Path(sysconfig.get_path("stdlib"))
    extensions = Path(np.__file__).parent
    for root, pattern in ((libraries, "*.so*"), (extensions, "*.so*"), (libraries, "*.py")):
        yield from sorted(path for path in root.rglob(pattern) if path.is_file())


def _file_bytes(size: int) -> Array:
    """``size`` bytes of real files, each beginning on a page of its own, as loaders have them."""
    data = np.zeros(size, dtype=np.uint8)
    at = 0
    for turn in range(256):
        for path in _files():
            # Where the files are too few, they come again in another guise: copies within one
            # worker would make the saving look better than it is.
            content = np.fromfile(path, dtype=np.uint8)[: size - at] ^ np.uint8(turn)
            data[at : at + content.size] = content
            at += -(-content.size // PAGE_SIZE) * PAGE_SIZE
            if at >= size:
                return data
    raise FileNotFoundError("this Python has too little of a standard library on disk")


def _copy(original: Array) -> Array:
    """Return a private copy that begins on a page, as memory from mmap or a loader does.

    Equal arrays at different places in a page have no equal pages, and malloc puts small arrays
    anywhere.
    """
    memory = mmap.mmap(-1, original.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(memory, dtype=original.dtype)
    copy[:] = original
    return copy


@dataclass
class Memory:
    """All workers' arrays, and what they have to hold."""

    originals: list[Array]
    """What every worker has a copy of."""
    workers: list[list[Array]]

    @classmethod
    def build(cls, workers: int, mebibytes: int) -> Memory:
        """Make ``workers`` sets of arrays of about ``mebibytes`` MiB each."""
        size = mebibytes << 20
        files = _file_bytes(int(size * FILES))
        # A lookup table as programs make them: numbers derived from bytes.
        source = np.resize(files, int(size * TABLE) // 4)
        table = np.sqrt(source.astype(np.float32) + np.arange(source.size, dtype=np.float32))
        originals = [files, table, np.zeros(int(size * ZERO), dtype=np.uint8)]
        rest = size - sum(array.nbytes for array in originals)
        made = []
        for number in range(workers):
            arrays = []
            for original in originals:
                arrays.append(_copy(original))
            arrays.append(_copy(cls._own(number, rest)))
            made.append(arrays)
        return cls(originals, made)

    @staticmethod
    def _own(worker: int, size: int) -> Array:
        """Return what only one worker has."""
        return np.random.default_rng(worker).integers(0, 256, size, dtype=np.uint8)

    def arrays(self) -> Iterator[Array]:
        """Yield every array of every worker."""
        for arrays in self.workers:
            yield from arrays

    def wrong_bytes(self) -> int:
        """Read every byte, and count those that are not what they have to be."""
        wrong = 0
        for number, arrays in enumerate(self.workers):
            expected = [*self.originals, self._own(number, arrays[-1].nbytes)]
            for array, original in zip(arrays, expected, strict=True):
                have, want = array.view(np.uint8), original.view(np.uint8)
                # In pieces, because the comparison's own memory would show in the figures.
                for at in range(0, have.size, PIECE):
                    piece = slice(at, at + PIECE)
                    wrong += int(np.count_nonzero(have[piece] != want[piece]))
        return wrong

    def write_one_worker(self) -> int:
        """Let the first worker write to a page in sixteen of its table; return the bytes it wrote.

        The others must not notice, which :meth:`wrong_bytes` shows after :meth:`undo`.
        """
        table = self.workers[0][1].view(np.uint8)
        table[:: 16 * PAGE_SIZE] ^= 0xFF
        return table[:: 16 * PAGE_SIZE].size

    def undo(self) -> None:
        """Take back what :meth:`write_one_worker` did."""
        self.write_one_worker()


def run(
    workers: int, mebibytes: int, progress: Callable[[str], None], settings: dict[str, Any]
) -> dict[str, Any]:
    """Merge the memory of ``workers`` workers, check it, and return the figures."""
    progress(f"reading files, making {workers} x {mebibytes} MiB")
    memory = Memory.build(workers, mebibytes)
    wrong = memory.wrong_bytes()
    with Engine(**settings) as engine:
        before = engine.stats()
        pss_before = memory_usage()["pss"]
        progress("merging")
        began = time.perf_counter()
        pages = sum(engine.register(array).pages for array in memory.arrays())
        after = engine.settle()
        seconds = time.perf_counter() - began
        progress("checking every byte")
        wrong += memory.wrong_bytes()
        # Measured after everything has been read, when page tables are as full as they get.
        pss_after = memory_usage()["pss"]
        progress("one worker writes")
        written = memory.write_one_worker()
        wrong_written = abs(memory.wrong_bytes() - written)
        memory.undo()
        progress("un-merging")
        began = time.perf_counter()
    unmerge_seconds = time.perf_counter() - began
    progress("checking every byte again")
    wrong_unmerged = memory.wrong_bytes()
    changed = after - before
    return {
        "workers": workers,
        "mebibytes_each": mebibytes,
        "pages": pages,
        "merged": after.pages_shared + after.pages_sharing,
        "zero": after.ksm_zero_pages,
        "frames": after.pages_shared,
        "frames_bytes": after.frames_bytes,
        "bytes_saved": (after.pages_sharing + after.ksm_zero_pages) * PAGE_SIZE,
        "seconds": seconds,
        "cpu_seconds": after.cpu_nanos / 1e9,
        "unmerge_seconds": unmerge_seconds,
        "pss_before": pss_before,
        "pss_after": pss_after,
        "pss_unmerged": memory_usage()["pss"],
        "wrong_bytes": wrong + wrong_written + wrong_unmerged,
        "barrier": str(after.barrier),
        "write_tracking": after.write_tracking,
        "skipped": dict(after.skipped),
        "counters": {
            name: value
            for name, value in dict(changed).items()
            if isinstance(value, int) and not isinstance(value, bool) and value
        },
    }
