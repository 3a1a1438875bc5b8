"""Defects that a review of the finished package found, each told with how it showed.

Their kin in the engine are in ``rust/linux/tests/regressions.rs``.
"""

from __future__ import annotations

import mmap
import subprocess
from collections.abc import Callable

import pagemerge
import pytest

Program = Callable[..., "subprocess.CompletedProcess[str]"]

# A signal handler runs between any two steps of the main thread, so it may come anywhere inside
# merge(), unmerge() or the callback of an array's end. A trace function comes there too, on every
# line in turn instead of once in a million rounds.
INTERRUPTED = """
    import faulthandler, sys
    import numpy as np, pagemerge
    from pagemerge import PAGE_SIZE

    faulthandler.dump_traceback_later(200, exit=True)
    inside = pagemerge.merge.__code__.co_filename
    handlers_own = bytearray(b"h" * 3 * PAGE_SIZE)
    outcomes = {"done": 0, "refused": 0}
    begun = False

    def handler():
        global begun
        begun = True
        try:
            ACTION
            outcomes["done"] += 1
        except pagemerge.Error as error:
            assert "within one another" in str(error), error
            outcomes["refused"] += 1

    def interrupt_at(where):
        # Interrupts once, at the step `where` of those inside the module; says whether it came.
        global begun
        begun, steps = False, 0

        def local(frame, event, arg):
            nonlocal steps
            steps += 1
            if steps > where and not begun:
                handler()
            return None if begun else local

        def trace(frame, event, arg):
            return local if frame.f_code.co_filename == inside and not begun else None

        sys.settrace(trace)
        try:
            array = np.full(4 * PAGE_SIZE, 7, dtype=np.uint8)
            pagemerge.merge(array, quiet_millisecs=1)
            assert (array == 7).all()
            other = np.full(4 * PAGE_SIZE, 7, dtype=np.uint8)
            pagemerge.merge(other, quiet_millisecs=1)
            pagemerge.unmerge(other)
            del array  # Its callback closes the engine, which has nothing left.
        finally:
            sys.settrace(None)
        assert (other == 7).all()
        return begun

    where = 0
    while interrupt_at(where):
        where += 1
        pagemerge.unmerge()
    print(where, outcomes["done"], outcomes["refused"])
"""


@pytest.mark.parametrize(
    "action",
    [
        "pagemerge.unmerge(handlers_own)",
        "pagemerge.merge(handlers_own, quiet_millisecs=1)",
        "pagemerge.unmerge()",
    ],
)
def test_signal_handler_in_the_middle_of_anything_is_refused_or_served(
    program: Program, action: str
) -> None:
    # The record's lock was taken in two places, and only one of them said which thread had it: a
    # handler that called unmerge() while a finished array was tidied up after waited for its own
    # thread, for ever.
    done = program(INTERRUPTED.replace("ACTION", action), seconds=240)
    steps, served, refused = map(int, done.stdout.split())
    assert steps > 50, "the handler never came inside"
    assert served > 0
    assert refused > 0


def test_signals_that_merge_while_arrays_end_do_not_deadlock(program: Program) -> None:
    # The same as it was found: a timer's handler, arrays that come and go.
    done = program(
        """
        import faulthandler, signal, time
        import numpy as np, pagemerge

        faulthandler.dump_traceback_later(200, exit=True)
        own = bytearray(b"h" * 10000)
        calls, busy = [0, 0], [False]

        def handler(*_):
            if busy[0]:
                return
            busy[0] = True
            try:
                pagemerge.unmerge(own)
                calls[0] += 1
            except pagemerge.Error:
                calls[1] += 1
            finally:
                busy[0] = False

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.0031)
        until = time.monotonic() + 4
        rounds = 0
        while time.monotonic() < until:
            array = np.ones(4000)
            try:
                pagemerge.merge(array, quiet_millisecs=1)
            except pagemerge.Error:
                pass
            assert (array == 1).all()
            del array
            rounds += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(rounds, *calls)
        """,
        seconds=240,
    )
    rounds, served, refused = map(int, done.stdout.split())
    assert rounds > 10
    assert served > 0
    assert served + refused > 100, "the handler hardly ever came"


def test_child_of_a_raw_fork_can_merge(program: Program) -> None:
    # `_Fork` calls no handlers of the C library, nor Python's: the child took the parent's merging
    # thread for its own, and hung when it made an engine.
    program(
        """
        import ctypes, os, signal
        import pagemerge

        libc = ctypes.PyDLL(None)
        if not hasattr(libc, "_Fork"):
            raise SystemExit(0)  # An older C library has no such call to make.
        parents = pagemerge.Engine()
        data = bytearray(b"q" * 100_000)
        parents.register(data)
        parents.settle()
        child = libc._Fork()
        if child == 0:
            signal.alarm(60)
            with pagemerge.Engine() as engine:
                own = bytearray(b"z" * 100_000)
                engine.register(own)
                right = engine.settle().pages_sharing > 10
            right = right and own == b"z" * 100_000 and data == b"q" * 100_000
            try:
                parents.stats()
            except pagemerge.ForkedError:
                pass
            else:
                right = False
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{status} (14: it hung until its alarm)"
        assert parents.stats().pages_sharing > 10
        parents.close()
        assert data == b"q" * 100_000
        """
    )


@pytest.mark.usefixtures("full_barrier")
def test_unregistered_memory_registers_and_discards_as_before(program: Program) -> None:
    # After `unregister`, protection stayed on memory with a watched page: it could not be
    # registered again, and debuggers got EIO for ever. And discarding memory showed what it held
    # while it was merged, as long as anybody else shared that.
    program(
        """
        import mmap
        import pagemerge
        from pagemerge import PAGE_SIZE as P

        def fresh():
            made = mmap.mmap(-1, 64 * P, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            made[:] = b"A" * (64 * P)
            return made

        one, other = fresh(), fresh()
        one[60 * P :] = b"".join(bytes([n]) * P for n in range(4))
        engine = pagemerge.Engine(quiet_millisecs=600_000)
        region, rest = engine.register(one), engine.register(other)
        engine.settle()
        one[8 * P + 9] = 66
        engine.scan()
        engine.unregister(region)
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            at = pagemerge._core._span(one)[0]
            memory.seek(at + 8 * P + 100)
            memory.write(b"Z")
        assert one[8 * P + 9] == 66 and one[8 * P + 100] == ord("Z")
        region = engine.register(one)
        engine.settle()
        assert region.stats().ksm_merging_pages >= 59
        engine.unregister(region)
        one.madvise(mmap.MADV_DONTNEED)
        assert all(one[n * P] == 0 for n in range(64) if n != 8)
        assert other[:] == b"A" * (64 * P)
        """
    )


def test_settings_in_use_make_another_engine() -> None:
    """The settings of an engine whose advisor had worked made no second engine.

    ``Engine(**engine.settings.as_dict())`` is what ``as_dict`` is for. After one scan it was a
    ``ValueError``: the dictionary had what the advisor had made of ``pages_to_scan``, which nobody
    may ask for; and the same after ``advisor_min_pages_to_scan`` had been changed. Found by fuzzing
    the settings.
    """
    with pagemerge.Engine(advisor_min_pages_to_scan=700) as engine:
        memory = mmap.mmap(-1, 8 * pagemerge.PAGE_SIZE, flags=mmap.MAP_PRIVATE)
        memory.write(b"a" * len(memory))
        engine.register(memory)
        engine.scan()
        engine.settings.advisor_min_pages_to_scan = 900
        settings = engine.settings.as_dict()
        with pagemerge.Engine(**settings) as again:
            assert again.settings.as_dict() == settings


def test_settings_change_although_the_advisor_begins_elsewhere() -> None:
    """No setting of an engine could be changed when the advisor was to begin with another number.

    ``Engine(advisor_min_pages_to_scan=60)`` refused each later assignment, to whatever setting,
    with ``pages_to_scan must be left to the advisor while advisor_mode is scan-time, got 500``:
    beside the scanner's settings, where the advisor's beginning had taken the default's place, a
    copy was kept where it had not, and a change began from that one. Found by fuzzing the settings.
    """
    with pagemerge.Engine(advisor_min_pages_to_scan=60) as engine:
        engine.settings.sleep_millisecs = 74
        assert engine.settings.sleep_millisecs == 74
        assert engine.settings.pages_to_scan == 60
