"""The compiled half of pagemerge.

Memory counts in pages of ``PAGE_SIZE`` bytes unless a name ends in ``_bytes``. Settings and
counters carry the names that the files of ksmd in sysfs have, with the same meanings.
"""

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, TypeAlias, final, overload

import numpy
import typing_extensions

from pagemerge._enums import AdvisorMode, Barrier, Remerge, RunMode, TreeOrder

__all__ = [
    "PAGE_SIZE",
    "AllocatorStats",
    "Blob",
    "Block",
    "Capabilities",
    "Engine",
    "NumpyContext",
    "Region",
    "RegionStats",
    "Settings",
    "Stats",
    "Store",
    "StoreStats",
    "_Allocator",
    "__version__",
    "_exiting",
    "_owner",
    "_span",
    "capabilities",
    "evaluate_files",
    "evaluate_memory",
    "kernel_defaults",
    "memory_usage",
]

PAGE_SIZE: int
"""Bytes in a page of this machine."""

__version__: str

_Buffer: TypeAlias = typing_extensions.Buffer | numpy.ndarray[Any, Any] | Block | Blob
"""Any object with a contiguous buffer: ndarray, bytearray, mmap, memoryview, bytes, array."""

_OnOff: TypeAlias = bool | Literal[0, 1]

@final
class Engine:
    """Merges equal pages of the memory that is registered with it.

    An engine has its own settings, counters, frames and trees; pages of two engines never share.
    It can be used from any number of threads. All methods that may take long release the GIL, and
    Ctrl-C ends them between two batches.

    Used as a context manager, it is closed at the end. An engine that is dropped is closed, too. At
    the end of the interpreter nothing is un-merged any more, because the process is about to give
    back all of its memory.

    After a fork the child keeps reading and writing its memory as before; there, every method
    raises :class:`ForkedError`. The parent's engine goes on.

    Args:
        pages_to_scan: Pages that the background thread examines at a time; 0 to 4294967295. Given
            without ``advisor_mode``, it turns the advisor off.
        sleep_millisecs: Its pause between two batches, in milliseconds (20).
        merge_across_nodes: Whether pages of different NUMA nodes may share a frame (True).
        max_page_sharing: How many pages may share one frame; 2 to 2147483647 (256). Beyond that a
            further frame is made for the same bytes.
        use_zero_pages: Whether pages of zeroes go to the kernel's zero page (True; kernel: False).
        smart_scan: Whether pages that have not merged for some time are examined less often (True).
        stable_node_chains_prune_millisecs: Pause between two prunings of one chain (2000).
        advisor_mode: ``"scan-time"`` (default) finds ``pages_to_scan`` by itself, ``"none"`` (the
            kernel's default) leaves it alone.
        advisor_max_cpu: Per cent of one CPU that the advisor lets scanning use (70).
        advisor_min_pages_to_scan, advisor_max_pages_to_scan: Where the advisor begins, and its
            upper limit (500, 30000).
        advisor_target_scan_time: Seconds in which it wants one pass to be done; at least 1 (200).
        tree_order: ``"digest"`` (default), or ``"content"`` as in the kernel.
        write_tracking: Whether the kernel's knowledge of writes replaces checksums (True). Where
            the kernel has none, checksums are used all the same. Fixed once the engine is made.
        lagging_records: Whether records go as late as the kernel's do (False). For comparisons.
        zero_only: Whether pages of zeroes are merged, and no others (False). Nobody can learn then
            what others hold from which pages have been merged, and no page is hashed. Needs
            ``use_zero_pages``; cannot be switched on while a frame is in use.
        barrier: ``"full"``, ``"user"`` or ``"none"``; None takes ``"full"`` where it is available,
            otherwise ``"none"``. Fixed once the engine is made.
        remerge: What happens to pages that were written after they had been merged. ``"quiet"``
            (default): once they have not been written for ``quiet_millisecs``, they are like any
            others. ``"never"``: they are left alone. ``"always"``: they are merged at once, as the
            kernel does it; only where no device ever writes to registered memory. (With the barrier
            ``"user"``, quiet is never.)
        quiet_millisecs: How long such a page must not have been written (1000); longer than the
            longest I/O into registered memory. At least 1.
        max_pause_micros: About how long a writer may have to wait for a page that is being merged
            (100). At least 1.
        reserved_mappings: Mappings of ``vm.max_map_count`` that are left to the program; None keeps
            a tenth, at least 1,000.
        thp_min_duplicates: Pages of one transparent huge page that would have to merge before it is
            split for them (32). 1 splits it for the first, as the kernel does. More than it has
            pages (512 of them on most machines) never does, and leaves huge pages alone altogether:
            otherwise what is written to them splits them, too, once it is tracked. At least 1.
        threads: Threads that hash pages in large batches (1). Merging itself is done by one thread:
            the kernel's lock on mappings lets no second one gain anything.

    Raises:
        ValueError: A setting is unknown (the text names those that are nearly it) or out of range.
        TypeError: A setting is of the wrong type.
        UnavailableError: The barrier asked for cannot be had here; the text says what to do.

    Example:
        >>> import numpy as np, pagemerge
        >>> first, second = np.ones(100_000), np.ones(100_000)
        >>> with pagemerge.Engine() as engine:
        ...     regions = [engine.register(array) for array in (first, second)]
        ...     stats = engine.settle()
        ...     stats.pages_shared >= 1 and stats.pages_sharing > 300
        True
    """

    def __new__(
        cls,
        *,
        pages_to_scan: int = ...,
        sleep_millisecs: int = ...,
        merge_across_nodes: _OnOff = ...,
        max_page_sharing: int = ...,
        use_zero_pages: _OnOff = ...,
        smart_scan: _OnOff = ...,
        stable_node_chains_prune_millisecs: int = ...,
        advisor_mode: AdvisorMode | str = ...,
        advisor_max_cpu: int = ...,
        advisor_min_pages_to_scan: int = ...,
        advisor_max_pages_to_scan: int = ...,
        advisor_target_scan_time: int = ...,
        tree_order: TreeOrder | str = ...,
        write_tracking: _OnOff = ...,
        lagging_records: _OnOff = ...,
        zero_only: _OnOff = ...,
        barrier: Barrier | str | None = ...,
        remerge: Remerge | str = ...,
        quiet_millisecs: int = ...,
        max_pause_micros: int = ...,
        reserved_mappings: int | None = ...,
        thp_min_duplicates: int = ...,
        threads: int = ...,
    ) -> Engine: ...
    def register(self, buffer: _Buffer, domain: str = "") -> Region:
        """Register the whole pages inside ``buffer`` for merging (``MADV_MERGEABLE``).

        The buffer is held (exported) until the region is unregistered or the engine is closed, so
        its owner cannot free, resize or close it meanwhile. Pages of different domains never share
        a frame. The memory must be private anonymous memory, as arrays and bytearrays have. Parts
        of it that are locked (``mlock``) or kept out of core dumps (``MADV_DONTDUMP``) are left
        alone, as is what :meth:`Region.exclude` is told.

        Raises:
            TypeError: It has no buffer.
            ValueError: It is not contiguous, holds no whole page, or is registered already, in
                whole or in part, with any engine.
            NotMergeableError: (a ValueError) It is shared, file-backed, locked throughout, ...
            ClosedError, ForkedError: As for all methods.
        """

    def unregister(self, region: Region) -> None:
        """Give every page of a region its own copy back (``MADV_UNMERGEABLE``) and let it go.

        Raises:
            UnmergeError: There is no memory for the copies; the region stays registered.
            ValueError: The region is not registered with this engine.
        """

    def discard(self, buffer: _Buffer) -> None:
        """Throw the contents of the whole pages inside ``buffer`` away (``MADV_DONTNEED``).

        They read as zero afterwards. Only for memory that is registered with this engine.

        Raises:
            ValueError: Some page is not, or the buffer is read-only. Nothing is discarded then.
            OSError: Some page is locked (``EINVAL``; munlock it first), and nothing is discarded.
                Or a limit of mappings was met; the text says what is left.
        """

    def scan(self, pages: int | None = None) -> Stats:
        """Scan to the end of the pass, or ``pages`` pages, now and on the caller's time.

        Works while ``run`` is 0 or 1. A page merges in the first pass in which it is found calm and
        another one like it is known; that takes up to three.

        With ``barrier="none"`` nobody may write to registered memory during the call.
        """

    def settle(self, max_scans: int = 32) -> Stats:
        """Scan until the counters stand still, for ``max_scans`` passes at most."""

    def start(self) -> None:
        """Merge in the background from now on (``run = 1``).

        Raises:
            UnavailableError: There is no barrier that would keep a page still meanwhile.
        """

    def stop(self) -> None:
        """Stop merging in the background (``run = 0``); what is merged stays merged."""

    @property
    def run(self) -> RunMode:
        """0 stop, 1 merge in the background, 2 un-merge everything now; as in sysfs."""

    @run.setter
    def run(self, mode: RunMode | int) -> None: ...
    @property
    def settings(self) -> Settings:
        """The settings, which can be changed by assignment."""

    def stats(self) -> Stats:
        """Return all counters as they are now."""

    def trace(self, on: bool = True) -> None:
        """Begin, or end, to record events under the names of the kernel's ``ksm`` tracepoints."""

    def events(self) -> tuple[list[tuple[str, dict[str, int | None]]], int]:
        """Take the events recorded since last time, oldest first, and how many were lost.

        The newest 65,536 are kept. An event is its name and its arguments, where ``pfn`` and
        ``ksm_page`` number pages and frames of this engine, and ``mm`` its regions.
        """

    def close(self) -> None:
        """Un-merge everything and let all buffers go. Closing twice is fine.

        Raises:
            UnmergeError: There is no memory for the copies; the engine stays open.
        """

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""

    def __enter__(self) -> Engine: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def _let_go(self, region: Region) -> None: ...
    def _forget(self, region: Region) -> None: ...

@final
class Region:
    """Memory that is registered with an engine: what :meth:`Engine.register` returns.

    Used as a context manager, it is unregistered at the end. A region that is merely dropped stays
    registered.
    """

    @property
    def pages(self) -> int:
        """How many whole pages are registered."""

    @property
    def nbytes(self) -> int:
        """The same in bytes."""

    @property
    def domain(self) -> str:
        """The domain: its pages share frames within it only."""

    @property
    def engine(self) -> Engine:
        """The engine."""

    @property
    def registered(self) -> bool:
        """Whether it still is registered."""

    def stats(self) -> RegionStats:
        """Return the counters of this region."""

    def exclude(self, buffer: _Buffer) -> int:
        """Keep secrets apart: the pages that hold ``buffer`` never merge from now on.

        ``buffer`` is a part of what was registered, for example a slice of the array. Pages that
        have been merged get their own copies back first. Every page counts that has one of its
        bytes. It lasts until the region is unregistered, whatever settings and run modes say.

        Returns:
            How many pages of the region that is. They are counted as ``skipped["excluded"]``.

        Raises:
            ValueError: It does not lie in the registered buffer, is not contiguous, or the region
                is not registered any more.
            UnmergeError: There is no memory for the copies; then nothing is excluded.

        Example:
            >>> import numpy as np, pagemerge
            >>> data = np.zeros((64, pagemerge.PAGE_SIZE), np.uint8)
            >>> engine = pagemerge.Engine()
            >>> region = engine.register(data)
            >>> region.exclude(data[8:10]) >= 2
            True
        """

    def close(self) -> None:
        """Unregister the region, if it still is registered. See :meth:`Engine.unregister`."""

    def __enter__(self) -> Region: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Settings:
    """An engine's settings. Each assignment takes effect at once, or raises and changes nothing.

    Names, ranges and defaults are described with :class:`Engine`.

    Raises:
        ValueError: Out of range, or where the kernel says ``EINVAL``: ``pages_to_scan`` while the
            advisor sets it.
        BusyError: Where the kernel says ``EBUSY``: ``max_page_sharing`` and ``merge_across_nodes``
            while pages are shared; likewise to switch ``zero_only`` on. Set ``engine.run = 2``
            first.
        AttributeError: There is no such setting.

    Example:
        >>> import pagemerge
        >>> engine = pagemerge.Engine(advisor_mode="none")
        >>> engine.settings.pages_to_scan = 4000
        >>> engine.settings.pages_to_scan
        4000
    """

    pages_to_scan: int
    sleep_millisecs: int
    merge_across_nodes: bool
    max_page_sharing: int
    use_zero_pages: bool
    smart_scan: bool
    stable_node_chains_prune_millisecs: int
    @property
    def advisor_mode(self) -> AdvisorMode: ...
    @advisor_mode.setter
    def advisor_mode(self, value: AdvisorMode | str) -> None: ...
    advisor_max_cpu: int
    advisor_min_pages_to_scan: int
    advisor_max_pages_to_scan: int
    advisor_target_scan_time: int
    @property
    def tree_order(self) -> TreeOrder: ...
    @tree_order.setter
    def tree_order(self, value: TreeOrder | str) -> None: ...
    write_tracking: bool
    lagging_records: bool
    zero_only: bool
    @property
    def barrier(self) -> Barrier | None: ...
    @barrier.setter
    def barrier(self, value: Barrier | str | None) -> None: ...
    @property
    def remerge(self) -> Remerge: ...
    @remerge.setter
    def remerge(self, value: Remerge | str) -> None: ...
    quiet_millisecs: int
    max_pause_micros: int
    reserved_mappings: int | None
    thp_min_duplicates: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """Return all of them, as keywords for :class:`Engine`.

        While the advisor sets ``pages_to_scan``, that is the number with which it begins.
        """

@final
class Stats:
    """An engine's counters at one moment: attributes, and a mapping (``dict(stats)``).

    ``later - earlier`` gives what has changed. As in the kernel the first nine move only when the
    scan comes by: a page that was merged and has been written counts as sharing until then.
    """

    pages_shared: int
    """Frames in use."""
    pages_sharing: int
    """Pages that share them, beyond the first of each frame: what is saved."""
    pages_unshared: int
    """Pages that are unique so far."""
    pages_volatile: int
    """Pages that change too fast, or that have not been looked at twice yet."""
    pages_scanned: int
    """Examinations of a page, ever."""
    pages_skipped: int
    """Pages passed over by smart scan, ever."""
    full_scans: int
    """Passes completed."""
    stable_node_chains: int
    """Contents that have needed more than one frame because of ``max_page_sharing``."""
    stable_node_dups: int
    """Frames of such contents."""
    ksm_zero_pages: int
    """Pages that this engine has put onto the zero page and that still are there. Exact."""
    general_profit: int
    """Bytes saved less the price of records, by the kernel's formula."""
    pages_to_scan: int
    """The setting, which the advisor changes."""
    rmap_items: int
    """Pages of which something is remembered."""
    pages_merged: int
    """Merges done, ever."""
    cow_broken: int
    """Merged pages that were seen to have been written, ever."""
    regions: int
    """Registered regions."""
    frames: int
    """Frames that take memory now."""
    frames_bytes: int
    """Bytes of memory that the frames take now."""
    generations: int
    """Frame stores: one, and one more for each fork whose frames are still in use."""
    mappings: int
    """Mappings that this process has."""
    mapping_budget: int
    """Mappings that merging may use, of ``vm.max_map_count``."""
    windows: int
    """Times that pages have been held still, ever."""
    lost_races: int
    """Pages that were given back because they had been written at that very time, ever."""
    metadata_bytes: int
    """Bytes that the engine's own records take."""
    cpu_nanos: int
    """CPU time that scanning has used, in nanoseconds."""
    barrier: Barrier
    """What keeps pages still while they are merged."""
    write_tracking: bool
    """Whether the kernel tells which pages were written."""
    background: bool
    """Whether the background thread merges (``run = 1``)."""
    skipped: dict[str, int]
    """Pages left alone in the last pass, by reason."""
    last_error: str | None
    """Why background merging ended by itself, if it did."""

    def keys(self) -> list[str]:
        """Return the names."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str, /) -> bool: ...
    def __sub__(self, earlier: Stats, /) -> Stats: ...
    def __rsub__(self, later: Stats, /) -> Stats: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class RegionStats:
    """A region's counters at one moment, under the names of ``/proc/PID/ksm_stat``.

    Attributes, and a mapping, as with :class:`Stats`.
    """

    ksm_rmap_items: int
    """Pages of which something is remembered."""
    ksm_zero_pages: int
    """Pages put onto the zero page."""
    ksm_merging_pages: int
    """Pages that share a frame, those that a frame was made from included."""
    ksm_process_profit: int
    """Bytes saved less the price of records, by the kernel's formula."""
    ksm_merge_any: bool
    """Always False: the kernel's switch for whole processes has no counterpart here."""
    ksm_mergeable: bool
    """Whether the region is registered."""

    def keys(self) -> list[str]:
        """Return the names."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str, /) -> bool: ...
    def __sub__(self, earlier: RegionStats, /) -> RegionStats: ...
    def __rsub__(self, later: RegionStats, /) -> RegionStats: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class Store:
    """Keeps bytes, each content once.

    Equal values are one entry, whole pages that values have in common are held once, pages of
    zeroes take no memory, and what is left of a value behind its last whole page is packed.
    Whatever is shared has been compared byte by byte.

    A store can be used from any number of threads. After a fork the child reads the blobs that it
    inherited; there, everything that would change or ask the store raises :class:`ForkedError`.

    Args:
        domain: Pages never share a frame with those of another domain.
        max_bytes: How much may be held: unique bytes and metadata together. None: no limit.
        engine: The engine whose frames hold the pages. None: one of its own.

    Raises:
        ClosedError: The engine has been closed. (What a store holds outlives its engine; it only
        takes
            nothing new.)
        ForkedError: The engine belongs to the parent process.

    Example:
        >>> import pagemerge
        >>> store = pagemerge.Store()
        >>> one, other = store.put(b"x" * 10_000), store.put(bytearray(b"x" * 10_000))
        >>> one == other, bytes(one[:3]), len(one)
        (True, b'xxx', 10000)
        >>> stats = store.stats()
        >>> stats.entries, stats.logical_bytes, stats.unique_bytes < 10_000
        (1, 20000, True)
    """

    def __new__(
        cls, domain: str = "", max_bytes: int | None = None, engine: Engine | None = None
    ) -> Store: ...
    def put(self, data: _Buffer) -> Blob:
        """Keep a copy of ``data`` and return a handle for it.

        The GIL is released for more than 16 KiB. If somebody writes to ``data`` meanwhile, some
        mixture is kept.

        Raises:
            TypeError: ``data`` is no buffer. ValueError: Its bytes do not lie in one piece, or a
            matrix is stored by columns. StoreFullError: It does not fit under ``max_bytes``.
            MemoryError: The kernel has no memory for it. (After this, and the error above, the
            store is as
                it was.)
            ClosedError: The engine has been closed.
            ForkedError: The store belongs to the parent process.
        """

    def stats(self) -> StoreStats:
        """Return what is held now. Cheap: nothing is counted, only read."""

    @property
    def engine(self) -> Engine:
        """The engine whose frames hold the pages."""

    @property
    def domain(self) -> str:
        """The domain, as given."""

    max_bytes: int | None
    """How much may be held. When it is lowered, what is held already stays."""

@final
class Blob:
    """Bytes that a store keeps, as ``Store.put`` returns them. They never change.

    Like ``bytes``: it has a length, an index gives a number and a slice a blob (without copying),
    it equals bytes-like objects of the same content, and has the hash that ``bytes`` of that
    content have. It has the buffer protocol, read-only and in one piece: ``memoryview(blob)``
    copies nothing where the bytes lie in one piece already, as those of values do that share no
    page with others (but for odd tails of values under some 100 KB). Where they do not they are
    copied side by side while views live. :meth:`segments` does without.

    The value's bytes go when the last blob of it, and the last view, has gone. A pickled blob
    becomes plain ``bytes``.
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> Blob: ...
    def __bytes__(self) -> bytes: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __copy__(self) -> Blob: ...
    def __deepcopy__(self, memo: Any, /) -> Blob: ...
    def segments(self) -> list[memoryview]:
        """Return the bytes as they lie in memory: read-only views, one for each piece, in order.

        For ``socket.sendmsg`` and ``os.writev`` (which take ``IOV_MAX`` pieces at a time, 1024 as a
        rule). Nothing is copied or mapped.
        """

    @property
    def charged_bytes(self) -> int:
        """The blob's fair share of the store's unique bytes.

        What several values or blobs share is divided among them; a slice is charged as its whole
        blob, which it holds. Rounded up.
        """

@final
class StoreStats:
    """What a store holds at one moment. Attributes, and a mapping, as with :class:`Stats`.

    Three honest sizes: what was put (``logical_bytes``), what is held for it (``unique_bytes``),
    and what that costs (``metadata_bytes``). ``Blob.charged_bytes`` is a blob's share.
    """

    logical_bytes: int
    """Bytes of all living blobs, each counted in full."""
    unique_bytes: int
    """Bytes held for contents: pages, and packed values with their rounding to 16."""
    metadata_bytes: int
    """Bytes held for everything else: indexes and records. (Blob objects are their holders'.)"""
    spare_bytes: int
    """Bytes that have memory and hold nothing: made ahead, or freed and not given back yet."""
    entries: int
    """Different values, but for those under 33 bytes, which are kept plainly."""
    blobs: int
    """Living blobs, slices not counted."""
    pages: int
    """Different pages."""
    put_bytes: int
    """Bytes that were put, ever."""
    puts: int
    """Puts, ever."""
    hits: int
    """Puts whose value was there already, ever."""
    copied_bytes: int
    """Bytes copied side by side for views that live now, in the whole process."""

    def keys(self) -> list[str]:
        """Return the names."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str, /) -> bool: ...
    def __sub__(self, earlier: StoreStats, /) -> StoreStats: ...
    def __rsub__(self, later: StoreStats, /) -> StoreStats: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class Capabilities:
    """What this kernel and these privileges allow; found once, by trying."""

    @property
    def barrier(self) -> Barrier:
        """The best barrier there is."""

    @property
    def write_tracking(self) -> bool:
        """Whether the kernel tells which pages were written (Linux 6.7)."""

    @property
    def move(self) -> bool:
        """Whether pages can be moved out of the way (``UFFDIO_MOVE``, Linux 6.8)."""

    @property
    def max_map_count(self) -> int:
        """``vm.max_map_count``: mappings that a process may have."""

    @property
    def kernel_ksm(self) -> bool:
        """Whether the kernel has KSM of its own."""

    @property
    def page_size(self) -> int:
        """Bytes in a page."""

    @property
    def kernel(self) -> str:
        """The kernel's release."""

    @property
    def reasons(self) -> dict[str, str]:
        """For each thing that is missing: why, and what to do about it."""

@final
class _Allocator:
    """What :class:`pagemerge.Allocator` stands on."""

    def __new__(cls, engine: Engine | None, domain: str) -> _Allocator: ...
    @property
    def engine(self) -> Engine: ...
    def allocate(self, nbytes: int) -> Block: ...
    def numpy(self, threshold: int) -> NumpyContext: ...
    def owns(self, address: int) -> bool: ...
    def trim(self) -> None: ...
    def stats(self) -> AllocatorStats: ...

@final
class AllocatorStats:
    """An allocator's counters at one moment: attributes, and a mapping (``dict(stats)``).

    ``later - earlier`` gives what has changed.
    """

    allocations: int
    """Blocks in use, those of arrays included."""
    live_bytes: int
    """What was asked for, for them."""
    held_bytes: int
    """The pages that they are in, and those that have been freed and are not given back yet. How
    much of
    it really is in memory, merged or not, :func:`memory_usage` tells."""
    reserved_bytes: int
    """Address space."""
    metadata_bytes: int
    """Bytes that the allocator's own records take. (The engine has its own.)"""
    arenas: int
    """Pieces of address space, those of large blocks included."""
    not_merging: str | None
    """Why some of it, or all, is not merged: the engine is closed, or a parent's, or has refused
    it."""

    def keys(self) -> list[str]:
        """Return the names."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str, /) -> bool: ...
    def __sub__(self, earlier: AllocatorStats, /) -> AllocatorStats: ...
    def __rsub__(self, value: object, /) -> Any: ...

@final
class Block:
    """Memory of an allocator: what :meth:`Allocator.allocate` returns.

    A writable buffer of bytes (``memoryview(block)``, ``numpy.frombuffer(block)``), zero at first.
    It begins on a page, and is freed with its last view.

    Used as a context manager, it is released at the end. (If that is left by an exception, views
    that the exception still holds keep the block.)

    Example:
        >>> import pagemerge
        >>> with pagemerge.Allocator().allocate(10_000) as block:
        ...     with memoryview(block) as view:
        ...         view[:5] = b"bytes"
        ...         bytes(view[:5])
        b'bytes'
    """

    @property
    def nbytes(self) -> int:
        """Its size in bytes, also when it has been released."""

    @property
    def released(self) -> bool:
        """Whether :meth:`release` has been called."""

    def release(self) -> None:
        """Give the memory back now. Releasing twice is fine.

        Raises:
            BufferError: Views of it exist.
        """

    def __len__(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, view: memoryview, /) -> None: ...
    def __enter__(self) -> Block: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class NumpyContext:
    """What :meth:`Allocator.numpy` returns, for ``with``."""

    @property
    def threshold(self) -> int:
        """Arrays of fewer bytes are left to numpy."""

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any: ...
    def __enter__(self) -> NumpyContext: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

def capabilities() -> Capabilities:
    """Return what can be done here, and why not more.

    Example:
        >>> import pagemerge
        >>> pagemerge.capabilities().max_map_count > 0
        True
    """

def kernel_defaults() -> dict[str, Any]:
    """Return the settings that make an engine behave exactly as the kernel does.

    Example:
        >>> import pagemerge
        >>> engine = pagemerge.Engine(**pagemerge.kernel_defaults())
        >>> engine.settings.pages_to_scan
        100
    """

def memory_usage() -> dict[str, int]:
    """Return what this process takes, in bytes: ``pss`` and its parts, and ``rss``.

    PSS divides what several mappings share, so it is the measure of what merging saves. RSS counts
    each mapping in full and does not fall.

    Raises:
        OSError: ``/proc/self/smaps_rollup`` cannot be read.
    """

def evaluate_memory(buffers: list[_Buffer]) -> dict[str, Any]:
    """Count pages of buffers. :func:`pagemerge.evaluate` is what programs call."""

def evaluate_files(
    paths: list[str],
    recursive: bool,
    page_size: int,
    keep_going: bool,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Any]:
    """Count pages of files. :func:`pagemerge.evaluate` is what programs call."""

def _owner(buffer: _Buffer) -> tuple[Any, bool]: ...
def _span(buffer: _Buffer) -> tuple[int, int]: ...
def _exiting() -> None: ...
