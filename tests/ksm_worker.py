"""A process that holds memory for ksmd: the other end of `ksm_kernel.Worker`, and no more.

Hundreds of these are started, so this file imports little: that halves the time of each start.
Requests and answers are marshalled tuples, each with its length in front: both ends are the same
interpreter.
"""

from __future__ import annotations

import marshal
import mmap
import os
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = mmap.PAGESIZE
MADV_NOHUGEPAGE = 15

#: What a page holds: None = never touched, 0 = written with zeros, n > 0 = a content of its own,
#: n < 0 = one that differs from its like in the last eight bytes only.
Tag = int | None


def page_bytes(tag: Tag) -> bytes:
    """The bytes of a page. Positive tags sort like their contents, and before negative ones."""
    if not tag:
        return bytes(PAGE)
    if tag < 0:
        return b"\xa5" * (PAGE - 8) + (-tag).to_bytes(8, "big")
    rest = (tag * 0x9E3779B97F4A7C15 | 1) & (2**64 - 1)
    return tag.to_bytes(8, "big") + rest.to_bytes(8, "big") * (PAGE // 8 - 1)


def send(to: IO[bytes], message: tuple[Any, ...]) -> None:
    """Sends one message."""
    body = marshal.dumps(message)
    to.write(len(body).to_bytes(4, "big") + body)
    to.flush()


def receive(source: IO[bytes]) -> tuple[Any, ...] | None:
    """The next message; None when there will be no more."""
    length = source.read(4)
    if not length:
        return None
    message: tuple[Any, ...] = marshal.loads(source.read(int.from_bytes(length, "big")))
    return message


class Memory:
    """One method for each request. Pages are counted from the start of the arena."""

    def __init__(self) -> None:
        self.children: list[tuple[int, int]] = []  # process id, the end of the pipe it waits at

    def map(self, pages: int) -> None:
        self.arena = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:  # noqa: SIM105  # contextlib would have to be imported
            self.arena.madvise(MADV_NOHUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages has nothing to forbid

    def write(self, first: int, tags: Sequence[Tag]) -> None:
        for page, tag in enumerate(tags, first):
            if tag is not None:
                self.arena[page * PAGE : (page + 1) * PAGE] = page_bytes(tag)

    def advise(self, advice: int, first: int, pages: int) -> None:
        self.arena.madvise(advice, first * PAGE, pages * PAGE)

    def unmap(self, first: int, pages: int) -> None:
        import ctypes  # here, since few layouts need it, and every worker would pay for it

        libc = ctypes.CDLL(None, use_errno=True)
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.arena)) + first * PAGE
        if libc.munmap(start, pages * PAGE):
            raise OSError(ctypes.get_errno(), "munmap failed")

    def fork(self) -> int:
        ends, ours = os.pipe()  # ours closes with this process at the latest: then the child ends
        child = os.fork()
        if child == 0:
            for _, other in self.children:
                os.close(other)
            os.close(ours)
            os.read(ends, 1)
            os._exit(0)
        os.close(ends)
        self.children.append((child, ours))
        return child

    def end_children(self) -> None:
        """Waits until they are gone: as long as one is, the merged pages are."""
        while self.children:
            child, ours = self.children.pop()
            os.close(ours)
            os.waitpid(child, 0)

    def wrong(self, first: int, tags: Sequence[Tag], holes: bool) -> list[int]:
        return [
            page
            for page, tag in enumerate(tags, first)
            if (holes or tag is not None)
            and self.arena[page * PAGE : (page + 1) * PAGE] != page_bytes(tag)
        ]


def serve() -> None:
    """Does as it is told until nobody is left to tell it."""
    memory = Memory()
    while request := receive(sys.stdin.buffer):
        name, arguments = request
        try:
            answer = (0, getattr(memory, name)(*arguments))
        except OSError as error:
            answer = (error.errno or -1, str(error))
        send(sys.stdout.buffer, answer)
    memory.end_children()


if __name__ == "__main__":
    serve()
