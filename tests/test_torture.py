"""A short run of the torture program's Python half; `make torture` runs it longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("full_barrier")
def test_nothing_is_lost_under_torture() -> None:
    seconds = os.environ.get("PAGEMERGE_TORTURE_SECONDS", "20")
    program = Path(__file__).with_name("torture_numpy.py")
    done = subprocess.run(
        [sys.executable, str(program), "--seconds", seconds],
        capture_output=True,
        text=True,
        timeout=float(seconds) * 2 + 300,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
