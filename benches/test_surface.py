"""What calls of the Python interface cost by themselves, by pytest-benchmark.

    pytest benches

Small memory, so that it is the calls that are measured; whole runs are in `rivals.py`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pagemerge
import pytest
from numpy.typing import NDArray
from pagemerge import PAGE_SIZE

PAGES = 256
Pages = NDArray[np.uint64]


def _memory(distinct: int) -> Pages:
    memory = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(memory, dtype=np.uint64).reshape(PAGES, -1)
    contents = np.random.default_rng(1).integers(1, 1 << 63, pages.shape, dtype=np.uint64)
    pages[:] = contents[np.arange(PAGES) % distinct]
    return pages


@pytest.fixture
def engine() -> Iterator[pagemerge.Engine]:
    with pagemerge.Engine() as made:
        yield made


@pytest.fixture
def settled(engine: pagemerge.Engine) -> pagemerge.Engine:
    engine.register(_memory(PAGES // 4))
    engine.settle()
    return engine


def test_make_and_close_an_engine(benchmark: Any) -> None:
    benchmark(lambda: pagemerge.Engine().close())


def test_register_and_unregister(benchmark: Any, engine: pagemerge.Engine) -> None:
    memory = _memory(PAGES)
    benchmark(lambda: engine.unregister(engine.register(memory)))


def test_scan_nothing(benchmark: Any, engine: pagemerge.Engine) -> None:
    benchmark(engine.scan)


def test_scan_what_has_not_changed(benchmark: Any, settled: pagemerge.Engine) -> None:
    benchmark(settled.scan)


def test_stats(benchmark: Any, settled: pagemerge.Engine) -> None:
    benchmark(settled.stats)


def test_difference_of_stats(benchmark: Any, settled: pagemerge.Engine) -> None:
    first, second = settled.stats(), settled.stats()
    benchmark(lambda: dict(second - first))


def test_region_stats(benchmark: Any, engine: pagemerge.Engine) -> None:
    region = engine.register(_memory(PAGES // 4))
    engine.settle()
    benchmark(region.stats)


def test_exclude_again(benchmark: Any, engine: pagemerge.Engine) -> None:
    memory = _memory(PAGES)
    region = engine.register(memory)
    benchmark(lambda: region.exclude(memory[8:10]))


def test_discard_a_page(benchmark: Any, engine: pagemerge.Engine) -> None:
    memory = _memory(PAGES)
    engine.register(memory)
    benchmark(lambda: engine.discard(memory[8:9]))


def test_change_a_setting(benchmark: Any, engine: pagemerge.Engine) -> None:
    def change() -> None:
        engine.settings.sleep_millisecs = 30

    benchmark(change)


def test_merge_again(benchmark: Any) -> None:
    memory = _memory(PAGES // 4)
    pagemerge.merge(memory)
    try:
        benchmark(lambda: pagemerge.merge(memory))
    finally:
        pagemerge.unmerge()


def test_merge_and_unmerge(benchmark: Any) -> None:
    memory = _memory(PAGES // 4)

    def once() -> None:
        pagemerge.merge(memory)
        pagemerge.unmerge(memory)

    benchmark(once)


def test_evaluate(benchmark: Any) -> None:
    memory = _memory(PAGES // 4)
    benchmark(lambda: pagemerge.evaluate(memory))


def test_capabilities(benchmark: Any) -> None:
    benchmark(pagemerge.capabilities)
