"""Arrays backed by huge pages, with 0, 1, 50 and 100 % duplicates: what is saved, what is split.

    python benches/hugepages.py [--mib 1024] [--repeat 3] [--min 1,32] [--json FILE]

Merging one page of a huge page splits it, and all of its 512 pages cost entries in the page tables
and misses in the TLB from then on. Whether that is worth it depends on how many duplicates are in
it, and `thp_min_duplicates` says how many are enough: each number of `--min` is a rival of its own.
The duplicates lie anywhere, so with 1 % of them nearly every huge page has some.

Counted is what `rivals.py` counts. "Read all" is the time to read every page in the end, which
tells what splitting costs the program itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import rivals
from machine import Child, FullSpeed
from memory import HUGE, Case
from rivals import publish, table

Result = dict[str, Any]

#: What our rivals' names begin with; the rest is their `thp_min_duplicates`.
OURS = "pagemerge, from "


def _one(rival: str, case: Case, mib: int, seed: int) -> Result:
    with Child.holder() as child:
        memory = child.ask("build", case.name, mib, seed)
        before = {"huge": child.ask("huge"), "read": child.ask("verify")["cpu"]}

        def finish(made: Result, scan: Callable[[], Result]) -> Result:
            passes, counted = rivals.converge(child, scan)
            huge = child.ask("huge")
            result = rivals.result_of(memory, passes, counted, made, 0)
            read = child.ask("verify")
            if read["wrong"]:
                sys.exit(f"{read['wrong']} pages read wrong after {rival}: this is a bug")
            return {**result, "before": before, "after": {"huge": huge, "read": read["cpu"]}}

        if rival != "ksmd":
            settings = {"thp_min_duplicates": int(rival.removeprefix(OURS))}
            with machine.mappings(memory["pages"] * 9 // 4 + 10_000):
                return finish(child.ask("engine", settings), lambda: child.ask("scan"))
        with FullSpeed(lock_seconds=900, pass_seconds=60 + mib / 4) as ksm:
            ksm.begin()
            return finish(child.ask("mergeable"), ksm.timed_pass)


def measure(mib: int, repeat: int, least: list[int]) -> Result:
    chosen = [f"{OURS}{number}" for number in least]
    skipped = {}
    if reason := machine.why_no_ksmd():
        skipped["ksmd"] = reason
    else:
        chosen.append("ksmd")
    found: dict[str, list[dict[str, Result]]] = {}
    for name, case in HUGE.items():
        found[name] = []
        for turn in range(repeat):
            row = {}
            for rival in chosen if turn % 2 == 0 else chosen[::-1]:
                print(f"{name}, {turn + 1} of {repeat}: {rival}", file=sys.stderr, flush=True)
                row[rival] = _one(rival, case, mib, turn + 1)
            found[name].append(row)
    return {"mib": mib, "repeat": repeat, "min": least, "skipped": skipped, "cases": found}


def report(found: Result) -> Iterator[str]:
    yield f"{found['mib']} MiB in huge pages; MiB in huge pages, and ns a page to read all"
    for rival, reason in found["skipped"].items():
        yield f"not run: {rival}, because {reason}"
    lines = []
    for name, rows in found["cases"].items():
        for rival in rows[0]:
            results = [row[rival] for row in rows]
            pages = results[0]["pages"]

            def mid(read: Callable[[Result], float], results: list[Result] = results) -> float:
                return statistics.median(read(result) for result in results)

            lines.append(
                [
                    f"{name} {rival}",
                    f"{mid(lambda result: result['cpu']):.3f}",
                    f"{mid(lambda result: result['saved_bytes']) / 2**20:,.1f}",
                    f"{mid(lambda result: result['before']['huge']) / 2**20:,.0f}",
                    f"{mid(lambda result: result['after']['huge']) / 2**20:,.0f}",
                    f"{1e9 * mid(lambda result: result['before']['read']) / pages:.0f}",
                    f"{1e9 * mid(lambda result: result['after']['read']) / pages:.0f}",
                    *rivals.judged(rivals.ratios(rows, rival, "") if rival != "ksmd" else [])[:2],
                ]
            )
    head = ("CPU s", "saved MiB", "huge before", "after", "read before", "after", "ratio", "")
    yield table(["case, rival", *head], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="MiB of memory (1024)")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--min", default="1,32", help="values of thp_min_duplicates (1,32)")
    options = parser.parse_args()
    least = [int(number) for number in options.min.split(",")]
    found = measure(options.mib, options.repeat, least)
    publish(found, report(found), options.json)


if __name__ == "__main__":
    main()
