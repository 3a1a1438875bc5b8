"""A cache of `cachelib`'s kind: per process, as its ``SimpleCache``, with equal values held once.

::

    cache = PagemergeCache(maxsize=256 << 20)
    cache.set("front page", page, timeout=60)

For Flask-Caching there is :mod:`pagemerge.contrib.flask_caching`.
"""

from __future__ import annotations

import math
import time
from typing import Any

from cachelib.base import BaseCache
from cachelib.serializers import SimpleSerializer

from pagemerge._cache import TimedCache
from pagemerge._core import Store


def _now() -> float:
    return time.time()


class PagemergeCache(BaseCache):
    """cachelib's cache on a :class:`pagemerge.Cache`, for any number of threads.

    Args:
        maxsize: Bytes that are really held; what has not been used for longest goes first.
        default_timeout: Seconds that a value stays if nothing else is said; 0 is for ever.
        domain: Values of different domains never share memory.
        store: A store to be used instead of one of its own.
        **options: What cachelib's ``BaseCache`` takes besides.
    """

    serializer = SimpleSerializer()

    def __init__(
        self,
        maxsize: float = 64 << 20,
        default_timeout: int = 300,
        *,
        domain: str = "",
        store: Store | None = None,
        **options: Any,
    ) -> None:
        super().__init__(default_timeout, **options)
        self._cache: TimedCache[str] = TimedCache(maxsize, domain=domain, store=store, timer=_now)

    def _until(self, timeout: int | None) -> float:
        seconds: float = self._normalize_timeout(timeout)
        return _now() + seconds if seconds else math.inf

    def _put(self, key: str, value: Any, timeout: int | None, *, add: bool) -> bool:
        pickled = self.serializer.dumps(value)
        try:
            return self._cache.put(key, pickled, self._until(timeout), add=add)
        except ValueError:
            # It is larger than the whole cache. What was there before is stale, too.
            self._cache.pop(key, None)
            return False

    def get(self, key: str) -> Any:
        """Return a value, or None."""
        blob = self._cache.get(key)
        if blob is None:
            return None
        # pickle takes any buffer; of others no more is known than that they take bytes.
        pickled = type(self.serializer) is SimpleSerializer
        return self.serializer.loads(blob if pickled else bytes(blob))

    def set(self, key: str, value: Any, timeout: int | None = None) -> bool:
        """Set a value; return whether it could be."""
        return self._put(key, value, timeout, add=False)

    def add(self, key: str, value: Any, timeout: int | None = None) -> bool:
        """Set a value unless there is one; return whether it was set."""
        return self._put(key, value, timeout, add=True)

    def delete(self, key: str) -> bool:
        """Drop a value; return whether there was one."""
        return self._cache.pop(key, None) is not None

    def has(self, key: str) -> bool:
        """Return whether there is a value."""
        return key in self._cache

    def clear(self) -> bool:
        """Drop all values."""
        self._cache.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> int | None:
        """Add to a number, which is 0 where there is none."""
        with self._cache.lock:
            value: int | None = super().inc(key, delta)
            return value

    def dec(self, key: str, delta: int = 1) -> int | None:
        """Subtract from a number, which is 0 where there is none."""
        with self._cache.lock:
            value: int | None = super().dec(key, delta)
            return value
