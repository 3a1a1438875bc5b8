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


@pytest.mark.usefixtures("full_barrier")
def test_exit_while_daemon_threads_write(program: Program) -> None:
    """Daemon threads write, and look, until the very end of the process; nobody un-merges then."""
    done = program(
        BEGIN
        + """
import os
engine = pagemerge.Engine(sleep_millisecs=0, advisor_mode="none", pages_to_scan=10_000)
for array in arrays:
    engine.register(array)
engine.start()

def write(mine):
    while True:
        mine[::512] = 5.0
        # Not by an exception: nobody would see it now.
        if not (mine[::512] == 5.0).all():
            os._exit(9)
        mine[::512] = 7.0
        if not (mine == 7.0).all():
            os._exit(9)

for array in arrays[:2]:
    threading.Thread(target=write, args=(array,), daemon=True).start()
while engine.stats().pages_merged < 5000:
    time.sleep(0.01)
"""
    )
    assert done.stderr == ""


def test_exit_in_any_order(program: Program) -> None:
    """Handlers that run at exit, in whatever order, find an engine that works, or is closed."""
    done = program(
        """
import atexit
def last():
    assert (arrays[0] == 7.0).all() and engine.stats().pages_sharing > 0
    engine.close()
    pagemerge.merge(*arrays)
    print("last", (arrays[1] == 7.0).all())
atexit.register(last)
"""
        + BEGIN
        + """
engine = pagemerge.Engine()
region = [engine.register(array) for array in arrays]
engine.settle()
def first():
    with engine.register(np.full(100_000, 7.0)):
        engine.settle()
    region.pop().close()
    print("first")
atexit.register(first)

class Late:
    def __del__(self):
        # When modules are taken down; numpy can do little then.
        assert all(array.tobytes() == self.right for array in self.arrays)
        try:
            self.engine.stats()
            self.engine.settle()
        except self.closed:
            pass
        self.engine.close()
        print("late")
late = Late()
late.arrays, late.engine, late.closed = arrays, engine, pagemerge.ClosedError
late.right = arrays[0].tobytes()
"""
    )
    assert done.stdout == "first\nlast True\nlate\n"
    assert done.stderr == ""


def test_engine_in_a_cycle_is_collected_by_another_thread_while_it_scans(program: Program) -> None:
    program(
        BEGIN
        + """
import gc
class Owner:
    pass
for turn in range(6):
    owner = Owner()
    owner.self = owner
    owner.arrays = [np.full(300_000, float(turn)) for _ in range(3)]
    owner.engine = pagemerge.Engine()
    owner.regions = [owner.engine.register(array) for array in owner.arrays]
    kept = owner.arrays[0]
    thread = threading.Thread(target=owner.engine.settle)
    thread.start()
    del owner
    collector = threading.Thread(target=gc.collect)
    collector.start()
    assert (kept == turn).all()
    thread.join()
    collector.join()
    gc.collect()
    assert (kept == turn).all()
    kept[:] = 0.0
    assert not kept.any()
"""
    )


def test_engine_lost_in_an_exception(program: Program) -> None:
    """An exception unwinds the only frames that hold an engine and its memory while it works."""
    program(
        BEGIN
        + """
def work(turn, keep):
    mine = [np.full(300_000, float(turn)) for _ in range(3)]
    engine = pagemerge.Engine(sleep_millisecs=0)
    for array in mine:
        engine.register(array)
    if pagemerge.capabilities().barrier == "full":
        engine.start()
    engine.scan()
    keep.append(mine[0])
    raise LookupError(turn)

for turn in range(8):
    keep = []
    try:
        work(turn, keep)
    except LookupError as error:
        assert error.args == (turn,)
    assert (keep[0] == turn).all()
    keep[0][:] = 1.0
    assert (keep[0] == 1.0).all()
"""
    )


def test_exceptions_from_signal_handlers_in_every_call(program: Program) -> None:
    """What a handler raises comes out of the call that it meets; bytes and engine are well."""
    done = program(
        """
import random, signal, numpy as np, pagemerge
class Alarm(Exception):
    pass
def ring(number, frame):
    raise Alarm
signal.signal(signal.SIGALRM, ring)
random.seed(1)
arrays = [np.full(600_000, 7.0) for _ in range(4)]
met = {}
def interrupted(call):
    # Somewhere within, or before, or after.
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.004))
        try:
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        met[call.__name__] = met.get(call.__name__, 0) + 1
def check():
    assert all((array == 7.0).all() for array in arrays)

def scan(): engine.scan()
def settle(): engine.settle()
def stats(): [engine.stats() for _ in range(200)]
def register(): regions.append(engine.register(arrays[3]))
def unregister():
    for region in regions: region.close()
def unmerge(): engine.run = 2
def merge(): pagemerge.merge(arrays[0], arrays[1])
def give_back(): pagemerge.unmerge()
def evaluate(): pagemerge.evaluate(*arrays)
def close(): engine.close()
for turn in range(40):
    engine = pagemerge.Engine()
    for array in arrays[2:3]:
        engine.register(array)
    regions = []
    for call in (scan, settle, register, stats, unregister, unmerge, settle, merge, give_back,
                 evaluate, close):
        interrupted(call)
        if turn % 8 == 0:
            check()
    # It goes on, or has been closed, and its memory can be had by another.
    if not engine.closed:
        engine.run = 0
        engine.settle()
    engine.close()
    pagemerge.unmerge()
    check()
print(*sorted(met))
"""
    )
    met = done.stdout.split()
    assert {"settle", "merge", "evaluate"} <= set(met), met


def test_exceptions_from_finalizers(program: Program) -> None:
    """Finalizers of registered memory, and of what holds it, that raise disturb nobody else."""
    done = program(
        """
import gc, sys, weakref, numpy as np, pagemerge
seen = []
sys.unraisablehook = lambda told: seen.append(type(told.exc_value))
class Loud(np.ndarray):
    def __del__(self):
        raise RuntimeError("on purpose")
def wrong():
    raise LookupError("on purpose")
kept = np.full(300_000, 7.0)
for turn in range(5):
    loud = np.full(300_000, 7.0).view(Loud)
    weakref.finalize(loud, wrong)
    pagemerge.merge(kept, loud)
    engine = pagemerge.Engine()
    engine.register(np.full(300_000, 7.0).view(Loud))
    weakref.finalize(engine, wrong) if hasattr(engine, "__weakref__") else None
    engine.settle()
    del loud
    engine.close()
    del engine
    gc.collect()
    assert (kept == 7.0).all()
assert RuntimeError in seen
print(len(seen) >= 10)
"""
    )
    assert done.stdout == "True\n"


def test_no_memory_for_python_objects(program: Program) -> None:
    """Every allocation of the interpreter's in a call fails once: an error, and all goes on.

    (Of calls that raise an error themselves nothing is said: where there is no memory for the
    text of it, the binding library ends the program.)
    """
    done = program(
        """
try:
    import _testcapi
except ImportError:
    raise SystemExit("not here")
import numpy as np, pagemerge
arrays = [np.full(20_000, 7.0) for _ in range(3)]
engine = pagemerge.Engine()
engine.trace()
for array in arrays[:2]:
    engine.register(array)
def register_and_back():
    engine.register(arrays[2]).close()
calls = [engine.stats, engine.scan, engine.settle, engine.events, engine.settings.as_dict,
         register_and_back, lambda: dict(engine.stats()), lambda: repr(engine),
         lambda: pagemerge.merge(arrays[2]), pagemerge.unmerge,
         lambda: pagemerge.Engine(sleep_millisecs=1).close(), pagemerge.capabilities]
failed = 0
for call in calls:
    for first in range(40):
        _testcapi.set_nomemory(first, first + 1)
        try:
            call()
        except (MemoryError, ValueError):
            failed += 1
        except BaseException as error:
            # The binding library's way of saying that it could not make an object.
            assert type(error).__name__ == "PanicException", error
            failed += 1
        finally:
            _testcapi.remove_mem_hooks()
        assert all((array == 7.0).all() for array in arrays)
assert failed > 50
engine.close()
pagemerge.unmerge()
arrays[0][:] = 1.0
assert (arrays[1] == 7.0).all() and (arrays[2] == 7.0).all()
print("right")
""",
        expect=None,
    )
    if "not here" in done.stderr:
        pytest.skip("this Python has no _testcapi")
    assert done.stdout == "right\n", done.stderr
    assert done.returncode == 0


def test_sub_interpreter_is_told_that_it_cannot_have_the_module(program: Program) -> None:
    """One engine of one process serves one interpreter; another one says so and harms nothing."""
    done = program(
        BEGIN
        + """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    try:
        import _interpreters as interpreters
    except ImportError:
        raise SystemExit(0)
pagemerge.merge(*arrays)
text = '''
try:
    import pagemerge
except ImportError as error:
    print("refused:", error)
else:
    print("accepted")
'''
other = interpreters.create()
interpreters.run_string(other, text)
interpreters.destroy(other)
assert all((array == 7.0).all() for array in arrays)
arrays[0][:] = 1.0
pagemerge.unmerge()
assert (arrays[1] == 7.0).all()
""",
        expect=None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" or "refused" in done.stdout, done.stdout
