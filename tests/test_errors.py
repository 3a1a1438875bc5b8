"""Every wrong use gets a clear error, and nothing is lost by it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena
from pagemerge import Engine

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_not_a_buffer(engine: Engine) -> None:
    for wrong in (3, "text", None, object(), [1, 2]):
        with pytest.raises(TypeError, match="has no buffer"):
            engine.register(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="has no buffer"):
            pagemerge.merge(wrong)  # type: ignore[arg-type]


def test_not_contiguous(engine: Engine) -> None:
    matrix = np.ones((1000, 1000))
    for wrong in (matrix[:, ::2], matrix[::2], memoryview(bytearray(9 * PAGE))[::2]):
        with pytest.raises(ValueError, match="one piece") as raised:
            engine.register(wrong)
        assert isinstance(raised.value.__cause__, BufferError)


def test_smaller_than_a_page(engine: Engine) -> None:
    for size in (0, 1, PAGE - 1):
        with pytest.raises(ValueError, match="no whole page"):
            engine.register(bytearray(size))
    arena = Arena([1, 2])
    with pytest.raises(ValueError, match="no whole page"):
        engine.register(memoryview(arena.map)[1:-1])


def test_registered_twice(engine: Engine) -> None:
    arena = Arena([1, 1])
    engine.register(arena.map)
    with pytest.raises(ValueError, match="already"):
        engine.register(arena.map)
    with Engine() as other, pytest.raises(ValueError, match="already"):
        other.register(arena.map)
    assert engine.settle().pages_sharing == 1
    assert arena.tags() == [1, 1]


def test_overlapping(engine: Engine) -> None:
    arena = Arena([1, 2, 3, 4])
    whole = memoryview(arena.map)
    engine.register(whole[: 2 * PAGE])
    with pytest.raises(ValueError, match="already"):
        engine.register(whole[PAGE : 3 * PAGE])
    engine.register(whole[2 * PAGE :])


def test_shared_memory(engine: Engine) -> None:
    shared = mmap.mmap(-1, 4 * PAGE)
    with pytest.raises(pagemerge.NotMergeableError, match="shared") as raised:
        engine.register(shared)
    assert raised.value.reason == "shared_mapping"
    assert isinstance(raised.value, ValueError)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (again.reason, str(again)) == (raised.value.reason, str(raised.value))
    shared.close()


def test_file_memory(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * 4 * PAGE)
    mapped = np.memmap(file, dtype=np.uint8, mode="c")
    with pytest.raises(pagemerge.NotMergeableError) as raised:
        engine.register(mapped)
    assert raised.value.reason == "file_backed"


def test_read_only_memory(engine: Engine) -> None:
    mapped = mmap.mmap(
        -1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
    )
    with pytest.raises(pagemerge.NotMergeableError) as raised:
        engine.register(mapped)
    assert raised.value.reason == "read_only"


def test_use_after_close() -> None:
    arena = Arena([1, 1])
    engine = Engine()
    region = engine.register(arena.map)
    settings = engine.settings
    engine.close()
    uses: list[Callable[[], Any]] = [
        lambda: engine.register(arena.map),
        lambda: engine.unregister(region),
        lambda: engine.discard(arena.map),
        engine.scan,
        engine.settle,
        engine.start,
        engine.stop,
        lambda: engine.run,
        lambda: setattr(engine, "run", 1),
        engine.stats,
        engine.trace,
        region.stats,
        lambda: settings.pages_to_scan,
        lambda: setattr(settings, "sleep_millisecs", 5),
    ]
    for use in uses:
        with pytest.raises(pagemerge.ClosedError, match="closed"):
            use()
    assert arena.tags() == [1, 1]


def test_failed_registration_lets_the_buffer_go(engine: Engine) -> None:
    buffer = bytearray(10)
    with pytest.raises(ValueError, match="no whole page"):
        engine.register(buffer)
    buffer.clear()


def test_region_of_another_engine(engine: Engine) -> None:
    arena = Arena([1, 1])
    with Engine() as other:
        region = other.register(arena.map)
        with pytest.raises(ValueError, match="not registered with this engine"):
            engine.unregister(region)
        assert region.registered


def test_unregister_twice(engine: Engine) -> None:
    region = engine.register(Arena([1, 1]).map)
    engine.unregister(region)
    with pytest.raises(ValueError, match="not registered"):
        engine.unregister(region)
    with pytest.raises(ValueError, match="not registered"):
        region.stats()


def test_discard_of_what_is_not_registered(engine: Engine) -> None:
    arena = Arena([1, 2, 3])
    with pytest.raises(ValueError, match="discard"):
        engine.discard(arena.map)
    engine.register(memoryview(arena.map)[: 2 * PAGE])
    with pytest.raises(ValueError, match="discard"):
        engine.discard(arena.map)
    assert arena.tags() == [1, 2, 3]


def test_discard_of_a_read_only_buffer(engine: Engine) -> None:
    data = b"x" * (4 * PAGE)
    engine.register(data)
    with pytest.raises(ValueError, match="read-only"):
        engine.discard(data)
    assert data == b"x" * (4 * PAGE)


def test_discard_of_locked_pages(engine: Engine) -> None:
    # The merged pages were thrown away before the locked ones were found, though the error said
    # that nothing was.
    arena = Arena([1, 1, 1, 1, 5, 6])
    engine.register(arena.map)
    engine.settle()
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.addressof(ctypes.c_char.from_buffer(arena.map))
    locked = ctypes.c_void_p(first + 4 * PAGE), ctypes.c_size_t(PAGE)
    assert libc.mlock(*locked) == 0, os.strerror(ctypes.get_errno())
    with pytest.raises(OSError, match=r"1 of them are mlocked .* nothing was discarded") as caught:
        engine.discard(arena.map)
    assert caught.value.errno == errno.EINVAL
    assert arena.tags() == [1, 1, 1, 1, 5, 6]
    assert libc.munlock(*locked) == 0
    engine.discard(arena.map)
    assert arena.tags() == [0] * 6


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("pages_to_scan", -1, ValueError),
        ("pages_to_scan", 2**32, ValueError),
        ("pages_to_scan", "100", TypeError),
        ("pages_to_scan", 1.5, TypeError),
        ("sleep_millisecs", 2**32, ValueError),
        ("max_page_sharing", 1, ValueError),
        ("max_page_sharing", 2**31, ValueError),
        ("max_page_sharing", 2**40, ValueError),
        ("merge_across_nodes", 2, ValueError),
        ("smart_scan", "yes", TypeError),
        ("use_zero_pages", None, TypeError),
        ("advisor_mode", "Scan-Time", ValueError),
        ("advisor_mode", 1, TypeError),
        ("advisor_target_scan_time", 0, ValueError),
        ("advisor_max_pages_to_scan", 2**64, ValueError),
        ("stable_node_chains_prune_millisecs", -5, ValueError),
        ("tree_order", "bytes", ValueError),
        ("barrier", "half", ValueError),
        ("remerge", "sometimes", ValueError),
        ("quiet_millisecs", 0, ValueError),
        ("max_pause_micros", 0, ValueError),
        ("thp_min_duplicates", 0, ValueError),
        ("reserved_mappings", -1, ValueError),
        ("threads", 0, ValueError),
        ("zero_only", "yes", TypeError),
    ],
)
def test_setting_out_of_range(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        Engine(**{name: value})
    with Engine(advisor_mode="none") as engine:
        before = engine.settings.as_dict()
        with pytest.raises(error, match=name):
            setattr(engine.settings, name, value)
        assert engine.settings.as_dict() == before


def test_limits_of_the_ranges_are_inside_them() -> None:
    with Engine(pages_to_scan=2**32 - 1, max_page_sharing=2**31 - 1, sleep_millisecs=0) as engine:
        assert engine.settings.max_page_sharing == 2**31 - 1
        engine.settings.pages_to_scan = 0
        engine.settings.max_page_sharing = 2


def test_unknown_setting_names_what_is_near() -> None:
    with pytest.raises(ValueError, match="did you mean pages_to_scan"):
        Engine(page_to_scan=5)
    with pytest.raises(ValueError, match="there are: pages_to_scan, "):
        Engine(xyzzy=5)
    with Engine() as engine, pytest.raises(AttributeError):
        engine.settings.pagestoscan = 5  # type: ignore[attr-defined]


def test_pages_to_scan_is_the_advisors(engine: Engine) -> None:
    with pytest.raises(ValueError, match="pages_to_scan"):
        engine.settings.pages_to_scan = 4000
    engine.settings.advisor_mode = "none"
    engine.settings.pages_to_scan = 4000


def test_zero_only_without_zero_pages() -> None:
    both = "zero_only must be off while use_zero_pages is off"
    with pytest.raises(ValueError, match=both):
        Engine(zero_only=True, use_zero_pages=False)
    with pytest.raises(ValueError, match=both):
        Engine(**pagemerge.kernel_defaults() | {"zero_only": True})
    with Engine(zero_only=True) as engine:
        with pytest.raises(ValueError, match=both):
            engine.settings.use_zero_pages = False
        assert engine.settings.use_zero_pages


def test_exclude_of_what_is_not_in_the_buffer(engine: Engine) -> None:
    arena, other = Arena([1] * 4), Arena([1] * 4)
    region = engine.register(arena.map)
    engine.register(other.map)
    for wrong in (other.map, np.frombuffer(arena.map, np.uint8).copy(), b"secret"):
        with pytest.raises(ValueError, match="not all of them lie in the buffer"):
            region.exclude(wrong)
    with pytest.raises(ValueError, match="do not lie in one piece"):
        region.exclude(np.frombuffer(arena.map, np.uint8)[::2])
    with pytest.raises(TypeError, match="has no buffer"):
        region.exclude(7)  # type: ignore[arg-type]
    assert counts_of(engine) == (1, 7)
    region.close()
    with pytest.raises(ValueError, match="not registered"):
        region.exclude(arena.map)


def counts_of(engine: Engine) -> tuple[int, int]:
    stats = engine.settle()
    return stats.pages_shared, stats.pages_sharing


def test_settings_that_are_busy() -> None:
    arena = Arena([1, 1])
    with Engine() as engine:
        engine.register(arena.map)
        engine.settle()
        busy = ("max_page_sharing", 5), ("merge_across_nodes", False), ("zero_only", True)
        for name, value in busy:
            with pytest.raises(pagemerge.BusyError, match=name) as raised:
                setattr(engine.settings, name, value)
            assert raised.value.errno == errno.EBUSY
            assert isinstance(raised.value, OSError)
        engine.settings.max_page_sharing = 256
        engine.run = 2
        engine.settings.max_page_sharing = 5
        assert engine.settings.max_page_sharing == 5


def test_run_out_of_range(engine: Engine) -> None:
    for wrong in (3, -1, 1000):
        with pytest.raises(ValueError, match="run must be"):
            engine.run = wrong
    with pytest.raises(TypeError, match="run must be"):
        engine.run = "1"  # type: ignore[assignment]


def test_no_userfaultfd(program: Program) -> None:
    """What an unprivileged process in a container sees."""
    program(
        """
        import os
        os.environ["PAGEMERGE_PRETEND"] = "no-uffd"
        import pagemerge

        found = pagemerge.capabilities()
        assert found.barrier == "none", found
        assert any("userfaultfd" in why for why in found.reasons.values()), found.reasons
        try:
            pagemerge.Engine(barrier="full")
        except pagemerge.UnavailableError as error:
            assert error.errno and "full" in str(error), error
        else:
            raise AssertionError("a barrier that is not there was promised")
        buffer = bytearray(b"x" * 400_000)
        with pagemerge.Engine() as engine:
            engine.register(buffer)
            try:
                engine.start()
            except pagemerge.UnavailableError as error:
                assert "background" in str(error), error
            else:
                raise AssertionError("merging in the background without a barrier")
            assert engine.settle().pages_sharing > 90
        assert buffer == b"x" * 400_000
        """
    )


def test_mapping_limit_is_a_named_reason() -> None:
    # Every second page is one of a kind, so that no two mergeable pages are neighbours.
    tags = [tag for number in range(400) for tag in (7, 1000 + number)]
    arena = Arena(tags)
    limit = pagemerge.capabilities().max_map_count
    used = len(Path("/proc/self/maps").read_text().splitlines())
    with Engine(
        reserved_mappings=limit - used - 200, use_zero_pages=False, smart_scan=False
    ) as engine:
        engine.register(arena.map)
        stats = engine.settle()
        assert stats.skipped["mapping_budget"] > 0
        assert 0 < stats.pages_sharing < 399
        assert arena.tags() == tags


def test_file_size_limit_is_refused_before_it_kills() -> None:
    """A memfd that grows beyond RLIMIT_FSIZE would end the program by SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(pagemerge.UnavailableError, match="RLIMIT_FSIZE") as raised:
            Engine()
        assert raised.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
