"""Torture for stores: everything that can happen to one, at once.

    python tests/torture_store.py --seconds 60 [--seed N]

Threads put values made of few different pages into stores of one engine (two of one domain, one of
them with a limit), read them back in every way, and drop them. Meanwhile memory with the same pages
is registered with that engine, written, merged in the background, un-merged and freed, the run
mode changes, and the process forks: children read what they inherited while the parent drops it.
What was put stands beside each blob as plain bytes. At the end nothing may be left.

The seed decides what each thread does, not when: a failure may need several runs to show again.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import random
import secrets
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable

import pagemerge

PAGE = pagemerge.PAGE_SIZE
Held = list[tuple[pagemerge.Blob, bytes]]


class Torture:
    def __init__(self, seed: int, seconds: float) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.until = time.monotonic() + seconds
        self.pages = [rng.randbytes(PAGE) for _ in range(40)] + [bytes(PAGE)]
        self.engine = pagemerge.Engine(
            sleep_millisecs=1,
            pages_to_scan=20_000,
            thp_min_duplicates=rng.choice((1, 32)),
            remerge=rng.choice(("quiet", "never")),
            quiet_millisecs=50,
        )
        self.stores = [
            pagemerge.Store("one", engine=self.engine),
            pagemerge.Store("two", engine=self.engine),
            pagemerge.Store("one", max_bytes=4 << 20, engine=self.engine),
        ]
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []

    def value(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.5:
            pages = rng.randrange(1, rng.choice((4, 40, 700)))
            whole = b"".join(rng.choice(self.pages) for _ in range(pages))
            return whole + rng.randbytes(rng.choice((0, 0, 1, 77, 4000)))
        if kind < 0.8:
            return rng.randbytes(rng.choice((5, 40, 900, 3_000, 4_096, 20_000, 300_000)))
        return bytes([rng.randrange(3)]) * rng.randrange(60_000)

    def put_and_read(self, rng: random.Random) -> None:
        held: dict[int, tuple[pagemerge.Blob, bytes]] = {}
        while time.monotonic() < self.until:
            value = self.value(rng)
            source = bytearray(value) if rng.random() < 0.3 else value
            try:
                held[rng.randrange(150)] = rng.choice(self.stores).put(source), value
                self.done["puts"] += 1
            except pagemerge.StoreFullError:
                self.done["full"] += 1
            if not held:
                continue
            blob, value = rng.choice(list(held.values()))
            kind = rng.random()
            if kind < 0.3:
                assert blob == value
            elif kind < 0.5:
                assert memoryview(blob) == value
            elif kind < 0.6:
                low = rng.randrange(len(value) + 1)
                high = rng.randrange(low, len(value) + 1)
                assert bytes(blob[low:high]) == value[low:high]
            elif kind < 0.65:
                assert b"".join(blob.segments()) == value
            elif kind < 0.66:
                held.clear()
        assert all(bytes(blob) == value for blob, value in held.values())

    def merge_beside(self, rng: random.Random) -> None:
        while time.monotonic() < self.until:
            pages = rng.randrange(10, 600)
            memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            shadow = bytearray(b"".join(rng.choice(self.pages) for _ in range(pages)))
            memory[:] = bytes(shadow)
            region = self.engine.register(memory, rng.choice(("one", "two")))
            self.engine.run = 0 if rng.random() < 0.3 else 1
            time.sleep(rng.random() * 0.5)
            for _ in range(20):
                at = rng.randrange(pages) * PAGE
                memory[at : at + PAGE] = shadow[at : at + PAGE] = rng.choice(self.pages)
            if rng.random() < 0.3:
                self.engine.scan()
            assert memory[:] == shadow
            if rng.random() < 0.2:
                self.engine.run = 2
            self.engine.unregister(region)
            assert memory[:] == shadow
            memory.close()
            self.done["regions"] += 1

    def fork(self, rng: random.Random) -> None:
        while time.monotonic() < self.until:
            values = [self.value(rng) for _ in range(12)]
            mine = [(rng.choice(self.stores[:2]).put(value), value) for value in values]
            time.sleep(rng.random() * 0.2)
            child = os.fork()
            if not child:
                self._child(mine)
            assert all(blob == value for blob, value in mine[::2])
            del mine[::2]
            _, status = os.waitpid(child, 0)
            assert status == 0, f"a child ended with {status}"
            self.done["forks"] += 1

    def _child(self, mine: Held) -> None:
        try:
            for _ in range(3):
                for blob, value in mine:
                    assert bytes(blob) == value
                    assert memoryview(blob) == value
                    assert blob == value
                time.sleep(0.05)
            mine.clear()
            gc.collect()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def run(self) -> None:
        def guarded(work: Callable[[random.Random], None], number: int) -> None:
            try:
                work(random.Random(self.seed * 100 + number))
            except BaseException:
                self.failed.append(traceback.format_exc())

        actors = [*[self.put_and_read] * 3, self.merge_beside, self.fork]
        threads = [
            threading.Thread(target=guarded, args=(work, number))
            for number, work in enumerate(actors)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        merged = self.engine.stats()
        print(dict(self.done), f"merged {merged.pages_merged}, broken {merged.cow_broken}")
        if self.failed:
            sys.exit(f"seed {self.seed}:\n" + "\n".join(self.failed))
        for store in self.stores:
            stats = store.stats()
            assert (stats.blobs, stats.entries, stats.unique_bytes) == (0, 0, 0), stats
            assert stats.spare_bytes < 1 << 20, stats
        self.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Torture for stores.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    Torture(chosen.seed, chosen.seconds).run()


if __name__ == "__main__":
    main()
