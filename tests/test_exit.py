"""The ends: of the interpreter, of the last reference, and by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

Program = Callable[..., subprocess.CompletedProcess[str]]

BEGIN = """
import numpy as np, pagemerge, threading, time
arrays = [np.full(2_000_000, 7.0) for _ in range(4)]
"""


@pytest.mark.usefixtures("full_barrier")
def test_exit_with_the_background_running(program: Program) -> None:
    program(
        BEGIN
        + """
engine = pagemerge.Engine(sleep_millisecs=0, advisor_mode="none", pages_to_scan=10_000)
for array in arrays:
    engine.register(array)
engine.start()
time.sleep(0.1)
"""
    )


def test_exit_with_everything_merged(program: Program) -> None:
    done = program(
        BEGIN
        + """
import atexit
pagemerge.merge(*arrays)
kept = bytearray(b"x" * 1_000_000)
pagemerge.merge(kept)
engine = pagemerge.Engine()
engine.register(np.full(1_000_000, 3.0))
engine.settle()
atexit.register(lambda: print(all((array == 7.0).all() for array in arrays)))
"""
    )
    assert done.stdout == "True\n"
    assert done.stderr == ""


def test_exit_while_a_thread_scans(program: Program) -> None:
    done = program(
        BEGIN
        + """
def scan():
    while True:
        with pagemerge.Engine() as engine:
            for array in arrays:
                engine.register(array)
            engine.settle()
threading.Thread(target=scan, daemon=True).start()
time.sleep(0.2)
"""
    )
    assert done.stderr == ""


def test_last_reference_dropped_in_the_middle_of_a_scan(program: Program) -> None:
    program(
        BEGIN
        + """
engine = pagemerge.Engine()
for array in arrays:
    engine.register(array)
thread = threading.Thread(target=engine.settle)
thread.start()
del engine
for array in arrays:
    assert (array == 7.0).all()
thread.join()
"""
    )


def test_arrays_freed_in_the_middle_of_a_merge(program: Program) -> None:
    done = program(
        """
import numpy as np, pagemerge, threading
for turn in range(20):
    arrays = [np.full(300_000, float(turn)) for _ in range(4)]
    pagemerge.merge(*arrays)
    more = [np.full(300_000, float(turn)) for _ in range(4)]
    thread = threading.Thread(target=pagemerge.merge, args=more)
    thread.start()
    del arrays[:2]
    thread.join()
    assert all((array == turn).all() for array in arrays + more)
"""
    )
    assert done.stderr == ""


def test_ctrl_c_ends_a_long_call_and_loses_nothing() -> None:
    text = """
        import numpy as np, pagemerge, sys
        memory = np.random.default_rng(1).integers(0, 256, 1 << 28, dtype=np.uint8)
        total = int(memory.sum(dtype=np.uint64))
        engine = pagemerge.Engine()
        engine.register(memory)
        print("ready", flush=True)
        try:
            while True:
                engine.settle()
        except KeyboardInterrupt:
            pass
        assert int(memory.sum(dtype=np.uint64)) == total
        # The engine goes on as if nothing had been.
        engine.stats()
        engine.scan(1000)
        engine.close()
        print("ended", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert out == "ended\n"
    assert child.returncode == 0


def test_ctrl_c_in_merge(program: Program) -> None:
    program(
        """
import numpy as np, os, pagemerge, signal, threading
arrays = [np.random.default_rng(1).integers(0, 256, 1 << 27, dtype=np.uint8) for _ in range(3)]
expected = arrays[0].copy()
# Sent by the program itself, once merging is under way.
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        pagemerge.merge(*arrays)
except KeyboardInterrupt:
    pass
assert all(np.array_equal(array, expected) for array in arrays)
assert pagemerge.merge(*arrays).merged > 90_000
del arrays
"""
    )
