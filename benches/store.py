"""Keeping values: the store beside dicts of bytes.

    python benches/store.py [--mib 64] [--repeat 5] [--sizes 100,65536] [--json FILE]

For each size and share of duplicates (0, 50 and 100 %) the same values are put, in the same order,
into each of:

dict          a dict of new bytes objects: `d[n] = bytes(view)`
dict+sha256   hash-consing by sha256: one bytes object for each digest
dict+hash     hash-consing by Python's own hash: a dict of bytes by themselves
store         pagemerge.Store
diskcache     a diskcache.Cache in memory (/dev/shm); "not run" where the package is missing

Duplicates are drawn from a hundred values that all occur. `put` is the time for all of them, `get`
that of reading each back as bytes, `memory` what the process holds more afterwards (PSS), beside
the bytes that were put. Each figure is the median of the repetitions, each in a process of its own.

Then the store alone: putting 64 KiB duplicates as a ratio to memcpy, putting unique ones as a ratio
to filling a dict, both taken in turns in one process, and what a memoryview of a blob takes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pagemerge

SIZES = (100, 1_000, 10_000, 65_536, 1 << 20)
SHARES = (0, 50, 100)
DIFFERENT = 100
Result = dict[str, Any]


def trim() -> None:
    """Give back what is free: nobody finds memory that the one before him has left warm."""
    ctypes.CDLL(None).malloc_trim(0)


class Values:
    """The values, each in the same buffer, as they would come from a socket."""

    def __init__(self, size: int, share: int, count: int) -> None:
        self.size, self.share, self.count = size, share, count
        rng = random.Random(size * 1000 + share)
        self.common = [rng.randbytes(size) for _ in range(min(DIFFERENT, count))]
        self.base = bytearray(rng.randbytes(size))
        self.buffer = bytearray(size)
        trim()

    def __iter__(self) -> Iterator[memoryview]:
        rng = random.Random(7)
        # By a view: assigning to a bytearray makes another one first, whose memory would then be
        # there for whoever comes next.
        buffer = memoryview(self.buffer)
        view = buffer.toreadonly()
        base = bytearray(self.base)
        for n in range(self.count):
            if n % 100 < self.share:
                buffer[:] = self.common[rng.randrange(len(self.common))]
            else:
                # A few bytes of each page differ: making all of them anew takes longer than keeping
                # them.
                for at in range(0, self.size, 1024):
                    end = min(at + 8, self.size)
                    base[at:end] = rng.randbytes(end - at)
                buffer[:] = base
            yield view


class Dict:
    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}

    def put(self, key: int, view: memoryview) -> None:
        self.kept[key] = bytes(view)

    def get(self, key: int) -> bytes:
        return self.kept[key]

    def close(self) -> None: ...


class Sha256(Dict):
    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, bytes] = {}

    def put(self, key: int, view: memoryview) -> None:
        digest = hashlib.sha256(view).digest()
        found = self.known.get(digest)
        if found is None:
            found = self.known[digest] = bytes(view)
        self.kept[key] = found


class Hash(Dict):
    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, bytes] = {}

    def put(self, key: int, view: memoryview) -> None:
        value = bytes(view)
        self.kept[key] = self.known.setdefault(value, value)


class OurStore:
    def __init__(self) -> None:
        self.store = pagemerge.Store()
        self.kept: dict[int, pagemerge.Blob] = {}

    def put(self, key: int, view: memoryview) -> None:
        self.kept[key] = self.store.put(view)

    def get(self, key: int) -> bytes:
        return bytes(self.kept[key])

    def close(self) -> None: ...


class DiskCache:
    def __init__(self) -> None:
        import diskcache

        self.folder = tempfile.mkdtemp(dir="/dev/shm")
        self.cache = diskcache.Cache(self.folder, eviction_policy="none", size_limit=1 << 40)

    def put(self, key: int, view: memoryview) -> None:
        self.cache[key] = bytes(view)

    def get(self, key: int) -> bytes:
        found: bytes = self.cache[key]
        return found

    def close(self) -> None:
        self.cache.close()
        shutil.rmtree(self.folder)


RIVALS: dict[str, Callable[[], Any]] = {
    "dict": Dict,
    "dict+sha256": Sha256,
    "dict+hash": Hash,
    "store": OurStore,
    "diskcache": DiskCache,
}


def measure(rival: str, size: int, share: int, count: int) -> Result:
    """One case, in this process: times and memory."""
    made = Values(size, share, count)
    holder = RIVALS[rival]()
    gc.collect()
    gc.disable()
    before = pagemerge.memory_usage()["pss"]
    spent = 0
    clock = time.perf_counter_ns
    for n, view in enumerate(made):
        start = clock()
        holder.put(n, view)
        spent += clock() - start
    memory = pagemerge.memory_usage()["pss"] - before
    order = list(range(count))
    random.Random(1).shuffle(order)
    start = clock()
    for key in order:
        holder.get(key)
    got = clock() - start
    wrong = sum(holder.get(n) != view for n, view in enumerate(made) if n % 7 == 0)
    result: Result = {
        "put_ns": spent / count,
        "get_ns": got / count,
        "memory_bytes": memory,
        "logical_bytes": size * count,
        "count": count,
        "wrong": wrong,
    }
    if rival == "store":
        result["stats"] = dict(holder.store.stats())
    holder.close()
    return result


def ratios(mib: int, repeat: int) -> Result:
    """What the store is bound to, in turns in one process: everything as a ratio."""
    size = 65_536
    count = max(16, mib * 1024 * 1024 // size)
    source = bytearray(random.Random(1).randbytes(size * count))
    view = memoryview(source).toreadonly()
    parts = [view[at : at + size] for at in range(0, size * count, size)]
    target = memoryview(bytearray(size * count))
    places = [target[at : at + size] for at in range(0, size * count, size)]
    clock = time.perf_counter_ns
    gc.disable()

    def timed(work: Callable[[], object]) -> int:
        trim()
        start = clock()
        kept = work()
        spent = clock() - start
        del kept
        return spent

    def copy() -> None:
        for place, part in zip(places, parts, strict=True):
            place[:] = part

    def fill() -> dict[int, bytes]:
        kept = {}
        for n, part in enumerate(parts):
            kept[n] = bytes(part)
        return kept

    def put(store: pagemerge.Store) -> Callable[[], dict[int, pagemerge.Blob]]:
        def work() -> dict[int, pagemerge.Blob]:
            kept = {}
            for n, part in enumerate(parts):
                kept[n] = store.put(part)
            return kept

        return work

    small = [b"%07d" % n * 14 for n in range(20_000)]

    def put_small(store: pagemerge.Store) -> Callable[[], list[pagemerge.Blob]]:
        return lambda: [store.put(value) for value in small]

    engine = pagemerge.Engine()
    rounds = []
    copy()
    for _ in range(repeat):
        store = pagemerge.Store(engine=engine)
        held = put(store)()
        took = {
            "memcpy": timed(copy),
            "duplicate": timed(put(store)),
            "dict": timed(fill),
            "unique": timed(put(pagemerge.Store(engine=engine))),
        }
        blob = held[3]
        memoryview(blob)
        calls = 20_000
        start = clock()
        for _ in range(calls):
            memoryview(blob)
        took["memoryview"] = (clock() - start) / calls
        took["small_unique"] = timed(put_small(store)) / len(small)
        kept = put_small(store)()
        took["small_duplicate"] = timed(put_small(store)) / len(small)
        del kept, held, blob, store
        rounds.append(took)
    mid = {name: statistics.median(took[name] for took in rounds) for name in rounds[0]}
    return {
        "value_bytes": size,
        "count": count,
        "duplicate_put_of_memcpy": statistics.median(r["memcpy"] / r["duplicate"] for r in rounds),
        "unique_put_of_dict": statistics.median(r["dict"] / r["unique"] for r in rounds),
        "memoryview_ns": mid["memoryview"],
        "memcpy_ns": mid["memcpy"] / count,
        "duplicate_put_ns": mid["duplicate"] / count,
        "unique_put_ns": mid["unique"] / count,
        "dict_ns": mid["dict"] / count,
        "put_98_bytes_unique_ns": mid["small_unique"],
        "put_98_bytes_duplicate_ns": mid["small_duplicate"],
    }


def alone(*arguments: str) -> Result:
    """What this file measures in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: Result = json.loads(done.stdout)
    return found


def why_not(rival: str) -> str | None:
    if rival != "diskcache":
        return None
    try:
        import diskcache  # noqa: F401
    except ImportError:
        return "not run: the package diskcache is not installed"
    return None if os.access("/dev/shm", os.W_OK) else "not run: /dev/shm cannot be written"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=64, help="of values in each case (64)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--most", type=int, default=200_000, help="values in a case, at most")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--ratios", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        rival, size, share, count = chosen.one
        print(json.dumps(measure(rival, int(size), int(share), int(count))))
        return
    if chosen.ratios:
        print(json.dumps(ratios(chosen.mib, chosen.repeat)))
        return
    figures: Result = {"mib": chosen.mib, "repeat": chosen.repeat, "cases": {}, "skipped": {}}
    print(f"{'bytes':>8} {'dup':>4} {'':12} {'put us':>8} {'get us':>8} {'memory/put':>10}")
    for size in map(int, chosen.sizes.split(",")):
        count = max(20, min(chosen.most, chosen.mib * 1024 * 1024 // size))
        for share in SHARES:
            for rival in RIVALS:
                if reason := why_not(rival):
                    figures["skipped"][rival] = reason
                    continue
                runs = [
                    alone("--one", rival, str(size), str(share), str(count))
                    for _ in range(chosen.repeat)
                ]
                if wrong := sum(run["wrong"] for run in runs):
                    sys.exit(f"{wrong} values read wrong from {rival}: this is a bug")
                row = {
                    name: statistics.median(run[name] for run in runs)
                    for name in ("put_ns", "get_ns", "memory_bytes", "logical_bytes", "count")
                }
                if "stats" in runs[0]:
                    row["stats"] = runs[0]["stats"]
                figures["cases"][f"{size}/{share}/{rival}"] = row
                print(
                    f"{size:8} {share:4} {rival:12} {row['put_ns'] / 1000:8.2f}"
                    f" {row['get_ns'] / 1000:8.2f}"
                    f" {row['memory_bytes'] / row['logical_bytes']:10.3f}",
                    flush=True,
                )
    for rival, reason in figures["skipped"].items():
        print(f"{rival}: {reason}")
    found = figures["ratios"] = alone(
        "--ratios", "--mib", str(chosen.mib), "--repeat", str(chosen.repeat)
    )
    print(
        f"64 KiB duplicates: {found['duplicate_put_of_memcpy']:.2f} of memcpy's speed;"
        f" unique: {found['unique_put_of_dict']:.2f} of filling a dict;"
        f" memoryview {found['memoryview_ns']:.0f} ns"
    )
    if chosen.json:
        with open(chosen.json, "w") as file:  # noqa: PTH123
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
