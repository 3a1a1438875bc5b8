"""The enumerations of the public interface; values are the kernel's where the kernel has any."""

from enum import IntEnum, StrEnum


class RunMode(IntEnum):
    """What an engine does by itself: the values of sysfs ``run``."""

    __module__ = "pagemerge"

    STOP = 0
    """Nothing; what is merged stays merged."""
    MERGE = 1
    """Merges in the background."""
    UNMERGE = 2
    """Nothing, and every page has its own copy again."""


class Barrier(StrEnum):
    """What keeps a page still while it is merged."""

    __module__ = "pagemerge"

    FULL = "full"
    """userfaultfd that stops every access, system calls included."""
    USER = "user"
    """userfaultfd that stops the program's own code: a system call that meets a page being merged
    fails with ``EFAULT``. Only on request."""
    NONE = "none"
    """Nothing: the caller promises that nobody writes during the call."""


class Remerge(StrEnum):
    """What happens to a page that was merged and has been written since."""

    __module__ = "pagemerge"

    QUIET = "quiet"
    """It is merged again once it has not been written for ``quiet_millisecs``."""
    NEVER = "never"
    """It is left alone."""
    ALWAYS = "always"
    """It is treated as any other page, as the kernel does: only where no device ever writes to
    registered memory."""


class TreeOrder(StrEnum):
    """What the stable and the unstable tree are ordered by."""

    __module__ = "pagemerge"

    DIGEST = "digest"
    """By hash, then by bytes."""
    CONTENT = "content"
    """By bytes, as in the kernel."""


class AdvisorMode(StrEnum):
    """Who decides how many pages the background thread examines at a time."""

    __module__ = "pagemerge"

    NONE = "none"
    """``pages_to_scan`` does."""
    SCAN_TIME = "scan-time"
    """The advisor, from the time and CPU that full scans take."""
