"""Short runs of the torture programs that are Python's; `make torture` runs them longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("full_barrier")
@pytest.mark.parametrize(("name", "time"), [("torture_numpy.py", "20"), ("torture_store.py", "10")])
def test_nothing_is_lost_under_torture(name: str, time: str) -> None:
    seconds = os.environ.get("PAGEMERGE_TORTURE_SECONDS", time)
    program = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, str(program), "--seconds", seconds],
        capture_output=True,
        text=True,
        timeout=float(seconds) * 2 + 300,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
