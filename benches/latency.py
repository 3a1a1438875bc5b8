"""What a writer feels while its memory is merged: by pagemerge, and by ksmd at full speed.

    python benches/latency.py [--mib 256] [--rounds 5] [--busy 2] [--json FILE]

A thread of `rust/linux/examples/latency.rs` writes one word of a page chosen at random every 100 us
and takes the time of each of these writes; everything else (the memory, the passes) is made
around it. The kinds of memory: half scattered duplicates with four copies each; half duplicates in
runs of 512 pages; all unique.

idle        nothing else happens: what the clock, caches, the hypervisor and other programs do
resting     passes over memory that has been merged, one after the other; what is written in the
            meantime is found by them
merging     from registering to the last merge, at full speed; again in each round

Each of these alone and with every core kept busy by other threads, where a writer may lose its core
in the middle of a write, whoever merges. Then the same merging for several `max_pause_micros`: a
window that holds more pages costs fewer calls and lets a writer wait longer.

ksmd runs whole passes at full speed (see `rivals.py`), and is measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import machine
from machine import FullSpeed
from rivals import publish, table

ROOT = Path(__file__).resolve().parent.parent
PAUSES = (10, 30, 100, 300, 1000, 10_000)
Result = dict[str, Any]


class Program:
    """The program that is measured; a line for each thing that it is told. A context manager."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen(
            [str(binary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _read(self, line: str) -> str:
        assert self._process.stdout  # PIPE was asked for
        answer = self._process.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise RuntimeError(f"{line!r} failed: {answer or self._process.wait()}")
        return answer

    def send(self, line: str) -> None:
        assert self._process.stdin  # PIPE was asked for
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ask(self, line: str) -> str:
        self.send(line)
        return self._read(line)

    def report(self) -> Result:
        result: Result = json.loads(self.ask("report"))
        if result["wrong"]:
            sys.exit(f"{result['wrong']} pages read wrong: this is a bug")
        return result

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Writes are measured while the block runs."""
        self.ask("measure outside")
        try:
            yield
        finally:
            self.send("stop")
            self._read("measure outside")

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


def build(example: str) -> Path:
    """Builds an example of the Rust crate; returns its path."""
    done = subprocess.run(
        [
            *("cargo", "build", "--release", "-p", "pagemerge-linux", "--example", example),
            "--message-format=json-render-diagnostics",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if found.get("executable") and found["target"]["name"] == example:
            return Path(found["executable"])
    raise FileNotFoundError(f"cargo has built no {example}")


def ours(program: Program, mib: int, kind: str, rounds: int, seconds: float) -> dict[str, Result]:
    """Merging in each round, then passes over what is merged."""
    for turn in range(rounds):
        program.ask(f"memory {mib} {kind}")
        program.ask("register")
        program.ask("measure merge")
        if turn < rounds - 1:
            program.ask("unregister")
    merging = program.report()
    program.ask(f"measure passes {seconds}")
    resting = program.report()
    program.ask("unregister")
    return {"merging": merging, "resting": resting}


def ksmd(
    program: Program, ksm: FullSpeed, mib: int, kind: str, rounds: int, seconds: float
) -> dict[str, Result]:
    """The same by ksmd, which needs two passes to merge."""
    cpu = wall = 0.0
    for turn in range(rounds):
        ksm.begin()
        program.ask(f"memory {mib} {kind}")
        program.ask("mergeable")
        with program.outside():
            for _ in range(2):
                made = ksm.timed_pass()
                cpu, wall = cpu + made["cpu"], wall + made["wall"]
        if turn < rounds - 1:
            program.ask("unmergeable")
    merging = {**program.report(), "cpu": cpu, "wall": wall}
    until = time.monotonic() + seconds
    with program.outside():
        while time.monotonic() < until:
            ksm.timed_pass()
    resting = program.report()
    program.ask("unmergeable")
    return {"merging": merging, "resting": resting}


def measure(options: argparse.Namespace) -> Result:
    binary = build("latency")
    pages = (options.mib << 20) // machine.PAGE
    found: Result = {"mib": options.mib, "rows": {}, "pauses": {}, "skipped": {}}
    rows = found["rows"]
    with contextlib.ExitStack() as stack:
        reason = machine.why_no_ksmd()
        ksm = None
        if reason is None:
            try:
                ksm = stack.enter_context(FullSpeed(lock_seconds=900, pass_seconds=300))
            except machine.UnavailableError as error:
                reason = str(error)
        if reason:
            found["skipped"]["ksmd"] = reason
        stack.enter_context(machine.mappings(pages * 9 // 4 + 10_000))
        program = stack.enter_context(Program(binary))
        program.ask("engine")
        for busy in dict.fromkeys((0, options.busy)):
            program.ask(f"busy {busy}")
            suffix = f", {busy} busy threads" if busy else ""
            program.ask(f"memory {options.mib} unique")
            program.ask(f"measure idle {options.seconds}")
            rows[f"idle{suffix}"] = program.report()
            for kind in options.kinds.split(","):
                sizes = (options.mib, kind, options.rounds, options.seconds)
                found_here = {"pagemerge": ours(program, *sizes)}
                if ksm is not None:
                    found_here["ksmd"] = ksmd(program, ksm, *sizes)
                for phase in ("merging", "resting"):
                    for rival, figures in found_here.items():
                        rows[f"{phase} {kind}{suffix}: {rival}"] = figures[phase]
        program.ask("busy 0")
        for pause in PAUSES:
            program.ask(f"engine max_pause_micros={pause}")
            found["pauses"][pause] = ours(program, options.mib, "scattered", options.rounds, 0.1)[
                "merging"
            ]
    return found


def report(found: Result) -> Iterator[str]:
    """The tables."""

    def micros(figures: Result, *names: str) -> list[str]:
        return [f"{figures[name] / 1000:.2f}" for name in names]

    shares = ("p50", "p90", "p99", "p999", "p9999", "max")
    head = ("p50", "p90", "p99", "p99.9", "p99.99", "max")
    yield f"{found['mib']} MiB; microseconds of a single write"
    for rival, reason in found["skipped"].items():
        yield f"not run: {rival}, because {reason}"
    yield table(
        ["", "writes", *head],
        [
            [name, f"{figures['writes']:,}", *micros(figures, *shares)]
            for name, figures in found["rows"].items()
        ],
    )
    for name, own in found["rows"].items():
        theirs = found["rows"].get(name.replace(": pagemerge", ": ksmd"))
        if name.startswith("merging") and name.endswith(": pagemerge") and theirs:
            reached = "yes" if own["p99"] <= theirs["p99"] else "no"
            yield (
                f"p99, {name.partition(':')[0]}: {own['p99'] / theirs['p99']:.2f} of ksmd's "
                f"(asked for: not above; {reached})"
            )
    yield "\nThe trade: max_pause_micros, while merging scattered"
    yield table(
        ["max_pause_micros", *head, "windows", "saved a window", "CPU s", "wall s"],
        [
            [
                str(pause),
                *micros(figures, *shares),
                f"{figures['windows']:,}",
                f"{figures['saved_pages'] / max(1, figures['windows']):.1f}",
                f"{figures['cpu']:.3f}",
                f"{figures['wall']:.3f}",
            ]
            for pause, figures in found["pauses"].items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="MiB of memory (256)")
    parser.add_argument("--rounds", type=int, default=5, help="how often it is merged (5)")
    parser.add_argument("--kinds", default="scattered,runs,unique", help="of memory (all)")
    parser.add_argument("--seconds", type=float, default=5, help="of idling and of resting (5)")
    parser.add_argument(
        "--busy", type=int, default=os.cpu_count(), help="threads that keep all cores busy"
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    found = measure(options)
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
