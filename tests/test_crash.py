"""Crashes and worse: a program that is killed, dumped, stopped, frozen, traced or replaced while it
merges ends (or goes on) as it would have without us, and whoever is left has his memory right.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Program = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.usefixtures("full_barrier")

# A program at work: threads that write, look and know what they wrote; the background merges.
AT_WORK = """
import os, sys, threading, time
import numpy as np
import pagemerge

class Work:
    def __init__(self, pages=1000, writers=2):
        self.arrays = [np.full(pages * 512, 7, dtype=np.int64) for _ in range(writers + 1)]
        self.engine = pagemerge.Engine(
            sleep_millisecs=0, advisor_mode="none", pages_to_scan=10_000, quiet_millisecs=5
        )
        for array in self.arrays:
            self.engine.register(array)
        self.engine.start()
        self.over = False
        self.steps = [0] * writers
        self.wrong = []
        self.threads = [
            threading.Thread(target=self.write, args=(n,), daemon=True) for n in range(writers)
        ]
        for thread in self.threads:
            thread.start()

    def write(self, number):
        mine = self.arrays[number]
        random = np.random.default_rng(number)
        while not self.over:
            at = random.integers(0, len(mine), 20)
            value = int(random.integers(1, 1 << 60))
            mine[at] = value
            if not (mine[at] == value).all():
                self.wrong.append((number, "just written"))
            mine[at] = 7
            if not (mine == 7).all():
                self.wrong.append((number, "at rest"))
            self.steps[number] += 1
            time.sleep(0.0005)

    def check(self):
        assert not self.wrong, self.wrong
        assert (self.arrays[-1] == 7).all()

    def merge_some(self, pages=500):
        goal = self.engine.stats().pages_merged + pages
        steps = list(self.steps)
        while self.engine.stats().pages_merged < goal or not all(
            now > then for now, then in zip(self.steps, steps)
        ):
            self.check()
            time.sleep(0.002)

    def end(self):
        self.over = True
        for thread in self.threads:
            thread.join()
        self.check()
        self.engine.close()
        assert all((array == 7).all() for array in self.arrays)
"""

# A program that works until it is told to end, and says when it has begun.
WORKER = (
    AT_WORK
    + """
work = Work()
work.merge_some()
print("ready", flush=True)
for line in sys.stdin:
    work.merge_some()
    print("alive", flush=True)
work.end()
print("right", flush=True)
"""
)


class Worker:
    """A program of its own that merges and checks until it is told to end."""

    def __init__(self, text: str = WORKER, variables: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(text)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(variables or {})},
        )
        self.expect("ready")

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == word + "\n", line + self.process.stdout.read()

    def goes_on(self) -> None:
        """It has merged and written since."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.expect("alive")

    def kill(self) -> int:
        """End it by force, if it has not ended: its exit code."""
        self.process.kill()
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.communicate(timeout=60)
        return self.process.wait(60)

    def end(self) -> None:
        out, _ = self.process.communicate(timeout=60)
        assert out == "right\n", out
        assert self.process.returncode == 0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


# ------------------------------------------------------------------------------- killed


def test_killed_in_the_middle_of_windows_leaves_nothing_behind(tmp_path: Path) -> None:
    """Others see what the victim wrote to files, and nothing of it is left."""
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(8 * 512))
    text = (
        AT_WORK
        + f"""
import mmap
file = open({str(shared)!r}, "r+b")
page = np.frombuffer(mmap.mmap(file.fileno(), 4096), dtype=np.int64)
work = Work()
work.merge_some()
print("ready", flush=True)
while True:
    page[1:] = page[0] + 1
    page[0] += 1
"""
    )
    for turn in range(6):
        worker = Worker(text, {"TMPDIR": str(tmp_path)})
        time.sleep(0.01 * turn)
        assert worker.kill() == -signal.SIGKILL
        # All words are of one step, or of two that follow each other.
        words = struct.unpack("512q", shared.read_bytes())
        assert words[0] > 0
        assert all(word - words[0] in (0, 1) for word in words[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_child_killed_in_its_own_windows_and_parent_goes_on(program: Program) -> None:
    program(
        AT_WORK
        + """
import signal
arrays = [np.full(400_000, 3.0) for _ in range(3)]
pagemerge.merge(*arrays)
for turn in range(6):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        work = Work()
        work.merge_some()
        arrays[turn % 3][:] = 9.0
        os.write(write, b"x")
        time.sleep(100)
    assert os.read(read, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert all((array == 3.0).all() for array in arrays)
    more = np.full(400_000, 3.0)
    assert pagemerge.merge(more).merged > 700
    os.close(read), os.close(write)
engine = pagemerge.Engine()
for array in [np.full(400_000, 5.0) for _ in range(2)]:
    engine.register(array)
# The dead child's frames have gone with it.
assert engine.settle().generations == 1
"""
    )


WAYS_TO_END = {
    "segfault": "ctypes.string_at(0)",
    "segfault_in_a_thread": "in_thread(lambda: ctypes.string_at(0))",
    "faulthandler": "import faulthandler; faulthandler.enable(); faulthandler._sigsegv()",
    "faulthandler_in_a_thread": "import faulthandler; faulthandler.enable();"
    " in_thread(faulthandler._sigabrt)",
    "bus_error": "os.kill(os.getpid(), signal.SIGBUS); time.sleep(9)",
    "illegal": "os.kill(os.getpid(), signal.SIGILL); time.sleep(9)",
    "abort": "os.abort()",
    "abort_in_a_thread": "in_thread(os.abort)",
    "_exit": "os._exit(3)",
    "_exit_in_a_thread": "in_thread(lambda: os._exit(4))",
    "exit_in_a_thread": "in_thread(lambda: sys.exit(5))",
    "exit": "sys.exit(6)",
    "exception": "raise ValueError('on purpose')",
    "exception_in_a_thread": "in_thread(lambda: {}['nothing'])",
    "terminated": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "interrupted": "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "alarm": "signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(9)",
    "cpu_limit": "import resource;"
    " resource.setrlimit(resource.RLIMIT_CPU, (0, 0)); [0 for _ in iter(int, 1)]",
    "fatal_error": "import ctypes; ctypes.pythonapi.Py_FatalError(b'on purpose')",
    "stack_overflow": "sys.setrecursionlimit(10**9); f = lambda *a: sorted([1, 2], key=f); f()",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'echo replaced; exit 8'])",
}


@pytest.mark.parametrize("way", WAYS_TO_END)
def test_ends_as_it_would_without_us(way: str, program: Program) -> None:
    """The same exit status, the same output, whether the background merges or not."""
    begin = (
        AT_WORK
        + """
import ctypes, resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    )
    merging = "work = Work()\nwork.merge_some(200)\n"
    without = "work = threading.Thread(target=time.sleep, args=(100,), daemon=True)\nwork.start()\n"
    with_us = program(begin + merging + WAYS_TO_END[way], expect=None, seconds=60)
    alone = program(begin + without + WAYS_TO_END[way], expect=None, seconds=60)
    assert with_us.returncode == alone.returncode
    assert with_us.stdout == alone.stdout

    def text(done: subprocess.CompletedProcess[str]) -> list[str]:
        # Of all threads' stacks the last one's is the program's; ours are no threads of Python's.
        last = done.stderr.rpartition("Current thread")[2] or done.stderr
        assert "panicked" not in done.stderr
        return re.sub(r"0x[0-9a-f]+|line \d+|Thread-\d+", "", last).splitlines()[:3]

    assert text(with_us) == text(alone)


# ------------------------------------------------------------------------------- dumped


def memory_in_core(path: Path, address: int, size: int) -> bytes:
    """What a core dump (ELF, 64 bits) has at an address; zeroes where it has nothing."""
    with path.open("rb") as core:
        head = core.read(64)
        assert head[:5] == b"\x7fELF\x02"
        (table,) = struct.unpack_from("<Q", head, 32)
        entry_size, entries = struct.unpack_from("<HH", head, 54)
        if entries == 0xFFFF:  # more than fit: the number stands in the first section header
            (sections,) = struct.unpack_from("<Q", head, 40)
            core.seek(sections + 44)
            (entries,) = struct.unpack("<I", core.read(4))
        found = bytearray(size)
        for number in range(entries):
            core.seek(table + number * entry_size)
            kind, _, offset, start, _, length = struct.unpack("<IIQQQQ", core.read(40))
            first, end = max(start, address), min(start + length, address + size)
            if kind == 1 and first < end:
                core.seek(offset + first - start)
                found[first - address : end - address] = core.read(end - first)
        return bytes(found)


@pytest.mark.parametrize("kept", [True, False])
def test_core_dump_has_merged_pages_when_asked_for(kept: bool, tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or "|" in pattern or "%" in pattern:
        pytest.skip(f"core dumps go elsewhere here (core_pattern is {pattern!r})")
    text = f"""
    import os, resource
    import numpy as np, pagemerge
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with open("/proc/self/coredump_filter", "w") as file:
        file.write({"0x37" if kept else "0x33"!r})
    arrays = [np.full(100_000, 7, dtype=np.int64) for _ in range(3)]
    engine = pagemerge.Engine()
    for array in arrays:
        engine.register(array)
    arrays[1][5] = 8
    assert engine.settle().pages_sharing > 500
    print(*(array.ctypes.data for array in arrays), flush=True)
    engine.start()
    os.abort()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    cores = list(tmp_path.glob("core*"))
    if not cores:
        pytest.skip("this machine writes no core dumps")
    right = struct.pack("q", 7) * 100_000
    for number, address in enumerate(map(int, done.stdout.split())):
        found = memory_in_core(cores[0], address, len(right))
        written = right[:40] + struct.pack("q", 8) + right[48:] if number == 1 else right
        if kept:
            assert found == written
        else:
            # As documented: what is merged is left out, and nothing wrong is in its place.
            pages = [found[at : at + 8] for at in range(0, len(found) - 8, 8)]
            assert set(pages) <= {bytes(8), struct.pack("q", 7), struct.pack("q", 8)}
            assert found != written
    cores[0].unlink()


# ------------------------------------------------------------------------------- stopped and traced


def test_stopped_and_continued(worker: Worker) -> None:
    for turn in range(20):
        worker.process.send_signal(signal.SIGSTOP)
        time.sleep(0.003 * (turn % 4))
        worker.process.send_signal(signal.SIGCONT)
        time.sleep(0.002 * (turn % 3))
    worker.goes_on()
    worker.end()


@contextlib.contextmanager
def control_group(parent: str, process: int) -> Iterator[Path]:
    """A control group of our own with one process in it."""
    path = Path(parent) / f"pagemerge-test-{os.getpid()}"
    path.mkdir()
    before = Path(parent) / "cgroup.procs"
    try:
        (path / "cgroup.procs").write_text(str(process))
        yield path
    finally:
        with contextlib.suppress(OSError):  # it may be over
            before.write_text(str(process))
        for _ in range(200):
            with contextlib.suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("parent", "file", "freeze", "thaw"),
    [
        ("/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED"),
        ("/sys/fs/cgroup/unified", "cgroup.freeze", "1", "0"),
        ("/sys/fs/cgroup", "cgroup.freeze", "1", "0"),
    ],
)
def test_frozen_and_thawed(parent: str, file: str, freeze: str, thaw: str, worker: Worker) -> None:
    root = Path(parent)
    if os.geteuid() != 0 or not os.access(root / "cgroup.procs", os.W_OK):
        worker.end()
        pytest.skip(f"{parent} is no control group that we may use")
    with control_group(parent, worker.process.pid) as group:
        if not (group / file).exists():
            worker.end()
            pytest.skip(f"{parent} has no {file}")
        for turn in range(15):
            (group / file).write_text(freeze)
            time.sleep(0.004 * (turn % 4))
            (group / file).write_text(thaw)
            time.sleep(0.003 * (turn % 3))
        worker.goes_on()
        worker.end()


def test_debugger_attaches_reads_and_lets_go(worker: Worker) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        worker.end()
        pytest.skip("gdb is not installed")
    for _ in range(3):
        done = subprocess.run(
            [gdb, "-nx", "-batch", "-p", str(worker.process.pid), "-ex", "thread apply all bt 3"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "pagemerge" in done.stdout, done.stdout + done.stderr
        worker.goes_on()
    worker.end()


def test_system_calls_are_traced(worker: Worker, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        worker.end()
        pytest.skip("strace is not installed")
    for _ in range(2):
        output = tmp_path / "trace"
        tracer = subprocess.Popen(
            [strace, "-f", "-o", str(output), "-p", str(worker.process.pid)],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.5)
        tracer.send_signal(signal.SIGINT)
        tracer.wait(60)
        assert "UFFDIO" in output.read_text(errors="replace"), "this proved nothing"
        worker.goes_on()
    worker.end()


# ------------------------------------------------------------------------------- replaced


def test_program_replaces_itself_while_it_merges(program: Program) -> None:
    text = "import numpy as np, pagemerge; a = [np.full(200_000, 2.0) for _ in range(2)];"
    text += "print(pagemerge.merge(*a).merged > 300, (a[0] == 2.0).all())"
    done = program(
        AT_WORK
        + f"""
work = Work()
work.merge_some()
# From another thread, in the middle of everything.
text = {text!r}
thread = threading.Thread(target=os.execv, args=(sys.executable, [sys.executable, "-c", text]))
thread.start()
time.sleep(30)
"""
    )
    assert done.stdout == "True True\n"


def test_daemon_closes_everything_and_merges(program: Program, tmp_path: Path) -> None:
    """Fork, new session, fork again, close all descriptors: before and after engines are made."""
    done = program(
        AT_WORK
        + f"""
work = Work()
work.merge_some()
arrays = [np.full(300_000, 4.0) for _ in range(3)]
pagemerge.merge(*arrays)
child = os.fork()
if not child:
    os.setsid()
    if os.fork():
        os._exit(0)
    # As daemons do: nothing that was open stays open.
    os.closerange(0, 4096)
    for number in range(3):
        assert os.open("/dev/null", os.O_RDWR) == number
    try:
        assert all((array == 4.0).all() for array in arrays)
        own = Work()
        own.merge_some()
        os.closerange(3, 4096)
        own.merge_some()
        own.end()
        assert all((array == 4.0).all() for array in arrays)
        told = "right"
    except BaseException as error:
        told = repr(error)
    with open({str(tmp_path / "told.new")!r}, "w") as file:
        file.write(told)
    os.rename({str(tmp_path / "told.new")!r}, {str(tmp_path / "told")!r})
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
# The program itself does the same thing to itself.
os.closerange(3, 4096)
work.merge_some()
work.end()
while not os.path.exists({str(tmp_path / "told")!r}):
    time.sleep(0.01)
print(open({str(tmp_path / "told")!r}).read())
"""
    )
    assert done.stdout == "right\n"


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_workers(method: str, tmp_path: Path) -> None:
    """Arrays that are merged go to workers, inherited or by value, and workers merge theirs."""
    file = tmp_path / "pool.py"
    file.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, sys, warnings
            import numpy as np, pagemerge

            warnings.simplefilter("ignore", DeprecationWarning)

            def work(array):
                mine = [array, array.copy(), np.array(array)]
                merged = pagemerge.merge(*mine).merged
                mine[1][7] = 0.5
                right = (mine[0] == 5.0).all() and mine[1][7] == 0.5 and (mine[2] == 5.0).all()
                return merged > 500 and bool(right)

            if __name__ == "__main__":
                arrays = [np.full(200_000, 5.0) for _ in range(6)]
                engine = pagemerge.Engine()
                for array in arrays:
                    engine.register(array)
                engine.start()
                engine.settle()
                with multiprocessing.get_context({method!r}).Pool(2) as pool:
                    print(pool.map(work, arrays) == [True] * 6)
                assert all((array == 5.0).all() for array in arrays)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n", done.stderr


def test_several_threads_fork_while_others_write(program: Program) -> None:
    program(
        AT_WORK
        + """
work = Work(pages=300)
quiet = work.arrays[-1]
bad = []

def forks():
    for _ in range(12):
        child = os.fork()
        if not child:
            right = (quiet == 7).all()
            quiet[::512] = 1
            right = right and (quiet[::512] == 1).all() and (quiet[1::512] == 7).all()
            os._exit(0 if right else 1)
        if os.waitpid(child, 0)[1] != 0:
            bad.append(child)

threads = [threading.Thread(target=forks) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not bad
work.merge_some()
work.end()
"""
    )
