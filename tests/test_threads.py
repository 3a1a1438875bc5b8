"""Threads that know nothing of merging lose nothing by it.

The writers run without the GIL: numpy releases it in ``np.add`` on large arrays, and system calls
do. A lost or torn write shows as a wrong count at the end, whenever it happened.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena, page_of
from pagemerge import Engine, RunMode

pytestmark = pytest.mark.usefixtures("full_barrier")

SECONDS = float(os.environ.get("PAGEMERGE_TEST_SECONDS", "10"))


class Threads:
    """Runs functions until told to stop, and raises what they raised."""

    def __init__(self, *targets: Callable[[], None]) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(target,)) for target in targets]

    def _run(self, target: Callable[[], None]) -> None:
        try:
            while not self.stop.is_set():
                target()
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def __enter__(self) -> Threads:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def merge_and_unmerge(engine: Engine, until: Callable[[], bool]) -> int:
    """Background merging, un-merged and begun again while ``until`` says false."""
    rounds = 0
    while not until():
        engine.run = RunMode.MERGE
        time.sleep(0.2)
        engine.run = RunMode.UNMERGE
        rounds += 1
    return rounds


def quick_engine() -> Engine:
    return Engine(sleep_millisecs=0, advisor_mode="none", pages_to_scan=4000, remerge="always")


def test_increments_without_the_gil_are_not_lost() -> None:
    # Two threads each increment their own half of every page, so that each page has two writers
    # and many pages are equal at any moment.
    pages, words = 256, PAGE // 8
    memory = Arena([0] * pages)
    counters = np.frombuffer(memory.map, dtype=np.int64).reshape(pages, words)
    done = [0, 0]

    def increments(half: slice, index: int) -> Callable[[], None]:
        mine = counters[:, half]

        def work() -> None:
            np.add(mine, 1, out=mine)
            done[index] += 1

        return work

    with quick_engine() as engine:
        engine.register(memory.map)
        began = time.monotonic()
        with Threads(
            increments(slice(0, words // 2), 0), increments(slice(words // 2, words), 1)
        ) as threads:
            rounds = merge_and_unmerge(
                engine, lambda: threads.stop.is_set() or time.monotonic() - began > SECONDS
            )
        assert rounds > 1
        # At rest now: what remains equal merges, and stays right.
        engine.settle()
        assert (counters[:, : words // 2] == done[0]).all()
        assert (counters[:, words // 2 :] == done[1]).all()
    assert (counters[:, : words // 2] == done[0]).all()
    assert (counters[:, words // 2 :] == done[1]).all()
    assert min(done) > 100


def test_increments_of_slow_pages_meet_windows() -> None:
    """Pages are quiet long enough to merge, and are written at the very time that they do."""
    pages = 512
    memory = Arena([1] * pages)
    cells = np.frombuffer(memory.map, dtype=np.int64).reshape(pages, PAGE // 8)
    cells[:, 0] = 0
    written = np.zeros(pages, dtype=np.int64)
    chooser = np.random.default_rng(5)

    def work() -> None:
        some = chooser.integers(0, pages, 8)
        for page in some:
            cells[page, 0] += 1
            written[page] += 1
        time.sleep(0.0005)

    with quick_engine() as engine:
        engine.register(memory.map)
        began = time.monotonic()
        with Threads(work) as threads:
            merge_and_unmerge(
                engine, lambda: threads.stop.is_set() or time.monotonic() - began > SECONDS / 2
            )
        assert engine.stats().pages_merged > 0
    assert (cells[:, 0] == written).all()
    assert (cells[:, 1:] == 1).all()


@pytest.mark.parametrize("how", ["read", "recv"])
def test_system_calls_into_registered_memory(how: str) -> None:
    """read(2) and recv(2) meet open windows: no EFAULT, and every byte arrives."""
    pages = 64
    memory = Arena([0] * pages)
    target = memoryview(memory.map)
    if how == "read":
        source, sink = os.pipe()

        def send(data: bytes) -> None:
            os.write(sink, data)

        def receive(into: memoryview) -> int:
            return os.readv(source, [into])
    else:
        one, two = socket.socketpair()

        def send(data: bytes) -> None:
            one.sendall(data)

        def receive(into: memoryview) -> int:
            return two.recv_into(into)

    turns = 0

    def work() -> None:
        nonlocal turns
        turns += 1
        # Mostly equal pages, so that they merge, and one that differs.
        data = page_of(turns % 3) * 7 + page_of(turns)
        at = turns * 8 % pages * PAGE
        send(data)
        got = 0
        while got < len(data):
            got += receive(target[at + got : at + len(data)])
        assert target[at : at + len(data)] == data, "bytes were lost"

    with quick_engine() as engine:
        engine.register(memory.map)
        began = time.monotonic()
        with Threads(work) as threads:
            merge_and_unmerge(
                engine, lambda: threads.stop.is_set() or time.monotonic() - began > SECONDS
            )
        assert turns > 100
    if how == "read":
        os.close(source)
        os.close(sink)
    else:
        one.close()
        two.close()


def test_many_threads_use_one_engine() -> None:
    with quick_engine() as engine:
        engine.start()

        def register_and_part() -> None:
            arena = Arena([1, 2, 3, 1])
            with engine.register(arena.map) as region:
                engine.scan(10)
                region.stats()
                engine.settings.sleep_millisecs = 1
                assert arena.tags() == [1, 2, 3, 1]

        began = time.monotonic()
        with Threads(*[register_and_part] * 4) as threads:
            while not threads.stop.is_set() and time.monotonic() - began < 2:
                engine.stats()
        assert engine.stats().regions == 0


def test_close_while_others_use_it() -> None:
    for _ in range(20):
        engine = quick_engine()
        arenas = [Arena([1, 1, 2]) for _ in range(8)]

        def use(engine: Engine = engine, arenas: list[Arena] = arenas) -> None:
            try:
                for arena in arenas:
                    engine.register(arena.map)
                engine.settle()
            except pagemerge.ClosedError:
                pass
            except ValueError as error:
                assert "already" in str(error)  # noqa: PT017

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        engine.close()
        for thread in threads:
            thread.join()
        assert all(arena.tags() == [1, 1, 2] for arena in arenas)
        for arena in arenas:
            arena.map.close()


def test_others_run_while_one_scans() -> None:
    """The GIL is released: another thread makes progress during one long call."""
    memory = np.random.default_rng(1).integers(0, 256, 256 << 20, dtype=np.uint8)
    progress = 0

    def count() -> None:
        nonlocal progress
        progress += 1

    with Engine() as engine:
        engine.register(memory)
        with Threads(count):
            before = progress
            engine.settle()
            assert progress - before > 1000
