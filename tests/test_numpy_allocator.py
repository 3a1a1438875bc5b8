"""``with allocator.numpy():`` numpy's own allocations (NEP 49) lie in the allocator."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import io
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def test_arrays_made_inside_lie_in_the_allocator(allocator: pagemerge.Allocator) -> None:
    before = np.ones(100_000)
    with allocator.numpy():
        made = {
            "ones": np.ones(100_000),
            "arithmetic": before * 2 + 1,
            "copy": before.copy(),
            "astype": before.astype(np.float32),
            "concatenate": np.concatenate([before, before]),
            "where": np.where(before > 0, before, 0),
            "arange": np.arange(100_000),
            "sort": np.sort(before),
            "random": np.random.default_rng(1).random(100_000),
            "matmul": np.ones((300, 300)) @ np.ones((300, 300)),
            "fromiter": np.fromiter(range(100_000), np.int64),
            "array": np.array(range(100_000)),
            "strings": np.full(10_000, "value"),
        }
        view = before[::2]
    after = np.ones(100_000)
    assert {name for name, array in made.items() if not allocator.owns(array)} == set()
    assert not any(allocator.owns(array) for array in (before, view.copy(), after))
    assert (made["arithmetic"] == 3).all()
    assert (made["fromiter"] == np.arange(100_000)).all()
    assert made["matmul"][7, 7] == 300
    assert all(array.ctypes.data % PAGE == 0 for array in made.values())
    assert all(array.flags.owndata for array in made.values())


def test_small_arrays_are_numpys(allocator: pagemerge.Allocator) -> None:
    context = allocator.numpy(threshold=1000)
    assert context.threshold == 1000
    with context:
        small, large = np.zeros(999, np.uint8), np.zeros(1000, np.uint8)
        many = [np.ones(n) for n in range(120)]
        nothing = np.empty((2, 0, 2)), np.empty(0), np.zeros(())
    assert not allocator.owns(small)
    assert allocator.owns(large)
    assert allocator.stats().allocations == 1
    del nothing, many, large
    gc.collect()
    assert allocator.stats().allocations == 0
    with allocator.numpy(0):
        arrays = [np.empty((2, 0, 2)), np.empty(0), np.zeros(()), np.ones(3)]
    assert all(allocator.owns(array) for array in arrays)
    del arrays
    gc.collect()
    assert allocator.stats().allocations == 0
    with pytest.raises(ValueError, match="threshold"):
        allocator.numpy(-1)


def test_arrays_outlive_context_allocator_and_engine() -> None:
    engine = pagemerge.Engine()
    allocator = pagemerge.Allocator(engine)
    context = allocator.numpy()
    with context:
        arrays = [np.full(300_000, 1.5) for _ in range(4)]
    engine.settle()
    del allocator, context
    gc.collect()
    assert all((array == 1.5).all() for array in arrays)
    arrays[0].resize(600_000, refcheck=False)
    assert engine.settle().pages_sharing > 1000
    engine.close()
    del engine
    gc.collect()
    assert (arrays[0][:300_000] == 1.5).all()
    assert not arrays[0][300_000:].any()
    arrays[0].resize(10, refcheck=False)
    del arrays[1]
    assert all((array == 1.5).all() for array in arrays)


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=12), st.sampled_from([0, 1, 9000]))
@settings(max_examples=60, deadline=None)
def test_resizing_across_the_threshold_keeps_every_byte(sizes: list[int], inside: int) -> None:
    allocator = SHARED
    with allocator.numpy(9000):
        array = np.ones(inside, np.uint8)
    model = array.copy()
    for turn, size in enumerate(sizes):
        array.resize(size, refcheck=False)
        grown = np.zeros(size, np.uint8)
        grown[: model.size] = model[:size]
        assert (array == grown).all()
        assert allocator.owns(array) == (size >= 9000)
        array[::3] = turn + 2
        model = array.copy()


SHARED = pagemerge.Allocator()


def test_growing_without_knowing_how_far(allocator: pagemerge.Allocator) -> None:
    """``fromiter`` and ``loadtxt`` begin small and have numpy resize what they have."""
    text = io.StringIO("\n".join(f"{n} {n * 2}" for n in range(20_000)))
    with allocator.numpy():
        grown = np.fromiter((n * 3 for n in range(200_000)), np.int64)
        table = np.loadtxt(text)
        line = np.fromstring(" ".join(map(str, range(50_000))), sep=" ")
    assert (grown == np.arange(200_000) * 3).all()
    assert (table[:, 1] == table[:, 0] * 2).all()
    assert (line == np.arange(50_000)).all()
    assert allocator.owns(grown)
    assert allocator.owns(table)
    assert allocator.owns(line)


def test_what_is_loaded_lies_in_the_allocator(allocator: pagemerge.Allocator) -> None:
    arrays = {"a": np.random.default_rng(1).random((200, 300)), "b": np.arange(70_000)}
    stored, packed = io.BytesIO(), io.BytesIO()
    np.savez(stored, **arrays)
    np.savez_compressed(packed, **arrays)
    with allocator.numpy():
        loaded = [dict(np.load(io.BytesIO(file.getvalue()))) for file in (stored, packed)]
    for found in loaded:
        for name, array in arrays.items():
            assert (found[name] == array).all()
            owner = found[name]
            while owner.base is not None:
                owner = owner.base
            assert allocator.owns(owner), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_unpickled_can_be_copied_over(
    allocator: pagemerge.Allocator, protocol: int
) -> None:
    base = np.arange(60_000).reshape(200, 300)
    thing = {
        "c": base,
        "f": np.asfortranarray(base * 2.0),
        "part": base[::2, 5:],
        "scalar": np.float32(3),
        "zero": np.array(7),
        "empty": np.empty((0, 3)),
        "records": np.ones(500, [("a", "i4"), ("b", "S8")]),
        "objects": np.array([None, "text"], object),
        "names": ["a", "b"],
        "again": base,
    }
    found = allocator.copy(pickle.loads(pickle.dumps(thing, protocol)))
    assert found["names"] == ["a", "b"]
    assert found["again"] is found["c"]
    assert found["objects"].tolist() == [None, "text"]
    for name in ("c", "f", "part", "scalar", "zero", "empty", "records"):
        right, copied = thing[name], found[name]
        assert type(copied) is type(right)
        assert copied.dtype == right.dtype
        assert copied.shape == right.shape
        assert (copied == right).all()
    assert found["f"].flags.f_contiguous
    for name in ("c", "f", "zero", "empty", "records"):
        assert allocator.owns(found[name]), name
    second = allocator.copy(found)
    assert allocator.engine.settle().pages_sharing > 200
    second["c"][0, 0] = -1
    assert found["c"][0, 0] == 0


def test_pandas_columns_merge(allocator: pagemerge.Allocator) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    with allocator.numpy():
        frames = [pandas.DataFrame({"a": np.arange(100_000), "b": np.ones(100_000)}) for _ in "12"]
        frames = [frame * 2 for frame in frames]
    assert allocator.engine.settle().pages_sharing > 300
    assert (frames[0] == frames[1]).all().all()


# ---------------------------------------------------------------------------------------- contexts


def test_contexts_can_be_nested(allocator: pagemerge.Allocator) -> None:
    other = pagemerge.Allocator(allocator.engine)
    outer, inner = allocator.numpy(), other.numpy()
    with outer:
        first = np.ones(50_000)
        with inner:
            second = np.ones(50_000)
            with outer, outer:
                third = np.ones(50_000)
            fourth = np.ones(50_000)
        fifth = np.ones(50_000)
    sixth = np.ones(50_000)
    assert [allocator.owns(a) for a in (first, second, third, fourth, fifth, sixth)] == [
        *(True, False, True, False, True, False)
    ]
    assert other.owns(second)
    assert other.owns(fourth)
    # Made by one, resized and freed while another is in force.
    with inner:
        first.resize(90_000, refcheck=False)
        assert allocator.owns(first)
        del third
    gc.collect()
    assert allocator.stats().allocations == 2


def test_exceptions_leave_the_context(allocator: pagemerge.Allocator) -> None:
    with pytest.raises(ZeroDivisionError), allocator.numpy():
        _ = 1 / 0
    assert not allocator.owns(np.ones(100_000))
    with allocator.numpy():
        try:
            with allocator.numpy(0):
                raise KeyError
        except KeyError:
            pass
        assert allocator.owns(np.ones(100_000))
        assert not allocator.owns(np.ones(10))


def test_leaving_in_another_order_is_refused(allocator: pagemerge.Allocator) -> None:
    first, second = allocator.numpy(), allocator.numpy()
    with pytest.raises(RuntimeError, match="cannot leave"):
        first.__exit__(None, None, None)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="reverse order"):
        first.__exit__(None, None, None)
    # Nor can another thread leave what this one has entered.
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="thread or task"):
        pool.submit(second.__exit__, None, None, None).result()
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert not allocator.owns(np.ones(100_000))


def test_threads_enter_for_themselves(allocator: pagemerge.Allocator) -> None:
    context = allocator.numpy()

    def owned() -> bool:
        return allocator.owns(np.ones(100_000))

    def inside() -> bool:
        with context:
            return owned()

    with context, ThreadPoolExecutor(1) as pool:
        assert owned()
        assert not pool.submit(contextvars.Context().run, owned).result()
        assert pool.submit(inside).result()
        assert pool.submit(contextvars.copy_context().run, owned).result()
    with ThreadPoolExecutor(2, initializer=context.__enter__) as pool:
        assert all(future.result() for future in [pool.submit(owned) for _ in range(8)])
    assert not owned()


def test_tasks_have_contexts_of_their_own(allocator: pagemerge.Allocator) -> None:
    async def one(allocator: pagemerge.Allocator | None, turns: int) -> bool:
        if allocator is None:
            for _ in range(turns):
                await asyncio.sleep(0)
                if any(each.owns(np.ones(30_000)) for each in allocators):
                    return False
            return True
        for _ in range(turns):
            with allocator.numpy():
                await asyncio.sleep(0)
                if not allocator.owns(np.ones(30_000)):
                    return False
            await asyncio.sleep(0)
            if allocator.owns(np.ones(30_000)):
                return False
        return True

    allocators = [allocator, pagemerge.Allocator(allocator.engine)]

    async def every() -> list[bool]:
        tasks = [one(which, 30) for which in [*allocators, None, *allocators]]
        found = await asyncio.gather(*tasks)
        with allocator.numpy():
            inherits = asyncio.create_task(asyncio.to_thread(np.ones, 30_000))
            return [*found, allocator.owns(await inherits)]

    assert all(asyncio.run(every()))


def test_generators_that_are_left_in_the_middle(allocator: pagemerge.Allocator) -> None:
    def numbers() -> Iterator[Array]:
        with allocator.numpy():
            while True:
                yield np.ones(100_000)

    made = numbers()
    assert allocator.owns(next(made))
    # As with every context variable: what a generator has entered is its caller's until it goes on.
    assert allocator.owns(np.ones(100_000))
    made.close()
    assert not allocator.owns(np.ones(100_000))


# ---------------------------------------------------------------------------- threads and merging


@pytest.mark.usefixtures("full_barrier")
def test_threads_compute_while_everything_merges(allocator: pagemerge.Allocator) -> None:
    engine = allocator.engine
    engine.settings.advisor_mode = "none"
    engine.settings.pages_to_scan = 50_000
    engine.settings.sleep_millisecs = 1
    engine.start()
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        with allocator.numpy():
            kept: list[tuple[Array, float]] = []
            for turn in range(150):
                value = float(turn % 5)
                size = int(random.integers(10, 120_000))
                array = np.full(size, value) + np.zeros(size) * 2
                kept.append((array, value))
                if turn % 7 == 0:
                    array.resize(size * 2, refcheck=False)
                    array[size:] = value
                if len(kept) > 8:
                    array, value = kept.pop(int(random.integers(8)))
                    if not (array == value).all():
                        wrong.append(value)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert allocator.stats().allocations == 0


# ---------------------------------------------------------------------------------------- the bound

MODEL = """
import ctypes, gc, io, os, pickle, sys
import numpy as np, pagemerge

def model():
    # Weights as networks have them: large and small, some of them zero or one.
    random = np.random.default_rng(5)
    layers = {"embedding": random.standard_normal((6000, 512), np.float32)}
    for n in range(10):
        layers[f"{n}.attention"] = random.standard_normal((512, 1536), np.float32)
        layers[f"{n}.attention.bias"] = random.standard_normal(1536, np.float32)
        layers[f"{n}.up"] = random.standard_normal((512, 2048)).astype(np.float16)
        layers[f"{n}.down"] = random.standard_normal((2048, 512)).astype(np.float16)
        layers[f"{n}.norm"] = np.ones(512, np.float32)
        layers[f"{n}.odd"] = random.standard_normal((333, 77))
        layers[f"{n}.steps"] = np.arange(5001)
    return layers

def loader(how):
    arrays, file = model(), io.BytesIO()
    if how == "npz":
        np.savez(file, **arrays)
    else:
        pickle.dump(arrays, file, protocol=4)
    path = f"/dev/shm/pagemerge-model-{os.getpid()}"
    with open(path, "wb") as there:
        there.write(file.getvalue())
    def load(allocator=None):
        with open(path, "rb") as there:
            if how == "npz":
                return dict(np.load(there))
            loaded = pickle.load(there)
            # numpy leaves the data in the unpickler's bytes.
            return allocator.copy(loaded) if allocator else loaded
    return load, path

def physical(engine=None, allocator=None):
    gc.collect()
    # What malloc keeps of what loading has freed is nobody's.
    ctypes.CDLL(None).malloc_trim(0)
    total = pagemerge.memory_usage()["pss"]
    # Frames are in PSS as far as they are mapped; what the memfd has beyond counts as well.
    if engine is not None:
        stats = engine.stats()
        shared = pagemerge.memory_usage()["pss_shmem"]
        total += max(0, stats.frames_bytes - shared)
    return total
"""


@pytest.mark.parametrize("how", ["npz", "pickle"])
def test_two_copies_of_a_model_take_little_more_than_one(program: Program, how: str) -> None:
    done = program(
        MODEL
        + f"""
load, path = loader({how!r})
try:
    load()
    allocator = pagemerge.Allocator()
    engine = allocator.engine
    engine.settle()
    empty = physical(engine)
    with allocator.numpy():
        first = load(allocator)
    one = physical(engine) - empty
    with allocator.numpy():
        second = load(allocator)
    engine.settle()
    two = physical(engine) - empty
finally:
    os.unlink(path)
right = model()
for copy in first, second:
    assert all((copy[name] == array).all() for name, array in right.items())
size = sum(array.nbytes for array in right.values())
del right
assert one > 0.95 * size, (one, size)
print(f"{{one}} {{two}} {{two / one:.4f}}")
assert two <= 1.05 * one, (one, two)
first["0.up"][:] = 0
assert (second["0.up"] != 0).any()
"""
    )
    print(done.stdout)


def test_nothing_is_left_when_everything_is_dropped(program: Program) -> None:
    done = program(
        MODEL
        + """
load, path = loader("pickle")
def mappings():
    with open("/proc/self/maps") as maps:
        return len(maps.readlines())
try:
    engine = pagemerge.Engine()
    allocator = pagemerge.Allocator(engine)
    for turn in range(4):
        with allocator.numpy():
            models = [load(allocator) for _ in range(3)]
        stats = engine.settle()
        assert stats.frames_bytes > 20_000_000
        del models
        gc.collect()
        allocator.trim()
        stats = engine.stats()
        left = stats.frames, stats.frames_bytes, stats.regions, stats.rmap_items
        assert left == (0, 0, 0, 0), stats
        assert allocator.stats().arenas == 0
        now = (physical(engine), mappings())
        print(now)
        if turn == 0:
            first = now
finally:
    os.unlink(path)
assert now[0] < first[0] + 4_000_000, (first, now)
assert now[1] <= first[1] + 8, (first, now)
"""
    )
    print(done.stdout)


# ------------------------------------------------------------------------------------------ PyTorch


def test_tensors_over_allocated_arrays_merge(allocator: pagemerge.Allocator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    source = torch.randn(200_000)
    tensors = []
    for _ in range(4):
        tensor = torch.from_numpy(allocator.empty(source.shape, np.float32))
        tensor.copy_(source)
        tensors.append(tensor)
    assert allocator.engine.settle().pages_sharing == 3 * 196
    assert all(torch.equal(tensor, source) for tensor in tensors)
    tensors[0] += 1
    assert torch.equal(tensors[1], source)
    del tensors, tensor
    gc.collect()
    assert allocator.stats().allocations == 0
