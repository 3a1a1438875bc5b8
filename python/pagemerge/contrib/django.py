"""A cache backend for Django: per process, as `locmem`, and with equal values held once.

::

    CACHES = {
        "default": {
            "BACKEND": "pagemerge.contrib.django.PagemergeCache",
            "LOCATION": "pages",             # aliases with the same location share their entries
            "OPTIONS": {"MAXSIZE": 256 << 20, "DOMAIN": "tenant a"},
        }
    }

``MAXSIZE`` (64 MiB) is in bytes that are really held, and what has not been used for longest goes
first. ``MAX_ENTRIES`` and ``CULL_FREQUENCY`` mean nothing here. Values are pickled, and so can be
equal where their pickles are.
"""

from __future__ import annotations

import math
import pickle
import threading
import time
from typing import Any

from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from pagemerge._cache import TimedCache

_caches: dict[tuple[str, str], TimedCache[str]] = {}
_lock = threading.Lock()


def _now() -> float:
    # The clock that `get_backend_timeout` reckons with.
    return time.time()


class PagemergeCache(BaseCache):
    """Django's cache on a :class:`pagemerge.Cache`. All threads of the process share it."""

    pickle_protocol = pickle.HIGHEST_PROTOCOL

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        super().__init__(params)
        options = params.get("OPTIONS", {})
        maxsize = options.get("MAXSIZE", 64 << 20)
        domain = options.get("DOMAIN", "")
        with _lock:
            # Django makes a backend for each thread.
            found = _caches.get((name, domain))
            if found is None:
                found = _caches[name, domain] = TimedCache(maxsize, domain=domain, timer=_now)
        found.resize(maxsize)
        self._cache = found

    def _key(self, key: str, version: int | None) -> str:
        made: str = self.make_and_validate_key(key, version=version)
        return made

    def _until(self, timeout: Any) -> float:
        end: float | None = self.get_backend_timeout(timeout)
        return math.inf if end is None else end

    def _put(self, key: str, value: Any, timeout: Any, *, add: bool) -> bool:
        pickled = pickle.dumps(value, self.pickle_protocol)
        try:
            return self._cache.put(key, pickled, self._until(timeout), add=add)
        except ValueError:
            # It is larger than the whole cache. What was there before is stale, too.
            self._cache.pop(key, None)
            return False

    def add(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        """Set a value unless there is one; return whether it was set."""
        return self._put(self._key(key, version), value, timeout, add=True)

    def get(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """Return a value, or ``default``."""
        blob: Any = self._cache.get(self._key(key, version))
        return default if blob is None else pickle.loads(blob)

    def set(
        self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        """Set a value."""
        self._put(self._key(key, version), value, timeout, add=False)

    def touch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give a value another timeout; return whether there is one."""
        return self._cache.touch(self._key(key, version), self._until(timeout))

    def incr(self, key: str, delta: int = 1, version: int | None = None) -> int:
        """Add to a number, whose timeout stays as it is."""
        key = self._key(key, version)
        with self._cache.lock:
            blob: Any = self._cache.get(key)
            if blob is None:
                raise ValueError(f"Key '{key}' not found")
            value: int = pickle.loads(blob) + delta
            self._cache.replace(key, pickle.dumps(value, self.pickle_protocol))
        return value

    def has_key(self, key: str, version: int | None = None) -> bool:
        """Return whether there is a value."""
        return self._key(key, version) in self._cache

    def delete(self, key: str, version: int | None = None) -> bool:
        """Drop a value; return whether there was one."""
        return self._cache.pop(self._key(key, version), None) is not None

    def clear(self) -> None:
        """Drop all values, those of all versions and prefixes."""
        self._cache.clear()
