"""What size costs: pages of 1, 4 and 16 GiB, sparse space, registering, starting.

    python benches/scale.py [--mib 1024,4096] [--json FILE]

* The CPU time for each page until it has converged, and in a pass at rest, as the memory grows.
  16 GiB are measured when asked for (`--mib 1024,4096,16384`): it takes the memory.
* Registering, and un-merging and unregistering, all of it.
* A pass over space of which next to nothing has ever been touched.
* Importing the package, beside importing numpy, which it needs; making the first engine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rivals
from machine import Child
from memory import CASES, PAGE
from rivals import publish, table

CASES_HERE = ("scattered", "runs512", "unique")
SPARSE_MIB = 16 << 10
Result = dict[str, Any]

STARTS = {
    "python": "pass",
    "python, numpy": "import numpy",
    "python, pagemerge": "import pagemerge",
    "python, pagemerge, an engine": "import pagemerge; pagemerge.Engine()",
}


def _started(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", program], check=True)
    return time.perf_counter() - began


def measure(sizes: list[int], cases: list[str]) -> Result:
    grown: dict[str, dict[str, Result]] = {}
    for case in cases:
        grown[case] = {}
        for mib in sizes:
            print(f"{case}, {mib} MiB", file=sys.stderr, flush=True)
            grown[case][str(mib)] = rivals.pagemerge(CASES[case], mib, 1, {})
    sparse = {}
    for every in (SPARSE_MIB * 256, 512, 64):
        with Child.holder() as child:
            sparse[str(every)] = child.ask("sparse", SPARSE_MIB, every)
    starts: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(10):
        for name, program in STARTS.items():
            starts[name].append(_started(program))
    return {"sizes": sizes, "cases": grown, "sparse": sparse, "starts": starts}


def report(found: Result) -> Iterator[str]:
    yield "CPU nanoseconds a page, as the memory grows"
    lines = []
    for case, by_size in found["cases"].items():
        first = None
        for mib, result in by_size.items():
            pages = result["pages"]
            cost = 1e9 * result["cpu"] / pages
            first = first or cost
            lines.append(
                [
                    f"{case}, {int(mib):,} MiB",
                    f"{cost:.0f}",
                    f"{cost / first:.2f}",
                    f"{1e9 * result['rest']['cpu'] / pages:.1f}",
                    f"{1e9 * result['changed']['cpu'] / pages:.1f}",
                    f"{1e3 * result['prepare_cpu']:.1f}",
                    f"{1e3 * result['unmerge']['wall']:.0f}",
                    f"{result['metadata_bytes_per_page']:.1f}",
                ]
            )
    head = ("to converge", "by the first (target: 1.3 at most)", "at rest", "1 % changed")
    yield table(["", *head, "register, ms", "unregister, wall ms", "metadata bytes a page"], lines)
    yield f"\nA space of {SPARSE_MIB:,} MiB of which little has been touched, CPU ms"
    yield table(
        ["touched", "pages", "register", "first pass", "at rest", "unregister", "metadata KiB"],
        [
            [
                f"one page in {int(every):,}",
                f"{result['touched']:,}",
                *(
                    f"{1e3 * result[name]['cpu']:.2f}"
                    for name in ("register", "first", "rest", "unregister")
                ),
                f"{result['metadata_bytes'] / 1024:,.0f}",
            ]
            for every, result in found["sparse"].items()
        ],
    )
    yield "\nStarting, wall ms"
    yield table(
        ["", "median", "least"],
        [
            [name, f"{1e3 * statistics.median(times):.0f}", f"{1e3 * min(times):.0f}"]
            for name, times in found["starts"].items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", default="1024,4096", help="sizes (1024,4096)")
    parser.add_argument("--cases", default=",".join(CASES_HERE), help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    found = measure([int(mib) for mib in options.mib.split(",")], options.cases.split(","))
    found["page_size"] = PAGE
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
