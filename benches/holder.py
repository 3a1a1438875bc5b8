"""The child process of every measurement: it holds the memory, and does to it what it is told.

One line of JSON comes in, `[command, arguments...]`, and one goes out. Each rival gets a new
process, with the same modules loaded and the same memory, made by the same instructions in the same
order.

What is measured here is the CPU time of this whole process, that is of all of its threads, user and
system, and the time on the wall, around nothing but the call concerned.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pagemerge
from memory import CASES, HUGE, PAGE, Memory
from pagemerge._core import memory_usage

MADV_MERGEABLE = 12
STATE = ("pages_shared", "pages_sharing", "ksm_zero_pages", "pages_unshared")
libc = ctypes.CDLL(None, use_errno=True)


class Timer:
    """CPU and wall seconds of a block."""

    def __enter__(self) -> Timer:
        self._wall, self._cpu = time.perf_counter_ns(), time.process_time_ns()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cpu = (time.process_time_ns() - self._cpu) / 1e9
        self.wall = (time.perf_counter_ns() - self._wall) / 1e9

    def figures(self) -> dict[str, float]:
        return {"cpu": self.cpu, "wall": self.wall}


class Holder:
    """One method for each command."""

    def build(self, case: str, mib: int, seed: int) -> dict[str, Any]:
        with Timer() as timer:
            self.memory = Memory((CASES | HUGE)[case], mib, seed)
        return {
            "pages": self.memory.pages,
            "redundant": self.memory.redundant,
            **timer.figures(),
        }

    # -- pagemerge

    def engine(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Makes an engine and registers everything."""
        with Timer() as timer:
            self.merger = pagemerge.Engine(**settings)
            for array in self.memory.arrays:
                self.merger.register(array)
        return {**timer.figures(), "settings": _plain(self.merger.settings.as_dict())}

    def scan(self) -> dict[str, Any]:
        """One full pass."""
        with Timer() as timer:
            stats = self.merger.scan()
        return {
            **timer.figures(),
            "state": [stats[name] for name in STATE],
            "scanned": stats.pages_scanned,
            "skipped": stats.pages_skipped,
        }

    def stats(self) -> Any:
        return _plain(dict(self.merger.stats()))

    def close(self) -> dict[str, float]:
        """Un-merges everything."""
        with Timer() as timer:
            self.merger.close()
        return timer.figures()

    def start(self) -> None:
        """Merges in the background."""
        self.merger.start()

    def sparse(self, mib: int, every: int) -> dict[str, Any]:
        """Registers a space of which one page in `every` has ever been touched, and scans it."""
        memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        touched = np.frombuffer(memory, dtype=np.uint64)[:: every * PAGE // 8]
        if every * PAGE < mib << 20:
            touched[:] = np.arange(1, touched.size + 1, dtype=np.uint64)
        with Timer() as making:
            self.merger = pagemerge.Engine()
            self.merger.register(memory)
        passes = [self.scan() for _ in range(8)]
        metadata = self.merger.stats().metadata_bytes
        with Timer() as closing:
            self.merger.close()
        return {
            "register": making.figures(),
            "first": passes[0],
            "rest": min(passes[3:], key=lambda entry: entry["cpu"]),
            "unregister": closing.figures(),
            "touched": touched.size,
            "metadata_bytes": metadata,
        }

    # -- the kernel

    def mergeable(self) -> dict[str, float]:
        """Hands everything to ksmd."""
        with Timer() as timer:
            for array in self.memory.arrays:
                start = array.__array_interface__["data"][0]
                if libc.madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(array.nbytes), MADV_MERGEABLE
                ):
                    raise OSError(ctypes.get_errno(), "madvise(MADV_MERGEABLE) failed")
        return timer.figures()

    # -- a dict

    def find(self) -> dict[str, Any]:
        """Finds what could be merged as anybody would at first, and merges nothing."""
        with Timer() as timer:
            seen: dict[bytes, int] = {}
            for array in self.memory.arrays:
                data = memoryview(array).cast("B")
                for at in range(0, len(data), PAGE):
                    digest = hashlib.blake2b(data[at : at + PAGE], digest_size=16).digest()
                    seen[digest] = seen.get(digest, 0) + 1
            found = sum(seen.values()) - len(seen)
        return {**timer.figures(), "state": [len(seen), found, 0, 0]}

    # -- the program that owns the memory

    def churn(self) -> dict[str, float]:
        with Timer() as timer:
            self.memory.churn()
        return timer.figures()

    def change(self, share: float) -> dict[str, float]:
        with Timer() as timer:
            count = self.memory.change(share)
        return {**timer.figures(), "pages": count}

    def huge(self) -> int:
        """Bytes of this process that are backed by huge pages."""
        text = Path("/proc/self/smaps_rollup").read_text()
        [line] = [line for line in text.splitlines() if line.startswith("AnonHugePages")]
        return int(line.split()[1]) * 1024

    def pss(self) -> int:
        return memory_usage()["pss"]

    def verify(self) -> dict[str, float]:
        with Timer() as timer:
            wrong = self.memory.wrong()
        return {**timer.figures(), "wrong": wrong}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def serve() -> None:
    """Answers until the input ends. What a command raises is the answer, too."""
    answers, sys.stdout = sys.stdout, sys.stderr
    holder = Holder()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = {"answer": getattr(holder, command)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    np.seterr(over="ignore")
    serve()
