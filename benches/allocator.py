"""The allocator beside numpy's default and malloc: rate, first touch, and fragmentation.

    python benches/allocator.py [--quick] [--repeat 3] [--json FILE]

Rivals: `allocator.empty`, the same by `with allocator.numpy():`, `numpy.empty`, and malloc and free
through ctypes (whose calls cost 0.3 us by themselves). Each measurement is a process of its own.

* **pair**: microseconds to allocate and free, nothing touched.
* **used**: microseconds to allocate, write one byte in each page, and free, per page: what an array
  costs that is really used. CPU is that of the whole process, the merging thread included.
* **zeroed**: the same for `numpy.zeros` and calloc.
* **trace**: a long random trace of sizes, many small, few large. "held / live" is what the process
  really has in memory (PSS, less what it had before) by what is live, in the end and at its worst;
  "in pages" what is live rounded to pages by it; "after" what stays when all of it is freed.

With "merging" the engine merges in the background meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pagemerge
from rivals import publish, table

Result = dict[str, Any]
PAGE = pagemerge.PAGE_SIZE
RIVALS = ["allocator", "allocator merging", "allocator.numpy()", "numpy", "malloc"]
SIZES = [4096, 65_536, 1 << 20, 8 << 20, 64 << 20]


class Malloc:
    """malloc and free, as they are."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.malloc, self.calloc, self.free = libc.malloc, libc.calloc, libc.free
        self.malloc.restype = self.calloc.restype = ctypes.c_void_p
        self.malloc.argtypes, self.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        self.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]


class Held:
    """A piece of malloc's that frees itself, as arrays do."""

    def __init__(self, libc: Malloc, address: int, size: int) -> None:
        self.libc, self.address, self.size = libc, address, size

    def __del__(self) -> None:
        self.libc.free(self.address)


def rival(name: str) -> tuple[Callable[[int], Any], Callable[[int], Any], Any]:
    """How a rival allocates, how it allocates zeroes, and what must be held."""
    if name == "malloc":
        libc = Malloc()
        return (
            lambda size: Held(libc, libc.malloc(size), size),
            lambda size: Held(libc, libc.calloc(1, size), size),
            libc,
        )
    if name == "numpy":
        return (lambda size: np.empty(size, np.uint8), lambda size: np.zeros(size, np.uint8), None)
    allocator = pagemerge.Allocator()
    if name == "allocator.numpy()":
        allocator.numpy(4096).__enter__()
        empty, zeros = np.empty, np.zeros
        return (lambda size: empty(size, np.uint8), lambda size: zeros(size, np.uint8), allocator)
    if name == "allocator merging":
        allocator.engine.start()
    return (
        lambda size: allocator.empty(size, np.uint8),
        lambda size: allocator.zeros(size, np.uint8),
        allocator,
    )


def touch(piece: Any) -> None:
    if isinstance(piece, Held):
        view = np.ctypeslib.as_array((ctypes.c_uint8 * piece.size).from_address(piece.address))
        view[::PAGE] = 1
    else:
        piece[::PAGE] = 1


def pss() -> int:
    return pagemerge.memory_usage()["pss"]


def rates(name: str, size: int, seconds: float) -> Result:
    empty, zeros, _held = rival(name)

    def timed(work: Callable[[], None]) -> float:
        """Microseconds a turn, of wall time; turns until `seconds` are over."""
        work()
        turns, began = 0, time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            for _ in range(4):
                work()
            turns += 4
        return (now - began) / turns * 1e6

    def used(make: Callable[[int], Any]) -> tuple[float, float]:
        def work() -> None:
            touch(make(size))

        before = time.process_time()
        began = time.perf_counter()
        wall = timed(work)
        return wall, wall * (time.process_time() - before) / (time.perf_counter() - began)

    pair = timed(lambda: empty(size) is None)
    wall, cpu = used(empty)
    zeroed, _ = used(zeros)
    pages = size // PAGE
    return {
        "pair": pair,
        "used": wall / pages,
        "cpu": cpu / pages,
        "zeroed": zeroed / pages,
    }


def trace(name: str, steps: int, most: int) -> Result:
    empty, _, held = rival(name)
    dice = random.Random(7)
    # What is made once, at the first use.
    touch(empty(100_000))
    gc.collect()
    before, live, worst = pss(), 0, 0.0
    pieces: list[tuple[Any, int]] = []
    began = time.perf_counter()
    for step in range(steps):
        # In waves: mostly growing, then mostly shrinking.
        grows = (step // (steps // 8)) % 2 == 0
        if live < most and dice.random() < (0.65 if grows else 0.4):
            kind = dice.random()
            largest = 30_000 if kind < 0.6 else 300_000 if kind < 0.95 else 4_000_000
            size = dice.randint(4096, largest)
            piece = empty(size)
            touch(piece)
            pieces.append((piece, size))
            live += size
            del piece
        elif pieces:
            at = dice.randrange(len(pieces))
            pieces[at], pieces[-1] = pieces[-1], pieces[at]
            live -= pieces.pop()[1]
        if step % (steps // 40) == 0 and live > most // 8:
            worst = max(worst, (pss() - before) / live)
    seconds = time.perf_counter() - began
    end = (pss() - before) / live
    pages = sum(-(-size // PAGE) * PAGE for _, size in pieces)
    found = {"seconds": seconds, "end": end, "worst": max(worst, end), "live": live}
    found["rounded"] = pages / live
    pieces.clear()
    gc.collect()
    found["after"] = pss() - before
    if held is not None and hasattr(held, "trim"):
        held.trim()
        found["trimmed"] = pss() - before
    return found


def _child(what: str, *arguments: object) -> Result:
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} {arguments}: {done.stderr}")
    return json.loads(done.stdout)


def measure(quick: bool, repeat: int) -> Result:
    rivals = [
        name
        for name in RIVALS
        if not name.endswith("merging") or pagemerge.capabilities().barrier == "full"
    ]
    sizes = SIZES[:3] if quick else SIZES
    seconds, steps, most = (0.02, 2_000, 20 << 20) if quick else (0.5, 60_000, 300 << 20)
    found: Result = {"sizes": {}, "trace": {}, "repeat": repeat, "skipped": {}}
    if len(rivals) < len(RIVALS):
        found["skipped"]["allocator merging"] = pagemerge.capabilities().reasons["barrier"]
    for size in sizes:
        rows = found["sizes"][size] = {name: [] for name in rivals}
        for turn in range(repeat):
            for name in rivals if turn % 2 == 0 else rivals[::-1]:
                print(f"{size} bytes: {name}", file=sys.stderr, flush=True)
                rows[name].append(_child("rates", name, size, seconds))
    for turn in range(repeat):
        for name in rivals if turn % 2 == 0 else rivals[::-1]:
            print(f"trace: {name}", file=sys.stderr, flush=True)
            found["trace"].setdefault(name, []).append(_child("trace", name, steps, most))
    return found


def report(found: Result) -> Iterator[str]:
    for name, reason in found["skipped"].items():
        yield f"not run: {name}, because {reason}"

    def mid(rows: list[Result], what: str) -> float:
        return statistics.median(row[what] for row in rows)

    lines = []
    for size, rivals in found["sizes"].items():
        for name, rows in rivals.items():
            figures = [f"{mid(rows, what):.2f}" for what in ("pair", "used", "cpu", "zeroed")]
            lines.append([f"{size:,} {name}", *figures])
    yield table(["bytes, rival", "pair us", "used us/page", "CPU", "zeroed us/page"], lines)
    yield ""
    lines = []
    for name, rows in found["trace"].items():
        after = f"{mid(rows, 'after') / 2**20:.1f}"
        figures = [f"{mid(rows, what):.3f}" for what in ("end", "worst", "rounded", "seconds")]
        lines.append([name, *figures, after])
    yield table(["trace", "held / live", "at worst", "in pages", "s", "after, MiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, name, *rest = options.child
        if what == "rates":
            print(json.dumps(rates(name, int(rest[0]), float(rest[1]))))
        else:
            print(json.dumps(trace(name, int(rest[0]), int(rest[1]))))
        return
    found = measure(options.quick, options.repeat)
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
