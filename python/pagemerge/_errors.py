"""Errors of our own.

Wrong arguments are ``ValueError`` or ``TypeError``, and refusals of the kernel are ``OSError`` with
``errno`` set. What is none of these, or has to be told apart from other such errors, is here.
"""


class Error(Exception):
    """Base class of all errors that are pagemerge's own."""

    __module__ = "pagemerge"


class BusyError(Error, OSError):
    """A setting cannot change now: the kernel's ``EBUSY``. ``errno`` is set."""

    __module__ = "pagemerge"


class UnavailableError(Error, OSError):
    """It cannot be done on this machine or with these privileges; the text says what to do.

    ``errno`` is ``EOPNOTSUPP``, or ``EFBIG`` where a limit of this process is in the way.
    """

    __module__ = "pagemerge"


class ClosedError(Error, ValueError):
    """The engine has been closed."""

    __module__ = "pagemerge"


class ForkedError(Error):
    """The engine, or the store, belongs to the parent process.

    Merged memory, and the bytes of blobs, stay readable in the child.
    """

    __module__ = "pagemerge"


class NotMergeableError(Error, ValueError):
    """The memory is not of the kind that can be merged; ``reason`` names why.

    Reasons are those of ``Stats.skipped``, for example ``"shared_mapping"``.
    """

    __module__ = "pagemerge"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


class StoreFullError(Error, MemoryError):
    """A value does not fit under a store's ``max_bytes``; the store is as it was.

    ``asked`` says how many bytes it needs beside what it shares, ``held`` how many are held, and
    ``max_bytes`` how many may be.
    """

    __module__ = "pagemerge"

    def __init__(self, message: str, asked: int, held: int, max_bytes: int) -> None:
        super().__init__(message)
        self.asked = asked
        self.held = held
        self.max_bytes = max_bytes

    def __reduce__(self) -> tuple[type, tuple[str, int, int, int]]:
        return type(self), (str(self), self.asked, self.held, self.max_bytes)


class UnmergeError(Error):
    """Pages could not be given copies of their own: they stay merged, and registered.

    ``pages`` says how many, ``reason`` why.
    """

    __module__ = "pagemerge"

    def __init__(self, message: str, pages: int, reason: str) -> None:
        super().__init__(message)
        self.pages = pages
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (str(self), self.pages, self.reason)
