"""Settings, set in ways that bytes describe.

The checks are those of the fuzz target ``settings`` (``fuzz/settings_driver.py``), which runs them
for hours with instrumented bindings; here they run with the module as it is built.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).parent.parent / "fuzz"
sys.path.insert(0, str(FUZZ))

import settings_driver  # noqa: E402

INPUTS = sorted((FUZZ / "corpus" / "settings").iterdir())


def test_there_are_inputs() -> None:
    assert INPUTS


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name[:8])
def test_inputs_that_the_fuzzer_has_met(path: Path) -> None:
    settings_driver.run(path.read_bytes())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    settings_driver.run(data)
