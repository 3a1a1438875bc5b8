"""``Cache``: cachetools' caches, limited by what the values take together.

The values lie in a :class:`pagemerge.Store`, which holds equal ones once. What goes first when room
is needed is decided by a cache of `cachetools`, which holds the blobs and counts nothing: it has no
limit of its own, and is asked for its next victim until the store has come down to ours. The
eviction of an entry whose value has a twin frees nothing; then the next one goes.

Invariants:

* The policy is only touched while ``lock`` is held.
* A value is in the store before room is made for it, so that what it shares with others is known
  and not counted twice. What cannot fit is refused before anything is evicted.
* A cache that a fork caught in the middle of a change by another thread is empty in the child. What
  the child puts goes to a store of its own, for the parent's does not take anything there.

Cost: one lock, what cachetools does, and for each value that is set a look at the store's counters.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import (
    Callable,
    Hashable,
    ItemsView,
    Iterator,
    MutableMapping,
    ValuesView,
)
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from pagemerge._core import PAGE_SIZE, Blob, Store
from pagemerge._errors import StoreFullError

if TYPE_CHECKING:
    from types import ModuleType

    from pagemerge._core import _Buffer

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

#: What an entry is charged besides its share of the store, so that keys without number that have
#: equal values come to an end, too.
ENTRY_BYTES = 64

#: By so much the records of a store may grow with one value.
SLACK_BYTES = 1024

_missing: Any = object()


def _cachetools() -> ModuleType:
    try:
        import cachetools
    except ImportError as error:
        raise ImportError(
            "pagemerge.Cache has its eviction policies from cachetools, which is not installed: "
            "pip install 'pagemerge[cache]'",
            name="cachetools",
        ) from error
    module: ModuleType = cachetools
    return module


class Cache(MutableMapping[K, Blob]):
    """A cache of bytes that is limited by what its values take together.

    Equal values are held once, and so are equal pages of different ones: the more repeats, the more
    entries there is room for. Otherwise it is what `cachetools` has: a mapping that drops entries
    by a policy when it is full. It needs that package: ``pip install 'pagemerge[cache]'``.

    Values are anything with a contiguous buffer, and what comes back is a :class:`Blob`, which
    copies nothing: use it as a buffer, or as ``bytes(blob)``. It stays as it is for as long as you
    hold it, also when its entry has been dropped; its memory is counted until then.

    It can be used from any number of threads. ``lock``, which may be taken more than once by the
    same thread, is held during each operation; hold it yourself for what takes several of them.
    After a fork, the child has the entries of the parent, whose memory it shares and which is not
    counted there, and puts its own into a store of its own.

    Args:
        maxsize: Bytes that the store may hold, with its metadata and 64 bytes for each entry. What
            Python needs for an entry is more: 200 to 350 bytes by the policy, and the key.
        policy: What is dropped first: ``"lru"`` least recently used, ``"lfu"`` least frequently
            used, ``"fifo"`` oldest, ``"rr"`` any.
        ttl: Seconds after which an entry is gone; only with ``"lru"``. What has run out is dropped
            by the next call that changes the cache.
        getsizeof: As in `cachetools`, a function that says what a value counts, given as a
            :class:`Blob`, in whatever ``maxsize`` is then meant to be: ``len`` counts values as if
            each were held by itself, ``lambda value: 1`` counts entries.
        domain: The domain of the store that is made. Values of different domains never share
            memory.
        store: A store to be used instead. All that it holds counts, whoever put it there.
        timer: The clock for ``ttl``.

    Raises:
        ImportError: `cachetools` is not installed.
        ValueError: There is no such policy, or arguments contradict each other.

    Example:
        >>> import pagemerge
        >>> cache = pagemerge.Cache(1_000_000)
        >>> for user in range(1000):
        ...     cache[user, "menu"] = b"the same for everybody, " * 500
        >>> len(cache), cache.currsize < 100_000
        (1000, True)
        >>> bytes(cache[7, "menu"][:8])
        b'the same'
    """

    __module__ = "pagemerge"

    #: Held during each operation. A fork replaces it in the child.
    lock: threading.RLock

    def __init__(
        self,
        maxsize: float,
        policy: str = "lru",
        ttl: float | None = None,
        *,
        getsizeof: Callable[[Blob], float] | None = None,
        domain: str = "",
        store: Store | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if not maxsize >= 0:
            raise ValueError(f"maxsize is a number of bytes, at least 0, got {maxsize!r}")
        if store is not None and domain:
            raise ValueError("a store has its own domain: give a domain or a store, not both")
        self.lock = threading.RLock()
        self._maxsize = maxsize
        self._sizes = getsizeof
        self._domain = domain
        self._own = store is None
        # What a store of ours holds anyway, before there is any entry.
        self._empty = 0
        if store is None:
            self._begin()
        else:
            self._store = store
        self._owner = os.getpid()
        self._ttl, self._timer = ttl, timer
        self._make = self._maker(policy)
        self._policy = self._make()
        _caches[id(self)] = self

    def _maker(self, policy: str) -> Callable[[], Any]:
        """Return what makes a new, empty cache of the policy."""
        library = _cachetools()
        known = {
            "lru": library.LRUCache,
            "lfu": library.LFUCache,
            "fifo": library.FIFOCache,
            "rr": library.RRCache,
        }
        if policy not in known:
            raise ValueError(f"there is no policy {policy!r}; there are {', '.join(known)}")
        limit = math.inf if self._sizes is None else self._maxsize
        sizes, ttl, timer = self._sizes, self._ttl, self._timer
        if ttl is None:
            return lambda: known[policy](limit, getsizeof=sizes)
        if policy != "lru":
            raise ValueError(f"with a ttl the policy is 'lru', got {policy!r}")
        return lambda: library.TTLCache(limit, ttl, timer=timer, getsizeof=sizes)

    @property
    def maxsize(self) -> float:
        """The limit of ``currsize``."""
        return self._maxsize

    @property
    def currsize(self) -> float:
        """What counts now: bytes of the store, or what ``getsizeof`` says."""
        with self.lock:
            self.expire()
            return self._size()

    @property
    def ttl(self) -> float | None:
        """Seconds after which an entry is gone; None for never."""
        return self._ttl

    @property
    def timer(self) -> Callable[[], float]:
        """The clock for ``ttl``."""
        return self._timer

    @property
    def store(self) -> Store:
        """The store that holds the values."""
        if self._own and self._owner != os.getpid():
            with self.lock:
                if self._owner != os.getpid():
                    self._begin()
                    self._owner = os.getpid()
        return self._store

    def getsizeof(self, value: _Buffer | Blob) -> float:
        """Return what a value counts: of a blob its fair share of what is held."""
        if self._sizes is not None:
            return self._sizes(value if isinstance(value, Blob) else self.store.put(value))
        held = value.charged_bytes if isinstance(value, Blob) else _length(value)
        return held + ENTRY_BYTES

    def _begin(self) -> None:
        """Make a store of our own."""
        self._store = Store(domain=self._domain)
        # With the first page and the first packed bytes come records for many more of them.
        self._store.put(b"\1" * (PAGE_SIZE + 100))
        self._empty = self._stored()

    def _stored(self) -> int:
        stats = self._store.stats()
        return stats.unique_bytes + stats.metadata_bytes

    def _size(self) -> float:
        if self._sizes is not None:
            size: float = self._policy.currsize
            return size
        if not self._policy or self._owner != os.getpid():
            return 0  # There is nothing, or all of it is the parent's.
        return max(0, self._stored() - self._empty) + ENTRY_BYTES * len(self._policy)

    # -- Writing

    def __setitem__(self, key: K, value: _Buffer | Blob) -> None:
        blob = self._put(value)
        with self.lock:
            self._insert(key, blob)

    def _put(self, value: _Buffer | Blob) -> Blob:
        if self._sizes is None:
            # By itself a value takes its length, and up to a twentieth on top. It comes on top of
            # the tables, which do not become smaller when everything else goes.
            length = _length(value)
            most = length + length // 20 + SLACK_BYTES
            if 2 * most > self._maxsize:
                most += max(0, self.store.stats().metadata_bytes - self._empty)
            if most > self._maxsize:
                raise ValueError("value too large")
        while True:
            try:
                return self.store.put(value)
            except StoreFullError:
                # The store has a limit of its own.
                with self.lock:
                    if not self._policy:
                        raise
                    self.popitem()

    def _insert(self, key: K, blob: Blob) -> None:
        """Add an entry, whose value lies in the store already. The lock is held."""
        policy = self._policy
        if self._sizes is None:
            cost = 0 if key in policy else ENTRY_BYTES
            if self._size() + cost > self._maxsize:
                self.expire()
                if not cost:
                    # Its old value goes before anybody else's, and its turn stays as it was.
                    _replace(policy, key, blob)
                while self._size() + cost > self._maxsize and policy:
                    self.popitem()
        policy[key] = blob

    def __delitem__(self, key: K) -> None:
        with self.lock:
            del self._policy[key]

    @overload
    def pop(self, key: K, /) -> Blob: ...
    @overload
    def pop(self, key: K, /, default: T) -> Blob | T: ...
    def pop(self, key: K, /, default: Any = _missing) -> Any:
        """Remove an entry and return its value, or ``default`` where there is none."""
        with self.lock:
            if default is _missing:
                return self._policy.pop(key)
            return self._policy.pop(key, default)

    def popitem(self) -> tuple[K, Blob]:
        """Drop the entry whose turn it is, and return its key and value.

        This is what makes room, so a subclass can see there what is dropped.
        """
        with self.lock:
            item: tuple[K, Blob] = self._policy.popitem()
            return item

    def setdefault(self, key: K, default: _Buffer | Blob | None = None) -> Blob:
        """Return the value of ``key``, which is ``default`` from now on if there was none."""
        with self.lock:
            try:
                return self[key]
            except KeyError:
                blob = self._put(default)  # type: ignore[arg-type]
                self._insert(key, blob)
                return blob

    def clear(self) -> None:
        """Drop all entries."""
        with self.lock:
            self._policy = self._make()

    def expire(self) -> None:
        """Drop what has run out, which the next change would do."""
        if self._ttl is not None:
            with self.lock:
                self._policy.expire()

    # -- Reading

    def __getitem__(self, key: K) -> Blob:
        with self.lock:
            blob: Blob = self._policy[key]
            return blob

    def __contains__(self, key: object) -> bool:
        with self.lock:
            return key in self._policy

    def __len__(self) -> int:
        with self.lock:
            return len(self._policy)

    def __iter__(self) -> Iterator[K]:
        """Go through the keys that there are now; what happens meanwhile does not disturb it."""
        with self.lock:
            keys: list[K] = list(self._policy)
        return iter(keys)

    def items(self) -> ItemsView[K, Blob]:
        """Return a view of both. Going through them is no use that the policy counts."""
        return _Items(self)

    def values(self) -> ValuesView[Blob]:
        """Return a view of the values. Going through them is no use that the policy counts."""
        return _Values(self)

    def _present(self) -> list[tuple[K, Blob]]:
        base = _cachetools().Cache.__getitem__
        with self.lock:
            return [(key, base(self._policy, key)) for key in self._policy]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(entries={len(self)}, "
            f"maxsize={self.maxsize!r}, currsize={self.currsize!r})"
        )

    # -- Fork

    def _in_child(self) -> None:
        if self.lock.acquire(blocking=False):
            self.lock.release()
        else:
            # Another thread, which is not here, was changing something.
            self.lock = threading.RLock()
            self._policy = self._make()


class _Items(ItemsView[K, Blob]):
    _mapping: Cache[K]

    def __iter__(self) -> Iterator[tuple[K, Blob]]:
        return iter(self._mapping._present())


class _Values(ValuesView[Blob]):
    _mapping: Cache[Any]

    def __iter__(self) -> Iterator[Blob]:
        return (blob for _, blob in self._mapping._present())


class TimedCache(Cache[K]):
    """A cache whose entries each have their own end, for the backends in ``pagemerge.contrib``.

    Args:
        maxsize: As for :class:`Cache`; it can be changed.
        domain: As for :class:`Cache`.
        store: As for :class:`Cache`.
        timer: The clock of ``until``.
    """

    def __init__(
        self,
        maxsize: float,
        *,
        domain: str = "",
        store: Store | None = None,
        timer: Callable[[], float] = time.time,
    ) -> None:
        # By this the policy learns the end of the entry that is being set.
        self._until = math.inf
        super().__init__(maxsize, ttl=math.inf, domain=domain, store=store, timer=timer)

    def _maker(self, policy: str) -> Callable[[], Any]:
        del policy
        library = _cachetools()
        return lambda: library.TLRUCache(math.inf, lambda *_: self._until, timer=self._timer)

    def resize(self, maxsize: float) -> None:
        """Change the limit; the next value that is set makes it good."""
        self._maxsize = maxsize

    def put(
        self, key: K, value: _Buffer | Blob, until: float = math.inf, *, add: bool = False
    ) -> bool:
        """Set an entry that ends when the timer says ``until``.

        Returns whether it was done: not if it is to be added, and there is one.
        """
        if add and key in self:
            return False
        late = not self._timer() < until
        blob = None if late else self._put(value)
        with self.lock:
            if add and key in self._policy:
                return False
            if blob is None:
                self._policy.pop(key, None)
            else:
                self._insert_until(key, blob, until)
            return True

    def touch(self, key: K, until: float = math.inf) -> bool:
        """Give an entry another end. Returns whether there is one."""
        with self.lock:
            blob = self._policy.pop(key, None)
            if blob is not None and self._timer() < until:
                self._insert_until(key, blob, until)
            return blob is not None

    def replace(self, key: K, value: _Buffer | Blob) -> None:
        """Give an entry another value, and leave its end as it is."""
        blob = self._put(value)
        with self.lock:
            if key in self._policy:
                _replace(self._policy, key, blob)

    def _insert_until(self, key: K, blob: Blob, until: float) -> None:
        self._until = until
        try:
            self._insert(key, blob)
        finally:
            self._until = math.inf


def _length(value: _Buffer | Blob) -> int:
    if isinstance(value, Blob):
        return len(value)
    with memoryview(cast("Any", value)) as view:
        return view.nbytes


def _replace(policy: Any, key: object, blob: Blob) -> None:
    """Give an entry another value, past the policy: neither its turn nor its time changes."""
    _cachetools().Cache.__setitem__(policy, key, blob)


_caches: weakref.WeakValueDictionary[int, Cache[Any]] = weakref.WeakValueDictionary()


def _after_fork() -> None:
    for cache in list(_caches.values()):
        cache._in_child()


os.register_at_fork(after_in_child=_after_fork)
