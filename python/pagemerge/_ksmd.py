"""The kernel's own KSM as a rival: runs ksmd over a child process and reads what it did.

There is one ksmd for the whole machine, so a lock file keeps programs of this kind apart, every
value in sysfs is read first and written back afterwards, and a machine whose KSM is in use by
somebody else is left alone.

The child (``python -m pagemerge._ksmd``) holds the memory; it answers one line of JSON to each line
it is sent.
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
from typing import IO, Any

SYSFS = Path("/sys/kernel/mm/ksm")
MADV_MERGEABLE = 12

# Given back in this order: the advisor refuses pages_to_scan while it is on, and run comes last.
KNOBS = (
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "use_zero_pages",
    "advisor_mode",
    "run",
)
# As fast as it goes, and with zero pages, as our own defaults have them.
FULL_SPEED = {
    "advisor_mode": "none",
    "pages_to_scan": "20000",
    "sleep_millisecs": "0",
    "use_zero_pages": "1",
}
COUNTERS = (
    "full_scans",
    "general_profit",
    "ksm_zero_pages",
    "pages_scanned",
    "pages_shared",
    "pages_sharing",
    "pages_skipped",
    "pages_unshared",
    "pages_volatile",
    "stable_node_chains",
    "stable_node_dups",
)


class KsmUnavailableError(Exception):
    """The kernel's KSM cannot be used here, and why."""


def _read(name: str) -> str:
    text = (SYSFS / name).read_text(encoding="ascii").strip()
    # A choice shows itself in brackets: "[none] scan-time".
    return text.split("[")[1].split("]")[0] if "[" in text else text


def _write(name: str, value: str) -> None:
    (SYSFS / name).write_text(value, encoding="ascii")


def counters() -> dict[str, int]:
    """Read the counters that this kernel has."""
    return {name: int(_read(name)) for name in COUNTERS if (SYSFS / name).exists()}


@contextmanager
def borrowed() -> Iterator[None]:
    """Have the machine's ksmd to ourselves, and leave it as it was found."""
    if not SYSFS.is_dir():
        raise KsmUnavailableError("this kernel has no KSM (CONFIG_KSM)")
    if not os.access(SYSFS / "run", os.W_OK):
        raise KsmUnavailableError(f"{SYSFS} may be written by root only")
    with (Path(tempfile.gettempdir()) / "ksm.lock").open("w") as lock:
        _lock(lock)
        before = {name: _read(name) for name in KNOBS if (SYSFS / name).exists()}
        if before["run"] == "1" or counters()["pages_shared"]:
            raise KsmUnavailableError("ksmd is in use on this machine, and is left alone")
        try:
            yield
        finally:
            # Un-merges, so that nothing of ours is left in the counters.
            _write("run", "2")
            if "advisor_mode" in before:
                _write("advisor_mode", "none")
            for name in before:
                _write(name, before[name])


def _lock(file: IO[str], patience: float = 60) -> None:
    """Lock a file, waiting for whoever has it for a while."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise KsmUnavailableError(
                    "another program is measuring ksmd; try again later"
                ) from None
        time.sleep(0.1)


def _cpu_seconds() -> float:
    """CPU time of ksmd so far."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        if name == "ksmd":
            fields = rest.split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Child:
    """A process that holds a copy of the demonstration's memory for ksmd."""

    def __init__(self, workers: int, mebibytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pagemerge._ksmd", str(workers), str(mebibytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("ready")

    def ask(self, question: str) -> Any:
        """Send a line and read the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise KsmUnavailableError(f"the child process ended with {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()


def run(workers: int, mebibytes: int, limit_seconds: float = 300) -> dict[str, Any]:
    """Let ksmd merge a copy of the demonstration's memory; return what it did."""
    with borrowed(), Child(workers, mebibytes) as child:
        for name, value in FULL_SPEED.items():
            if (SYSFS / name).exists():
                _write(name, value)
        child.ask("mergeable")
        pss_before = child.ask("pss")
        before = counters()
        cpu = _cpu_seconds()
        began = time.perf_counter()
        _write("run", "1")
        scans = before["full_scans"]
        last: tuple[int, ...] = ()
        while True:
            time.sleep(0.02)
            now = counters()
            state = (now["pages_shared"], now["pages_sharing"], now.get("ksm_zero_pages", 0))
            if now["full_scans"] > scans:
                # Three passes are needed at least; then a whole one that changes nothing.
                if now["full_scans"] - before["full_scans"] > 3 and state == last:
                    break
                scans, last = now["full_scans"], state
            if time.perf_counter() - began > limit_seconds:
                raise KsmUnavailableError(f"ksmd was not done after {limit_seconds:.0f} s")
        seconds = time.perf_counter() - began
        _write("run", "0")
        after = counters()
        return {
            "seconds": seconds,
            "cpu_seconds": _cpu_seconds() - cpu,
            "pss_before": pss_before,
            "pss_after": child.ask("pss"),
            "wrong_bytes": child.ask("verify"),
            "settings": FULL_SPEED,
            "counters": {name: after[name] - before[name] for name in after},
        }


def _serve(workers: int, mebibytes: int) -> None:
    import ctypes

    import pagemerge._core as core
    from pagemerge._demo import Memory

    memory = Memory.build(workers, mebibytes)
    libc = ctypes.CDLL(None, use_errno=True)
    for line in sys.stdin:
        answer: object = None
        match line.strip():
            case "mergeable":
                for array in memory.arrays():
                    start, end = core._span(array)
                    if libc.madvise(
                        ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_MERGEABLE
                    ):
                        raise OSError(ctypes.get_errno(), "madvise(MADV_MERGEABLE)")
            case "pss":
                answer = core.memory_usage()["pss"]
            case "verify":
                answer = memory.wrong_bytes()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
