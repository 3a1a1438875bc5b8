"""What `cache_server.py` holds: entries by key, the least recently used of which goes first.

The store holds the values, and equal ones once. So what limits a cache of equal values is what
Python needs for an entry: a bytes object for the key and its place in a dict, some eighty bytes. A
`Blob` for each would be as much again; keys whose values are equal and short share one.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import time
import weakref
from typing import Any

import pagemerge

#: Bytes that Python needs: for a key, a blob, flags or an end, and a number that `gets` has told.
KEY, BLOB, TUPLE, UNIQUE = 80, 80, 110, 150
MONTH = 60 * 60 * 24 * 30
#: A blob; if it has flags or an end, (blob, flags, end).
Entry = Any


class Recent:
    """A mapping that knows what was used longest ago, at the price of plain dicts.

    Dicts keep their keys in order. What is used moves to the end of the newest of some thirty,
    which is closed before its table would double: 30 to 60 bytes a key, where an OrderedDict takes
    75 to 200. The last one is turned round, so that the oldest key is at its end, where dicts find
    it at once.
    """

    def __init__(self) -> None:
        self.parts: list[dict[bytes, Entry]] = [{}]
        self._begin()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, key: bytes, entry: Entry) -> None:
        """Add a key that is not there, as the one used last."""
        if not self._slots:
            self._begin()
        self._slots -= 1
        self.parts[0][key] = entry

    def pop(self, key: bytes) -> Entry | None:
        for part in self.parts:
            entry = part.pop(key, None)
            if entry is not None:
                return entry
        return None

    def oldest(self) -> tuple[bytes, Entry]:
        """Remove the key used longest ago. There must be one."""
        while not self.parts[-1]:
            self.parts[-2:] = [dict(reversed(self.parts[-2].items()))]
            if len(self.parts) == 1:
                self._begin()
        return self.parts[-1].popitem()

    def _begin(self) -> None:
        """Begin a newest part. Of two hollow neighbours make one, so that there are never many."""
        table = 1 << 13
        while table * 10 < len(self):
            table *= 2
        # A dict keeps a third of its table free. A slot is used up though its key may have gone
        # again.
        self._slots = table * 2 // 3
        self.parts.insert(0, {})
        for at in range(1, len(self.parts) - 2):
            newer, older = self.parts[at : at + 2]
            if len(newer) + len(older) <= self._slots:
                self.parts[at : at + 2] = [{**older, **newer}]
                break


class Items:
    """Entries, and the limit of what they take altogether."""

    def __init__(self, memory: int) -> None:
        self.store, self.limit = pagemerge.Store(), memory
        self.counts: collections.Counter[str] = collections.Counter()
        self._numbers = itertools.count(1)
        # By hash: the one blob of many keys. It goes with the last of them.
        self.equal: weakref.WeakValueDictionary[int, pagemerge.Blob] = weakref.WeakValueDictionary()
        self.clear()

    def __len__(self) -> int:
        return len(self.recent)

    def clear(self) -> None:
        self.recent = Recent()
        self.uniques: dict[bytes, int] = {}  # what `gets` has told of a key, until that changes
        self.overhead = 0
        self.room = 0  # is at least so much; found out anew when that is used up

    def flush(self, delay: bytes) -> bytes:
        """Drop all that there will be in so many seconds; return what is to be said about it."""
        if not integer(delay):
            return b"CLIENT_ERROR invalid exptime argument"
        if int(delay) > 0:
            asyncio.get_running_loop().call_later(int(delay), self.clear)
        else:
            self.clear()
        return b"OK"

    def held(self) -> int:
        """Bytes that all this takes."""
        stats = self.store.stats()
        python = self.overhead + len(self.uniques) * UNIQUE + stats.blobs * BLOB
        return stats.unique_bytes + stats.metadata_bytes + python

    def stats(self) -> dict[str, Any]:
        """What the command `stats` tells, under memcached's names where it has them."""
        stats = self.store.stats()
        own = ("logical_bytes", "unique_bytes", "metadata_bytes")
        counts = ("curr_connections", "cmd_set", "get_hits", "get_misses", "evictions")
        return {
            "pid": os.getpid(),
            "time": int(time.time()),
            "version": pagemerge.__version__,
            "curr_items": len(self),
            "limit_maxbytes": self.limit,
            "bytes": self.held(),
            **{name: getattr(stats, name) for name in own},
            **{name: self.counts[name] for name in counts},
        }

    def get(self, key: bytes) -> tuple[pagemerge.Blob, int, float] | None:
        """Return blob, flags and end of a key, which is the one used last from now on."""
        entry = self.recent.pop(key)
        if entry is None:
            return None
        if type(entry) is not tuple:
            self.recent.add(key, entry)
            return entry, 0, 0
        if 0 < entry[2] <= time.time():
            self._gone(key, entry)
            return None
        self.recent.add(key, entry)
        return entry

    def drop(self, key: bytes) -> bool:
        """Remove a key; return whether it was there."""
        found = self.get(key) is not None
        if found:
            self._gone(key, self.recent.pop(key))
        return found

    def set(self, key: bytes, value: Any, flags: int = 0, end: float = 0) -> bool:
        """Set a value; return False if there is no room for it, whatever goes."""
        self.drop(key)
        if 2 * len(value) > self.limit:
            return False
        while True:
            try:
                blob = self.store.put(value)
                break
            except MemoryError:
                if not self.recent:
                    return False
                self._evict()
        if len(blob) <= 4096 and 4 * blob.charged_bytes <= len(blob):
            # Some have this value already, and it is so short that a blob matters.
            same = self.equal.setdefault(hash(blob), blob)
            blob = same if same == blob else blob
        self._add(key, blob, flags, end)
        self.room -= KEY + len(key) + TUPLE + BLOB + len(value) + len(value) // 16
        while self.room < 0 and self.recent:
            self.room = self.limit - self.held()
            if self.room < 0:
                self._evict()
        return True

    def unique(self, key: bytes) -> int:
        """Return a number that a key has until it is changed."""
        return self.uniques.get(key) or self.uniques.setdefault(key, next(self._numbers))

    def count(self, key: bytes, delta: bytes, up: bool) -> bytes:
        """Add to a number of 64 bits, or subtract down to 0; return what is to be said about it."""
        if not delta.isdigit() or int(delta) >= 1 << 64:
            return b"CLIENT_ERROR invalid numeric delta argument"
        found = self.get(key)
        if found is None:
            return b"NOT_FOUND"
        blob, flags, end = found
        old = bytes(blob) if len(blob) <= 20 else b""
        if not old.rstrip().isdigit() or int(old) >= 1 << 64:
            return b"CLIENT_ERROR cannot increment or decrement non-numeric value"
        number = (int(old) + int(delta)) % (1 << 64) if up else max(0, int(old) - int(delta))
        new = b"%d" % number
        self.set(key, new.ljust(len(old)), flags, end)  # It does not become shorter.
        return new

    def touch(self, key: bytes, end: float) -> bool:
        """Give a key another end; return whether it was there."""
        found = self.get(key)
        if found is None:
            return False
        unique = self.uniques.get(key)
        self._gone(key, self.recent.pop(key))
        self._add(key, found[0], found[1], end)
        if unique is not None:
            self.uniques[key] = unique
        return True

    def _add(self, key: bytes, blob: pagemerge.Blob, flags: int, end: float) -> None:
        self.recent.add(key, (blob, flags, end) if flags or end else blob)
        self.overhead += KEY + len(key) + (TUPLE if flags or end else 0)

    def _gone(self, key: bytes, entry: Entry) -> None:
        self.overhead -= KEY + len(key) + (TUPLE if type(entry) is tuple else 0)
        self.uniques.pop(key, None)

    def _evict(self) -> None:
        self._gone(*self.recent.oldest())
        self.counts["evictions"] += 1


def integer(word: bytes) -> bool:
    """Whether it is a number, negative ones included."""
    return word.removeprefix(b"-").isdigit() and abs(int(word)) < 1 << 63


def moment(end: bytes) -> float:
    """When an entry ends: 0 is never; up to a month it is so many seconds from now."""
    seconds = int(end)
    return seconds if not seconds or seconds > MONTH else max(1.0, time.time() + seconds)
