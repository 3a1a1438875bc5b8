"""The command ``pagemerge``: Python over the public interface.

Results go to standard output, as text or (``--json``) as one JSON document; progress goes to
standard error, and only to a terminal. Exit codes: 0 done, 1 it failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pagemerge
from pagemerge import _demo, _ksmd, kernel


def _out() -> Console:
    # In a pipe nothing is wrapped: lines are for programs there.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def _fail(error: object) -> NoReturn:
    click.echo(f"pagemerge: {error}", err=True)
    sys.exit(1)


@contextmanager
def _errors() -> Iterator[None]:
    """Say what went wrong in a line, not in a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("pagemerge: interrupted", err=True)
        sys.exit(130)
    except (pagemerge.Error, _ksmd.KsmUnavailableError, OSError, MemoryError, ValueError) as error:
        _fail(error)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield what shows a line of progress, if anybody can see it."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda _text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))


def _mib(count: float) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pagemerge.__version__, prog_name="pagemerge")
def main() -> None:
    """Merge equal pages of memory, as ksmd does, from within a program."""


@main.command()
@click.option("--workers", default=8, show_default=True, type=click.IntRange(2, 1024))
@click.option(
    "--size",
    default=64,
    show_default=True,
    type=click.IntRange(1, 1 << 20),
    help="MiB of memory for each worker.",
)
@click.option("--kernel", is_flag=True, help="Let ksmd merge a second copy, and compare (root).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def demo(workers: int, size: int, kernel: bool, as_json: bool) -> None:
    """Merge what the workers of a pre-fork server would each have a copy of.

    Each worker holds private copies of real data: this Python's standard library and shared objects
    as read from disk, and arrays made from them; and pages that are its own, and pages of zeroes.
    They are merged, every byte is checked, one worker writes, all is un-merged and checked again.
    """
    need = (workers + 2) * size << 20
    if need > _available_bytes():
        _fail(
            f"the demonstration needs about {_mib(need)} and {_mib(_available_bytes())} are "
            "available; give smaller --workers or --size"
        )
    with _errors():
        with _progress() as progress:
            result = _demo.run(workers, size, progress, {})
            if kernel:
                progress("ksmd is merging a second copy")
                result["kernel"] = _ksmd.run(workers, size)
        if as_json:
            click.echo(json.dumps(result, indent=2))
        else:
            _print_demo(result)
    wrong = result["wrong_bytes"] + result.get("kernel", {}).get("wrong_bytes", 0)
    if wrong:
        _fail(f"{wrong} bytes were not what they have to be: this is a bug, please report it")


def _print_demo(result: dict[str, Any]) -> None:
    out = _out()
    rival = result.get("kernel")
    out.print(
        f"{result['workers']} workers with {result['mebibytes_each']} MiB each: real files, arrays "
        "made from them, zeroes, and pages of their own"
    )
    out.print(
        f"barrier {result['barrier']}, "
        f"write tracking {'on' if result['write_tracking'] else 'off'}\n"
    )

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("merged", justify="right")
    table.add_column("un-merged", justify="right")
    if rival:
        table.add_column("ksmd: before", justify="right")
        table.add_column("merged", justify="right")

    def row(name: str, before: str, merged: str, after: str, *kernels: str) -> None:
        table.add_row(name, before, merged, after, *(kernels if rival else ()))

    def of_rival(text: Callable[[dict[str, Any]], str]) -> str:
        return text(rival) if rival else ""

    page = pagemerge.PAGE_SIZE
    row(
        "PSS of the process",
        _mib(result["pss_before"]),
        _mib(result["pss_after"]),
        _mib(result["pss_unmerged"]),
        of_rival(lambda r: _mib(r["pss_before"])),
        of_rival(lambda r: _mib(r["pss_after"])),
    )
    row(
        "pages that share a frame",
        "0",
        f"{result['merged']:,}",
        "0",
        "0",
        of_rival(lambda r: f"{r['counters']['pages_shared'] + r['counters']['pages_sharing']:,}"),
    )
    row(
        "frames",
        "0",
        f"{result['frames']:,}",
        "0",
        "0",
        of_rival(lambda r: f"{r['counters']['pages_shared']:,}"),
    )
    row(
        "zero pages",
        "0",
        f"{result['zero']:,}",
        "0",
        "0",
        of_rival(lambda r: f"{r['counters'].get('ksm_zero_pages', 0):,}"),
    )
    row(
        "saved",
        "",
        _mib(result["bytes_saved"]),
        "",
        "",
        of_rival(
            lambda r: _mib(
                (r["counters"]["pages_sharing"] + r["counters"].get("ksm_zero_pages", 0)) * page
            )
        ),
    )
    row(
        "seconds",
        "",
        f"{result['seconds']:.2f}",
        f"{result['unmerge_seconds']:.2f}",
        "",
        of_rival(lambda r: f"{r['seconds']:.2f}"),
    )
    row(
        "CPU seconds",
        "",
        f"{result['cpu_seconds']:.2f}",
        "",
        "",
        of_rival(lambda r: f"{r['cpu_seconds']:.2f}"),
    )
    out.print(table)

    counters = Table(box=None, pad_edge=False)
    counters.add_column("\ncounter")
    counters.add_column("\nchange", justify="right")
    names = list(result["counters"])
    if rival:
        counters.add_column("\nksmd", justify="right")
        names += [name for name, value in rival["counters"].items() if value and name not in names]
    for name in names:
        mine = result["counters"].get(name, 0)
        theirs = []
        if rival:
            theirs = [f"{rival['counters'][name]:,}" if name in rival["counters"] else ""]
        counters.add_row(name, f"{mine:,}", *theirs)
    out.print(counters)
    if result["skipped"]:
        out.print("\nleft alone: " + _listed(result["skipped"]))
    if not result["wrong_bytes"]:
        out.print(
            f"\nevery byte of {result['pages']:,} pages was checked after merging, after one "
            "worker had written, and after un-merging: all right"
        )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-r", "--recursive", is_flag=True, help="Go into directories.")
@click.option("-k", "--keep-going", is_flag=True, help="Leave out what cannot be read.")
@click.option(
    "--page-size",
    default=pagemerge.PAGE_SIZE,
    show_default=True,
    type=int,
    help="Bytes in a page: what would larger or smaller pages save?",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def evaluate(
    paths: tuple[Path, ...], recursive: bool, keep_going: bool, page_size: int, as_json: bool
) -> None:
    """Count equal and zero pages within and between files: memory dumps, images, data."""
    with _errors():
        with _progress() as progress:
            result = pagemerge.evaluate(
                paths=paths,
                recursive=recursive,
                page_size=page_size,
                keep_going=keep_going,
                progress=lambda done, all_: progress(f"reading: {_mib(done)} of {_mib(all_)}"),
            )
        if as_json:
            click.echo(json.dumps(result.as_dict(), indent=2))
        else:
            _print_evaluation(result)
    for message in result.left_out.values():
        click.echo(f"pagemerge: left out: {message}", err=True)


def _print_evaluation(result: pagemerge.Evaluation) -> None:
    out = _out()
    table = Table(box=None, pad_edge=False)
    for name in ("file", "pages", "zero", "twin within", "twin elsewhere", "unique"):
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for file in result.files:
        counts = (file.pages, file.zero, file.twin_within, file.twin_elsewhere, file.unique)
        table.add_row(escape(file.path), *(f"{count:,}" for count in counts))
    out.print(table)
    share = 100 * result.bytes_saved / max(1, result.pages * result.page_size)
    out.print(
        f"\n{result.pages:,} pages of {result.page_size:,} bytes, {result.zero:,} of them zero; "
        f"{result.merged:,} have their like and would need {result.frames:,} frames: "
        f"{_mib(result.bytes_saved)} ({share:.1f} %) saved"
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def capabilities(as_json: bool) -> None:
    """Say what this machine and these privileges allow, and why not more."""
    with _errors():
        found = pagemerge.capabilities()
        figures = {
            "barrier": str(found.barrier),
            "write_tracking": found.write_tracking,
            "move": found.move,
            "max_map_count": found.max_map_count,
            "kernel_ksm": found.kernel_ksm,
            "page_size": found.page_size,
            "kernel": found.kernel,
            "reasons": found.reasons,
        }
        if as_json:
            click.echo(json.dumps(figures, indent=2))
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in figures.items():
            if name != "reasons":
                text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
                table.add_row(name, escape(text))
        out = _out()
        out.print(table)
        for name, why in found.reasons.items():
            out.print(f"\n{escape(name)}: {escape(why)}")


@main.group("kernel")
def of_kernel() -> None:
    """Look at the kernel's own KSM, set it, and start programs with it."""


@of_kernel.command()
@click.option("--pid", type=click.IntRange(1), help="And what it does for this process.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(pid: int | None, as_json: bool) -> None:
    r"""Show what ksmd is set to, and what it has done.

    \b
    Example: pagemerge kernel status --pid $(pgrep -o redis-server)
    """
    with _errors():
        figures: dict[str, dict[str, Any]] = {
            "settings": {"run": int(kernel.run()), **kernel.settings.as_dict()},
            "counters": dict(kernel.stats()) | {"bytes_saved": kernel.stats().bytes_saved},
        }
        if pid is not None:
            figures["process"] = dict(kernel.process(pid))
        if as_json:
            click.echo(json.dumps(figures, indent=2))
            return
        out = _out()
        for title, values in figures.items():
            table = Table(title, "", box=None, pad_edge=False)
            for name, value in values.items():
                table.add_row(name, str(int(value) if isinstance(value, bool) else value))
            out.print(table)
            out.print()


@of_kernel.command("set")
@click.argument("values", nargs=-1, required=True, metavar="NAME=VALUE...")
def set_(values: tuple[str, ...]) -> None:
    r"""Set ksmd, for the whole machine (root).

    \b
    Example: pagemerge kernel set advisor_mode=none pages_to_scan=4000 run=1
    """
    with _errors():
        wanted: dict[str, Any] = {}
        for text in values:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"{text!r} is not NAME=VALUE")
            wanted[name] = value if name == "advisor_mode" else _number(name, value)
        mode = wanted.pop("run", None)
        try:
            kernel.settings.update(wanted)
        except AttributeError as error:
            _fail(error)
        if mode is not None:
            kernel.set_run(mode)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return int(text)


@of_kernel.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...]) -> NoReturn:
    r"""Start a program all of whose memory is given to ksmd, and that of its children.

    It takes the place of this command: its output, signals and exit code are its own. ksmd has to
    run for anything to merge (pagemerge kernel set run=1).

    \b
    Example: pagemerge kernel run -- redis-server --port 6380
    """
    with _errors():
        kernel.merge_any()
        if kernel.run() != pagemerge.RunMode.MERGE:
            click.echo("pagemerge: ksmd does not run: pagemerge kernel set run=1", err=True)
        sys.stdout.flush()
        try:
            os.execvp(command[0], command)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, f"cannot start {command[0]!r}: there is no such program"
            ) from None
    raise AssertionError("it has taken our place")


if __name__ == "__main__":
    main()
