"""After a fork the child's memory is as it was, and the engine is the parent's.

Each test forks in a program of its own: the test runner's threads are none of a child's business.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

Program = Callable[..., subprocess.CompletedProcess[str]]

BEGIN = """
import os, sys, gc, signal
import numpy as np
import pagemerge

def data():
    return np.full(400_000, 7.0)

def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def finish(child):
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""


def test_child_reads_and_writes_and_parent_goes_on(program: Program) -> None:
    program(
        BEGIN
        + """
arrays = [data() for _ in range(3)]
engine = pagemerge.Engine()
for array in arrays:
    engine.register(array)
assert engine.settle().pages_sharing > 1500

def child():
    assert all((array == 7.0).all() for array in arrays)
    arrays[0][:] = 1.0
    assert (arrays[1] == 7.0).all()

pid = in_child(child)
more = data()
engine.register(more)
engine.settle()
finish(pid)
assert all((array == 7.0).all() for array in [*arrays, more])
arrays[1][:] = 2.0
engine.settle()
assert (arrays[0] == 7.0).all() and (arrays[1] == 2.0).all()
engine.close()
assert (arrays[0] == 7.0).all() and (arrays[1] == 2.0).all()
"""
    )


def test_child_keeps_its_bytes_when_the_parent_lets_go(program: Program) -> None:
    """The parent un-merges and merges other things; the child's pages must not change."""
    program(
        BEGIN
        + """
arrays = [data() for _ in range(3)]
engine = pagemerge.Engine()
regions = [engine.register(array) for array in arrays]
engine.settle()
go, ready = os.pipe()

def child():
    os.read(go, 1)
    assert all((array == 7.0).all() for array in arrays)

pid = in_child(child)
for region in regions:
    engine.unregister(region)
others = [np.full(400_000, 3.0) for _ in range(4)]
for other in others:
    engine.register(other)
engine.settle()
os.write(ready, b"x")
finish(pid)
assert all((other == 3.0).all() for other in others)
"""
    )


def test_every_use_in_the_child_says_so(program: Program) -> None:
    program(
        BEGIN
        + """
arrays = [data() for _ in range(2)]
engine = pagemerge.Engine()
region = engine.register(arrays[0])
settings = engine.settings

def child():
    uses = [
        lambda: engine.register(arrays[1]), lambda: engine.unregister(region), engine.scan,
        engine.settle, engine.start, engine.stop, engine.stats, engine.close, region.stats,
        lambda: engine.run, lambda: setattr(engine, "run", 2), lambda: engine.settings,
        lambda: settings.pages_to_scan, lambda: setattr(settings, "smart_scan", True),
        lambda: engine.discard(arrays[0]), engine.trace, engine.events, lambda: engine.closed,
    ]
    for use in uses:
        try:
            use()
        except pagemerge.ForkedError as error:
            assert "parent" in str(error)
        else:
            raise AssertionError("not refused")
    repr(engine), repr(region)
    with engine:
        pass

    # An engine of its own works. What the parent has too is left alone, and said so.
    mine = data()
    with pagemerge.Engine() as own:
        own.register(mine)
        own.register(arrays[1])
        stats = own.settle()
        assert stats.pages_sharing > 700
        if stats.barrier == "full":
            assert stats.skipped["shared_by_fork"] > 700
    assert (arrays[1] == 7.0).all() and (mine == 7.0).all()

finish(in_child(child))
assert region.registered
engine.settle()
"""
    )


def test_merged_arrays_in_parent_and_child(program: Program) -> None:
    program(
        BEGIN
        + """
arrays = [data() for _ in range(3)]
pagemerge.merge(*arrays)

def child():
    assert all((array == 7.0).all() for array in arrays)
    del arrays[0]
    gc.collect()
    others = [np.zeros(400_000) for _ in range(3)]
    assert not any(other.any() for other in others)
    assert all((array == 7.0).all() for array in arrays)
    own = [data() for _ in range(2)]
    assert pagemerge.merge(*own).merged > 1500
    pagemerge.unmerge()
    assert all((array == 7.0).all() for array in own + arrays)

first = in_child(child)
finish(first)
assert all((array == 7.0).all() for array in arrays)
more = data()
assert pagemerge.merge(more).merged > 700
del arrays[1]
assert all((array == 7.0).all() for array in arrays) and (more == 7.0).all()
"""
    )


def test_child_drops_the_engine(program: Program) -> None:
    program(
        BEGIN
        + """
arrays = [data() for _ in range(2)]
engine = pagemerge.Engine()
region = [engine.register(array) for array in arrays]
engine.settle()

def child():
    global engine, region
    del region, engine
    gc.collect()
    assert all((array == 7.0).all() for array in arrays)

finish(in_child(child))
assert engine.stats().pages_sharing > 700
"""
    )


@pytest.mark.usefixtures("full_barrier")
def test_forks_while_the_background_merges(program: Program) -> None:
    program(
        BEGIN
        + """
engine = pagemerge.Engine(sleep_millisecs=0, advisor_mode="none", pages_to_scan=1000)
arrays = [np.repeat(np.arange(400, dtype=np.int64), 512) for _ in range(4)]
expected = arrays[0].copy()
for array in arrays:
    engine.register(array)
engine.start()

def child():
    assert all((array == expected).all() for array in arrays)
    arrays[1][::512] = 5
    assert (arrays[2] == expected).all()

for turn in range(60):
    # The parent writes, so that pages merge anew all the time.
    arrays[0][:: 512] += 1
    arrays[0][:: 512] -= 1
    finish(in_child(child))
engine.stop()
assert all((array == expected).all() for array in arrays)
"""
    )


def test_multiprocessing_workers_fork_merged_memory(program: Program) -> None:
    program(
        """
        import multiprocessing
        import warnings

        import numpy as np
        import pagemerge

        # The merging thread takes no lock that a child could need.
        warnings.simplefilter("ignore", DeprecationWarning)
        arrays = [np.full(200_000, 5.0) for _ in range(4)]
        pagemerge.merge(*arrays)

        def total(index):
            return float(arrays[index].sum())

        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(total, range(4)) == [1_000_000.0] * 4
        """
    )
