"""``Allocator``: memory in which equal values are equal pages.

What decides about pages is compiled; here are the ways in which arrays are made. They are ndarrays
like any others: numpy makes them itself, while the allocator serves its requests for memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, TypeVar, cast

import numpy as np

from pagemerge._core import AllocatorStats, Block, Engine, NumpyContext, _Allocator

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

_T = TypeVar("_T")
_Shape: TypeAlias = "SupportsIndex | Sequence[SupportsIndex]"
_Order = Literal["C", "F"]

THRESHOLD = 16384
"""Arrays of fewer bytes are left to numpy by :meth:`Allocator.numpy`, unless told otherwise."""


class Allocator:
    """Allocates memory in which equal values merge, whatever their order and surroundings.

    Every block begins on a page and has its pages for itself; what lies between its end and the end
    of its last page is zero; and all of it is registered for merging from the beginning. So two
    equal values are equal page by page, the last one included. The price is half a page for each
    block, on average.

    Memory comes zeroed, and goes back to the machine when it is freed. Blocks and arrays free
    themselves. They outlive the allocator, its engine, and a fork: when the engine is closed, or in
    a child, they are ordinary memory.

    Nothing merges by itself: call ``allocator.engine.settle()``, or ``allocator.engine.start()`` to
    have it done in the background. Any number of threads may use an allocator. Without a barrier
    (:func:`capabilities`) nothing of it is merged, since nobody can promise that nothing computes
    meanwhile: ``stats().not_merging`` says so.

    Args:
        engine: The engine that merges what is allocated; None makes one with default settings.
        domain: Pages of different domains never share memory, as with :meth:`Engine.register`.

    Example:
        >>> import pagemerge
        >>> allocator = pagemerge.Allocator()
        >>> first = allocator.full(100_000, 2.5)
        >>> second = allocator.full(100_000, 2.5)
        >>> stats = allocator.engine.settle()
        >>> stats.pages_merged == 2 * 196  # 800,000 bytes are 196 pages, the last one in part
        True
    """

    __module__ = "pagemerge"
    _made: Callable[..., NDArray[Any]]
    __slots__ = ("__weakref__", "_heap", "_made")

    def __init__(self, engine: Engine | None = None, *, domain: str = "") -> None:
        self._heap = _Allocator(engine, domain)
        # Whoever asks for an array by name gets one from here, however small it is.
        self._made = self._heap.numpy(0)._call

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._heap.engine

    def allocate(self, nbytes: int) -> Block:
        """Return ``nbytes`` bytes of zeroes as a :class:`Block`.

        Raises:
            ValueError: Less than none.
            MemoryError: There is not so much memory, or room in the address space.
        """
        return self._heap.allocate(nbytes)

    def empty(
        self, shape: _Shape, dtype: DTypeLike = float, *, order: _Order = "C"
    ) -> NDArray[Any]:
        """Return a new array, as :func:`numpy.empty` does; it is all zero.

        It is an ordinary ndarray, in every way: it owns its data, can be resized, pickled (what is
        loaded lies wherever the loading process puts it), viewed and freed.

        Raises:
            TypeError: The dtype holds Python objects: their addresses would be merged, not they.
            MemoryError: As for :meth:`allocate`.
        """
        found = _plain(dtype)
        return self._made(np.empty, shape, found, order)

    def zeros(
        self, shape: _Shape, dtype: DTypeLike = float, *, order: _Order = "C"
    ) -> NDArray[Any]:
        """Return a new array of zeroes. See :meth:`empty`."""
        found = _plain(dtype)
        return self._made(np.zeros, shape, found, order)

    def full(
        self,
        shape: _Shape,
        fill_value: ArrayLike,
        dtype: DTypeLike | None = None,
        *,
        order: _Order = "C",
    ) -> NDArray[Any]:
        """Return a new array filled with a value, as :func:`numpy.full` does. See :meth:`empty`."""
        made = self.empty(
            shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order
        )
        np.copyto(made, fill_value, casting="unsafe")
        return made

    def array(
        self,
        data: ArrayLike,
        dtype: DTypeLike | None = None,
        *,
        order: Literal["K", "A", "C", "F"] = "K",
    ) -> NDArray[Any]:
        """Return a copy of ``data`` as a new array, as :func:`numpy.array`. See :meth:`empty`."""
        source = np.asarray(data, dtype)
        _plain(source.dtype)
        return self._made(source.copy, order)

    def copy(self, thing: _T) -> _T:
        """Return a deep copy of anything that can be pickled, with the data of its arrays here.

        For what was made elsewhere: models and tables that others have loaded, or what
        ``pickle.load`` has made (``allocator.copy(pickle.load(file))``). Subclasses of ndarray, and
        arrays of objects, are copied to where they would be unpickled.

        Example:
            >>> import numpy as np, pagemerge
            >>> allocator = pagemerge.Allocator()
            >>> weights = {"first": np.ones(100_000), "names": ["a", "b"]}
            >>> copies = [allocator.copy(weights) for _ in range(3)]
            >>> allocator.stats().allocations
            3
        """
        buffers: list[pickle.PickleBuffer] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            # Whatever else hands its memory over would find itself in the copy.
            with memoryview(buffer) as view:
                kept = not isinstance(view.obj, np.ndarray)
            if not kept:
                buffers.append(buffer)
            return kept

        data = pickle.dumps(thing, protocol=5, buffer_callback=in_band)
        unpickler = _Unpickler(io.BytesIO(data), buffers=buffers)
        unpickler.allocator = self
        return cast("_T", unpickler.load())

    def numpy(self, threshold: int = THRESHOLD) -> NumpyContext:
        """Have numpy allocate here: a context for ``with``.

        The data of every array that is made in it, by numpy or by what is built on numpy
        (``np.load``, arithmetic, pandas columns), comes from this allocator if it has ``threshold``
        bytes or more. Smaller ones are numpy's as before. Arrays outlive the context; those that
        are resized stay here, or move across the threshold.

        A context belongs to the thread, or the asyncio task, that enters it. Others are not
        affected: a thread enters it for itself (``ThreadPoolExecutor(initializer=allocator.numpy()
        .__enter__)`` has every worker do so for good); a task that is made inside inherits it. The
        same context may be entered again, also within itself, and by several threads.

        What does not ask numpy for memory is not affected either: views, ``frombuffer``,
        memory-mapped files, and large arrays that are unpickled, whose data numpy leaves where the
        unpickler has read it. For these there is :meth:`copy`.

        Raises:
            RuntimeError: (On leaving.) It was not the last to be entered in this thread or task.

        Example:
            >>> import numpy as np, pagemerge
            >>> allocator = pagemerge.Allocator()
            >>> with allocator.numpy():
            ...     copies = [np.arange(100_000.0) * 2 for _ in range(2)]
            >>> allocator.stats().allocations
            2
        """
        if threshold < 0:
            raise ValueError(f"the threshold is a number of bytes, not {threshold}")
        return self._heap.numpy(threshold)

    def owns(self, array: NDArray[Any]) -> bool:
        """Return whether the memory of an array begins where a block of this allocator does."""
        return self._heap.owns(array.__array_interface__["data"][0])

    def trim(self) -> None:
        """Give all memory back that no block has, and wait until that is done.

        Otherwise some MiB are kept for the next block of the same size, and 64 MiB of address
        space.
        """
        self._heap.trim()

    def stats(self) -> AllocatorStats:
        """Return all counters as they are now."""
        return self._heap.stats()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<pagemerge.Allocator of {stats.allocations} blocks, {stats.live_bytes} bytes>"


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays into an allocator."""

    allocator: Allocator

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        # How numpy says, since protocol 5, that an array is made of a buffer.
        if name == "_frombuffer" and module.startswith("numpy."):

            def copied(*arguments: Any) -> NDArray[Any]:
                return self.allocator.array(found(*arguments))

            return copied
        return found


def _plain(dtype: DTypeLike) -> np.dtype[Any]:
    found = np.dtype(dtype)
    if found.hasobject:
        raise TypeError(
            f"cannot allocate an array of {found}: it holds references to Python objects, which "
            "lie elsewhere; use a dtype of plain values"
        )
    return found
