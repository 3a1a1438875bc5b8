"""``merge()``: an engine that nobody has to hold.

Buffers given to ``merge`` may be freed whenever their owner likes, but memory must never be let go
while it is merged: the allocator would hand it out again, and whoever gets it would see frames. So
each buffer's *owner* (the object whose end frees the memory) is either hooked or held:

* A plain ``ndarray`` that owns its data runs its weak references' callbacks before it frees
  anything. The callback drops the pages' records and puts fresh memory in their place. The weak
  reference also makes numpy refuse ``ndarray.resize``, which would move the memory.
* Anything else (``bytearray``, ``mmap``, ``bytes``, instances of ndarray subclasses) is kept alive
  by its buffer export until ``unmerge`` is called, and the report says so.

Invariants:

* Registered memory has a span here, and a span's owner is hooked or held.
* The lock is taken by ``merge`` and ``unmerge`` only. A callback, which may run on any thread, in
  the middle of anything, never waits for it; what it cannot tidy up, the holder of the lock does.
* In a forked child the parent's record is set aside whole: its pages stay mapped, callbacks do
  nothing, and ``merge`` begins with an empty record.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pagemerge._core import PAGE_SIZE, Engine, Region, Stats, _owner, _span
from pagemerge._errors import Error

if TYPE_CHECKING:
    from pagemerge._core import _Buffer


@dataclass(frozen=True)
class MergeReport:
    """What one call of :func:`merge` did.

    ``pages``, ``merged`` and ``zero`` are about the buffers of the call; ``frames`` and
    ``bytes_saved`` are what the call has added to earlier ones with the same settings, and can be
    0 for buffers that were merged before.
    """

    pages: int
    """Whole pages in the buffers."""
    merged: int
    """How many of them now share a frame, those that a frame was made from included."""
    zero: int
    """How many of them now are the kernel's zero page, which takes no memory at all."""
    frames: int
    """Frames (shared pages) made."""
    bytes_saved: int
    """Bytes of memory given back: ``(merged + zero - frames) * PAGE_SIZE`` in a first call."""
    seconds: float
    """How long it took."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Pages that were left alone, by reason."""
    kept_alive: tuple[object, ...] = ()
    """Buffers whose owners cannot tell when they free their memory; they are held until
    :func:`unmerge`."""


@dataclass(eq=False)
class _Span:
    """Whole pages that are registered, from ``start`` to ``end`` (addresses)."""

    start: int
    end: int
    region: Region
    owner: weakref.ref[Any] | None
    """The owner, if its end is hooked; otherwise the engine holds the buffer."""
    hook: weakref.finalize[Any, Any] | None = None


class _Shared:
    """One engine for all calls with the same settings, and what is registered with it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.engine = Engine(**settings)
        self.spans: set[_Span] = set()
        self.usable = True

    def overlapping(self, start: int, end: int) -> list[_Span]:
        found = [span for span in list(self.spans) if span.start < end and start < span.end]
        return sorted(found, key=lambda span: span.start)

    def add(self, buffer: _Buffer, start: int, end: int) -> _Span:
        owner, hooked = _owner(buffer)
        made: list[Region] = []
        span = None
        try:
            # A signal handler runs, and may raise, as soon as a call has returned: by then `extend`
            # has what was made.
            made.extend(map(self.engine.register, [buffer]))
            span = _Span(start, end, made[0], weakref.ref(owner) if hooked else None)
            self.spans.add(span)
            if hooked:
                span.hook = weakref.finalize(owner, _ended, self, span, os.getpid())
                # At the end of the interpreter arrays outlive this module, and their memory the
                # process.
                span.hook.atexit = False
                self.engine._let_go(span.region)
        except BaseException:
            for region in made:
                self.drop(span or _Span(start, end, region, None))
            raise
        return span

    def drop(self, span: _Span) -> None:
        """Un-merge a span whose memory lives on."""
        # Held by name so that the owner cannot end while its memory is being un-merged.
        owner = span.owner() if span.owner is not None else None
        if span.owner is not None and owner is None:
            return  # It has ended already, and its callback does the rest.
        # A signal handler may have raised here before, when the first half was done.
        if span.region.registered:
            self.engine.unregister(span.region)
        self.spans.discard(span)
        if span.hook is not None:
            span.hook.detach()


class _Record:
    """Everything that ``merge`` has merged and not yet let go."""

    def __init__(self) -> None:
        # A signal handler may run on the thread that has just taken the lock, before that could say
        # so. It gets the lock, too, and `busy` tells whether anything has begun.
        self.lock = threading.RLock()
        self.busy = False
        self.shared: dict[tuple[tuple[str, str], ...], _Shared] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.busy:
                raise Error("merge() and unmerge() cannot be called from within one another")
            try:
                self.busy = True
                yield
            finally:
                try:
                    self.tidy()
                finally:
                    self.busy = False
        # A callback that came between the last look and the release has left its share to us.
        self.tidy_if_free()

    def tidy_if_free(self) -> None:
        while any(not shared.spans for shared in list(self.shared.values())):
            if not self.lock.acquire(blocking=False):
                return
            try:
                if self.busy:
                    return  # Further down on this thread's stack; that call will tidy up.
                try:
                    self.busy = True
                    self.tidy()
                finally:
                    self.busy = False
            finally:
                self.lock.release()

    def tidy(self) -> None:
        """Close engines that have nothing left. The lock is held."""
        for key, shared in list(self.shared.items()):
            if not shared.usable:
                # Its pages may be anybody's by now, so it must neither scan nor un-merge again.
                _set_aside.append(self.shared.pop(key))
            elif not shared.spans:
                del self.shared[key]
                shared.engine.close()


_record = _Record()
_set_aside: list[object] = []


def _ended(shared: _Shared, span: _Span, process: int) -> None:
    """Let go of memory that its owner is about to free."""
    if process != os.getpid():
        return
    try:
        # It is not when an exception has undone a registration that this hook was made for.
        if span.region.registered:
            shared.engine._forget(span.region)
    except BaseException:
        # A signal handler's comes when the work is done.
        shared.usable = not span.region.registered
        raise
    finally:
        shared.spans.discard(span)
        _record.tidy_if_free()


def _after_fork() -> None:
    global _record
    _set_aside.append(_record)
    _record = _Record()


os.register_at_fork(after_in_child=_after_fork)


def merge(*buffers: _Buffer, **settings: Any) -> MergeReport:
    """Merge equal pages of ``buffers`` now, until nothing more merges.

    Reading a merged buffer is as before. Writing to it copies the page that is written, once, and
    nobody else sees that. Nothing has to be held or closed afterwards: when an array is freed, its
    pages are let go. Calls with the same settings share their frames, so buffers can be added by
    and by; a buffer may be given again.

    Pages that were merged and have been written since merge again once they have not been written
    for ``quiet_millisecs``; where there are any, the call waits that long.

    Where userfaultfd is not available (see :func:`capabilities`), nothing keeps the pages still
    while they are merged: then nobody may write to the buffers **during the call**.

    Args:
        *buffers: Objects with a contiguous buffer: ndarray, bytearray, mmap, memoryview, ...
            The whole pages inside each are merged; that takes at least one, so two pages' worth
            of bytes are always enough.
        **settings: Those of :class:`Engine`.

    Returns:
        What was done: pages, merged, zero, frames, bytes_saved, seconds, skipped, kept_alive.

    Raises:
        TypeError: An argument has no buffer.
        ValueError: A buffer is not contiguous or holds no whole page, a setting is unknown or out
            of range, or (:class:`NotMergeableError`) memory is shared, file-backed, or otherwise
            not to be merged. Nothing is merged then that was not before.
        OSError: The kernel refused; ``errno`` says why.

    Example:
        >>> import numpy as np, pagemerge
        >>> originals = [np.full(1_000_000, 7.5) for _ in range(4)]
        >>> report = pagemerge.merge(*originals)
        >>> report.bytes_saved > 20_000_000
        True
        >>> all((array == 7.5).all() for array in originals)
        True
    """
    began = time.perf_counter()
    key = tuple(sorted((name, str(value)) for name, value in settings.items()))
    with _record.held():
        shared = _record.shared.get(key)
        if shared is None or not shared.usable:
            _record.tidy()
            shared = _record.shared[key] = _Shared(settings)
        before = shared.engine.stats()
        spans: list[_Span] = []
        added: list[_Span] = []
        kept: list[object] = []
        try:
            for buffer in buffers:
                found = _spans_of(shared, buffer, added)
                spans += [span for span in found if span not in spans]
                if any(span.owner is None for span in found):
                    kept.append(buffer)
        except BaseException:
            for span in added:
                shared.drop(span)
            raise
        after = _settle(shared.engine)
        counts = [span.region.stats() for span in spans]
    saved = (after.pages_sharing + after.ksm_zero_pages) - (
        before.pages_sharing + before.ksm_zero_pages
    )
    return MergeReport(
        pages=sum(span.region.pages for span in spans),
        merged=sum(count.ksm_merging_pages for count in counts),
        zero=sum(count.ksm_zero_pages for count in counts),
        frames=after.pages_shared - before.pages_shared,
        bytes_saved=saved * PAGE_SIZE,
        seconds=time.perf_counter() - began,
        skipped=dict(after.skipped),
        kept_alive=tuple(kept),
    )


def _settle(engine: Engine) -> Stats:
    """Scan until nothing more merges, waiting for pages that have to be quiet for a while first."""
    stats = engine.settle()
    while waiting := stats.skipped.get("not_quiet"):
        time.sleep(engine.settings.quiet_millisecs / 1000)
        stats = engine.settle()
        if stats.skipped.get("not_quiet", 0) >= waiting:
            break  # They are being written again and again.
    return stats


def unmerge(*buffers: _Buffer) -> None:
    """Give every page of ``buffers`` its own copy back, and let go of them.

    Without arguments, everything that :func:`merge` has merged. A buffer that is not merged is
    fine. What shares memory with a buffer is un-merged with it, as a whole.

    Raises:
        UnmergeError: There is not enough memory for the copies; those pages stay merged.

    Example:
        >>> import pagemerge
        >>> data = bytearray(b"x" * 100_000)
        >>> report = pagemerge.merge(data)
        >>> report.kept_alive == (data,)
        True
        >>> pagemerge.unmerge(data)
    """
    with _record.held():
        ranges = [_span(buffer) for buffer in buffers]
        for shared in list(_record.shared.values()):
            if buffers:
                spans = [span for range_ in ranges for span in shared.overlapping(*range_)]
            else:
                spans = list(shared.spans)
            for span in dict.fromkeys(spans):
                shared.drop(span)


def _spans_of(shared: _Shared, buffer: _Buffer, added: list[_Span]) -> list[_Span]:
    """Return the spans that cover a buffer, registering what is not registered yet."""
    start, end = _span(buffer)
    for other in list(_record.shared.values()):
        if other is not shared:
            # Merged with other settings before: the last call's settings hold.
            for span in other.overlapping(start, end):
                other.drop(span)
    spans = shared.overlapping(start, end)
    if not spans:
        added.append(shared.add(buffer, start, end))
        return added[-1:]
    whole = _bytes_of(buffer)
    origin = start - _lead(whole)
    here = start
    for span in spans:
        if here < span.start:
            added.append(shared.add(whole[here - origin : span.start - origin], here, span.start))
        here = max(here, span.end)
    if here < end:
        added.append(shared.add(whole[here - origin : end - origin], here, end))
    return shared.overlapping(start, end)


def _bytes_of(buffer: Any) -> memoryview:
    """Return a view of a contiguous buffer's bytes. It keeps the exporter, and so the owner."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        # Transposed, the same bytes are in C order.
        view = memoryview(cast("Any", np.asarray(buffer).T))
    return view.cast("B")


def _lead(view: memoryview) -> int:
    """Bytes before the first whole page of a view."""
    start = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return int(-start % PAGE_SIZE)
