"""evaluate(): what merging would do, and nothing done."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena, page_of, random_array


def test_figures_are_what_merging_gives() -> None:
    tags = [1, 1, 1, 2, 3, 0, 0, 3]
    arena = Arena(tags)
    found = pagemerge.evaluate(arena.map)
    assert (found.pages, found.present) == (8, 8)
    assert (found.merged, found.zero, found.frames) == (5, 2, 2)
    assert found.bytes_saved == (5 + 2 - 2) * PAGE
    with pagemerge.Engine() as engine:
        engine.register(arena.map)
        stats = engine.settle()
    assert stats.pages_shared == found.frames
    assert stats.pages_shared + stats.pages_sharing == found.merged
    assert stats.ksm_zero_pages == found.zero
    assert arena.tags() == tags


def test_nothing_is_changed() -> None:
    arenas = [Arena([1] * 2000), Arena([1] * 2000)]
    before = pagemerge.memory_usage()
    pagemerge.evaluate(*(arena.map for arena in arenas))
    after = pagemerge.memory_usage()
    assert after["pss"] >= before["pss"] - (1 << 20)
    assert after["pss_shmem"] == before["pss_shmem"]


def test_untouched_pages_are_not_read() -> None:
    untouched = np.empty(1 << 28, dtype=np.uint8)
    before = pagemerge.memory_usage()["rss"]
    found = pagemerge.evaluate(untouched)
    assert found.pages >= (1 << 28) // PAGE - 1
    assert found.present < 1000
    assert pagemerge.memory_usage()["rss"] - before < 64 << 20


def test_no_gain_is_reported_as_none() -> None:
    found = pagemerge.evaluate(random_array(100 * PAGE, 1), random_array(100 * PAGE, 2))
    assert (found.merged, found.frames, found.bytes_saved) == (0, 0, 0)


def test_shifted_copies_are_different() -> None:
    data = random_array(100 * PAGE, 1).tobytes()
    straight, shifted = Arena([0] * 100), Arena([0] * 101)
    straight.map[:] = data
    shifted.map[8 : 8 + len(data)] = data
    found = pagemerge.evaluate(straight.map, shifted.map)
    assert found.merged == 0


def test_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"".join(page_of(tag) for tag in (1, 2, 1, 0)) + b"rest")
    two.write_bytes(b"".join(page_of(tag) for tag in (2, 7)))
    found = pagemerge.evaluate(paths=[one, two])
    assert (found.pages, found.merged, found.zero, found.frames) == (6, 4, 1, 2)
    first, second = found.files
    assert (first.path, first.bytes, first.pages) == (str(one), 4 * PAGE + 4, 4)
    assert (first.zero, first.twin_within, first.twin_elsewhere, first.unique) == (1, 2, 1, 0)
    assert (second.zero, second.twin_within, second.twin_elsewhere, second.unique) == (0, 0, 1, 1)
    assert found.as_dict()["files"][1]["unique"] == 1


def test_sparse_file_larger_than_memory(tmp_path: Path) -> None:
    file = tmp_path / "image"
    with file.open("wb") as image:
        image.write(page_of(1))
        image.truncate(1 << 40)
        image.seek((1 << 40) - PAGE)
        image.write(page_of(1))
    found = pagemerge.evaluate(paths=[file], progress=lambda *_: None)
    assert found.pages == (1 << 40) // PAGE
    assert found.zero == found.pages - 2
    assert found.merged == 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(page_of(1) * 2)
    os.mkfifo(tmp_path / "pipe")
    for wrong, error in (
        (tmp_path / "missing", FileNotFoundError),
        (tmp_path, IsADirectoryError),
        (tmp_path / "pipe", OSError),
    ):
        with pytest.raises(error, match=str(wrong)):
            pagemerge.evaluate(paths=[good, wrong])
        found = pagemerge.evaluate(paths=[good, wrong], keep_going=True)
        assert list(found.left_out) == [str(wrong)]
        assert found.merged == 2


def test_file_that_may_not_be_read(
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    program(
        f"""
        import os, tempfile, pathlib, pagemerge
        with tempfile.TemporaryDirectory() as folder:
            secret = pathlib.Path(folder, "secret")
            secret.write_bytes(bytes({PAGE}))
            secret.chmod(0)
            os.chmod(folder, 0o755)
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may read everything
            try:
                pagemerge.evaluate(paths=[secret])
            except PermissionError as error:
                assert str(secret) in str(error), error
            else:
                raise AssertionError("it was read")
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
        """
    )


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="either"):
        pagemerge.evaluate(bytearray(PAGE), paths=[tmp_path])
    with pytest.raises(TypeError, match="has no buffer"):
        pagemerge.evaluate(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page_size"):
        pagemerge.evaluate(bytearray(PAGE), page_size=512)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="page_size"):
        pagemerge.evaluate(paths=[file], page_size=1000)


def test_progress_may_raise(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(random_array(8 << 20, 1).tobytes())

    class EnoughError(Exception):
        pass

    def progress(_done: int, _all: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        pagemerge.evaluate(paths=[file], progress=progress)
