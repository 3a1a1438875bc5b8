"""Drive the kernel's own ksmd, one full pass at a time, and give the machine back as it was.

The parity tests let ksmd and an `Engine` scan equal memory and compare the counters after every
pass. This module is the kernel's half: `Ksm` borrows the machine's KSM, `Worker` is a process of
its own that holds memory for it, so that an engine can live in the test's process undisturbed.

How one pass is stepped
    `pages_to_scan` is so large that a batch is a full pass (a batch never spans the end of one),
    and `sleep_millisecs` so large that ksmd then sleeps for ever. ksmd has two ways of sleeping:
    timed, between batches, which only a *change* of `sleep_millisecs` ends, and *parked*, when it
    should not run, which `run=1` ends at once. A step is: `run=1` (ksmd is parked, so the pass
    starts), wait until `full_scans` has moved, `run=0` (waits for the batch in progress), then
    change `sleep_millisecs` as soon as ksmd is asleep, so that it wakes, sees `run=0`, and parks.
    Parked with `run=1` and nothing registered, it would start a pass of its own as soon as anybody
    registers; so `run` is 1 only while a pass is wanted.

What is borrowed is given back
    * Every writable sysfs value is read first and put back at the end, and read again to prove it.
      `full_scans` starts again at 0 and the two cumulative counters go on: they cannot be written.
    * The *guard*, a child process, has the values and the lock too. When this process dies without
      a word (SIGTERM, SIGKILL, a crash), its pipe closes and the guard puts the values back.
    * The guard also registers one mergeable page that is never touched. No counter counts it, but
      it keeps the list of address spaces from being empty: with an empty list, ksmd makes no pass.
    * Nobody else is disturbed: an exclusive lock on `ksm.lock` in the temporary folder keeps out
      other programs of this kind, and KSM that is running, has merged pages, or finds somebody
      else's mergeable memory is refused.

Needs root, CONFIG_KSM and Linux. Programs that hold mergeable memory must not start meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ksm_worker import PAGE, Tag, receive, send

KSM = Path("/sys/kernel/mm/ksm")
LOCK = Path(tempfile.gettempdir()) / "ksm.lock"

COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_scanned",
    "pages_skipped",
    "full_scans",
    "stable_node_chains",
    "stable_node_dups",
    "ksm_zero_pages",
    "general_profit",
)
#: Never set back to zero while the machine runs, so a session reports what was added to them.
CUMULATIVE = ("pages_scanned", "pages_skipped", "full_scans")
#: Counters of the memory that is registered now: all zero when nobody uses KSM.
STATE = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages")

#: The kernel's defaults, for everything that a layout does not set. One batch is one full pass.
DEFAULTS = {
    "pages_to_scan": 100_000_000,
    "max_page_sharing": 256,
    "merge_across_nodes": 1,
    "use_zero_pages": 0,
    "smart_scan": 1,
    "stable_node_chains_prune_millisecs": 2000,
}
FOR_EVER = 1_000_000_000  # milliseconds: 11 days

MADV_DONTNEED, MADV_MERGEABLE, MADV_UNMERGEABLE = 4, 12, 13


class UnavailableError(RuntimeError):
    """This machine's KSM cannot be borrowed, and why."""


def why_not() -> str | None:
    """Why this machine has no KSM that this process may drive; None if it has."""
    if not KSM.is_dir():
        return f"{KSM} does not exist: the kernel is not Linux or was built without CONFIG_KSM"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "driving ksmd needs root"
    return None


def borrowed(skip: Callable[[str], NoReturn], fail: Callable[[str], NoReturn]) -> Iterator[Ksm]:
    """For a fixture: a session, or a skip with the reason.

    Without root or KSM that is a fact about the machine. With both there, "not run" must not look
    like "passed" where it counts: CI=true makes it a failure.
    """
    reason = why_not()
    if reason:
        skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            ksm = stack.enter_context(Ksm())
        except UnavailableError as error:
            (fail if os.environ.get("CI") == "true" else skip)(str(error))
        yield ksm


def read(name: str) -> str:
    """One sysfs value, as the kernel prints it."""
    return (KSM / name).read_text().strip()


def write(name: str, value: object) -> None:
    """Sets one sysfs value. OSError with the kernel's errno when it refuses."""
    fd = os.open(KSM / name, os.O_WRONLY)
    try:
        os.write(fd, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, f"cannot set {name} to {value}: {error.strerror}") from error
    finally:
        os.close(fd)


def _write_when_free(name: str, value: object) -> None:
    """Sets one sysfs value while nothing is merged.

    A process that is ending may map merged pages for a moment longer, and until they are gone the
    kernel says EBUSY to some settings.
    """
    deadline = time.monotonic() + 30
    while True:
        try:
            return write(name, value)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
        write("run", 2)
        write("run", 0)


def knobs() -> dict[str, str]:
    """Every writable value as it reads now, `advisor_mode` reduced to the mode that is on."""
    found = {}
    for file in sorted(KSM.iterdir()):
        if file.stat().st_mode & stat.S_IWUSR:
            value = read(file.name)
            found[file.name] = value.split("[")[1].split("]")[0] if "[" in value else value
    return found


def put_back(saved: dict[str, str]) -> None:
    """Un-merges what a session has left, then restores every value of `saved` and proves it."""
    write("run", 0)  # `run=2` acts only on a change
    write("run", 2)
    write("run", 0)
    write("advisor_mode", "none")  # else pages_to_scan cannot be written
    last = ("advisor_mode", "advisor_min_pages_to_scan", "sleep_millisecs", "run")
    for name, value in saved.items():
        if name not in last:
            _write_when_free(name, value)
    if saved["advisor_mode"] != "none":
        # Switching the mode on starts pages_to_scan at the minimum: the only way to set it then.
        write("advisor_min_pages_to_scan", saved["pages_to_scan"])
        write("advisor_mode", saved["advisor_mode"])
    write("advisor_min_pages_to_scan", saved["advisor_min_pages_to_scan"])
    write("sleep_millisecs", saved["sleep_millisecs"])  # a change: wakes ksmd, which parks
    write("run", saved["run"])
    left = {name: (value, saved[name]) for name, value in knobs().items() if value != saved[name]}
    if left:
        raise RuntimeError(f"KSM settings could not be put back (now, before): {left}")


def find_ksmd() -> int | None:
    """The process id of ksmd; None inside a process namespace that hides it."""
    for entry in Path("/proc").iterdir():
        try:
            named = entry.name.isdigit() and (entry / "comm").read_text() == "ksmd\n"
            if named and not (entry / "cmdline").read_bytes():  # a kernel thread, not a namesake
                return int(entry.name)
        except OSError:  # it ended while we looked
            continue
    return None


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ----------------------------------------------------------------------------------- the session


class Ksm:
    """This machine's KSM, borrowed. A context manager; everything is given back when it ends.

    >>> with Ksm() as ksm:                                              # doctest: +SKIP
    ...     ksm.begin(smart_scan=0)
    ...     worker = ksm.worker()
    ...     worker.map([1] * 10)
    ...     worker.mergeable(0, 10)
    ...     ksm.scan(), ksm.scan()["pages_sharing"]
    """

    def __init__(self, lock_seconds: float = 300, pass_seconds: float = 60) -> None:
        self._lock_seconds = lock_seconds
        self._pass_seconds = pass_seconds
        self._workers: list[Worker] = []
        self._sleep = FOR_EVER
        self._base = dict.fromkeys(COUNTERS, 0)
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ksm:
        reason = why_not()
        if reason:
            raise UnavailableError(reason)
        self._lock = _open_lock()
        try:
            self._wait_for_lock()
            if not os.access(KSM / "run", os.W_OK):
                raise UnavailableError(f"{KSM} cannot be written: sysfs is mounted read-only")
            self._refuse_if_used()
            self._saved = knobs()
            self._ksmd = find_ksmd()
            self._start_guard()
        except BaseException:
            self._stop_guard()
            os.close(self._lock)
            raise
        try:
            self.begin()
            alone = self.scan()
            strangers = {name: alone[name] for name in STATE if alone[name]}
            if strangers or alone["pages_scanned"]:
                raise UnavailableError(
                    f"somebody else has registered mergeable memory: {strangers}"
                )
            self.begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            try:
                self._end_workers()
            finally:
                put_back(self._saved)
                self._stop_guard()  # not on failure: then the guard has another try
        finally:
            self._stop_guard(b"")
            os.close(self._lock)

    def begin(self, **settings: int) -> None:
        """A new, empty state: no workers, nothing merged, `settings` over `DEFAULTS`."""
        self._end_workers()
        write("run", 2)
        write("run", 0)
        write("advisor_mode", "none")
        for name, value in {**DEFAULTS, **settings}.items():
            _write_when_free(name, value)
        self._park()
        self._base = dict.fromkeys(COUNTERS, 0)
        now = self.counters()
        if any(now[name] for name in STATE):
            raise UnavailableError(f"KSM is not at rest after run=2; somebody else uses it: {now}")
        self._base = {name: now[name] if name in CUMULATIVE else 0 for name in COUNTERS}

    def worker(self) -> Worker:
        """A new process, the last in the scan's order once it registers memory."""
        worker = Worker()
        self._workers.append(worker)
        return worker

    def scan(self) -> dict[str, int]:
        """Exactly one full pass; the counters after it."""
        before = int(read("full_scans"))
        deadline = time.monotonic() + self._pass_seconds
        write("run", 1)
        try:
            while int(read("full_scans")) == before:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"ksmd finished no pass in {self._pass_seconds} s; is its list empty, or "
                        f"did another program change its settings? they are {knobs()}"
                    )
                time.sleep(0.0001)
        finally:
            write("run", 0)
            self._park()
        passes = int(read("full_scans")) - before
        if passes != 1:
            raise RuntimeError(f"ksmd made {passes} passes where one was asked for")
        return self.counters()

    def unmerge_all(self) -> dict[str, int]:
        """`run=2`: every merged page gets its own copy back. Memory stays registered."""
        seen = self.counters()["full_scans"]
        write("run", 2)
        write("run", 0)
        self._park()
        self._base["full_scans"] = -seen  # the kernel starts from 0 again; a session does not
        return self.counters()

    def set(self, name: str, value: int) -> None:
        """Changes a setting between two passes. OSError when the kernel refuses."""
        write(name, value)

    def counters(self) -> dict[str, int]:
        """All counters now; the cumulative ones since `begin`."""
        return {name: int(read(name)) - self._base[name] for name in COUNTERS}

    # -- inside

    def _park(self) -> None:
        """Brings ksmd from its timed sleep to where `run=1` wakes it. `run` is 0.

        Once ksmd is asleep, in whichever place, it has read the present `sleep_millisecs`: a change
        ends a timed sleep for sure, and does nothing to a ksmd that is parked already.
        """
        if self._ksmd is None:
            time.sleep(0.005)  # it cannot be seen: give it ample time to fall asleep
        else:
            deadline = time.monotonic() + self._pass_seconds
            while _state(self._ksmd) != "S":
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ksmd did not go to sleep in {self._pass_seconds} s")
                time.sleep(0.0001)
        self._sleep ^= 1
        write("sleep_millisecs", self._sleep)
        if self._ksmd is None:
            time.sleep(0.005)

    def _end_workers(self) -> None:
        while self._workers:
            self._workers.pop().exit()

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + self._lock_seconds
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"another program held {LOCK} for {self._lock_seconds} s"
                    ) from None
                time.sleep(0.05)

    @staticmethod
    def _refuse_if_used() -> None:
        if read("run") == "1":
            raise UnavailableError("KSM is running (run=1): somebody else uses it")
        used = {name: read(name) for name in STATE if read(name) != "0"}
        if used:
            raise UnavailableError(
                f"somebody else's memory is in KSM: {used}; if its owners ended while ksmd stood "
                f"still, write 2 and then 0 to {KSM / 'run'}"
            )

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-E", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._lock],  # a share of the lock: it is held until the values are back
            start_new_session=True,
        )
        assert self._guard.stdin  # PIPE was asked for
        assert self._guard.stdout
        self._guard.stdin.write(json.dumps(self._saved).encode() + b"\n")
        self._guard.stdin.flush()
        if self._guard.stdout.readline() != b"ready\n":
            raise RuntimeError("the guard process of the KSM settings did not start")

    def _stop_guard(self, word: bytes = b"done\n") -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin  # PIPE was asked for
        assert guard.stdout
        try:
            guard.stdin.write(word)
            guard.stdin.close()
        except BrokenPipeError:
            pass  # it is gone already; then nothing is left to tell
        guard.wait(timeout=60)
        guard.stdout.close()


def _open_lock() -> int:
    try:
        # Without O_CREAT: in a sticky folder the kernel refuses that for a file of another user.
        return os.open(LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


# ----------------------------------------------------------------------------------- the workers


class Worker:
    """A process that holds one stretch of private anonymous memory and does to it as it is told.

    Pages are counted from the start of the stretch. A fresh interpreter, not a fork of this
    process, so that the memory has one owner, and an engine here is not disturbed.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("ksm_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the driver, which ends its workers
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def map(self, tags: Sequence[Tag]) -> None:
        """Maps the stretch and writes its pages."""
        self._ask("map", len(tags))
        self.write(0, tags)

    def write(self, first: int, tags: Sequence[Tag]) -> None:
        """Writes whole pages; None leaves a page alone."""
        self._ask("write", first, list(tags))

    def mergeable(self, first: int, pages: int) -> None:
        """MADV_MERGEABLE."""
        self._ask("advise", MADV_MERGEABLE, first, pages)

    def unmergeable(self, first: int, pages: int) -> None:
        """MADV_UNMERGEABLE: every page gets its own copy back now."""
        self._ask("advise", MADV_UNMERGEABLE, first, pages)

    def discard(self, first: int, pages: int) -> None:
        """MADV_DONTNEED: the pages are gone, and read as zeros."""
        self._ask("advise", MADV_DONTNEED, first, pages)

    def unmap(self, first: int, pages: int) -> None:
        """munmap(2)."""
        self._ask("unmap", first, pages)

    def fork(self) -> int:
        """Forks a child that keeps the memory and waits; its process id. Ends with the worker."""
        return int(self._ask("fork"))

    def wrong(self, first: int, tags: Sequence[Tag], holes: bool = True) -> list[int]:
        """The pages that do not read as they should. Reading a hole maps the zero page there."""
        return [int(page) for page in self._ask("wrong", first, list(tags), holes)]

    def stat(self) -> dict[str, int]:
        """`ksm_stat` of the process, numbers only."""
        text = Path(f"/proc/{self.pid}/ksm_stat").read_text()
        pairs = (line.split() for line in text.splitlines())
        return {name: int(value) for name, value in pairs if not name.endswith(":")}

    def exit(self) -> None:
        """Ends the process, its memory with it, and waits until it is gone. Twice is harmless."""
        assert self._process.stdin  # PIPE was asked for
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, name: str, *arguments: object) -> Any:
        assert self._process.stdin  # PIPE was asked for
        assert self._process.stdout
        send(self._process.stdin, (name, arguments))
        answer = receive(self._process.stdout)
        if answer is None:
            raise RuntimeError(f"the worker died over {name}{arguments}")
        failure, result = answer
        if failure:
            raise OSError(failure, f"{name}{arguments} failed in the worker: {result}")
        return result


def _guard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends when the driver has ended
    saved = json.loads(sys.stdin.buffer.readline())
    keeper = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    keeper.madvise(MADV_MERGEABLE)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.buffer.readline() != b"done\n":
        put_back(saved)


if __name__ == "__main__":
    _guard()
