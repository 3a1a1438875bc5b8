"""The command: clean text in a pipe, JSON that parses, exit codes that mean something."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pagemerge
import pytest
from conftest import PAGE, page_of


def run(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pagemerge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout, "escape sequences in a pipe"
    return done


def test_help_and_version() -> None:
    assert "demo" in run("--help").stdout
    assert pagemerge.__version__ in run("--version").stdout


def test_installed_command() -> None:
    command = Path(sys.executable).parent / "pagemerge"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert pagemerge.__version__ in done.stdout


def test_demo_merges_and_checks_every_byte() -> None:
    done = run("demo", "--workers", "4", "--size", "8", "--json")
    result = json.loads(done.stdout)
    assert done.stderr == ""
    assert result["wrong_bytes"] == 0
    assert result["merged"] + result["zero"] > 4 * 0.85 * (8 << 20) / PAGE
    # Four workers have a tenth of their memory to themselves.
    assert 0.55 < result["bytes_saved"] / (4 * 8 << 20) < 0.85
    assert result["pss_before"] - result["pss_after"] > 0.8 * result["bytes_saved"]
    assert result["counters"]["pages_sharing"] > 0


def test_demo_as_text() -> None:
    done = run("demo", "--workers", "2", "--size", "4")
    for word in ("PSS", "frames", "CPU seconds", "pages_sharing", "every byte", "barrier"):
        assert word in done.stdout
    assert done.stderr == ""


def test_demo_beside_the_kernel() -> None:
    sysfs = Path("/sys/kernel/mm/ksm")
    if not os.access(sysfs / "run", os.W_OK):
        pytest.skip("needs root and a kernel with KSM")

    def knobs() -> dict[str, str]:
        names = ("run", "pages_to_scan", "sleep_millisecs", "use_zero_pages", "advisor_mode")
        with (Path(tempfile.gettempdir()) / "ksm.lock").open("w") as lock:
            # Whoever else measures ksmd has put everything back while nobody holds the lock.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return {name: (sysfs / name).read_text() for name in names if (sysfs / name).exists()}

    before = knobs()
    result = json.loads(run("demo", "--workers", "4", "--size", "8", "--kernel", "--json").stdout)
    rival = result["kernel"]
    assert rival["wrong_bytes"] == 0
    ours = result["counters"]["pages_sharing"] + result["zero"]
    theirs = rival["counters"]["pages_sharing"] + rival["counters"].get("ksm_zero_pages", 0)
    assert ours == theirs
    assert knobs() == before


def test_demo_that_does_not_fit() -> None:
    done = run("demo", "--size", "1000000", expect=1)
    assert "--size" in done.stderr
    assert done.stdout == ""


def test_wrong_usage() -> None:
    assert "Usage" in run("demo", "--workers", "0", expect=2).stderr
    assert "Usage" in run("evaluate", expect=2).stderr
    assert "Usage" in run("nothing", expect=2).stderr


def test_capabilities() -> None:
    found = json.loads(run("capabilities", "--json").stdout)
    assert found["barrier"] == pagemerge.capabilities().barrier
    text = run("capabilities").stdout
    assert "barrier" in text
    assert "max_map_count" in text


def test_evaluate_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"".join(page_of(tag) for tag in (1, 2, 1, 0, 5)) + b"end")
    two.write_bytes(b"".join(page_of(tag) for tag in (2, 7, 0)))
    result = json.loads(run("evaluate", one, two, "--json").stdout)
    assert result["pages"] == 8
    assert result["zero"] == 2
    assert result["bytes_saved"] == (2 + 1 + 1) * PAGE
    files = {Path(file["path"]).name: file for file in result["files"]}
    assert files["one"]["pages"] == 5
    assert files["one"]["zero"] == 1
    assert files["two"]["unique"] == 1
    text = run("evaluate", one, two).stdout
    assert "zero" in text
    assert "one" in text


def test_evaluate_directory(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(page_of(3) * 4)
    done = run("evaluate", tmp_path, expect=1)
    assert str(tmp_path) in done.stderr
    result = json.loads(run("evaluate", "--recursive", tmp_path, "--json").stdout)
    assert result["bytes_saved"] == 3 * PAGE


def test_evaluate_what_may_not_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = run("evaluate", missing, expect=1)
    assert str(missing) in done.stderr
    assert done.stdout == ""


def test_evaluate_page_size(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes((page_of(1) + page_of(2)) * 2 + page_of(1) * 2)
    small = json.loads(run("evaluate", file, "--json").stdout)
    large = json.loads(run("evaluate", file, "--page-size", str(2 * PAGE), "--json").stdout)
    assert small["bytes_saved"] == 4 * PAGE
    assert large["bytes_saved"] == 2 * PAGE
