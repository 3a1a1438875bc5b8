"""What a benchmark borrows of the machine, and how all of it comes back.

* The kernel's KSM: `tests/ksm_kernel.py` has the lock, the guard process that puts every value back
  whatever happens to us, and the way to make ksmd do exactly one pass. Here it is asked less often
  whether a pass is over, because the asking takes CPU time that a measurement would feel.
* `vm.max_map_count`: each merged page that has no merged neighbour is a mapping, and splits one. It
  is raised under the lock that the tests have for such settings; a keeper process puts it back when
  our end of its pipe closes, which it does also when we are killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import ksm_kernel
from ksm_kernel import Ksm, UnavailableError, find_ksmd

MAPPINGS = Path("/proc/sys/vm/max_map_count")
STATE = ("pages_shared", "pages_sharing", "ksm_zero_pages", "pages_unshared")
PAGE = os.sysconf("SC_PAGE_SIZE")
LOCK = Path(tempfile.gettempdir()) / "pagemerge-tests-machine.lock"

__all__ = [
    "Child",
    "FullSpeed",
    "UnavailableError",
    "ksm_kernel",
    "ksmd_cpu",
    "mappings",
    "why_no_ksmd",
]


def ksmd_cpu() -> float:
    """CPU seconds of ksmd since it began: what the scheduler has counted for that thread."""
    return int(Path(f"/proc/{_ksmd()}/schedstat").read_text().split()[0]) / 1e9


_found: list[int] = []


def _ksmd() -> int:
    if not _found:
        pid = find_ksmd()
        if pid is None:
            raise UnavailableError("ksmd is not to be seen: this is a process namespace")
        _found.append(pid)
    return _found[0]


def why_no_ksmd() -> str | None:
    """Why the kernel is no rival here; None if it is."""
    reason = ksm_kernel.why_not()
    if reason:
        return reason
    if not os.access(ksm_kernel.KSM / "run", os.W_OK):
        return f"{ksm_kernel.KSM} cannot be written: sysfs is mounted read-only"
    try:
        ksmd_cpu()
    except (UnavailableError, OSError) as error:
        return str(error)
    return None


class FullSpeed(Ksm):
    """The machine's ksmd, one pass at a time, as fast as it goes."""

    def timed_pass(self) -> dict[str, Any]:
        """One full pass: what it took, and where the counters are."""
        before = int(ksm_kernel.read("full_scans"))
        deadline = time.monotonic() + self._pass_seconds
        cpu, wall = ksmd_cpu(), time.perf_counter()
        ksm_kernel.write("run", 1)
        try:
            # After a pass ksmd sleeps for ever, so being late here does no harm.
            while int(ksm_kernel.read("full_scans")) == before:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ksmd finished no pass in {self._pass_seconds} s")
                time.sleep(0.001)
            wall = time.perf_counter() - wall
        finally:
            ksm_kernel.write("run", 0)
            self._park()
        now = self.counters()
        return {
            "cpu": ksmd_cpu() - cpu,
            "wall": wall,
            "state": [now[name] for name in STATE],
            "scanned": now["pages_scanned"],
            "skipped": now["pages_skipped"],
        }


@contextmanager
def mappings(wanted: int) -> Iterator[int]:
    """Lets processes have `wanted` mappings at least, where this process may; yields how many."""
    now = int(MAPPINGS.read_text())
    if now >= wanted or not os.access(MAPPINGS, os.W_OK):
        yield now
        return
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = MAPPINGS.read_text().strip()
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", f"cat > /dev/null; echo {before} > {MAPPINGS}"],
            stdin=subprocess.PIPE,
            pass_fds=[lock.fileno()],  # a share of the lock: it is held until the value is back
            start_new_session=True,
        )
        try:
            MAPPINGS.write_text(str(max(wanted, int(before))))
            yield int(MAPPINGS.read_text())
        finally:
            assert keeper.stdin  # PIPE was asked for
            keeper.stdin.close()
            keeper.wait()


class Child:
    """A process that answers a line of JSON with a line of JSON. A context manager."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @classmethod
    def holder(cls) -> Child:
        """What `holder.py` is."""
        return cls(sys.executable, str(Path(__file__).with_name("holder.py")))

    def ask(self, *question: object) -> Any:
        assert self._process.stdin  # PIPE was asked for
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # Its end is the answer.
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child ended with {self._process.wait()} at {question}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{question} failed in the child: {answer['error']}")
        return answer["answer"]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        # Nothing has to be put in order in a process that only holds memory.
        self._process.kill()
        self._process.communicate()
