"""Kernel samepage merging, run by the program itself.

:func:`merge` merges equal pages of buffers now. An :class:`Engine` merges in the background or step
by step, with its own settings, counters and domains. An :class:`Allocator` gives memory in which
equal values are equal pages, a :class:`Store` keeps bytes, each content once from the start, and a
:class:`Cache` is limited by what its values take there together.
:func:`evaluate` says what there is to gain, :func:`capabilities` what this machine allows.
:mod:`pagemerge.kernel` is about the kernel's own KSM.
"""

from pagemerge._allocator import Allocator
from pagemerge._cache import Cache
from pagemerge._core import (
    PAGE_SIZE,
    AllocatorStats,
    Blob,
    Block,
    Capabilities,
    Engine,
    NumpyContext,
    Region,
    RegionStats,
    Settings,
    Stats,
    Store,
    StoreStats,
    __version__,
    capabilities,
    kernel_defaults,
    memory_usage,
)
from pagemerge._enums import AdvisorMode, Barrier, Remerge, RunMode, TreeOrder
from pagemerge._errors import (
    BusyError,
    ClosedError,
    Error,
    ForkedError,
    NotMergeableError,
    StoreFullError,
    UnavailableError,
    UnmergeError,
)
from pagemerge._evaluate import Evaluation, FileEvaluation, evaluate
from pagemerge._merge import MergeReport, merge, unmerge

__all__ = [
    "PAGE_SIZE",
    "AdvisorMode",
    "Allocator",
    "AllocatorStats",
    "Barrier",
    "Blob",
    "Block",
    "BusyError",
    "Cache",
    "Capabilities",
    "ClosedError",
    "Engine",
    "Error",
    "Evaluation",
    "FileEvaluation",
    "ForkedError",
    "MergeReport",
    "NotMergeableError",
    "NumpyContext",
    "Region",
    "RegionStats",
    "Remerge",
    "RunMode",
    "Settings",
    "Stats",
    "Store",
    "StoreFullError",
    "StoreStats",
    "TreeOrder",
    "UnavailableError",
    "UnmergeError",
    "__version__",
    "capabilities",
    "evaluate",
    "kernel_defaults",
    "memory_usage",
    "merge",
    "unmerge",
]
