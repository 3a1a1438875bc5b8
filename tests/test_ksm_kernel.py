"""The driver of the kernel's ksmd: it steps exactly, counts as recorded, and leaves no trace.

The golden rows were recorded by another program on one kernel (their file says which). Where this
driver and they agree, neither of them has a trap of stepping in it. A difference on another kernel
would be a finding about that kernel: the parity tests compare with the live one, not with them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ksm_kernel
import pytest
from ksm_kernel import Ksm, UnavailableError, Worker, knobs, put_back, read, write
from parity_layouts import GOLDEN, ONES, KsmdSide, golden, play, recorded


@pytest.fixture
def ksm() -> Iterator[Ksm]:
    yield from ksm_kernel.borrowed(pytest.skip, pytest.fail)


# ------------------------------------------------------------------------------- the golden rows

#: The fork cases have a test of their own: a layout has no fork.
FORKED = {
    "j_fork_child_of_merged": (ONES, {"max_page_sharing": 4}),
    "j_fork_child_of_zero": ((0,) * 10, {"use_zero_pages": 1}),
    "j_fork_child_of_unique": (tuple(range(1, 9)), {}),
}
#: Rows that this driver does not produce, and why.
LEFT_OUT = {
    "l_mremap_moves_6_merged_4_zero": "an engine's region does not move",
    "p_batches_of_30_over_100_unique": "rows of batches; the driver steps full passes",
    "p_batches_of_50_over_100_unique": "rows of batches; the driver steps full passes",
    "q_thp_512_identical": "huge pages are switched off, so that passes are deterministic",
    "q_thp_512_unique": "huge pages are switched off",
    "q_thp_512_zero_use0": "huge pages are switched off",
    "q_thp_512_zero_use1": "huge pages are switched off",
}


def test_golden_cases_are_all_accounted_for() -> None:
    for smart in (0, 1):
        assert set(recorded(smart)) == set(GOLDEN) | set(FORKED) | set(LEFT_OUT)


@pytest.mark.parametrize("smart", [0, 1])
def test_ksmd_gives_the_golden_rows(ksm: Ksm, smart: int) -> None:
    side = KsmdSide(ksm)
    for layout, rows in golden(smart):
        played = [[row[c] for c in ksm_kernel.COUNTERS] for row in play(layout, side).rows]
        assert played == rows, layout.label


@pytest.mark.parametrize("smart", [0, 1])
@pytest.mark.parametrize("name", FORKED)
def test_ksmd_gives_the_golden_rows_after_a_fork(ksm: Ksm, name: str, smart: int) -> None:
    tags, settings = FORKED[name]
    expected = recorded(smart)[name]["rows"]
    ksm.begin(smart_scan=smart, **settings)
    worker = ksm.worker()
    worker.map(tags)
    worker.mergeable(0, len(tags))
    rows = [ksm.scan() for _ in range(3)]
    worker.fork()
    rows += [ksm.scan() for _ in range(len(expected) - 3)]
    assert [[row[c] for c in ksm_kernel.COUNTERS] for row in rows] == expected


def test_ending_a_forked_worker_ends_its_child(ksm: Ksm) -> None:
    """A child that outlived its worker kept pages merged, and settings could not be put back."""
    for limit in (3, 4) * 5:
        ksm.begin(max_page_sharing=limit, smart_scan=0)
        worker = ksm.worker()
        worker.map((1,) * 3000)
        worker.mergeable(0, 3000)
        ksm.scan()
        assert ksm.scan()["pages_shared"] == 3000 // limit
        child = worker.fork()
        worker.exit()
        assert not Path(f"/proc/{child}").exists()


# ----------------------------------------------------------------------------------- the stepping


def test_scan_makes_exactly_one_pass_each_time(ksm: Ksm) -> None:
    worker = ksm.worker()
    worker.map((1, 2, 3))
    worker.mergeable(0, 3)
    before = int(read("full_scans"))
    for done in range(1, 301):
        assert ksm.scan()["full_scans"] == done
        assert int(read("full_scans")) == before + done


def test_registering_between_passes_starts_none(ksm: Ksm) -> None:
    """With `run=1` the first registration would wake ksmd, and it makes a pass on its own."""
    ksm.scan()
    for _ in range(20):
        worker = ksm.worker()
        worker.map((1, 1))
        before = ksm.counters()
        worker.mergeable(0, 2)
        time.sleep(0.005)
        assert ksm.counters() == before


def test_passes_go_on_when_nothing_is_registered(ksm: Ksm) -> None:
    """Without the guard's page the list of address spaces would be empty, and ksmd would wait."""
    worker = ksm.worker()
    worker.map((1, 1))
    worker.mergeable(0, 2)
    assert ksm.scan()["pages_volatile"] == 2
    worker.exit()
    rows = [ksm.scan() for _ in range(3)]
    assert [row["full_scans"] for row in rows] == [2, 3, 4]
    assert all(row[name] == 0 for row in rows for name in ksm_kernel.STATE)


def test_unmerge_all_keeps_memory_registered_and_the_count_of_passes(ksm: Ksm) -> None:
    worker = ksm.worker()
    worker.map((1,) * 4)
    worker.mergeable(0, 4)
    assert [ksm.scan() for _ in range(2)][-1]["pages_sharing"] == 3
    after = ksm.unmerge_all()
    assert (after["pages_shared"], after["pages_sharing"], after["full_scans"]) == (0, 0, 2)
    rows = [ksm.scan() for _ in range(2)]
    assert (rows[-1]["pages_sharing"], rows[-1]["full_scans"]) == (3, 4)
    assert worker.wrong(0, (1,) * 4) == []


def test_worker_finds_a_page_that_reads_wrong(ksm: Ksm) -> None:
    """The check behind "every byte reads back" must be able to fail."""
    worker = ksm.worker()
    worker.map((1, None, -2, 0))
    assert worker.wrong(0, (1, None, -2, 0)) == []
    assert worker.wrong(0, (1, 3, -1, 0)) == [1, 2]
    assert worker.wrong(0, (2, 3, -2, 1)) == [0, 1, 3]


def test_a_refused_setting_has_the_kernels_errno(ksm: Ksm) -> None:
    with pytest.raises(OSError, match="max_page_sharing to 1") as refusal:
        ksm.set("max_page_sharing", 1)
    assert refusal.value.errno == errno.EINVAL
    worker = ksm.worker()
    worker.map((1, 1))
    worker.mergeable(0, 2)
    ksm.scan()
    ksm.scan()
    with pytest.raises(OSError, match="max_page_sharing to 7") as refusal:
        ksm.set("max_page_sharing", 7)
    assert refusal.value.errno == errno.EBUSY


# ------------------------------------------------------------------------- borrowed and given back


@pytest.fixture
def odd_settings() -> Iterator[dict[str, str]]:
    """The machine with settings that are nobody's defaults, among them the scan-time advisor's."""
    for _ in ksm_kernel.borrowed(pytest.skip, pytest.fail):
        pass  # it can be borrowed at all, or this is a skip
    before = knobs()
    odd = {
        **before,
        "sleep_millisecs": "37",
        "smart_scan": str(1 - int(before["smart_scan"])),
        "use_zero_pages": str(1 - int(before["use_zero_pages"])),
        "max_page_sharing": "77",
        "stable_node_chains_prune_millisecs": "1234",
        "pages_to_scan": "321",
        "run": "0",
    }
    if "advisor_mode" in before:
        odd |= {
            "advisor_mode": "scan-time",
            "advisor_min_pages_to_scan": "400",
            "advisor_max_pages_to_scan": "4000",
            "advisor_max_cpu": "33",
            "advisor_target_scan_time": "44",
        }
    with _locked():
        put_back(odd)
    try:
        assert knobs() == odd
        yield odd
    finally:
        with _locked():
            put_back(before)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Waits until nobody has a session, and keeps sessions out."""
    with ksm_kernel.LOCK.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _disturb(ksm: Ksm) -> None:
    ksm.begin(max_page_sharing=3, use_zero_pages=1, smart_scan=0)
    worker = ksm.worker()
    worker.map((1,) * 30)
    worker.mergeable(0, 30)
    assert [ksm.scan() for _ in range(2)][-1]["pages_sharing"] == 20


def test_settings_are_put_back_at_the_end(odd_settings: dict[str, str]) -> None:
    with Ksm() as ksm:
        _disturb(ksm)
        assert knobs() != odd_settings
    assert knobs() == odd_settings
    assert all(read(name) == "0" for name in ksm_kernel.STATE)


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt, SystemExit])
def test_settings_are_put_back_after_an_error(
    odd_settings: dict[str, str], error: type[BaseException]
) -> None:
    def fail_in_session() -> None:
        with Ksm() as ksm:
            _disturb(ksm)
            raise error

    with pytest.raises(error):
        fail_in_session()
    assert knobs() == odd_settings


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from ksm_kernel import Ksm
with Ksm() as ksm:
    ksm.begin(max_page_sharing=3)
    worker = ksm.worker()
    worker.map((1,) * 30)
    worker.mergeable(0, 30)
    ksm.scan()
    ksm.scan()
    worker.fork()
    print("merging", flush=True)
    while True:
        ksm.scan()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_settings_are_put_back_when_the_driver_is_killed(
    odd_settings: dict[str, str], number: signal.Signals
) -> None:
    """No handler runs at SIGKILL: the guard puts the values back, under the same lock."""
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the traceback of KeyboardInterrupt
    )
    assert driver.stdout
    assert driver.stdout.readline() == b"merging\n"
    assert knobs() != odd_settings
    driver.send_signal(number)
    driver.wait(timeout=60)
    driver.stdout.close()
    with _locked():
        assert knobs() == odd_settings
        assert all(read(name) == "0" for name in ksm_kernel.STATE)


def test_running_ksm_is_refused_and_left_alone(odd_settings: dict[str, str]) -> None:
    running = {**odd_settings, "run": "1"}
    with _locked():
        write("run", 1)
    with pytest.raises(UnavailableError, match="run=1"), Ksm():
        pass
    with _locked():
        assert knobs() == running


def test_merged_memory_of_others_is_refused_and_left_alone(odd_settings: dict[str, str]) -> None:
    with _locked():
        worker = Worker()
        try:
            worker.map((1,) * 5)
            worker.mergeable(0, 5)
            write("run", 1)
            deadline = time.monotonic() + 60
            while read("pages_sharing") != "4":
                assert time.monotonic() < deadline, "ksmd did not merge five equal pages"
                time.sleep(0.01)
            write("run", 0)
        except BaseException:
            worker.exit()
            raise
    try:
        with pytest.raises(UnavailableError, match="pages_sharing"), Ksm():
            pass
        assert (read("pages_shared"), read("pages_sharing")) == ("1", "4")
        # The advisor may have set pages_to_scan meanwhile, as it does for anybody.
        now = knobs()
        assert {**now, "pages_to_scan": ""} == {**odd_settings, "pages_to_scan": ""}
    finally:
        worker.exit()


def test_mergeable_memory_of_others_is_refused(odd_settings: dict[str, str]) -> None:
    """It has no counters while ksmd stands still, but its pages would be in all of ours."""
    worker = Worker()
    try:
        worker.map((1,) * 5)
        worker.mergeable(0, 5)
        with pytest.raises(UnavailableError, match="somebody else"), Ksm():
            pass
        assert worker.wrong(0, (1,) * 5) == []
        assert knobs() == odd_settings
    finally:
        worker.exit()


def test_two_sessions_exclude_each_other(ksm: Ksm) -> None:
    with pytest.raises(UnavailableError, match=r"ksm\.lock"), Ksm(lock_seconds=0.1):
        pass
    assert ksm.scan()["full_scans"] == 1  # the one that was there goes on


def test_without_the_means_a_session_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ksm_kernel, "KSM", Path("/nowhere"))
    with pytest.raises(UnavailableError, match="CONFIG_KSM"), Ksm():
        pass
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if ksm_kernel.KSM.is_dir():
        with pytest.raises(UnavailableError, match="root"), Ksm():
            pass


def test_a_skip_is_a_failure_in_ci_when_ksm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class SkippedError(Exception):
        pass

    class FailedError(Exception):
        pass

    def skip(reason: str) -> None:
        raise SkippedError(reason)

    def fail(reason: str) -> None:
        raise FailedError(reason)

    def refuse(_: Ksm) -> Ksm:
        raise UnavailableError("in use")

    monkeypatch.setattr(Ksm, "__enter__", refuse)
    monkeypatch.setattr(ksm_kernel, "why_not", lambda: None)
    for value, outcome in (("true", FailedError), ("", SkippedError)):
        monkeypatch.setenv("CI", value)
        with pytest.raises(outcome, match="in use"):
            next(ksm_kernel.borrowed(skip, fail))  # type: ignore[arg-type]
    monkeypatch.setattr(ksm_kernel, "why_not", lambda: "no KSM")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SkippedError, match="no KSM"):
        next(ksm_kernel.borrowed(skip, fail))  # type: ignore[arg-type]
