"""`pagemerge.Cache` is cachetools' cache, but for what counts."""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import cachetools
import pagemerge
import pytest
import zict
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

#: A value of whole pages, so that what it takes is known: its length, and metadata that is less
#: than as much.
SIZE = 4 * pagemerge.PAGE_SIZE
POLICIES = ("lru", "lfu", "fifo", "rr")


def value(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def room_for(values: int) -> int:
    """A limit that lets so many different values in, and not one more."""
    return values * SIZE + SIZE * 3 // 4


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_a_mapping() -> None:
    cache: pagemerge.Cache[Any] = pagemerge.Cache(1 << 20)
    assert isinstance(cache, MutableMapping)
    cache["a"] = b"first"
    cache["b"] = bytearray(b"second")
    cache[3] = memoryview(b"third")
    assert len(cache) == 3
    assert "a" in cache
    assert "c" not in cache
    assert set(cache) == {"a", "b", 3}
    assert {key: bytes(blob) for key, blob in cache.items()} == {
        "a": b"first",
        "b": b"second",
        3: b"third",
    }
    assert sorted(map(bytes, cache.values())) == [b"first", b"second", b"third"]
    assert isinstance(cache["a"], pagemerge.Blob)
    assert cache.get("c") is None
    assert cache.get("c", 7) == 7
    assert bytes(cache.setdefault("a", b"other")) == b"first"
    assert bytes(cache.setdefault("d", b"fourth")) == b"fourth"
    assert bytes(cache.pop("d")) == b"fourth"
    assert cache.pop("d", 1) == 1
    with pytest.raises(KeyError, match="d"):
        cache.pop("d")
    with pytest.raises(KeyError, match="c"):
        cache["c"]
    with pytest.raises(KeyError, match="c"):
        del cache["c"]
    del cache["a"]
    assert bytes(cache.popitem()[1]) == b"second"
    cache.update({"e": b"fifth"}, f=b"")
    assert bytes(cache["f"]) == b""
    assert "entries=3" in repr(cache)
    cache.clear()
    assert len(cache) == 0
    assert cache.currsize == 0
    with pytest.raises(KeyError):
        cache.popitem()


def test_equal_values_count_once() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(1 << 20)
    for key in range(4000):
        cache[key] = b"x" * (64 << 10)
    assert len(cache) == 4000
    assert cache.currsize <= (64 << 10) + 4000 * 64 + 64 * 1024
    assert cache.store.stats().unique_bytes <= 64 << 10
    # Keys without number come to an end, too: each entry is charged something.
    for key in range(20_000):
        cache[key] = b"x" * (64 << 10)
    assert 10_000 < len(cache) < 20_000
    assert cache.currsize <= cache.maxsize


def test_unique_values_do_not() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(10))
    for key in range(100):
        cache[key] = value(key)
        assert cache.currsize <= cache.maxsize
    assert list(cache) == list(range(90, 100))


def test_an_eviction_that_frees_nothing_is_followed_by_another() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(4))
    for key in range(10):
        cache[key] = value(0)  # twins, which go first
    for key in range(10, 13):
        cache[key] = value(key)
    assert len(cache) == 13
    cache[13] = value(13)
    assert list(cache) == [10, 11, 12, 13]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_value_that_never_fits_costs_nothing(policy: str) -> None:
    cache: pagemerge.Cache[str] = pagemerge.Cache(room_for(3), policy)
    for key in "abc":
        cache[key] = value(ord(key))
    before = cache.currsize
    for key in ("a", "new"):
        with pytest.raises(ValueError, match="value too large"):
            cache[key] = value(9, room_for(3) + 1)
    with pytest.raises(ValueError, match="value too large"):
        cache.setdefault("new", value(9, room_for(3)))
    assert {key: bytes(blob) for key, blob in cache.items()} == {
        key: value(ord(key)) for key in "abc"
    }
    assert cache.currsize == before


@pytest.mark.parametrize("maxsize", [300, 1000, 2000, 5000, 20_000, 100_000])
def test_the_limit_holds_however_small(maxsize: int) -> None:
    """What a store needs for its tables counts, and what there is of them before does not."""
    sizes = [0, 10, 33, 100, 1000, 4096, 5000, maxsize // 2, maxsize * 9 // 10]
    chance = random.Random(maxsize)
    cache: pagemerge.Cache[int] = pagemerge.Cache(maxsize)
    refused = 0
    for key in range(1000):
        size = chance.choice(sizes)
        kept = len(cache)
        try:
            cache[key] = chance.randbytes(size)
        except ValueError:
            assert len(cache) == kept
            assert size > maxsize // 2 - 1024
            refused += 1
        else:
            assert key in cache
        assert cache.currsize <= maxsize
    assert refused < 1000 or maxsize < 1100


def test_a_small_cache_holds_what_fits() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(20_000)
    for key in range(4):
        cache[key] = value(key, 4096)
    assert len(cache) == 4


def test_tables_of_what_is_gone_leave_less_room() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(100_000)
    for key in range(1000):
        cache[key] = value(key, 40)
    kept = len(cache)
    # By itself it would fit, but not on top of the records of all those small ones.
    with pytest.raises(ValueError, match="value too large"):
        cache[-1] = value(1, 90_000)
    assert len(cache) == kept
    cache[-1] = value(1, 50_000)
    assert cache.currsize <= cache.maxsize


@pytest.mark.parametrize("wrong", ["text", 5, None, [1, 2], {"a": 1}])
def test_only_bytes(wrong: Any) -> None:
    cache: pagemerge.Cache[str] = pagemerge.Cache(1 << 20)
    cache["a"] = b"kept"
    for key in ("a", "b"):
        with pytest.raises(TypeError):
            cache[key] = wrong
    with pytest.raises(TypeError):
        cache.setdefault("b", wrong)
    with pytest.raises(TypeError):
        cache[[]] = b"the key cannot be hashed"  # type: ignore[index]
    assert bytes(cache["a"]) == b"kept"
    assert len(cache) == 1


def test_arguments() -> None:
    with pytest.raises(ValueError, match="no policy 'mru'; there are lru, lfu, fifo, rr"):
        pagemerge.Cache(1, "mru")
    with pytest.raises(ValueError, match="with a ttl the policy is 'lru'"):
        pagemerge.Cache(1, "fifo", 60)
    for maxsize in (-1, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            pagemerge.Cache(maxsize)
    with pytest.raises(ValueError, match="not both"):
        pagemerge.Cache(1, domain="a", store=pagemerge.Store())
    assert pagemerge.Cache(math.inf).maxsize == math.inf
    cache: pagemerge.Cache[int] = pagemerge.Cache(7, "lru", 60.0)
    assert (cache.maxsize, cache.ttl, cache.timer) == (7, 60.0, time.monotonic)
    assert pagemerge.Cache(7).ttl is None


def test_the_policies_differ() -> None:
    kept = {}
    for policy in ("lru", "lfu", "fifo"):
        cache: pagemerge.Cache[str] = pagemerge.Cache(room_for(3), policy)
        for key in "abc":
            cache[key] = value(ord(key))
        for key in "aab":
            cache[key]
        cache["c"]
        cache["a"]
        cache["d"] = value(ord("d"))
        kept[policy] = "".join(sorted(cache))
    assert kept["lru"] == "acd"
    assert kept["lfu"] in ("acd", "abd")
    assert kept["fifo"] == "bcd"


def test_looking_through_is_no_use() -> None:
    cache: pagemerge.Cache[str] = pagemerge.Cache(room_for(3))
    for key in "abc":
        cache[key] = value(ord(key))
    cache["a"]
    assert len(list(cache.items())) == len(list(cache.values())) == len(list(cache)) == 3
    cache["d"] = value(ord("d"))
    assert sorted(cache) == ["a", "c", "d"]


def test_popitem_is_where_subclasses_see_what_is_dropped() -> None:
    dropped: list[tuple[int, bytes]] = []

    class Seen(pagemerge.Cache[int]):
        def popitem(self) -> tuple[int, pagemerge.Blob]:
            key, blob = super().popitem()
            dropped.append((key, bytes(blob)))
            return key, blob

    cache = Seen(room_for(2))
    for key in range(4):
        cache[key] = value(key)
    assert dropped == [(0, value(0)), (1, value(1))]


def test_a_blob_outlives_its_entry() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(2))
    cache[0] = value(0)
    held = cache[0]
    view = memoryview(held)
    for key in range(1, 10):
        cache[key] = value(key)
    assert 0 not in cache
    assert bytes(held) == bytes(view) == value(0)
    del held, view, cache
    gc.collect()


def test_ttl() -> None:
    clock = Clock()
    cache: pagemerge.Cache[str] = pagemerge.Cache(room_for(3), ttl=10, timer=clock)
    cache["a"] = value(1)
    clock.now = 5
    cache["b"] = value(2)
    clock.now = 9.9
    assert "a" in cache
    assert len(cache) == 2
    clock.now = 10
    assert "a" not in cache
    assert cache.get("a") is None
    assert list(cache) == ["b"]
    assert len(cache) == 1
    with pytest.raises(KeyError):
        cache["a"]
    # What has run out makes room before anything else has to.
    cache["c"], cache["d"] = value(3), value(4)
    clock.now = 16
    cache["e"], cache["f"] = value(5), value(6)
    assert sorted(cache) == ["c", "d", "e"] or sorted(cache) == ["d", "e", "f"]
    assert "f" in cache
    clock.now = 100
    assert cache.currsize == 0
    assert cache.store.stats().unique_bytes == 0


def test_what_has_run_out_is_dropped_by_expire() -> None:
    clock = Clock()
    cache: pagemerge.Cache[str] = pagemerge.Cache(1 << 20, ttl=1, timer=clock)
    cache["a"] = value(1)
    clock.now = 2
    assert cache.store.stats().unique_bytes == SIZE
    cache.expire()
    assert cache.store.stats().unique_bytes == 0
    pagemerge.Cache(1).expire()  # means nothing without a ttl, and does no harm


def test_getsizeof_counts_as_in_cachetools() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(3, getsizeof=lambda _: 1)
    theirs: cachetools.Cache[int, bytes] = cachetools.LRUCache(3)
    for key in range(5):
        cache[key] = b"equal"
        theirs[key] = b"equal"
        assert (list(cache), cache.currsize) == (list(theirs), theirs.currsize)
    assert cache.getsizeof(b"anything") == 1
    by_length: pagemerge.Cache[int] = pagemerge.Cache(100, getsizeof=len)
    by_length[0] = b"x" * 60
    by_length[1] = b"x" * 40
    assert by_length.currsize == 100
    with pytest.raises(ValueError, match="value too large"):
        by_length[2] = b"x" * 101
    by_length[2] = b"x"
    assert sorted(by_length) == [1, 2]


def test_getsizeof_without_one_is_the_fair_share() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(1 << 20)
    cache[0] = value(0)
    alone = cache.getsizeof(cache[0])
    assert SIZE <= alone <= SIZE * 1.05 + 128
    cache[1] = value(0)
    assert cache.getsizeof(cache[0]) < alone * 0.6
    assert cache.getsizeof(b"x" * 1000) >= 1000


def test_a_store_of_ones_own() -> None:
    store = pagemerge.Store(domain="mine")
    first: pagemerge.Cache[int] = pagemerge.Cache(math.inf, store=store)
    second: pagemerge.Cache[int] = pagemerge.Cache(math.inf, store=store)
    assert first.store is store
    for key in range(10):
        first[key] = second[key] = value(key)
    assert store.stats().unique_bytes == 10 * SIZE
    assert bytes(first[3]) == bytes(second[3]) == value(3)


def test_a_store_with_a_limit_of_its_own_is_made_room_in() -> None:
    store = pagemerge.Store(max_bytes=4 * SIZE + SIZE // 2)
    cache: pagemerge.Cache[int] = pagemerge.Cache(math.inf, store=store)
    for key in range(20):
        cache[key] = value(key)
    assert 2 <= len(cache) <= 4
    assert 19 in cache
    held = list(cache.values())
    with pytest.raises(MemoryError):
        # Whoever holds blobs keeps the store full; that cannot be helped by dropping entries.
        cache[99] = value(99)
    assert len(held) >= 2


def test_nothing_is_left_when_it_is_gone() -> None:
    store = pagemerge.Store()
    cache: pagemerge.Cache[int] = pagemerge.Cache(math.inf, store=store)
    for key in range(50):
        cache[key] = value(key)
    cache.clear()
    assert (store.stats().unique_bytes, store.stats().entries) == (0, 0)
    cache[0] = value(0)
    del cache
    gc.collect()
    assert store.stats().unique_bytes == 0


def test_without_cachetools_it_says_what_to_install(program: Callable[..., Any]) -> None:
    done = program(
        """
        import sys
        sys.modules["cachetools"] = None
        import pagemerge
        try:
            pagemerge.Cache(1000)
        except ImportError as error:
            print(error.name, error)
        """
    )
    assert "cachetools" in done.stdout
    assert "pip install 'pagemerge[cache]'" in done.stdout


# -- Threads and forks


@pytest.mark.parametrize("policy", POLICIES)
def test_threads(policy: str) -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(20), policy)
    values = [value(seed, 3000 + 700 * seed) for seed in range(40)]
    wrong: list[object] = []
    end = time.monotonic() + 0.5

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while time.monotonic() < end:
                key = chance.randrange(40)
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        cache[key] = values[key]
                    case 3:
                        cache.pop(key, None)
                    case 4:
                        if bytes(cache.setdefault(key, values[key])) != values[key]:
                            wrong.append(key)
                    case 5:
                        for found, blob in cache.items():
                            if bytes(blob) != values[found]:
                                wrong.append(found)
                    case _:
                        blob = cache.get(key)
                        if blob is not None and bytes(blob) != values[key]:
                            wrong.append(key)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    cache[0] = values[0]  # makes room with nobody else holding any blob
    assert cache.currsize <= cache.maxsize


def test_the_lock_holds_for_several_operations() -> None:
    cache: pagemerge.Cache[str] = pagemerge.Cache(1 << 20)
    cache["n"] = b"0"

    def add() -> None:
        for _ in range(200):
            with cache.lock:
                cache["n"] = b"%d" % (int(bytes(cache["n"])) + 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(cache["n"]) == b"800"


def in_a_child(work: Callable[[], None]) -> None:
    """What must come to an end in a forked child, without an error."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # That there are other threads is what some of this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        signal.alarm(60)  # for what would wait for ever
        try:
            work()
            os.write(write, b"done")
        finally:
            os._exit(0)
    os.close(write)
    with Path(f"/proc/self/fd/{read}").open("rb") as end:
        os.close(read)
        answer = end.read()
    os.waitpid(child, 0)
    assert answer == b"done"


def test_a_child_reads_what_it_inherited_and_puts_its_own() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(5))
    for key in range(5):
        cache[key] = value(key)

    def work() -> None:
        assert all(bytes(cache[key]) == value(key) for key in range(5))
        assert cache.currsize == 0
        for key in range(3, 20):
            cache[key] = value(key + 100)
            assert bytes(cache[key]) == value(key + 100)
            assert cache.currsize <= cache.maxsize

    in_a_child(work)
    assert {key: bytes(blob) for key, blob in cache.items()} == {
        key: value(key) for key in range(5)
    }


def test_a_child_cannot_use_its_parents_store() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(1 << 20, store=pagemerge.Store())
    cache[0] = b"there"

    def work() -> None:
        assert bytes(cache[0]) == b"there"
        with pytest.raises(pagemerge.ForkedError):
            cache[1] = b"own"
        assert "entries=1" in repr(cache)
        del cache[0]

    in_a_child(work)
    assert bytes(cache[0]) == b"there"


def test_a_fork_in_the_middle_of_a_change_leaves_an_empty_cache() -> None:
    cache: pagemerge.Cache[int] = pagemerge.Cache(1 << 20)
    cache[0] = b"there"
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with cache.lock:
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)

    def work() -> None:
        assert len(cache) == 0
        cache[1] = b"own"
        assert bytes(cache[1]) == b"own"

    try:
        in_a_child(work)
    finally:
        release.set()
        thread.join()
    assert bytes(cache[0]) == b"there"


# -- zict


def test_inside_zict(tmp_path: Path) -> None:
    """Dask's mappings hold it as the fast one, with files or anything else behind it."""
    fast: pagemerge.Cache[str] = pagemerge.Cache(math.inf)
    slow = zict.File(tmp_path)
    buffer = zict.Buffer(fast, slow, n=6 * SIZE, weight=lambda _, blob: len(blob))
    for number in range(20):
        buffer[f"key{number}"] = value(number)
    assert len(fast) == 6
    assert len(buffer) == 20
    for number in range(20):
        assert bytes(buffer[f"key{number}"]) == value(number)
    assert len(fast) <= 6
    del buffer["key0"]
    assert "key0" not in buffer
    assert len(buffer) == 19
    buffer.close()


def test_inside_zicts_lru_and_cache() -> None:
    gone: list[str] = []
    inner: pagemerge.Cache[str] = pagemerge.Cache(math.inf)
    lru = zict.LRU(3, inner, on_evict=lambda key, _: gone.append(key))
    for key in "abcd":
        lru[key] = value(ord(key))
    assert gone == ["a"]
    assert sorted(lru) == ["b", "c", "d"]

    behind: dict[str, Any] = {}
    front: pagemerge.Cache[str] = pagemerge.Cache(room_for(1))
    through = zict.Cache(behind, front, update_on_set=False)
    through["x"], through["y"] = value(1), value(2)
    assert through["x"] is behind["x"]
    assert list(front) == ["x"]
    assert bytes(through["x"]) == value(1)
    assert through["x"] is not behind["x"]
    assert bytes(through["y"]) == value(2)
    assert list(front) == ["y"]
    through["z"] = value(3)
    assert behind["z"] == value(3)
    assert bytes(through["z"]) == value(3)
    del through["x"]
    assert sorted(through) == ["y", "z"]


# -- Property: the same as cachetools' own, where all values differ


class Beside(RuleBasedStateMachine):
    """Whatever is done: the same entries as in cachetools' class, with so many of equal size."""

    LIMIT = 5
    keys = st.integers(0, 9)

    @initialize(policy=st.sampled_from(["lru", "lfu", "fifo", "ttl"]))
    def begin(self, policy: str) -> None:
        self.fresh = itertools.count()
        self.clock = Clock()
        ours: dict[str, Any] = {"policy": policy}
        if policy == "ttl":
            ours = {"ttl": 10, "timer": self.clock}
        self.cache: pagemerge.Cache[int] = pagemerge.Cache(room_for(self.LIMIT), **ours)
        self.theirs: Any = {
            "lru": lambda: cachetools.LRUCache(self.LIMIT),
            "lfu": lambda: cachetools.LFUCache(self.LIMIT),
            "fifo": lambda: cachetools.FIFOCache(self.LIMIT),
            "ttl": lambda: cachetools.TTLCache(self.LIMIT, 10, timer=self.clock),
        }[policy]()

    def both(self, work: Callable[[Any], Any]) -> None:
        answers = []
        for mapping in (self.cache, self.theirs):
            try:
                answer = work(mapping)
            except KeyError as error:
                answer = type(error)
            if isinstance(answer, tuple):
                answer = tuple(bytes(x) if isinstance(x, pagemerge.Blob) else x for x in answer)
            answers.append(bytes(answer) if isinstance(answer, pagemerge.Blob) else answer)
        assert answers[0] == answers[1]

    @rule(key=keys)
    def set(self, key: int) -> None:
        new = value(next(self.fresh))
        self.both(lambda mapping: mapping.__setitem__(key, new))

    @rule(key=keys)
    def setdefault(self, key: int) -> None:
        new = value(next(self.fresh))
        self.both(lambda mapping: mapping.setdefault(key, new))

    @rule(key=keys)
    def look(self, key: int) -> None:
        self.both(lambda mapping: mapping[key])

    @rule(key=keys)
    def get(self, key: int) -> None:
        self.both(lambda mapping: mapping.get(key, 5))

    @rule(key=keys)
    def contains(self, key: int) -> None:
        self.both(lambda mapping: key in mapping)

    @rule(key=keys)
    def delete(self, key: int) -> None:
        self.both(lambda mapping: mapping.__delitem__(key))

    @rule(key=keys, default=st.booleans())
    def pop(self, key: int, default: bool) -> None:
        self.both(lambda mapping: mapping.pop(key, 5) if default else mapping.pop(key))

    @rule()
    def popitem(self) -> None:
        self.both(lambda mapping: mapping.popitem())

    @rule()
    def clear(self) -> None:
        self.both(lambda mapping: mapping.clear())

    @rule(seconds=st.sampled_from([1, 4, 11]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def alike(self) -> None:
        if hasattr(self, "cache"):
            assert sorted(self.cache) == sorted(self.theirs)
            assert len(self.cache) == len(self.theirs)
            assert self.cache.currsize <= self.cache.maxsize
            stats = self.cache.store.stats()
            assert stats.unique_bytes == len(self.theirs) * SIZE


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Repeating(RuleBasedStateMachine):
    """Values that repeat, of all sizes: nothing comes back wrong, and the limit holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: pagemerge.Cache[int] = pagemerge.Cache(100_000)
        self.model: dict[int, bytes] = {}

    @rule(key=st.integers(0, 200), seed=st.integers(0, 12))
    def set(self, key: int, seed: int) -> None:
        self.model[key] = value(seed, [0, 1, 63, 64, 1000, 4096, 10_000, 30_000][seed % 8])
        self.cache[key] = self.model[key]

    @rule(seed=st.integers(0, 12))
    def fill(self, seed: int) -> None:
        for key in range(seed * 10, seed * 10 + 30):
            self.set(key, seed)

    @rule(key=st.integers(0, 200))
    def drop(self, key: int) -> None:
        self.cache.pop(key, None)

    @invariant()
    def right(self) -> None:
        assert all(bytes(blob) == self.model[key] for key, blob in self.cache.items())
        assert self.cache.currsize <= self.cache.maxsize


TestRepeating = Repeating.TestCase
TestRepeating.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
