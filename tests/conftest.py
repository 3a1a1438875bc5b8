"""What the tests have in common: memory to merge, and what must be there to run them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pagemerge
import pytest
from numpy.typing import NDArray

PAGE = pagemerge.PAGE_SIZE


def page_of(tag: int) -> bytes:
    """A page's content: tag 0 is all zero, and equal tags are equal pages."""
    return tag.to_bytes(8, "little") * (PAGE // 8)


def contents(tags: Iterable[int]) -> bytes:
    return b"".join(page_of(tag) for tag in tags)


class Arena:
    """Private anonymous memory that begins on a page, as C programs have it."""

    def __init__(self, tags: Iterable[int]) -> None:
        data = contents(tags)
        self.map = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map[:] = data
        self.pages = len(data) // PAGE

    def write(self, page: int, tag: int) -> None:
        self.map[page * PAGE : (page + 1) * PAGE] = page_of(tag)

    def tags(self) -> list[int]:
        """The tag of each page, after checking that the page is nothing else."""
        found = []
        for at in range(0, len(self.map), PAGE):
            tag = int.from_bytes(self.map[at : at + 8], "little")
            assert self.map[at : at + PAGE] == page_of(tag), f"page {at // PAGE} is torn"
            found.append(tag)
        return found


@pytest.fixture
def engine() -> Iterator[pagemerge.Engine]:
    with pagemerge.Engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def full_barrier() -> None:
    """For tests that write while pages are merged, or merge in the background."""
    found = pagemerge.capabilities()
    if found.barrier != pagemerge.Barrier.FULL:
        why = f"needs the full barrier: {found.reasons}"
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of its own, which must end as said."""

    def run(
        text: str, *, expect: int | None = 0, seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if expect is not None:
            assert done.returncode == expect, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def random_array(bytes_: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, bytes_, dtype=np.uint8)
