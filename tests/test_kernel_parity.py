"""Counter for counter the kernel's equal: ksmd and an `Engine` over the same memory.

Each layout (parity_layouts.py) is played twice, in worker processes under this machine's own ksmd
and in this process under an `Engine(**kernel_defaults())`, with the same full passes between the
same steps. Compared after every pass: all of ksmd's counters, the cumulative ones as what was
added, and `ksm_stat` of each process with the regions that stand for it. Every byte is read back.

Single-stepped, ksmd is deterministic, so that every pass can be compared, but for one thing: how it
chooses among the dups of a chain depends on the time since the chain was last pruned. So layouts
set the prune interval to 0 (prune at every visit) or to days (at none); one that keeps the default
says so in `only_at_rest`, and only its state after the last pass is compared.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence

import hypothesis
import ksm_kernel
import pagemerge
import pytest
from hypothesis import strategies as st
from ksm_kernel import COUNTERS, Ksm
from ksm_worker import PAGE, Tag, page_bytes
from parity_layouts import (
    ALWAYS,
    NEVER,
    PER_PROCESS,
    Discard,
    Exit,
    KsmdSide,
    Layout,
    Played,
    Register,
    Row,
    Scan,
    Set,
    Side,
    Step,
    Unmap,
    UnmergeAll,
    Unregister,
    Write,
    families,
    golden,
    layouts,
    play,
)

IN_CI = os.environ.get("CI") == "true"


@pytest.fixture(scope="module")
def ksm() -> Iterator[Ksm]:
    yield from ksm_kernel.borrowed(pytest.skip, pytest.fail)


class EngineSide:
    """The engine's side: one arena of private anonymous memory, whose slices are the regions."""

    def __init__(self) -> None:
        self.engine: pagemerge.Engine | None = None
        self.arena: mmap.mmap | None = None

    def begin(self, layout: Layout) -> None:
        self.layout = layout
        self.starts = layout.starts()
        kernel = pagemerge.kernel_defaults()
        settings = {name: type(kernel[name])(value) for name, value in layout.settings.items()}
        self.engine = pagemerge.Engine(**{**kernel, **settings})
        size = layout.arena_pages() * PAGE
        self.arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.arena.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self.arena)
        # As the guard does for ksmd: with nothing registered, neither of them makes a pass.
        self.engine.register(mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.regions: dict[int, pagemerge.Region] = {}
        first = self.engine.stats()
        self.base = {name: first[name] for name in ksm_kernel.CUMULATIVE}

    def end(self) -> None:
        """Ends the engine and its memory, in this order."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        if self.arena is not None:
            self.view.release()
            self.arena.close()
            self.arena = None

    def _slice(self, region: int, first: int = 0, pages: int | None = None) -> memoryview:
        start = self.starts[region] + first
        stop = start + (len(self.layout.regions[region]) if pages is None else pages)
        return self.view[start * PAGE : stop * PAGE]

    def write(self, region: int, first: int, tags: Sequence[Tag]) -> None:
        for page, tag in enumerate(tags, first):
            if tag is not None:
                self._slice(region, page, 1)[:] = page_bytes(tag)

    def discard(self, region: int, first: int, pages: int) -> None:
        assert self.engine is not None
        self.engine.discard(self._slice(region, first, pages))

    def register(self, region: int) -> None:
        assert self.engine is not None
        self.regions[region] = self.engine.register(self._slice(region))

    def unregister(self, region: int) -> None:
        assert self.engine is not None
        self.engine.unregister(self.regions.pop(region))

    def unmap(self, region: int) -> None:
        self.discard(region, 0, len(self.layout.regions[region]))
        self.unregister(region)

    def exit(self, region: int) -> None:
        assert self.engine is not None
        # The hook that `merge` puts on an owner's end: there is no public name for dying.
        self.engine._forget(self.regions.pop(region))

    def unmerge_all(self) -> None:
        assert self.engine is not None
        seen = self.engine.stats().full_scans
        self.engine.run = pagemerge.RunMode(2)
        self.engine.run = pagemerge.RunMode(0)
        # As in the kernel it starts from 0 again; a layout goes on counting.
        self.base["full_scans"] -= seen - self.engine.stats().full_scans

    def set(self, name: str, value: int) -> int:
        assert self.engine is not None
        try:
            setattr(self.engine.settings, name, value)
        except OSError as error:
            return error.errno or -1
        except ValueError:
            return errno.EINVAL
        return 0

    def scan(self) -> Row:
        assert self.engine is not None
        now = self.engine.scan()
        row = {name: now[name] for name in COUNTERS}
        for name, first in self.base.items():
            row[name] -= first
        processes = len(self.layout.regions) if self.layout.own_processes else 1
        row |= {f"{name}[{n}]": 0 for n in range(processes) for name in PER_PROCESS}
        for number, region in self.regions.items():
            stat = region.stats()
            for name in PER_PROCESS:
                row[f"{name}[{number if self.layout.own_processes else 0}]"] += stat[name]
        return row

    def wrong(self, region: int, tags: Sequence[Tag], holes: bool) -> list[int]:
        return [
            page
            for page, tag in enumerate(tags)
            if (holes or tag is not None) and self._slice(region, page, 1) != page_bytes(tag)
        ]


# ---------------------------------------------------------------------------------- the comparison


def _differing(kernel: Row, engine: Row) -> list[str]:
    assert kernel.keys() == engine.keys()
    return [name for name in kernel if kernel[name] != engine[name]]


def _short(tags: tuple[Tag, ...]) -> str:
    """The contents of a region, repeated ones folded."""
    folded: list[tuple[Tag, int]] = []
    for tag in tags:
        if folded and folded[-1][0] == tag:
            folded[-1] = (tag, folded[-1][1] + 1)
        else:
            folded.append((tag, 1))
    return " ".join(f"{tag}" if count == 1 else f"{count}x{tag}" for tag, count in folded)


def report(layout: Layout, kernel: Played, engine: Played) -> str:
    """The layout, the passes until the first that differs, and both rows of that one in full."""
    lines = [f"{layout.label} {dict(layout.settings)}"]
    for number, tags in enumerate(layout.regions):
        note = ", not registered at first" if number in layout.unregistered else ""
        lines.append(f"region {number} ({len(tags)} pages{note}): {_short(tags)}")
    lines += [f"step {number}: {step}" for number, step in enumerate(layout.steps)]
    if layout.own_processes:
        lines.append("each region in a process of its own")
    if kernel.answers != engine.answers:
        lines.append(f"answers to settings: kernel {kernel.answers}, engine {engine.answers}")
    shown = [name for name in COUNTERS if name not in ("full_scans", "general_profit")]
    lines.append("pass step kernel | engine: " + " ".join(shown))
    rows = enumerate(zip(kernel.rows, engine.rows, kernel.steps, strict=True))
    for number, (theirs, ours, step) in rows:
        mark = "  <<" if _differing(theirs, ours) else ""
        left, right = ("/".join(str(row[name]) for name in shown) for row in (theirs, ours))
        lines.append(f"{number + 1:4} {step:4} {left} | {right}{mark}")
    for number, (theirs, ours) in enumerate(zip(kernel.rows, engine.rows, strict=True)):
        if names := _differing(theirs, ours):
            lines.append(f"first difference, pass {number + 1}: counter, kernel, engine")
            lines += [f"  {name:36} {theirs[name]:10} {ours[name]:10}" for name in names]
            break
    return "\n".join(lines)


def agree(layout: Layout, kernel: Played, engine: Played) -> bool:
    """Whether both sides counted the same, pass by pass or at rest."""
    theirs, ours = kernel.rows, engine.rows
    if layout.only_at_rest:
        theirs, ours = theirs[-1:], ours[-1:]
    return theirs == ours and kernel.answers == engine.answers


def compare(layout: Layout, ksm: Ksm) -> None:
    """Plays the layout on both sides; fails with a report when they differ."""
    kernel = play(layout, KsmdSide(ksm))
    side = EngineSide()
    try:
        engine = play(layout, side)
    finally:
        side.end()
    if not agree(layout, kernel, engine):
        pytest.fail(report(layout, kernel, engine), pytrace=False)
    for step, answer in zip(
        (step for step in layout.steps if isinstance(step, Set)), kernel.answers, strict=True
    ):
        assert answer == (errno.EBUSY if step.refused else 0), f"the kernel's answer to {step}"


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: layout.label)
def test_engine_counts_as_ksmd_does(layout: Layout, ksm: Ksm) -> None:
    compare(layout, ksm)


@pytest.mark.parametrize("smart", [0, 1])
def test_engine_counts_as_ksmd_once_did(smart: int) -> None:
    """Needs no KSM: rows that were recorded, by another program, on a kernel that has it."""
    for layout, rows in golden(smart):
        side = EngineSide()
        try:
            engine = play(layout, side)
        finally:
            side.end()
        recorded = Played(
            [
                {**row, **dict(zip(COUNTERS, right, strict=True))}
                for row, right in zip(engine.rows, rows, strict=True)
            ],
            engine.steps,
            engine.answers,
        )
        if not agree(layout, recorded, engine):
            pytest.fail(report(layout, recorded, engine), pytrace=False)


def test_the_layouts_are_many_and_distinct() -> None:
    bare = [layout for family in families().values() for layout in family]
    assert len({layout.name for layout in bare}) == len(bare) >= 40
    labels = [layout.label for layout in layouts()]
    assert len(set(labels)) == len(labels)


# ------------------------------------------------------------------------------ generated layouts

CONTENTS: list[Tag] = [None, 0, 0, 1, 1, 1, 2, 2, 3, 4, -1, -2]


@st.composite
def generated(draw: st.DrawFn) -> Layout:
    """A few small regions over few contents, so that pages meet, and a script to keep them busy."""
    fresh = iter(range(100, 10_000))  # contents that no other page has

    def tags(least: int, most: int) -> tuple[Tag, ...]:
        drawn = draw(st.lists(st.sampled_from([*CONTENTS, "new"]), min_size=least, max_size=most))
        return tuple(next(fresh) if tag == "new" else tag for tag in drawn)  # type: ignore[misc]

    count = draw(st.integers(1, 3))
    regions = tuple(tags(1, 24) for _ in range(count))
    own_processes = draw(st.booleans())
    registered, gone = set(range(count)), set[int]()
    steps: list[Step] = [Scan(draw(st.integers(1, 4)))]
    swept: set[int] = set()  # un-registered, and a pass has come by since
    for _ in range(draw(st.integers(0, 12))):
        region = draw(st.integers(0, count - 1))
        pages = len(regions[region])
        kinds: list[type[Step]] = [Scan, Scan]
        if region not in gone:
            kinds += [Write] * 4
            # In one process the order of scanning goes by address, in an engine by registration:
            # the same only until a pass has swept up what was un-registered.
            if region not in registered and (own_processes or region not in swept):
                kinds += [Register] * 4
        if region in registered:
            kinds += [Discard, Discard, Unregister, Unregister, Unmap]
            kinds += [Exit] * own_processes
        if registered:
            kinds.append(UnmergeAll)
        kind = draw(st.sampled_from(kinds))
        if kind is Scan:
            steps.append(Scan(draw(st.integers(1, 3))))
        elif kind is Write:
            first = draw(st.integers(0, pages - 1))
            steps.append(Write(region, first, tags(1, pages - first)))
        elif kind is Discard:
            first = draw(st.integers(0, pages - 1))
            steps.append(Discard(region, first, draw(st.integers(1, pages - first))))
        elif kind is Register:
            registered.add(region)
            swept.discard(region)
            steps.append(Register(region))
        elif kind is Unregister:
            registered.remove(region)
            steps.append(Unregister(region))
        elif kind in (Unmap, Exit):
            registered.remove(region)
            gone.add(region)
            steps.append(Exit(region) if kind is Exit else Unmap(region))
        else:
            steps.append(UnmergeAll())
        if draw(st.booleans()):
            steps.append(Scan(1))
        if isinstance(steps[-1], Scan):
            swept |= set(range(count)) - registered
    steps.append(Scan(3))
    settings = {
        "smart_scan": draw(st.integers(0, 1)),
        "use_zero_pages": draw(st.integers(0, 1)),
        "max_page_sharing": draw(st.sampled_from([2, 3, 5, 256])),
        "stable_node_chains_prune_millisecs": draw(st.sampled_from([ALWAYS, NEVER])),
    }
    return Layout("generated", regions, tuple(steps), settings, own_processes=own_processes)


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=IN_CI,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
)
@hypothesis.given(layout=generated())
def test_engine_counts_as_ksmd_does_on_generated_layouts(layout: Layout, ksm: Ksm) -> None:
    compare(layout, ksm)


# ----------------------------------------------------------------------- the comparison can fail


class _Miscounting(KsmdSide):
    """ksmd, but one counter is off by one in one pass, or one page reads wrong."""

    def __init__(self, ksm: Ksm, counter: str, in_pass: int) -> None:
        super().__init__(ksm)
        self.counter, self.left = counter, in_pass

    def scan(self) -> Row:
        row = super().scan()
        self.left -= 1
        row[self.counter] += self.left == 0
        return row


@pytest.mark.parametrize("counter", [*COUNTERS, *(f"{name}[0]" for name in PER_PROCESS)])
def test_a_counter_off_by_one_in_one_pass_is_reported(ksm: Ksm, counter: str) -> None:
    layout = Layout("probe", ((1, 1, 2),), (Scan(3),), {"smart_scan": 0})
    right = play(layout, KsmdSide(ksm))
    wrong = play(layout, _Miscounting(ksm, counter, 2))
    assert agree(layout, right, right)
    assert not agree(layout, right, wrong)
    text = report(layout, right, wrong)
    assert "first difference, pass 2" in text
    assert counter in text.splitlines()[-1]


@pytest.mark.parametrize("kind", ["kernel", "engine"])
def test_a_page_that_reads_wrong_is_reported(ksm: Ksm, kind: str) -> None:
    layout = Layout("probe", ((1, None, 2),), (Scan(2), Discard(0, 0, 1), Scan(1)), {})
    ours = EngineSide()
    side: Side = KsmdSide(ksm) if kind == "kernel" else ours
    try:
        play(layout, side)
        assert side.wrong(0, (None, None, 2), True) == []
        assert side.wrong(0, (1, 5, 2), True) == [0, 1]
        assert side.wrong(0, (0, None, 3), False) == [2]
    finally:
        ours.end()
