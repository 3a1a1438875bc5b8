"""What merging in the background costs a program beside it that needs memory bandwidth.

    python benches/neighbour.py [--mib 1024] [--seconds 10] [--repeat 3] [--json FILE]

As many neighbours as there are cores sum arrays of 256 MiB as often as they can. Their throughput
is taken alone, beside pagemerge's background thread at its defaults (which has an advisor), and
beside ksmd with its advisor switched on at its defaults; both begin with fresh memory, half
duplicates in runs of 16 pages, and go on as long as the neighbours run. What they got done
meanwhile is said, too: doing nothing costs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from machine import Child, FullSpeed, ksm_kernel, ksmd_cpu
from rivals import publish, spread, table

CASE = "runs16"
Result = dict[str, Any]

NEIGHBOUR = """
import sys, time
import numpy
array = numpy.ones((256 << 20) // 8)
print("ready", flush=True)
sys.stdin.readline()
until, sums = time.monotonic() + float(sys.argv[1]), 0
began = time.monotonic()
while time.monotonic() < until:
    # Pieces of 4 MiB, so that the end is met in time.
    at = sums % 64 << 19
    array[at : at + (1 << 19)].sum()
    sums += 1
print(sums * (4 << 20) / (time.monotonic() - began), flush=True)
"""


def _throughput(seconds: float) -> float:
    """Bytes a second that all neighbours have summed."""
    with contextlib.ExitStack() as stack:
        neighbours = []
        for _ in range(os.cpu_count() or 1):
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", NEIGHBOUR, str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdin  # PIPE was asked for
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            neighbours.append(process)
        for process in neighbours:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        return sum(float(process.stdout.readline()) for process in neighbours if process.stdout)


def _alone(mib: int, seconds: float) -> Result:
    with Child.holder() as child:
        child.ask("build", CASE, mib, 1)  # The same memory is taken, and nobody merges it.
        return {"throughput": _throughput(seconds)}


def _ours(mib: int, seconds: float) -> Result:
    with Child.holder() as child:
        pages = child.ask("build", CASE, mib, 1)["pages"]
        with machine.mappings(pages * 9 // 4 + 10_000):
            child.ask("engine", {})
            child.ask("start")
            throughput = _throughput(seconds)
            stats = child.ask("stats")
    return {
        "throughput": throughput,
        "cpu": stats["cpu_nanos"] / 1e9,
        "scanned": stats["pages_scanned"],
        "saved_pages": stats["pages_sharing"] + stats["ksm_zero_pages"],
        "full_scans": stats["full_scans"],
    }


def _ksmd(mib: int, seconds: float) -> Result:
    with Child.holder() as child:
        child.ask("build", CASE, mib, 1)
        with FullSpeed(lock_seconds=900, pass_seconds=60 + mib / 4) as ksm:
            ksm.begin()
            child.ask("mergeable")
            for name, value in (("pages_to_scan", 100), ("advisor_mode", "scan-time")):
                ksm_kernel.write(name, value)
            cpu = ksmd_cpu()
            ksm_kernel.write("run", 1)
            try:
                ksm_kernel.write("sleep_millisecs", 20)
                throughput = _throughput(seconds)
            finally:
                ksm_kernel.write("run", 0)
            now = ksm.counters()
            return {
                "throughput": throughput,
                "cpu": ksmd_cpu() - cpu,
                "scanned": now["pages_scanned"],
                "saved_pages": now["pages_sharing"] + now["ksm_zero_pages"],
                "full_scans": now["full_scans"],
            }


def measure(mib: int, seconds: float, repeat: int) -> Result:
    kinds = {"alone": _alone, "pagemerge": _ours, "ksmd": _ksmd}
    skipped = {}
    if reason := machine.why_no_ksmd():
        skipped["ksmd"] = reason
        del kinds["ksmd"]
    rows = []
    for turn in range(repeat):
        order = list(kinds)[turn % len(kinds) :] + list(kinds)[: turn % len(kinds)]
        row = {}
        for name in order:
            print(f"{turn + 1} of {repeat}: {name}", file=sys.stderr, flush=True)
            row[name] = kinds[name](mib, seconds)
            time.sleep(0.5)  # What the last one has freed is given back first.
        rows.append(row)
    return {"mib": mib, "seconds": seconds, "skipped": skipped, "rows": rows}


def report(found: Result) -> Iterator[str]:
    yield (
        f"{os.cpu_count()} neighbours sum arrays for {found['seconds']:g} s, "
        f"beside {found['mib']:,} MiB"
    )
    for rival, reason in found["skipped"].items():
        yield f"not run: {rival}, because {reason}"
    rows = found["rows"]
    lines = []
    for name in ("alone", "pagemerge", "ksmd"):
        if name not in rows[0]:
            continue
        ratios = [row[name]["throughput"] / row["alone"]["throughput"] for row in rows]
        middle, least, most = spread(ratios)

        def mid(key: str, name: str = name) -> float:
            return statistics.median(row[name].get(key, 0) for row in rows)

        lines.append(
            [
                name,
                f"{mid('throughput') / 2**30:.2f}",
                f"{middle:.3f}",
                f"{least:.3f}..{most:.3f}",
                f"{mid('cpu') / found['seconds']:.1%}",
                f"{mid('scanned'):,.0f}",
                f"{mid('saved_pages') * machine.PAGE / 2**20:,.1f}",
            ]
        )
    head = ("GiB/s", "of alone", "", "of a core", "pages scanned", "saved MiB")
    yield table(["", *head], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="MiB that are merged (1024)")
    parser.add_argument("--seconds", type=float, default=10, help="for each (10)")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    found = measure(options.mib, options.seconds, options.repeat)
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
