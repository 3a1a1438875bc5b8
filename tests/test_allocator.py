"""``Allocator``: blocks and arrays in memory that merges by construction."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pagemerge
import pytest
from conftest import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st

Program = Callable[..., subprocess.CompletedProcess[str]]
Array = np.ndarray[Any, Any]


@pytest.fixture
def allocator() -> Iterator[pagemerge.Allocator]:
    with pagemerge.Engine() as engine:
        yield pagemerge.Allocator(engine)


# ------------------------------------------------------------------------------------------ blocks


def test_block_is_a_writable_buffer_of_zeroes(allocator: pagemerge.Allocator) -> None:
    block = allocator.allocate(10_000)
    assert len(block) == block.nbytes == 10_000
    assert not block.released
    view = memoryview(block)
    assert (view.format, view.itemsize, view.ndim, view.shape) == ("B", 1, 1, (10_000,))
    assert view.contiguous
    assert not view.readonly
    assert not any(view)
    view[3:6] = b"abc"
    assert bytes(memoryview(block)[2:7]) == b"\0abc\0"
    assert repr(block) == "<pagemerge.Block of 10000 bytes>"


def test_block_begins_on_a_page_and_is_freed_with_its_last_view(
    allocator: pagemerge.Allocator,
) -> None:
    block = allocator.allocate(5_000)
    assert np.frombuffer(block, np.uint8).ctypes.data % PAGE == 0
    view = memoryview(block)[10:20]
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert allocator.stats().allocations == 1
    view[:] = b"x" * 10
    assert bytes(view) == b"x" * 10
    view.release()
    gc.collect()
    assert gone() is None
    assert allocator.stats().allocations == 0


def test_released_block_says_so(allocator: pagemerge.Allocator) -> None:
    block = allocator.allocate(5_000)
    view = memoryview(block)
    with pytest.raises(BufferError, match="1 views of it exist"):
        block.release()
    view[:] = b"y" * 5_000  # still there
    view.release()
    block.release()
    block.release()
    assert block.released
    assert block.nbytes == 5_000
    for use in (len, memoryview, np.frombuffer):
        with pytest.raises(ValueError, match="released"):
            use(block)
    with pytest.raises(ValueError, match="released"), block:
        pass
    assert repr(block) == "<pagemerge.Block released>"


def test_block_as_context_manager(allocator: pagemerge.Allocator) -> None:
    with allocator.allocate(5_000) as block, memoryview(block) as view:
        view[0] = 1
    assert block.released
    with pytest.raises(BufferError), allocator.allocate(5_000) as block:
        view = memoryview(block)
    assert not block.released
    # What went wrong inside is not hidden by the views that it left.
    kept: list[memoryview] = []

    def fail(block: pagemerge.Block) -> None:
        kept.append(memoryview(block))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), allocator.allocate(5_000) as block:
        fail(block)
    assert not block.released
    kept[0][0] = 2


def test_release_gives_memory_back_and_old_addresses_show_nobody_elses(
    allocator: pagemerge.Allocator,
) -> None:
    """``ndarray(buffer=...)`` gives its export back and keeps the address."""
    block = allocator.allocate(100_000)
    array: Array = np.ndarray(100_000, np.uint8, buffer=block)
    array[:] = 7
    block.release()
    others = [allocator.full(100_000, 9, np.uint8) for _ in range(20)]
    assert not array.any()
    array[:] = 5
    assert all((other == 9).all() for other in others)


def test_no_bytes_and_too_many(allocator: pagemerge.Allocator) -> None:
    empty = allocator.allocate(0)
    assert len(empty) == 0
    assert bytes(empty) == b""
    with pytest.raises(ValueError, match="less than none"):
        allocator.allocate(-1)
    with pytest.raises(MemoryError, match="cannot allocate"):
        allocator.allocate(1 << 47)
    with pytest.raises(MemoryError):
        allocator.allocate((1 << 63) - 1)
    with pytest.raises(OverflowError):
        allocator.allocate(1 << 63)
    with pytest.raises(TypeError):
        allocator.allocate(1.5)  # type: ignore[arg-type]
    assert allocator.stats().allocations == 1


# ------------------------------------------------------------------------------------------ arrays


def test_arrays_are_ndarrays_like_any_others(allocator: pagemerge.Allocator) -> None:
    array = allocator.empty((30, 400), np.int32, order="F")
    assert type(array) is np.ndarray
    assert array.flags.owndata
    assert array.flags.f_contiguous
    assert array.flags.writeable
    assert array.base is None
    assert allocator.owns(array)
    assert not array.any()
    array[:] = np.arange(12_000).reshape(30, 400)
    assert array.sum() == 12_000 * 11_999 // 2
    assert (pickle.loads(pickle.dumps(array)) == array).all()
    assert (copy.deepcopy(array) == array).all()
    view = array.reshape(-1, order="F")[5:100:7]
    assert view.base is not None
    flat = array.ravel(order="K").view(np.uint8)
    assert flat.nbytes == array.nbytes
    array = array.astype(np.float64)
    assert not allocator.owns(array)


def test_each_way_to_make_one(allocator: pagemerge.Allocator) -> None:
    assert allocator.zeros(5).tolist() == [0.0] * 5
    assert allocator.full((2, 2), 7).tolist() == [[7, 7], [7, 7]]
    assert allocator.full(3, 2.5).dtype == np.float64
    assert allocator.full(3, 300.7, np.uint16).tolist() == [300, 300, 300]
    assert allocator.full((2, 3), [1, 2, 3], "f4").tolist() == [[1, 2, 3], [1, 2, 3]]
    source = np.arange(6.0).reshape(2, 3).T
    copied = allocator.array(source)
    assert copied.flags.f_contiguous
    assert (copied == source).all()
    assert allocator.array(source, order="C").flags.c_contiguous
    assert allocator.array([[1, 2], [3, 4]], "i2").dtype == np.int16
    assert allocator.array(3.5).shape == ()
    record = allocator.zeros(100, [("name", "S20"), ("value", "f8", (2,))])
    record[7] = (b"seven", (7, 7))
    assert record["value"].sum() == 14
    made = [copied, record, allocator.empty((0, 5)), allocator.zeros(()), allocator.array(b"abc")]
    assert all(allocator.owns(array) for array in made)
    assert allocator.empty((0, 5)).shape == (0, 5)
    masked = allocator.array(np.ma.masked_array([1, 2], [True, False]))
    assert type(masked) is np.ndarray


def test_what_cannot_be_made_is_refused_by_name(allocator: pagemerge.Allocator) -> None:
    for dtype in (object, [("a", "i4"), ("b", "O")]):
        with pytest.raises(TypeError, match="references to Python objects"):
            allocator.empty(3, dtype)
        with pytest.raises(TypeError, match="references to Python objects"):
            allocator.zeros(3, dtype)
    with pytest.raises(TypeError, match="references to Python objects"):
        allocator.array([object(), None])
    with pytest.raises(ValueError, match="negative dimensions"):
        allocator.empty(-1)
    with pytest.raises(MemoryError):
        allocator.empty(1 << 45)
    with pytest.raises(TypeError):
        allocator.empty(3, "nonsense")
    # None of them has left its context behind.
    assert not allocator.owns(np.ones(100_000))
    assert allocator.stats().allocations == 0


def test_arrays_can_be_resized(allocator: pagemerge.Allocator) -> None:
    array = allocator.array(np.arange(3000))
    for size in (3001, 10, 1_000_000, 4_000_000, 0, 5, 700_000):
        before = array.copy()
        array.resize(size, refcheck=False)
        same = min(size, before.size)
        assert (array[:same] == before[:same]).all()
        assert not array[same:].any()
        assert allocator.owns(array)


def test_arrays_free_themselves(allocator: pagemerge.Allocator) -> None:
    arrays = [allocator.full(10_000 * (1 + n), n) for n in range(50)]
    stats = allocator.stats()
    assert stats.allocations == 50
    assert stats.live_bytes == sum(array.nbytes for array in arrays)
    assert stats.held_bytes >= stats.live_bytes
    part = arrays[49][5:10]
    del arrays
    gc.collect()
    assert allocator.stats().allocations == 1
    assert (part == 49).all()
    del part
    gc.collect()
    allocator.trim()
    after = allocator.stats()
    assert (after.allocations, after.live_bytes, after.held_bytes, after.arenas) == (0, 0, 0, 0)
    assert (after - stats).allocations == -50


def test_arrays_outlive_allocator_and_engine() -> None:
    allocator = pagemerge.Allocator()
    arrays = [allocator.full(200_000, 3.5) for _ in range(4)]
    assert allocator.engine.settle().pages_sharing > 1000
    del allocator
    gc.collect()
    assert all((array == 3.5).all() for array in arrays)
    arrays[0][:] = 1
    arrays[1].resize(500_000, refcheck=False)
    assert (arrays[1][:200_000] == 3.5).all()
    assert (arrays[2] == 3.5).all()


# ------------------------------------------------------------------------------------------ merging


def test_equal_arrays_merge_to_the_last_page(allocator: pagemerge.Allocator) -> None:
    random = np.random.default_rng(1)
    data = random.random(12_345)
    arrays, between = [], []
    for _ in range(10):
        arrays.append(allocator.array(data))
        between.append(allocator.array(random.random(int(random.integers(1, 5000)))))
    stats = allocator.engine.settle()
    pages = -(-data.nbytes // PAGE)
    assert stats.pages_shared == pages
    assert stats.pages_sharing == 9 * pages
    assert all((array == data).all() for array in arrays)
    arrays[3][0] = -1
    assert (arrays[4] == data).all()


@pytest.mark.usefixtures("full_barrier")
def test_background_merges_what_is_allocated_later(allocator: pagemerge.Allocator) -> None:
    engine = allocator.engine
    engine.settings.sleep_millisecs = 1
    engine.settings.advisor_mode = "none"
    engine.settings.pages_to_scan = 100_000
    engine.start()
    arrays = [allocator.full(50_000, 4.5) for _ in range(20)]
    for _ in range(1000):
        if engine.stats().pages_sharing >= 19 * 97:
            break
        threading.Event().wait(0.01)
    assert engine.stats().pages_sharing >= 19 * 97
    assert all((array == 4.5).all() for array in arrays)


def test_domains_keep_allocators_apart() -> None:
    with pagemerge.Engine(use_zero_pages=False) as engine:
        allocators = [pagemerge.Allocator(engine, domain=name) for name in ("one", "other")]
        arrays = [each.full(20_000, 6.5) for each in allocators]
        same = allocators[0].full(20_000, 6.5)
        # 39 equal pages in each array, and one that ends early: alone in its domain for the other.
        assert engine.settle().pages_shared == 3
        assert all((array == 6.5).all() for array in [*arrays, same])


def test_memory_of_an_allocator_is_registered_already(allocator: pagemerge.Allocator) -> None:
    array = allocator.full(100_000, 2.5)
    with pytest.raises(ValueError, match=r"an allocator's.*allocator\.engine\.settle"):
        allocator.engine.register(array)
    with pytest.raises(ValueError, match="an allocator's"):
        pagemerge.merge(np.full(100_000, 2.5), array)
    assert pagemerge.evaluate(array, array.copy()).merged > 300


def test_closed_engine_leaves_ordinary_memory() -> None:
    engine = pagemerge.Engine()
    allocator = pagemerge.Allocator(engine)
    assert allocator.engine is engine
    arrays = [allocator.full(100_000, 2.5) for _ in range(3)]
    assert allocator.stats().not_merging is None
    engine.settle()
    engine.close()
    assert "closed" in str(allocator.stats().not_merging)
    arrays.append(allocator.full(100_000, 2.5))
    del arrays[1]
    assert not allocator.zeros(100_000).any()
    assert all((array == 2.5).all() for array in arrays)
    with pytest.raises(pagemerge.ClosedError):
        allocator.engine.settle()


def test_engine_that_is_dropped_lets_arrays_stay_merged(program: Program) -> None:
    program(
        """
import gc
import numpy as np, pagemerge
engine = pagemerge.Engine()
own = np.full(1_000_000, 1.5)
engine.register(own)
allocator = pagemerge.Allocator(engine)
arrays = [allocator.full(4_000_000, 2.5) for _ in range(4)]
engine.settle()
before = pagemerge.memory_usage()["pss"]
del engine, allocator
gc.collect()
after = pagemerge.memory_usage()["pss"]
assert after < before + 20_000_000, (before, after)  # `own`, and not 128 MB of arrays
pagemerge.merge(own)  # it is not registered any more
assert all((array == 2.5).all() for array in arrays)
del arrays
gc.collect()
assert pagemerge.memory_usage()["rss"] < 200_000_000
"""
    )


def test_counters_are_a_mapping(allocator: pagemerge.Allocator) -> None:
    stats = allocator.stats()
    assert isinstance(stats, pagemerge.AllocatorStats)
    assert dict(stats)["allocations"] == 0
    assert repr(allocator) == "<pagemerge.Allocator of 0 blocks, 0 bytes>"
    array = allocator.zeros(1000)
    assert repr(allocator) == "<pagemerge.Allocator of 1 blocks, 8000 bytes>"
    assert allocator.stats().metadata_bytes > 0
    assert allocator.stats().metadata_bytes < 1 << 20
    del array


# ------------------------------------------------------------------------------ fork, threads, exit


def test_child_allocates_and_its_parent_is_not_touched(program: Program) -> None:
    program(
        """
import gc, os, sys
import numpy as np, pagemerge

allocator = pagemerge.Allocator()
arrays = [allocator.full(300_000, 2.5) for _ in range(4)]
blocks = [allocator.allocate(100_000) for _ in range(4)]
allocator.engine.settle()
for turn in range(3):
    child = os.fork()
    if not child:
        try:
            assert all((array == 2.5).all() for array in arrays)
            arrays[0][:] = 1
            blocks[0].release()
            del blocks[1:], arrays[2:]
            gc.collect()
            more = [allocator.zeros(n) for n in (10, 100_000, 5_000_000)]
            assert not any(array.any() for array in more)
            for array in more:
                array[:] = 9
            with allocator.numpy():
                assert (np.ones(100_000) * 4 == 4).all()
            assert (arrays[1] == 2.5).all()
            assert "parent" in allocator.stats().not_merging
            try:
                allocator.engine.settle()
            except pagemerge.ForkedError:
                pass
            else:
                raise AssertionError
            allocator.trim()
            del allocator, more, arrays
            gc.collect()
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all((array == 2.5).all() for array in arrays)
    assert allocator.engine.settle().pages_sharing > 2000
assert allocator.stats().not_merging is None
"""
    )


def test_child_that_leaves_by_the_interpreters_end(program: Program) -> None:
    done = program(
        """
import os, sys
import numpy as np, pagemerge
allocator = pagemerge.Allocator()
arrays = [allocator.full(300_000, 2.5) for _ in range(4)]
allocator.engine.settle()
if not os.fork():
    assert (arrays[0] == 2.5).all()
    sys.exit(3)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 3
assert (arrays[3] == 2.5).all()
"""
    )
    assert done.stderr == ""


def test_threads_allocate_and_free(allocator: pagemerge.Allocator) -> None:
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        kept: list[tuple[Array, int]] = []
        for turn in range(300):
            array = allocator.zeros(int(random.integers(1, 60_000)), np.uint8)
            if array.any():
                wrong.append("not zero")
            array[:] = turn % 250
            kept.append((array, turn % 250))
            if len(kept) > 20:
                array, value = kept.pop(int(random.integers(20)))
                if not (array == value).all():
                    wrong.append("not its own")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        allocator.engine.scan()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert allocator.stats().allocations == 0


def test_exit_with_everything_alive(program: Program) -> None:
    done = program(
        """
import atexit, threading
import numpy as np, pagemerge
allocator = pagemerge.Allocator()
if pagemerge.capabilities().barrier == "full":
    allocator.engine.start()
arrays = [allocator.full(500_000, 2.5) for _ in range(4)]
block = allocator.allocate(100_000)
view = memoryview(block)
context = allocator.numpy()
context.__enter__()
more = np.ones(500_000)

class Late:
    def __del__(self):
        # Modules are being taken down.
        self.kept.resize(100, refcheck=False)
        del self.kept

late = Late()
late.kept = np.ones(800_000)
late.circle = late
atexit.register(lambda: print(all((array == 2.5).all() for array in arrays)))

def churn():
    with allocator.numpy():
        while True:
            np.ones(100_000) + 1

threading.Thread(target=churn, daemon=True).start()
"""
    )
    assert done.stdout == "True\n"
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------- limits


def test_address_space_limit_is_a_memory_error(program: Program) -> None:
    program(
        """
import resource
import numpy as np, pagemerge
allocator = pagemerge.Allocator()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * pagemerge.PAGE_SIZE
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
kept = []
try:
    while True:
        kept.append(allocator.full(10_000, 7.5))
except MemoryError:
    pass
assert len(kept) > 20, len(kept)  # small arenas, where there is no room for a large one
assert all((array == 7.5).all() for array in kept)
del kept[::2]
kept.append(allocator.full(10_000, 7.5))
"""
    )


@given(
    st.lists(
        st.tuples(st.sampled_from("aaafrsm"), st.integers(0, 300_000), st.integers(0, 30)),
        max_size=40,
    )
)
@settings(max_examples=30, deadline=None)
def test_any_history_gives_each_array_its_own_bytes(
    history: list[tuple[str, int, int]],
) -> None:
    with pagemerge.Engine(quiet_millisecs=1) as engine:
        allocator = pagemerge.Allocator(engine)
        arrays: list[list[Array]] = []
        for step in history:
            _one_step(allocator, arrays, *step)
        assert all((array == model).all() for array, model in arrays)
        live = sum(max(model.size, 1) for _, model in arrays)
        assert allocator.stats().live_bytes == live


def _one_step(
    allocator: pagemerge.Allocator, arrays: list[list[Array]], what: str, size: int, which: int
) -> None:
    if what == "a":
        made = allocator.empty(size, np.uint8)
        assert not made.any()
        made[:] = which % 4
        arrays.append([made, made.copy()])
    elif what == "s":
        allocator.engine.scan()
    elif arrays:
        array, model = arrays[which % len(arrays)]
        if what == "f":
            arrays.pop(which % len(arrays))
        elif what == "r":
            array.resize(size, refcheck=False)
            grown = np.zeros(size, np.uint8)
            grown[: model.size] = model[:size]
            arrays[which % len(arrays)][1] = grown
        else:
            array[size % 7 :: 13] = which
            model[size % 7 :: 13] = which


def test_blocks_beyond_all_machines_are_refused_before_the_kernel_is_asked() -> None:
    """Broke: 20 TiB were given as 16 TiB, which only the kernel's refusal kept from being used."""
    for nbytes in (1 << 42, (1 << 44) + (1 << 43), 1 << 62):
        with pytest.raises(MemoryError, match="largest block"):
            pagemerge.Allocator().allocate(nbytes)


def test_copies_share_no_buffer_with_what_they_are_of() -> None:
    """Broke: buffers that are not numpy's were handed over as they were."""
    allocator = pagemerge.Allocator()
    mine = bytearray(100_000)
    [copied] = allocator.copy([pickle.PickleBuffer(mine)])
    mine[0] = 1
    assert bytes(copied) == bytes(100_000)


def test_nothing_of_an_allocator_merges_without_a_barrier(
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Broke: arrays that threads wrote during settle() read back what had been there before."""
    program(
        """
        import threading
        import numpy as np, pagemerge

        engine = pagemerge.Engine(barrier="none")
        allocator = pagemerge.Allocator(engine)
        same = [allocator.full(50_000, 4.5) for _ in range(3)]
        ended, wrong = threading.Event(), []

        def compute(seed):
            value = float(seed)
            while not ended.is_set():
                array = allocator.zeros(20_000)
                array += value
                if not (array == value).all():
                    wrong.append(array)

        threads = [threading.Thread(target=compute, args=(seed,)) for seed in (0, 2)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            assert engine.settle().pages_sharing == 0
        ended.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert "without a barrier" in allocator.stats().not_merging
        assert all((array == 4.5).all() for array in same)
        """
    )
