"""Other allocators under Python: memory that was merged, freed and handed out again.

jemalloc, mimalloc and tcmalloc take memory back in their own ways (they keep it, discard it
by `MADV_DONTNEED` or `MADV_FREE`, or map over it), and what they know to be zero they hand out
unwritten as `calloc`'s result. A frame that lay there still would be somebody else's bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PLACES = ["/usr/lib", "/usr/local/lib", "/usr/lib64"]
SECONDS = float(os.environ.get("PAGEMERGE_STRESS_SECONDS", "2"))

PROGRAM = """
import gc, os, sys, threading, time
import numpy as np, pagemerge

with open("/proc/self/maps") as maps:
    assert os.path.realpath(os.environ["LD_PRELOAD"]) in maps.read(), "it is not loaded"
end = time.monotonic() + float(sys.argv[1])
random = np.random.default_rng(int(sys.argv[2]))
wrong = []

def others():
    # Somebody else uses memory meanwhile, and trusts that it is zero.
    mine = np.random.default_rng(2)
    while time.monotonic() < end:
        size = int(mine.choice([1_500, 5_000, 40_000, 120_000]))
        fresh = np.zeros(size)
        if fresh.any():
            wrong.append(("another thread", size))
        fresh[:] = 6.0
        if not (fresh == 6.0).all():
            wrong.append(("another thread's own", size))

thread = threading.Thread(target=others)
thread.start()
engine = pagemerge.Engine(quiet_millisecs=5)
kept, turns, merged, zeroes = [], 0, 0, 0
while time.monotonic() < end or turns < 12:
    turns += 1
    value = float(turns % 5)
    size = int(random.choice([2_000, 5_000, 30_000, 80_000]))
    arrays = [np.full(size, value) for _ in range(int(random.integers(2, 6)))]
    way = turns % 4
    if way == 0:
        merged += pagemerge.merge(*arrays).merged
    elif way == 1:
        regions = [engine.register(array) for array in arrays]
        merged += engine.settle().pages_sharing
        arrays[0][::700] = 9.0
        for region in regions:
            region.close()
        arrays[0][::700] = value
    elif way == 2:
        merged += pagemerge.merge(*arrays).merged
        arrays[1][::600] = 3.5
        arrays[1][::600] = value
        pagemerge.unmerge(*arrays)
    else:
        regions = [engine.register(array) for array in arrays]
        engine.start()
        time.sleep(0.01)
        arrays[1][:] = 8.0
        for region in regions:
            region.close()
        engine.stop()
        arrays[1][:] = value
    if not all((array == value).all() for array in arrays):
        wrong.append((way, size))
    # Some outlive the others with whom they share frames.
    kept = [*kept[-5:], (arrays[0], value)]
    if not all((array == right).all() for array, right in kept):
        wrong.append(("kept", way))
    del arrays
    for part in (0.5, 1.0, 1.2):
        fresh = np.zeros(int(size * part))
        zeroes += 1
        if fresh.any():
            wrong.append(("zeroes", way, size, int(np.count_nonzero(fresh))))
        fresh[:] = 1.0
        del fresh
    if any(memoryview(bytearray(size * 8))[::1000]):
        wrong.append(("bytearray", way))
thread.join()
print(f"{turns} turns, {merged} pages merged, {zeroes} arrays of zeroes; wrong: {wrong[:5]}")
sys.exit(bool(wrong) or merged < 100)
"""


def library(name: str) -> str:
    for place in PLACES:
        folder = Path(place)
        found = sorted([*folder.glob(f"{name}.so*"), *folder.glob(f"*/{name}.so*")])
        if found:
            return str(found[0])
    pytest.skip(f"{name} is not installed")


@pytest.mark.usefixtures("full_barrier")
@pytest.mark.parametrize("name", ["libjemalloc", "libmimalloc", "libtcmalloc_minimal"])
def test_memory_that_was_merged_is_zero_for_its_next_owner(name: str) -> None:
    seed = int.from_bytes(os.urandom(3), "little")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(SECONDS), str(seed)],
        env={**os.environ, "LD_PRELOAD": library(name)},
        capture_output=True,
        text=True,
        timeout=SECONDS * 3 + 120,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}\n{done.stderr}"
    print(done.stdout)
