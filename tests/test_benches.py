"""The benchmarks still run: small cases of them, whatever their figures are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ksm_kernel
import pytest

BENCHES = Path(__file__).parent.parent / "benches"
RIVALS = BENCHES / "rivals.py"


def _run(folder: Path, rivals: str) -> tuple[dict[str, Any], str]:
    figures = folder / "figures.json"
    command = [sys.executable, str(RIVALS), "--mib", "16", "--repeat", "1", "--json", str(figures)]
    done = subprocess.run(
        [*command, "--cases", "runs16,zero", "--rivals", rivals],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text()), done.stdout


def test_rivals_measures_and_reports(tmp_path: Path) -> None:
    measured, text = _run(tmp_path, "pagemerge,dict")
    for case in ("runs16", "zero"):
        [row] = measured["cases"][case]
        ours, found = row["pagemerge"], row["dict"]
        assert ours["pages"] == 4096
        assert ours["cpu"] > 0 < ours["wall"]
        assert ours["rest"]["passes"] >= 1 <= ours["changed"]["passes"]
        assert ours["verify"]["wrong"] == 0
        assert ours["saved_pages"] == ours["redundant"] > 1000
        # All zero pages are one entry of a dict, and none of the zero page's users is a first one.
        assert found["saved_pages"] == found["redundant"] - (case == "zero")
        assert f"{case} pagemerge" in text
        assert f"{case} at rest, pagemerge" in text


def test_rivals_measures_ksmd(tmp_path: Path) -> None:
    reason = ksm_kernel.why_not()
    if reason:
        pytest.skip(reason)
    measured, text = _run(tmp_path, "pagemerge,ksmd")
    if "ksmd" in measured["skipped"]:
        # As for the parity tests: where it counts, "not run" must not look like "passed".
        not_run = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        not_run(measured["skipped"]["ksmd"])
    for case in ("runs16", "zero"):
        [row] = measured["cases"][case]
        theirs = row["ksmd"]
        assert theirs["saved_pages"] == theirs["redundant"] == row["pagemerge"]["redundant"]
        assert theirs["cpu"] > 0 < theirs["rest_all"]["cpu"]
        assert theirs["verify"]["wrong"] == 0
        assert f"{case} ksmd" in text


def test_allocator_measures_and_reports(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    script = BENCHES / "allocator.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--repeat", "1", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())
    for rows in measured["sizes"].values():
        assert {"allocator", "allocator.numpy()", "numpy", "malloc"} <= set(rows)
        assert all(row["pair"] > 0 and row["used"] > 0 for [row] in rows.values())
    assert measured["trace"]["allocator"][0]["live"] == measured["trace"]["numpy"][0]["live"] > 0
    assert "65,536 allocator.numpy()" in done.stdout
    assert "held / live" in done.stdout


def test_store_measures_and_reports(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHES / "store.py"), "--mib", "1", "--repeat", "1"]
    done = subprocess.run(
        [*command, "--sizes", "1000,65536", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())
    for size in (1000, 65_536):
        for share in (0, 50, 100):
            for rival in ("dict", "dict+sha256", "dict+hash", "store"):
                row = measured["cases"][f"{size}/{share}/{rival}"]
                assert row["put_ns"] > 0 < row["get_ns"]
                assert row["logical_bytes"] == size * row["count"]
    held = measured["cases"]["1000/100/store"]["stats"]
    assert held["unique_bytes"] < 0.2 * held["logical_bytes"]
    ratios = measured["ratios"]
    assert ratios["duplicate_put_of_memcpy"] > 0 < ratios["unique_put_of_dict"]
    assert "of memcpy's speed" in done.stdout
    assert "diskcache" in measured["skipped"] or "1000/0/diskcache" in measured["cases"]


def test_cache_server_measures_and_reports(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHES / "cache_server.py"), "--quick", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())
    # memcached is beside it where it is installed.
    names = {"pagemerge", "memcached"} - set(measured["skipped"])
    for row in measured["rows"]:
        assert set(row["rivals"]) == names
        for [turn] in row["rivals"].values():
            assert turn["items"] == turn["values"] > 0
            assert min(turn[key] for key in ("set", "get", "alone_set", "alone_get")) > 0
        assert f"{row['size']:,} B {row['kind']}, pagemerge" in done.stdout
    [limited] = measured["held"]
    assert limited["pagemerge"]["full"]
    assert limited["pagemerge"]["held"] > 20_000
