"""merge(): now, and then nobody has to hold anything."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena, page_of, random_array
from pagemerge._core import memory_usage

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    pagemerge.unmerge()


def test_report_says_what_was_done() -> None:
    arena = Arena([1, 1, 1, 2, 3, 0, 0])
    report = pagemerge.merge(arena.map)
    assert report.pages == 7
    assert report.merged == 3
    assert report.zero == 2
    assert report.frames == 1
    assert report.bytes_saved == (3 + 2 - 1) * PAGE
    assert report.seconds > 0
    assert report.kept_alive == (arena.map,)
    assert arena.tags() == [1, 1, 1, 2, 3, 0, 0]


def test_nothing_to_merge_saves_nothing() -> None:
    report = pagemerge.merge(random_array(50 * PAGE, 1), random_array(50 * PAGE, 2))
    assert (report.merged, report.zero, report.frames, report.bytes_saved) == (0, 0, 0, 0)


def test_no_buffers_is_no_work() -> None:
    assert pagemerge.merge().pages == 0


def test_eight_arrays_of_64_mib() -> None:
    """The acceptance test: PSS falls by at least 95 % of what is possible, and comes back."""
    gc.collect()
    start = memory_usage()
    data = random_array(64 * MIB, 3)
    arrays = [data.copy() for _ in range(8)]
    before = memory_usage()
    report = pagemerge.merge(*arrays)
    assert all(np.array_equal(array, data) for array in arrays)
    after = memory_usage()
    possible = 7 * 64 * MIB
    assert before["pss"] - after["pss"] >= 0.95 * possible
    assert report.bytes_saved >= 0.99 * possible
    assert report.kept_alive == ()
    # The frames lie in a memfd, which is shared memory.
    assert abs(after["pss_shmem"] - start["pss_shmem"] - 64 * MIB) <= MIB

    arrays[3] += 1
    assert all(np.array_equal(array, data) for array in arrays[:3] + arrays[4:])
    assert np.array_equal(arrays[3], data + np.uint8(1))

    del arrays, data
    gc.collect()
    end = memory_usage()
    assert end["pss_shmem"] == start["pss_shmem"]
    assert end["pss"] - start["pss"] <= 16 * MIB


def test_arrays_are_not_kept_alive() -> None:
    arrays = [np.full(100_000, 3.0) for _ in range(3)]
    ends = [weakref.ref(array) for array in arrays]
    report = pagemerge.merge(*arrays)
    assert report.kept_alive == ()
    del arrays[1]
    assert [end() is None for end in ends] == [False, True, False]
    assert all((array == 3.0).all() for array in arrays)


def test_views_follow_their_owner() -> None:
    owner = np.full((400, 1000), 4.0)
    end = weakref.ref(owner)
    view = memoryview(owner[10:200])
    report = pagemerge.merge(view, owner[200:300])
    assert report.kept_alive == ()
    assert report.merged > 500
    del view
    assert (owner == 4.0).all()
    del owner
    assert end() is None


def test_memory_of_a_freed_array_is_fresh() -> None:
    """An allocator hands memory out again; whoever gets it must not see frames."""
    for size in (3 * PAGE, 20 * PAGE, 600 * PAGE):
        for _ in range(20):
            arrays = [np.full(size, 7, dtype=np.uint8) for _ in range(4)]
            pagemerge.merge(*arrays)
            del arrays
            others = [np.zeros(size, dtype=np.uint8) for _ in range(4)]
            assert not any(array.any() for array in others)


def test_array_cannot_move_while_merged() -> None:
    array = np.full(100_000, 4.0)
    pagemerge.merge(array)
    with pytest.raises(ValueError, match="referenc"):
        array.resize(200_000, refcheck=False)


def test_other_owners_are_kept_alive_until_unmerged() -> None:
    class Special(np.ndarray):
        pass

    special = np.full(100_000, 5.0).view(Special).copy()
    buffer = bytearray(page_of(6) * 20)
    report = pagemerge.merge(buffer, special)
    assert [type(kept) for kept in report.kept_alive] == [bytearray, Special]
    with pytest.raises(BufferError):
        buffer.clear()
    pagemerge.unmerge(buffer)
    buffer.clear()
    pagemerge.unmerge()
    assert (special == 5.0).all()


def test_merging_again_and_more() -> None:
    first, second, third = (np.full(200_000, 9.0) for _ in range(3))
    one = pagemerge.merge(first, second)
    again = pagemerge.merge(first, second)
    assert again.merged == one.merged
    assert (again.frames, again.bytes_saved) == (0, 0)
    more = pagemerge.merge(first, third)
    assert more.bytes_saved > 300 * PAGE
    del first, second
    assert (third == 9.0).all()


def test_the_same_buffer_twice_and_overlapping_pieces() -> None:
    array = np.full(40 * PAGE, 2, dtype=np.uint8)
    whole = pagemerge.merge(array, array).pages
    assert whole in (39, 40)
    pagemerge.unmerge(array)
    pagemerge.merge(array[: 10 * PAGE])
    pagemerge.merge(array[25 * PAGE : 30 * PAGE])
    assert pagemerge.merge(array).pages == whole
    assert (array == 2).all()
    del array
    gc.collect()


def test_other_settings_take_over() -> None:
    arena = Arena([1] * 12)
    assert pagemerge.merge(arena.map).frames == 1
    report = pagemerge.merge(arena.map, max_page_sharing=3)
    assert report.frames == 4
    assert arena.tags() == [1] * 12


def test_failure_merges_nothing_new() -> None:
    array = np.full(100_000, 1.0)
    with pytest.raises(TypeError):
        pagemerge.merge(array, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no whole page"):
        pagemerge.merge(array, bytearray(5))
    with pytest.raises(ValueError, match="there is no setting"):
        pagemerge.merge(array, nothing=5)
    array.resize(200_000, refcheck=False)


def test_unmerge_of_what_is_not_merged_is_fine() -> None:
    pagemerge.unmerge(bytearray(10 * PAGE))
    pagemerge.unmerge()


def test_registered_memory_is_refused(engine: pagemerge.Engine) -> None:
    arena = Arena([1, 1])
    engine.register(arena.map)
    with pytest.raises(ValueError, match="already"):
        pagemerge.merge(arena.map)


def test_threads_merge_and_free_at_once() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(8):
                arrays = [random_array(64 * PAGE, turn) for _ in range(3)]
                pagemerge.merge(*arrays)
                expected = random_array(64 * PAGE, turn)
                assert all(np.array_equal(array, expected) for array in arrays)
                del arrays[seed % 3]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_cyclic_garbage_sees_its_data_in_its_finalizer() -> None:
    """Weak references of a subclass in a cycle are cleared before finalizers run."""
    seen: list[bool] = []

    class Cycle(np.ndarray):
        def __array_finalize__(self, _source: object) -> None:
            self.me = self

    class Owner:
        def __init__(self) -> None:
            self.me = self
            self.plain = np.full(100_000, 8.0)
            self.special = np.full(100_000, 8.0).view(Cycle).copy()

        def __del__(self) -> None:
            seen.append(bool((self.plain == 8.0).all() and (self.special == 8.0).all()))

    owner = Owner()
    pagemerge.merge(owner.plain, owner.special)
    del owner
    pagemerge.unmerge()
    gc.collect()
    assert seen == [True]
