"""pagemerge, the kernel's ksmd and a dict of hashes on the same memory, in the same run.

    python benches/rivals.py [--cases a,b] [--mib 1024] [--repeat 3] [--json FILE] [--plot DIR]

Ratios are the result: CPU seconds of ksmd by those of pagemerge, within one repeat, and of the
repeats' ratios the median, the least and the greatest. Times by themselves are noise that others
make.

The rivals
    pagemerge       an `Engine` with its defaults, whose passes are called (`Engine.scan`)
    threads         the same with `threads=2`
    ksmd            the kernel's, at full speed: a batch is a whole pass, no sleep, no advisor, and
                    its defaults otherwise: `smart_scan` on, `max_page_sharing` 256, and
                    `use_zero_pages` on where the case is about zero pages
    dict            Python: blake2b of each page into a dict. Finds, and merges nothing

Each rival of each repeat gets a fresh process (`holder.py`) with the same memory (`memory.py`, same
seed). Who is first changes from one repeat to the next.

What is counted: until it has converged
    Passes are made one by one, by all rivals alike. One has converged with the last pass that
    changed any of `pages_shared`, `pages_sharing` and `ksm_zero_pages`, or brought `pages_unshared`
    (pages known to have no twin) to more than ever before; that matters where nothing merges. Two
    whole passes without such a change prove it, and are not counted. Counted are whole passes: what
    was done in the last one after its last merge, too.
    * pagemerge: CPU time of the whole process, so of every thread of it, in user mode and in the
      kernel, while `Engine()` and `register` run and while each pass runs.
    * ksmd: CPU time of its thread as the scheduler counts it (/proc/PID/schedstat, in nanoseconds),
      from waking up to having gone to sleep again, and of the process during
      `madvise(MADV_MERGEABLE)`.
    * dict: CPU time of the process for one pass, which is all that it makes.
    Both are what the scheduler has charged to threads. Work that the kernel does for either
    elsewhere (freeing pages after a grace period) is charged to nobody. Making the memory is not
    counted.

Further passes
    At rest: the mean of the ten passes that follow the two of the proof, in which nothing has
    changed. 1 % changed: nine more; before each one page in a hundred, chosen anew, gets a content
    of its own.

    `smart_scan` makes ksmd pass over pages that have not merged for a while without a look. It
    examines unique pages in its passes 2, 3, 4, 6, 9, 14, 23 and each ninth from there, so at three
    of those ten passes and, as in the long run, at one of those nine. A pass that skips a page does
    not notice that it has changed. pagemerge learns about every page in every pass. So ksmd is
    measured twice: as it is, and with `smart_scan` off, where both look after the same pages (three
    passes at rest and three after changes; they are all alike).

    Writing is not counted here; it is reported by itself, since each rival makes it dearer: by
    copying merged pages, and pagemerge by write tracking. Where pages are volatile, these are
    written before each pass, also "at rest", and 1 % is left out.

Saved
    Bytes by the counters, the share of what could be saved at all, and what PSS has fallen by, all
    at the time of convergence. In the end every page is read back and compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
from machine import Child, FullSpeed
from memory import CASES, PAGE, Case

#: Further passes: at rest, after changes, and both again while ksmd examines all. The numbers
#: decide what `smart_scan` has to do in them, so they are not cut short where time runs out.
REST, CHANGED, ALL = 10, 9, 3
LONGEST = 40

RIVALS = ("pagemerge", "threads", "ksmd", "dict")
Result = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - not an error
    """This rival does not run here, and why."""


# ------------------------------------------------------------------------------------ one rival


def converge(child: Child, scan: Callable[[], Result]) -> tuple[list[Result], int]:
    """Passes until two have changed nothing; and how many of them count."""
    passes: list[Result] = []
    known, counted = [0, 0, 0, 0], 0
    # What says least at first is ksmd, which only learns checksums in its first pass.
    while len(passes) < max(counted, 2) + 2 and len(passes) < LONGEST:
        if passes:
            child.ask("churn")
        passes.append(scan())
        *merged, unshared = passes[-1]["state"]
        # `smart_scan` lets unique pages come and go.
        now = [*merged, max(unshared, known[-1])]
        if now != known:
            known, counted = now, len(passes)
    return passes, counted


def _further(
    scan: Callable[[], Result], before: Callable[[], Result] | None, passes: int
) -> Result:
    """The mean of some more passes."""
    made, writes = [], []
    for _ in range(passes):
        if before is not None:
            writes.append(before()["cpu"])
        made.append(scan())
    scanned = [entry.get("scanned", 0) for entry in made]
    return {
        "cpu": statistics.fmean(entry["cpu"] for entry in made),
        "wall": statistics.fmean(entry["wall"] for entry in made),
        "each": [entry["cpu"] for entry in made],
        "writer_cpu": statistics.fmean(writes) if writes else 0.0,
        "passes": len(made),
        "scanned_last": scanned[-1] if scanned else 0,
    }


def pagemerge(case: Case, mib: int, seed: int, settings: dict[str, Any]) -> Result:
    """Ours, called pass by pass."""
    with Child.holder() as child:
        memory = child.ask("build", case.name, mib, seed)
        pss = child.ask("pss")
        # Two mappings for each page that merges, at most, of the nine tenths that merging may use.
        with machine.mappings(memory["pages"] * 9 // 4 + 10_000):
            made = child.ask("engine", settings)

            def scan() -> Result:
                return child.ask("scan")

            passes, counted = converge(child, scan)
            saved = pss - child.ask("pss")
            stats = child.ask("stats")
            result = result_of(memory, passes, counted, made, saved)
            result |= _later(case, child, scan, "")
            result["verify"] = child.ask("verify")
            result["unmerge"] = child.ask("close")
    result["settings"] = made["settings"]
    result["stats"] = stats
    result["metadata_bytes_per_page"] = stats["metadata_bytes"] / memory["pages"]
    return result


def ksmd(case: Case, mib: int, seed: int) -> Result:
    """The kernel's."""
    reason = machine.why_no_ksmd()
    if reason:
        raise Skipped(reason)
    with Child.holder() as child:
        memory = child.ask("build", case.name, mib, seed)
        pss = child.ask("pss")
        try:
            with FullSpeed(lock_seconds=900, pass_seconds=60 + mib / 4) as ksm:
                ksm.begin(use_zero_pages=int(case.zero_pages))
                made = child.ask("mergeable")
                passes, counted = converge(child, ksm.timed_pass)
                saved = pss - child.ask("pss")
                result = result_of(memory, passes, counted, made, saved)
                result |= _later(case, child, ksm.timed_pass, "")
                ksm.set("smart_scan", 0)
                child.ask("churn")
                ksm.timed_pass()  # The first one examines what was skipped until now.
                result |= _later(case, child, ksm.timed_pass, "_all")
                result["verify"] = child.ask("verify")
        except machine.UnavailableError as error:
            raise Skipped(str(error)) from error
    return result


def dict_of_hashes(case: Case, mib: int, seed: int) -> Result:
    """What anybody would write first."""
    with Child.holder() as child:
        memory = child.ask("build", case.name, mib, seed)
        found = child.ask("find")
        result = result_of(memory, [found], 1, {"cpu": 0.0, "wall": 0.0}, 0)
        # It remembers nothing from pass to pass that would make the next one cheaper.
        again = child.ask("find")
        for name in ("rest", "changed"):
            result[name] = {"cpu": again["cpu"], "wall": again["wall"], "each": [again["cpu"]]}
    return result


def _later(case: Case, child: Child, scan: Callable[[], Result], suffix: str) -> Result:
    rest, changed = (REST, CHANGED) if not suffix else (ALL, ALL)
    if case.name == "instagram":
        return {"rest" + suffix: _further(scan, lambda: child.ask("churn"), rest)}
    return {
        "rest" + suffix: _further(scan, None, rest),
        "changed" + suffix: _further(scan, lambda: child.ask("change", 0.01), changed),
    }


def result_of(
    memory: Result, passes: list[Result], counted: int, made: Result, saved_pss: int
) -> Result:
    """The figures of one rival until it has converged."""
    cpu = made["cpu"] + sum(entry["cpu"] for entry in passes[:counted])
    wall = made["wall"] + sum(entry["wall"] for entry in passes[:counted])
    _, sharing, zero = passes[-1]["state"][:3]
    redundant = memory["redundant"]
    return {
        "pages": memory["pages"],
        "redundant": redundant,
        "cpu": cpu,
        "wall": wall,
        "pages_per_second": memory["pages"] / wall,
        "passes": counted,
        "each": [entry["cpu"] for entry in passes],
        "prepare_cpu": made["cpu"],
        "state": passes[-1]["state"],
        "saved_pages": sharing + zero,
        "saved_bytes": (sharing + zero) * PAGE,
        "saved_share": (sharing + zero) / redundant if redundant else 1.0,
        "saved_pss": saved_pss,
    }


# ------------------------------------------------------------------------------------ all of them


def _play(rival: str, case: Case, mib: int, seed: int) -> Result:
    if rival == "pagemerge":
        return pagemerge(case, mib, seed, {})
    if rival == "threads":
        return pagemerge(case, mib, seed, {"threads": 2})
    if rival == "ksmd":
        return ksmd(case, mib, seed)
    return dict_of_hashes(case, mib, seed)


def measure(
    cases: Sequence[str],
    rivals: Sequence[str],
    mib: int,
    repeat: int,
    seed: int,
    say: Callable[[str], None],
) -> Result:
    """Everything: for each case a list of repeats, each with the result of every rival."""
    skipped: dict[str, str] = {}
    found: dict[str, list[dict[str, Result]]] = {}
    for name in cases:
        found[name] = []
        for turn in range(repeat):
            row: dict[str, Result] = {}
            order = list(rivals)[turn % len(rivals) :] + list(rivals)[: turn % len(rivals)]
            if turn % 2:
                order.reverse()
            for rival in order:
                if rival in skipped:
                    continue
                say(f"{name}, {turn + 1} of {repeat}: {rival}")
                try:
                    row[rival] = _play(rival, CASES[name], mib, seed + turn)
                except Skipped as reason:
                    skipped[rival] = str(reason)
                    continue
                wrong = row[rival].get("verify", {}).get("wrong", 0)
                if wrong:
                    sys.exit(f"{name}: {wrong} pages read wrong after {rival}: this is a bug")
            found[name].append(row)
    return {
        "mib": mib,
        "repeat": repeat,
        "seed": seed,
        "page_size": PAGE,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "skipped": skipped,
        "cases": found,
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least, greatest."""
    return statistics.median(values), min(values), max(values)


def ratios(rows: list[dict[str, Result]], ours: str, *keys: str) -> list[float]:
    """CPU seconds of ksmd by ours, one for each repeat that has both. `keys`: theirs, ours."""
    theirs, own = keys[0], keys[-1]

    def cpu(result: Result, key: str) -> float | None:
        return result["cpu"] if not key else result.get(key, {}).get("cpu")

    pairs = [
        (cpu(row["ksmd"], theirs), cpu(row[ours], own))
        for row in rows
        if "ksmd" in row and ours in row
    ]
    return [a / b for a, b in pairs if a is not None and b]


TARGETS = {"rest": 500.0, "changed": 100.0}


def judged(values: Sequence[float], target: float | None = None) -> list[str]:
    """Three cells: the median, least and greatest, and whether the target is reached."""
    if not values:
        return ["-", "", ""]
    middle, least, most = spread(values)
    verdict = "" if target is None else f"{target:g}: {'yes' if middle >= target else 'no'}"
    return [_short(middle), f"{_short(least)}..{_short(most)}", verdict]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, figures to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def report(measured: Result) -> Iterator[str]:
    """The tables, piece by piece."""
    cases = measured["cases"]
    rivals = [
        name for name in RIVALS if any(name in row for rows in cases.values() for row in rows)
    ]
    yield (
        f"{measured['mib']} MiB, {measured['repeat']} repeats, Linux {measured['kernel']}; "
        "ratio: CPU seconds of ksmd by the rival's, median (least..greatest) of the repeats"
    )
    for rival, reason in measured["skipped"].items():
        yield f"not run: {rival}, because {reason}"
    lines = []
    for name, rows in cases.items():
        for rival in rivals:
            results = [row[rival] for row in rows if rival in row]
            if not results:
                continue
            ours = rival in ("pagemerge", "threads")

            def mid(key: str, results: list[Result] = results) -> float:
                return statistics.median(result[key] for result in results)

            lines.append(
                [
                    f"{name} {rival}",
                    f"{mid('cpu'):.3f}",
                    f"{mid('wall'):.3f}",
                    f"{mid('pages_per_second'):,.0f}",
                    str(int(mid("passes"))),
                    f"{mid('saved_bytes') / 2**20:,.1f}" if rival != "dict" else "finds",
                    f"{mid('saved_share'):.1%}" if mid("redundant") else "-",
                    f"{mid('saved_pss') / 2**20:,.1f}" if rival != "dict" else "-",
                    *judged(
                        ratios(rows, rival, "") if rival != "ksmd" else [],
                        CASES[name].target if ours else None,
                    ),
                ]
            )
    yield "\nUntil it has converged"
    yield table(
        [
            *("case, rival", "CPU s", "wall s", "pages/s", "passes", "saved MiB", "of all"),
            *("PSS less", "ratio", "", "target"),
        ],
        lines,
    )
    yield "\nA further pass, CPU milliseconds (ksmd with smart_scan as it is | examining all pages)"
    lines = []
    for name, rows in cases.items():
        for key, what in (("rest", "at rest"), ("changed", "1 % changed")):
            for rival in rivals:
                if rival == "ksmd":
                    continue
                own = [row[rival][key]["cpu"] for row in rows if key in row.get(rival, {})]
                if not own or (name == "instagram" and key == "changed"):
                    continue
                ours = rival in ("pagemerge", "threads")
                target = TARGETS[key] if ours and name != "instagram" else None
                theirs = [
                    [row["ksmd"][other]["cpu"] for row in rows if other in row.get("ksmd", {})]
                    for other in (key, key + "_all")
                ]
                lines.append(
                    [
                        f"{name} {'steady' if name == 'instagram' else what}, {rival}",
                        f"{1e3 * statistics.median(own):.2f}",
                        *(f"{1e3 * statistics.median(cpu):.1f}" if cpu else "-" for cpu in theirs),
                        *judged(ratios(rows, rival, key), target),
                        *judged(ratios(rows, rival, key + "_all", key), target),
                    ]
                )
    yield table(
        [
            *("case, rival", "ms", "ksmd", "ksmd all", "ratio", "", "target"),
            *("ratio all", "", "target"),
        ],
        lines,
    )
    lines = []
    for name, rows in cases.items():
        for rival in rivals:
            results = [row[rival] for row in rows if rival in row and "verify" in row[rival]]
            if not results:
                continue
            pages = results[0]["pages"]

            def per_page(key: str, results: list[Result] = results, pages: int = pages) -> str:
                values = [result[key]["cpu"] for result in results if key in result]
                return f"{1e9 * statistics.median(values) / pages:.0f}" if values else "-"

            writes = [
                1e6 * result["changed"]["writer_cpu"] / max(1, pages // 100)
                for result in results
                if "changed" in result
            ]
            metadata = [result.get("metadata_bytes_per_page", 0) for result in results]
            lines.append(
                [
                    f"{name} {rival}",
                    per_page("verify"),
                    f"{statistics.median(writes):.2f}" if writes else "-",
                    per_page("unmerge"),
                    f"{statistics.median(metadata):.1f}" if any(metadata) else "-",
                ]
            )
    yield "\nWhat was asked for (ratios, pagemerge with its defaults)"
    yield targets(measured)
    yield "\nWhat else it costs (metadata: 24 bytes a page are the target; ksmd has 64)"
    yield table(
        [
            *("case, rival", "read all, ns a page", "write one, us", "un-merge, ns a page"),
            "metadata, bytes a page",
        ],
        lines,
    )


def targets(measured: Result) -> str:
    """What was aimed at, as far as this file measures it: asked for, found, reached."""
    cases = measured["cases"]
    lines = []

    def add(what: str, least: float, values: list[float]) -> None:
        if values:
            verdict = "yes" if statistics.median(values) >= least else "no"
            lines.append([what, f"{least:g}", *judged(values)[:2], verdict])

    for name, rows in cases.items():
        target = CASES[name].target
        if target is not None:
            add(f"converge, {CASES[name].title}", target, ratios(rows, "pagemerge", ""))
    for key, what in (("rest", "nothing has changed"), ("changed", "1 % has changed")):
        for suffix, how in (("", "smart_scan"), ("_all", "examining all")):
            # One figure for each case: the least of them is the one that counts.
            middles = {
                name: statistics.median(found)
                for name, rows in cases.items()
                if name != "instagram" and (found := ratios(rows, "pagemerge", key + suffix, key))
            }
            if middles:
                worst = min(middles, key=lambda name: middles[name])
                lines.append(
                    [
                        f"a pass when {what}, ksmd {how}; least: {worst}",
                        f"{TARGETS[key]:g}",
                        _short(middles[worst]),
                        f"{_short(middles[worst])}..{_short(max(middles.values()))}",
                        "yes" if middles[worst] >= TARGETS[key] else "no",
                    ]
                )
    # By the candidate page, where all pages are candidates. Frames come on top.
    held = {
        name: statistics.median(values)
        for name, rows in cases.items()
        if (
            values := [
                row["pagemerge"]["metadata_bytes_per_page"]
                for row in rows
                if "metadata_bytes_per_page" in row.get("pagemerge", {})
            ]
        )
    }
    if "unique" in held:
        verdict = "yes" if held["unique"] <= 24 else "no"
        most = max(held, key=lambda name: held[name])
        lines.append(
            [
                f"metadata, bytes a candidate page, at most; with frames: {most}",
                "24",
                f"{held['unique']:.1f}",
                f"{held[most]:.1f}",
                verdict,
            ]
        )
    return table(["asked for", "least", "found", "", "reached"], lines)


def publish(measured: Result, pieces: Iterable[str], into: Path | None) -> None:
    """Writes every figure to a file, if there is to be one, and prints the report.

    The file comes first: a report that fails must not cost what took so long to measure.
    """
    if into:
        into.write_text(json.dumps(measured, indent=1) + "\n")
    for piece in pieces:
        print(piece)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure pagemerge beside the kernel's ksmd and a dict of hashes.",
        epilog="What is counted, and how, is said at the head of this file.",
    )
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"of {', '.join(RIVALS)}")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of memory (1024)")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    parser.add_argument("--seed", type=int, default=1, help="of the memory's contents (1)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw bench.png and bench.svg into this folder")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: show this JSON")
    options = parser.parse_args()
    for given, known in ((options.cases, CASES), (options.rivals, RIVALS)):
        for name in given.split(","):
            if name not in known:
                parser.error(f"there is no {name}; there are {', '.join(known)}")

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    if options.source:
        measured = json.loads(options.source.read_text())
    else:
        measured = measure(
            options.cases.split(","),
            options.rivals.split(","),
            options.mib,
            options.repeat,
            options.seed,
            say,
        )
    publish(measured, report(measured), options.json)
    if options.plot:
        import plot

        for path in plot.draw(measured, options.plot):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
