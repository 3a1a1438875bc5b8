"""The kernel's own KSM: what it is set to, what it has done, and memory given to it.

One ksmd works for the whole machine. Everybody may read its settings and counters; root alone sets
them, and for all programs at once. A program gives it memory by :func:`madvise`, or all that it has
by :func:`merge_any`.

Names, values and meanings are sysfs's (``Documentation/admin-guide/mm/ksm.rst`` in the kernel's
source); errors are those of :class:`pagemerge.Settings`, which has the same names.

Example:
    >>> from pagemerge import kernel
    >>> kernel.available()
    True
    >>> kernel.settings.pages_to_scan > 0
    True
    >>> kernel.stats().pages_shared >= 0
    True
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

from pagemerge._core import PAGE_SIZE, _span
from pagemerge._enums import AdvisorMode, RunMode
from pagemerge._errors import BusyError, UnavailableError

if TYPE_CHECKING:
    from pagemerge._core import _Buffer

__all__ = [
    "KernelSettings",
    "KernelStats",
    "ProcessStats",
    "available",
    "cow_broken",
    "madvise",
    "merge_any",
    "merges_any",
    "process",
    "run",
    "set_run",
    "settings",
    "stats",
]

#: Where the kernel shows it.
SYSFS = Path("/sys/kernel/mm/ksm")

MADV_MERGEABLE, MADV_UNMERGEABLE = 12, 13
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def available() -> bool:
    """Return whether this kernel has KSM, and shows it here."""
    return SYSFS.is_dir()


def _read(name: str) -> str:
    try:
        text = (SYSFS / name).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        _missing(name)
    # A choice shows itself in brackets: "[none] scan-time".
    return text.partition("[")[2].partition("]")[0] if "[" in text else text


def _missing(name: str) -> NoReturn:
    if not available():
        raise UnavailableError(
            errno.EOPNOTSUPP,
            f"cannot read {SYSFS / name}: this kernel has no KSM (CONFIG_KSM), or hides sysfs from "
            "this container; merge with pagemerge.Engine, which needs neither",
        ) from None
    raise UnavailableError(
        errno.EOPNOTSUPP, f"cannot read {SYSFS / name}: this kernel is too old to have it"
    ) from None


def _write(name: str, value: str) -> None:
    path = SYSFS / name
    try:
        path.write_text(value, encoding="ascii")
    except FileNotFoundError:
        _missing(name)
    except PermissionError as error:
        raise UnavailableError(
            errno.EACCES,
            f"cannot set {name} to {value}: {path} may be written by root only; use sudo, or merge "
            "with pagemerge.Engine, which has settings of its own",
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                errno.EBUSY,
                f"cannot set {name} to {value} while pages are shared; un-merge everything first "
                "(run = 2)",
            ) from error
        if error.errno == errno.EINVAL:
            raise ValueError(f"the kernel does not take {value} for {name}{_hint(name)}") from error
        raise OSError(error.errno, f"cannot set {name} to {value}: {error.strerror}") from error


def _hint(name: str) -> str:
    if name == "pages_to_scan" and settings.advisor_mode != AdvisorMode.NONE:
        return " while its advisor sets it; set advisor_mode to none first"
    return ""


#: Each setting and its type, in an order in which all of them can be set: ``pages_to_scan`` is
#: refused while the advisor is on.
_SETTINGS: dict[str, type] = {
    "merge_across_nodes": bool,
    "max_page_sharing": int,
    "use_zero_pages": bool,
    "smart_scan": bool,
    "stable_node_chains_prune_millisecs": int,
    "sleep_millisecs": int,
    "pages_to_scan": int,
    "advisor_max_cpu": int,
    "advisor_min_pages_to_scan": int,
    "advisor_max_pages_to_scan": int,
    "advisor_target_scan_time": int,
    "advisor_mode": AdvisorMode,
}


@final
class KernelSettings:
    """ksmd's settings, live: each is read from sysfs when asked for, and each assignment sets it.

    The names are those of :class:`pagemerge.Settings` that the kernel has. An older kernel lacks
    some.

    Raises:
        ValueError: The kernel does not take the value.
        BusyError: It cannot change while pages are shared.
        UnavailableError: Not without root, or this kernel does not have it. ``errno`` says which.
        AttributeError: There is no such setting.
    """

    __slots__ = ()

    merge_across_nodes: bool
    max_page_sharing: int
    use_zero_pages: bool
    smart_scan: bool
    stable_node_chains_prune_millisecs: int
    sleep_millisecs: int
    pages_to_scan: int
    advisor_max_cpu: int
    advisor_min_pages_to_scan: int
    advisor_max_pages_to_scan: int
    advisor_target_scan_time: int
    advisor_mode: AdvisorMode

    def __getattr__(self, name: str) -> Any:
        kind = _SETTINGS.get(name)
        if kind is None:
            raise AttributeError(f"the kernel's KSM has no setting {name!r}", name=name, obj=self)
        text = _read(name)
        return kind(text) if kind is AdvisorMode else kind(int(text))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SETTINGS:
            raise AttributeError(f"the kernel's KSM has no setting {name!r}", name=name, obj=self)
        _write(name, _text(name, value))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_SETTINGS]

    def as_dict(self) -> dict[str, Any]:
        """Return those that this kernel has."""
        if not available():
            _missing("run")
        return {name: getattr(self, name) for name in _SETTINGS if (SYSFS / name).exists()}

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several, in an order in which the kernel takes them.

        All are checked before the first is set. What the kernel itself refuses stays as it was, and
        so does what comes after it.
        """
        texts = {name: _text(name, value) for name, value in values.items()}
        if "pages_to_scan" in texts and texts.get("advisor_mode") == "none":
            _write("advisor_mode", texts.pop("advisor_mode"))
        for name in _SETTINGS:
            if name in texts:
                _write(name, texts[name])

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!s}" for name, value in self.as_dict().items())
        return f"<pagemerge.kernel.settings {shown}>"


def _text(name: str, value: Any) -> str:
    """Return what is written to sysfs for a value, if it is one."""
    kind = _SETTINGS.get(name)
    if kind is None:
        known = ", ".join(_SETTINGS)
        raise AttributeError(f"the kernel's KSM has no setting {name!r}; there are: {known}")
    if kind is AdvisorMode:
        return AdvisorMode(value).value
    if isinstance(value, bool):
        value = int(value)
    try:
        number = int(value.__index__())
    except AttributeError:
        raise TypeError(
            f"{name} must be {'True or False' if kind is bool else 'an integer'}, "
            f"got {type(value).__name__}"
        ) from None
    if number < 0 or (kind is bool and number > 1):
        raise ValueError(f"{name} must be {'True or False' if kind is bool else 'at least 0'}")
    return str(number)


settings = KernelSettings()


class _Counters(Mapping[str, int]):
    """Attributes, and a mapping of those that this kernel has."""

    def __getitem__(self, name: str) -> int:
        value: int | None = getattr(self, name, None) if name in self._names() else None
        if value is None:
            raise KeyError(name)
        return value

    def _names(self) -> list[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names() if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@final
@dataclass(frozen=True, slots=True, eq=False)
class KernelStats(_Counters):
    """ksmd's counters at one moment, for the whole machine. None: this kernel does not count it."""

    pages_shared: int
    """Frames in use."""
    pages_sharing: int
    """Pages that share them, beyond the first of each: what is saved."""
    pages_unshared: int
    """Pages that have no equal, and are compared again in each pass."""
    pages_volatile: int
    """Pages that change too fast to be compared."""
    full_scans: int
    """Passes over all mergeable memory."""
    pages_scanned: int | None
    """Pages examined, since the machine was started."""
    pages_skipped: int | None
    """Pages that `smart_scan` has passed over."""
    ksm_zero_pages: int | None
    """Pages put onto the zero page."""
    general_profit: int | None
    """Bytes saved, less the kernel's records."""
    stable_node_chains: int
    """Contents with more than one frame."""
    stable_node_dups: int
    """Their frames."""

    @property
    def bytes_saved(self) -> int:
        """What all programs together would need in addition, without KSM."""
        return (self.pages_sharing + (self.ksm_zero_pages or 0)) * PAGE_SIZE


def stats() -> KernelStats:
    """Read ksmd's counters.

    Raises:
        UnavailableError: This kernel has no KSM.
    """
    if not available():
        _missing("pages_shared")
    found = {
        field.name: int(_read(field.name)) if (SYSFS / field.name).exists() else None
        for field in fields(KernelStats)
    }
    return KernelStats(**found)  # type: ignore[arg-type]


def run() -> RunMode:
    """Return what ksmd does: sysfs ``run``."""
    return RunMode(int(_read("run")))


def set_run(mode: RunMode | int) -> None:
    """Start ksmd (1), stop it (0), or stop it and un-merge everything in all programs (2).

    Raises:
        ValueError: There is no such mode.
        UnavailableError: Not without root.
        OSError: Not enough memory to un-merge everything (``ENOMEM``).
    """
    _write("run", str(RunMode(mode).value))


@final
@dataclass(frozen=True, slots=True, eq=False)
class ProcessStats(_Counters):
    """What KSM does for one process. None: this kernel does not tell."""

    ksm_rmap_items: int | None
    """Pages with records, of 64 bytes each."""
    ksm_zero_pages: int | None
    """Pages put onto the zero page."""
    ksm_merging_pages: int | None
    """Pages that share frames."""
    ksm_process_profit: int | None
    """Bytes saved, less the records."""
    ksm_merge_any: int | None
    """1 if all of its memory is given to ksmd (:func:`merge_any`)."""
    ksm_mergeable: int | None
    """1 if any of its memory is: without it nothing can ever merge."""
    ksm_swpin_copy: int | None
    """Pages copied because they were swapped in."""
    cow_ksm: int | None
    """Merged pages that were written, and copied again."""
    ksm_bytes: int | None
    """Bytes of it that are merged pages (``KSM`` in ``smaps``)."""


def process(pid: int | None = None) -> ProcessStats:
    """Read what KSM does for a process, which by default is this one.

    Raises:
        ProcessLookupError: There is no such process.
        PermissionError: It is somebody else's.
        UnavailableError: This kernel tells nothing of it (before Linux 6.1).
    """
    folder = Path("/proc") / str(os.getpid() if pid is None else pid)
    found: dict[str, int | None] = {field.name: None for field in fields(ProcessStats)}
    try:
        for line in (folder / "ksm_stat").read_text(encoding="ascii").splitlines():
            name, value = line.replace(":", " ").split()
            if name in found:
                found[name] = (
                    {"yes": 1, "no": 0}.get(value) if value in ("yes", "no") else int(value)
                )
        for line in (folder / "smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("KSM:"):
                found["ksm_bytes"] = int(line.split()[1]) * 1024
    except FileNotFoundError:
        if not folder.exists():
            raise ProcessLookupError(
                errno.ESRCH, f"cannot read what KSM does for process {pid}: there is none"
            ) from None
        raise UnavailableError(
            errno.EOPNOTSUPP, f"cannot read {folder / 'ksm_stat'}: this kernel does not have it"
        ) from None
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"cannot read what KSM does for process {pid}: it is another user's; use sudo",
        ) from error
    return ProcessStats(**found)


def cow_broken() -> int | None:
    """Return how many merged pages were written since the machine started; None if not counted.

    The kernel's ``cow_ksm`` in ``/proc/vmstat``.
    """
    for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name == "cow_ksm":
            return int(value)
    return None


def madvise(buffer: _Buffer, mergeable: bool = True) -> int:
    """Give the whole pages inside a buffer to ksmd, or (``mergeable=False``) take them back.

    Returns how many pages that are. Taking them back un-merges them. ksmd does something only while
    it runs (:func:`run`), and merges private anonymous memory only: the kernel takes any other
    without a word.

    Raises:
        TypeError: It has no buffer.
        ValueError: There is no whole page in it.
        UnavailableError: This kernel has no KSM.
        OSError: The kernel refuses.
    """
    start, end = _span(buffer)
    if start == end:
        raise ValueError(
            f"cannot give this buffer to ksmd: there is no whole page of {PAGE_SIZE} bytes in it"
        )
    advice = MADV_MERGEABLE if mergeable else MADV_UNMERGEABLE
    if _libc.madvise(start, end - start, advice):
        _refused("cannot give this buffer to ksmd (madvise)")
    return (end - start) // PAGE_SIZE


def merge_any(on: bool = True) -> None:
    """Give all memory of this process to ksmd, what it will have and what its children inherit.

    ``PR_SET_MEMORY_MERGE`` of Linux 6.4. Children inherit it, and so does what they execute on most
    kernels: ``pagemerge kernel run`` looks. Switched off, everything is un-merged.

    Raises:
        UnavailableError: This kernel does not have it, or does not let this process.
    """
    if _libc.prctl(PR_SET_MEMORY_MERGE, int(on), 0, 0, 0):
        _refused("cannot give this process to ksmd (PR_SET_MEMORY_MERGE)")


def merges_any() -> bool:
    """Return whether all memory of this process is given to ksmd."""
    found: int = _libc.prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0)
    if found < 0:
        _refused("cannot ask whether this process is given to ksmd (PR_GET_MEMORY_MERGE)")
    return found == 1


def _refused(what: str) -> NoReturn:
    number = ctypes.get_errno()
    text = f"{what}: {os.strerror(number)}"
    if number == errno.EINVAL and not available():
        raise UnavailableError(
            errno.EOPNOTSUPP,
            f"{text}; this kernel has no KSM (CONFIG_KSM): use pagemerge.Engine, which needs none",
        )
    if number == errno.EINVAL:
        raise UnavailableError(errno.EOPNOTSUPP, f"{text}; this kernel is too old to have it")
    if number == errno.EPERM:
        raise UnavailableError(
            errno.EACCES,
            f"{text}; use sudo, or give it single buffers by madvise()",
        )
    raise OSError(number, text)
