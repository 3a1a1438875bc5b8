"""``evaluate()``: what merging would save, without changing anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pagemerge._core import PAGE_SIZE, evaluate_files, evaluate_memory

if TYPE_CHECKING:
    from pagemerge._core import _Buffer

    _Path = str | os.PathLike[str]


@dataclass(frozen=True)
class FileEvaluation:
    """One file's pages. A page may have its like both in this file and in another."""

    path: str
    bytes: int
    pages: int
    """Whole pages; the rest of a last partial page never merges."""
    zero: int
    """Pages of zeroes, holes included."""
    twin_within: int
    """Pages, other than zero pages, whose like is in the same file."""
    twin_elsewhere: int
    """Pages, other than zero pages, whose like is in another of the files."""
    unique: int
    """Pages that nothing equals."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found, in the words of a :class:`MergeReport`."""

    pages: int
    """Whole pages in the buffers or files."""
    present: int
    """How many of them were read: in memory, those that exist and may be merged."""
    merged: int
    """Pages, other than zero pages, that have their like."""
    zero: int
    """Pages of zeroes."""
    frames: int
    """Frames that the merged pages would need."""
    bytes_saved: int
    """``(merged + zero - frames) * page_size``."""
    seconds: float
    """How long it took to find out."""
    page_size: int
    """Bytes in a page."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Pages of buffers that cannot be merged, by reason."""
    files: tuple[FileEvaluation, ...] = ()
    """Each file that was read."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that were not read, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return asdict(self)


def evaluate(
    *buffers: _Buffer,
    paths: Iterable[_Path] = (),
    recursive: bool = False,
    page_size: int = PAGE_SIZE,
    keep_going: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Count equal and zero pages in ``buffers``, or in files.

    Nothing is merged, written, or loaded as a whole. The figures are those of one moment: of memory
    that is being written meanwhile, some pages are counted as they were before, others as after.

    Args:
        *buffers: As for :func:`merge`. Pages that nobody has touched yet take no memory, and are
            not read.
        paths: Files instead: data, memory dumps, images of virtual machines.
        recursive: Whether directories among the paths are gone into.
        page_size: For files: bytes in a page, to see what other page sizes would do. A power of
            two from 256 to 2097152.
        keep_going: Whether a file that cannot be read is left out, and the others are read.
        progress: Called now and then with the bytes read so far, and those to be read in all.

    Raises:
        TypeError: An argument has no buffer, or there are both buffers and paths.
        ValueError: A buffer is not contiguous, or ``page_size`` is not one.
        OSError: A file cannot be read, or is a directory or a device.

    Example:
        >>> import numpy as np, pagemerge
        >>> found = pagemerge.evaluate(np.ones(100_000), np.ones(100_000))
        >>> found.merged > 300 and found.bytes_saved > 1_000_000
        True
    """
    began = time.perf_counter()
    files = [os.fspath(path) for path in paths]
    if buffers and files:
        raise TypeError("evaluate takes either buffers or paths, not both")
    if files:
        found = evaluate_files(files, recursive, page_size, keep_going, progress)
        found["files"] = tuple(FileEvaluation(**file) for file in found["files"])
    elif page_size != PAGE_SIZE:
        raise ValueError(f"page_size can be chosen for files only; memory has {PAGE_SIZE}")
    else:
        found = evaluate_memory(list(buffers))
    return Evaluation(**found, seconds=time.perf_counter() - began, page_size=page_size)
