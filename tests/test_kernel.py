"""`pagemerge.kernel`: what it reads is what the kernel shows, what it sets takes effect, and what
the kernel refuses has the class of error that an engine's settings have.

The machine's KSM is borrowed: a lock file keeps other tests out, and all values are put back.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ksm_kernel
import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena
from ksm_kernel import Ksm
from pagemerge import AdvisorMode, BusyError, RunMode, UnavailableError, kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="this kernel has no KSM")


@pytest.fixture
def ksm() -> Iterator[Ksm]:
    yield from ksm_kernel.borrowed(pytest.skip, pytest.fail)


def shown(name: str) -> str:
    return (Path("/sys/kernel/mm/ksm") / name).read_text(encoding="ascii").strip()


def command(*words: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
    drop = ["setpriv", "--reuid", user, "--clear-groups"] if user else []
    return subprocess.run(
        [*drop, sys.executable, "-m", "pagemerge", "kernel", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, kernel.stats()
        time.sleep(0.02)


def test_settings_are_those_of_sysfs_and_of_an_engine() -> None:
    found = kernel.settings.as_dict()
    ours = pagemerge.kernel_defaults()
    for name, value in found.items():
        assert name in ours, "an engine's settings have the same names"
        assert type(value) is type(ours[name])
        if name == "advisor_mode":
            assert f"[{value}]" in shown(name)
        else:
            assert str(int(value)) == shown(name)
    assert int(kernel.run()) == int(shown("run"))
    assert "pages_to_scan" in dir(kernel.settings)
    assert f"pages_to_scan={found['pages_to_scan']}" in repr(kernel.settings)


def test_counters_are_those_of_sysfs() -> None:
    stats = kernel.stats()
    for name in ("pages_shared", "pages_sharing", "stable_node_dups", "pages_scanned"):
        assert stats[name] == getattr(stats, name) == int(shown(name))
    assert set(stats) == {name for name in stats._names() if (kernel.SYSFS / name).exists()}
    with pytest.raises(KeyError):
        stats["bytes_saved"]


@pytest.mark.usefixtures("ksm")
def test_settings_take_effect_and_are_refused_by_name() -> None:
    settings = kernel.settings
    settings.advisor_mode = "none"
    settings.pages_to_scan = np.int64(4321)
    settings.smart_scan = False
    assert (shown("pages_to_scan"), shown("smart_scan")) == ("4321", "0")
    settings.update({"pages_to_scan": 1234, "advisor_mode": "scan-time", "use_zero_pages": 1})
    assert settings.advisor_mode is AdvisorMode.SCAN_TIME
    assert settings.use_zero_pages is True
    with pytest.raises(ValueError, match="set advisor_mode to none first"):
        settings.pages_to_scan = 5
    # The other way round goes, too, whatever the order of the names.
    settings.update({"pages_to_scan": 99, "advisor_mode": "none"})
    assert settings.pages_to_scan == 99

    before = settings.as_dict()
    for name, value, error in [
        ("max_page_sharing", 1, ValueError),
        ("pages_to_scan", -1, ValueError),
        ("pages_to_scan", 1 << 40, ValueError),
        ("pages_to_scan", "many", TypeError),
        ("smart_scan", 2, ValueError),
        ("advisor_mode", "never", ValueError),
        ("pages_to_scam", 1, AttributeError),
    ]:
        with pytest.raises(error, match=None if error is ValueError else name):
            setattr(settings, name, value)
        with pytest.raises(error):
            # Nothing is set where one is wrong on its face; the kernel's own refusals come later.
            settings.update({"sleep_millisecs": before["sleep_millisecs"], name: value})
    assert settings.as_dict() == before
    with pytest.raises(AttributeError, match="tree_order"):
        _ = settings.tree_order
    with pytest.raises(ValueError, match="3"):
        kernel.set_run(3)


@pytest.mark.usefixtures("ksm")
def test_memory_given_to_ksmd_merges_and_is_taken_back() -> None:
    arena = Arena([7] * 64 + list(range(100, 164)))
    assert kernel.madvise(arena.map) == 128
    assert kernel.process().ksm_mergeable == 1
    kernel.settings.update({"advisor_mode": "none", "pages_to_scan": 10_000, "sleep_millisecs": 0})
    kernel.set_run(RunMode.MERGE)
    assert kernel.run() is RunMode.MERGE
    wait_for(lambda: kernel.stats().pages_sharing == 63)
    stats, mine = kernel.stats(), kernel.process(os.getpid())
    assert stats.pages_shared == 1
    assert stats.bytes_saved == 63 * PAGE
    assert mine.ksm_merging_pages == 64
    assert mine.ksm_bytes == 64 * PAGE
    with pytest.raises(BusyError, match="run = 2") as busy:
        kernel.settings.max_page_sharing = 100
    assert busy.value.errno == errno.EBUSY

    broken = kernel.cow_broken()
    arena.write(3, 8)
    assert broken is not None
    after = kernel.cow_broken()
    assert after is not None
    assert after > broken
    assert kernel.madvise(arena.map, mergeable=False) == 128
    # Un-merged at once; the kernel forgets it when it comes by.
    assert kernel.process().ksm_bytes == 0
    wait_for(lambda: kernel.process().ksm_merging_pages == 0)
    kernel.set_run(0)
    assert arena.tags() == [7] * 3 + [8] + [7] * 60 + list(range(100, 164))


def test_what_cannot_be_given_to_ksmd_says_why() -> None:
    with pytest.raises(ValueError, match="no whole page"):
        kernel.madvise(bytearray(100))
    with pytest.raises(TypeError, match="no buffer"):
        kernel.madvise(3)  # type: ignore[arg-type]


def test_all_memory_of_a_program_and_of_what_it_starts(
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = program(
        """
        import os, subprocess, sys
        from pagemerge import kernel
        assert not kernel.merges_any()
        kernel.merge_any()
        assert kernel.merges_any() and kernel.process().ksm_merge_any == 1
        child = os.fork()
        if not child:
            os._exit(0 if kernel.merges_any() else 9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        kernel.merge_any(False)
        assert not kernel.merges_any()
        """
    )
    assert done.stderr == ""


def test_processes_that_are_not_there_or_not_ours() -> None:
    with pytest.raises(ProcessLookupError, match="4194305"):
        kernel.process(4194305)
    done = command("status", "--pid", "1", user="65534")
    if done.returncode:
        assert "another user's" in done.stderr


def test_command_shows_sets_and_starts(ksm: Ksm) -> None:
    del ksm
    done = command("status", "--json", "--pid", str(os.getpid()))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["settings"]["run"] == int(shown("run"))
    assert figures["counters"]["pages_shared"] == 0
    assert "ksm_merging_pages" in figures["process"]
    assert "pages_to_scan" in command("status").stdout

    done = command("set", "pages_to_scan=777", "advisor_mode=none", "run=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert shown("pages_to_scan") == "777"
    for words, why in [
        (["pages_to_scan"], "NAME=VALUE"),
        (["pages_to_scan=x"], "must be a number"),
        (["nothing=1"], "no setting 'nothing'"),
        (["max_page_sharing=1"], "does not take 1 for max_page_sharing"),
    ]:
        done = command("set", *words)
        assert done.returncode == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr

    done = command("run", "--", "sh", "-c", "cat /proc/self/ksm_stat; exit 3")
    assert done.returncode == 3, "the exit code is the program's"
    assert "ksm_merge_any: yes" in done.stdout
    assert "ksmd does not run" in done.stderr
    done = command("run", "no such program")
    assert done.returncode == 1
    assert "there is no such program" in done.stderr


def test_without_privilege_everything_can_be_read_and_nothing_set() -> None:
    if os.geteuid():
        pytest.skip("needs root to drop it")
    assert command("status", user="65534").returncode == 0
    done = command("set", "run=0", user="65534")
    assert done.returncode == 1
    assert "by root only" in done.stderr


def test_a_kernel_without_ksm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "SYSFS", tmp_path / "none")
    assert not kernel.available()
    for ask in (
        kernel.stats,
        kernel.run,
        kernel.settings.as_dict,
        lambda: kernel.settings.smart_scan,
        lambda: kernel.set_run(1),
    ):
        with pytest.raises(UnavailableError, match="has no KSM") as error:
            ask()
        assert error.value.errno == errno.EOPNOTSUPP
    (tmp_path / "none").mkdir()
    with pytest.raises(UnavailableError, match="too old"):
        _ = kernel.settings.advisor_mode
