"""At memory limits: what Python programs see when there is no room to un-merge.

The engine's own tests (``rust/linux/tests/limits.rs``) go through every limit; here are the ways in
which a Python program meets them: exceptions, ``with`` blocks, finalizers, the interpreter's end.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("full_barrier")

Program = Callable[..., subprocess.CompletedProcess[str]]

GROUPS = Path("/sys/fs/cgroup/memory")


class Group:
    """A memory cgroup (version 1) of our own."""

    def __init__(self) -> None:
        self.path = GROUPS / f"pagemerge-pytest-{os.getpid()}-{time.monotonic_ns()}"
        self.path.mkdir()
        (self.path / "memory.limit_in_bytes").write_text("512M")

    def end(self) -> None:
        """Nobody was killed; processes leave the group a moment after they are reaped."""
        kills = [
            line
            for line in (self.path / "memory.oom_control").read_text().splitlines()
            if line.startswith("oom_kill ")
        ]
        for _ in range(500):
            try:
                self.path.rmdir()
                break
            except OSError:
                time.sleep(0.01)
        assert kills == ["oom_kill 0"]


@pytest.fixture
def group() -> Iterator[Group]:
    if os.geteuid() != 0 or not (GROUPS / "memory.oom_control").exists():
        pytest.skip("needs root and a memory cgroup of version 1")
    group = Group()
    yield group
    group.end()


# 64 MiB of duplicates, and 8 MiB left below the limit once they are merged.
SHORT = """
    import atexit, pathlib, sys
    import numpy as np, pagemerge
    group = pathlib.Path({group!r})
    (group / "cgroup.procs").write_text("0")
    WORDS = 64 << 17
    def right(array):
        # In pieces: comparing the whole would take 8 MiB.
        step = 1 << 14
        return all(bool((array[at : at + step] == 7).all()) for at in range(0, len(array), step))
    def limit(extra):
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + extra))
        (group / "memory.failcnt").write_text("0")
    def met():
        return int((group / "memory.failcnt").read_text())
    array = np.full(WORDS, 7, dtype=np.uint64)
"""


def short(group: Group, text: str) -> str:
    return SHORT.format(group=str(group.path)) + text


@pytest.mark.parametrize(
    "how",
    [
        "engine.unregister(region)",
        "engine.run = 2",
        "region.close()",
        "engine.close()",
        "engine.__exit__(None, None, None)",
    ],
)
def test_unmerging_refuses_with_the_figures(program: Program, group: Group, how: str) -> None:
    program(
        short(
            group,
            f"""
    engine = pagemerge.Engine()
    region = engine.register(array)
    assert engine.settle().pages_sharing > 15000
    limit(8 << 20)
    try:
        {how}
    except pagemerge.UnmergeError as error:
        assert error.reason == "no_memory" and error.pages > 15000, error.pages
        assert "bytes" in str(error) and "memory cgroup" in str(error), str(error)
    else:
        raise AssertionError("there is no room for the copies")
    assert region.registered and not engine.closed
    assert engine.stats().pages_sharing > 15000
    assert right(array) and met() == 0, met()
    limit(200 << 20)
    {how}
    assert right(array)
    """,
        )
    )


def test_unmerge_refuses_with_the_figures(program: Program, group: Group) -> None:
    program(
        short(
            group,
            """
    report = pagemerge.merge(array)
    assert report.bytes_saved > 60 << 20
    limit(8 << 20)
    try:
        pagemerge.unmerge(array)
    except pagemerge.UnmergeError as error:
        assert error.reason == "no_memory" and "bytes" in str(error)
    else:
        raise AssertionError("there is no room for the copies")
    assert right(array) and met() == 0
    limit(200 << 20)
    pagemerge.unmerge(array)
    assert right(array)
    """,
        )
    )


def test_end_of_an_owner_needs_no_room(program: Program, group: Group) -> None:
    """An array that is freed takes its merged pages with it: nothing is copied."""
    program(
        short(
            group,
            """
    other = array.copy()
    pagemerge.merge(array, other)
    limit(2 << 20)
    del array
    assert right(other) and met() == 0
    """,
        )
    )


def test_last_reference_goes_where_there_is_no_room(program: Program, group: Group) -> None:
    """Nobody is left to be told: the memory stays merged, and its owner alive."""
    program(
        short(
            group,
            """
    engine = pagemerge.Engine()
    region = engine.register(array)
    engine.settle()
    view = memoryview(array)
    limit(8 << 20)
    del region, engine, array
    assert view[0] == view[-1] == 7
    assert right(np.frombuffer(view, dtype=np.uint64)) and met() == 0
    """,
        )
    )


def test_interpreter_ends_where_there_is_no_room(program: Program, group: Group) -> None:
    """Nothing is un-merged at the end, so nothing can be refused."""
    done = program(
        short(
            group,
            """
    atexit.register(lambda: print("right" if right(array) and met() == 0 else "wrong"))
    engine = pagemerge.Engine()
    engine.register(array)
    engine.settle()
    pagemerge.merge(np.full(1 << 20, 3))
    engine.start()
    limit(8 << 20)
    """,
        )
    )
    assert done.stdout == "right\n"


def test_program_at_its_own_limit_gets_memory_errors_and_goes_on(program: Program) -> None:
    """Merging neither ends a program that has used up its address space nor is ended by that."""
    program(
        """
        import pathlib, resource
        import numpy as np, pagemerge
        array = np.full(4 << 20, 7, dtype=np.uint64)
        engine = pagemerge.Engine()
        engine.register(array)
        engine.scan(100)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        size = pages * pagemerge.PAGE_SIZE
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
        for _ in range(3):
            try:
                np.ones(1 << 22)
            except MemoryError:
                pass
            else:
                raise AssertionError("the limit does not hold")
            try:
                engine.scan()
            except OSError as error:
                assert error.errno == 12, error
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert (array == 7).all()
        assert engine.settle().pages_sharing > 8000
        engine.close()
        assert (array == 7).all()
        """
    )


def test_store_at_a_memory_limit_refuses_and_keeps_what_it_has(
    program: Program, group: Group
) -> None:
    """Making a page at the limit would bring the OOM killer in: there is a look at what is left."""
    program(
        short(
            group,
            """
    import os, time
    store = pagemerge.Store()
    values = [os.urandom(100_000) for _ in range(20)]
    blobs = [store.put(value) for value in values]
    tiny = [store.put(b"%040d" % n) for n in range(1000)]
    limit(24 << 20)
    # What was looked up before is no longer believed by then.
    time.sleep(0.2)
    before, refused = store.stats(), 0
    more = []
    for size in (300_000, 3_000):
        source = bytearray(os.urandom(size))
        try:
            for n in range(20_000):
                source[:8] = n.to_bytes(8, "little")
                source[size // 2 : size // 2 + 8] = n.to_bytes(8, "little")
                for at in range(0, size, 4096):
                    source[at : at + 8] = (n ^ at << 32).to_bytes(8, "little")
                more.append(store.put(source))
        except MemoryError as error:
            assert "no memory" in str(error), error
            refused += 1
    assert refused == 2 and len(more) > 30, (refused, len(more))
    # (A piece at a time: what is left is little.)
    assert all(blob == value for blob, value in zip(blobs, values))
    assert all(blob == b"%040d" % n for n, blob in enumerate(tiny))
    more.clear()
    after = store.stats()
    assert (after.logical_bytes, after.unique_bytes, after.entries) == (
        before.logical_bytes, before.unique_bytes, before.entries), (before, after)
    assert bytes(store.put(b"z" * 200_000)) == b"z" * 200_000
    assert met() == 0, met()
    """,
        )
    )
