"""What the documentation shows is what happens."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pagemerge
import pytest

ROOT = Path(__file__).parents[1]
STUB = ROOT / "python" / "pagemerge" / "_core.pyi"


def stub_docstrings() -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(STUB.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                found.append((node.name, text))
    return found


def check(name: str, text: str) -> None:
    """Run an example as a reader would: in a new interpreter."""
    program = f"""
import doctest
test = doctest.DocTestParser().get_doctest({text!r}, {{}}, {name!r}, None, 0)
assert test.examples
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
raise SystemExit(runner.run(test).failed)
"""
    run(program)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stub_has_examples() -> None:
    assert {"Engine", "Settings", "capabilities", "kernel_defaults"} <= {
        name for name, _ in stub_docstrings()
    }


@pytest.mark.parametrize(("name", "text"), stub_docstrings(), ids=lambda value: value[:20])
def test_examples_of_the_stub(name: str, text: str) -> None:
    check(name, text)


@pytest.mark.parametrize("name", ["merge", "unmerge", "evaluate", "Cache"])
def test_examples_of_functions(name: str) -> None:
    check(name, getattr(pagemerge, name).__doc__)


@pytest.mark.parametrize("documented", [pagemerge.Allocator, pagemerge.Allocator.numpy])
def test_examples_of_the_allocator(documented: Callable[..., object]) -> None:
    assert documented.__doc__ is not None
    check(documented.__name__, documented.__doc__)


def test_every_public_name_is_documented() -> None:
    documented = STUB.read_text(encoding="utf-8")
    for name in pagemerge.__all__:
        thing = getattr(pagemerge, name)
        if getattr(thing, "__module__", "").startswith("pagemerge") and thing.__doc__:
            continue
        assert re.search(rf"\b{name}\b", documented), name


def readme_blocks(kind: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_runs() -> None:
    """All Python blocks, one after the other, as a reader would type them."""
    blocks = readme_blocks("python")
    assert len(blocks) >= 3
    assert "MiB saved" in run("\n".join(blocks))


def test_the_readme_names_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = {
        word for block in readme_blocks("sh") for word in re.findall(r"^make (\S+)", block, re.M)
    }
    assert {"run", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.M), command


#: The server runs until it is told to end, which is in `test_cache_server.py`.
EXAMPLES = sorted(
    set((ROOT / "examples").glob("*.py")) - set((ROOT / "examples").glob("cache_*.py"))
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path) -> None:
    assert run(example.read_text(encoding="utf-8"))
