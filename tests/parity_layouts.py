"""Memory layouts, and what happens to them, for the comparison with the kernel.

A `Layout` is data: what the pages of each region hold, which settings apply, and a script of steps.
`play` plays it on a `Side`: on ksmd (`KsmdSide`, here), or on an `Engine`, for the comparison in
tests/test_kernel_parity.py. A page's content is a tag (see `ksm_worker.page_bytes`): None = never
touched, 0 = zeros, n > 0 = content number n, n < 0 = one that differs from its like only at its
very end. Contents of positive tags sort as the tags do, so a layout can say on which side of
another content a search goes on.

Regions lie in one arena, in ascending order, one untouched page apart. `own_processes` gives each
region a process of its own on the kernel's side. To ksmd, a process is what a region is to an
engine: its place in the order of scanning is given by registration, not by address, so layouts
that register a region again after a pass has swept it up use that.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ksm_kernel
from ksm_worker import Tag

NEVER = 1_000_000_000  # prune interval that no test reaches: a chain is pruned at no visit
ALWAYS = 0  # ... and at each


class Scan(NamedTuple):
    """So many full passes."""

    passes: int


class Write(NamedTuple):
    """Writes whole pages, from page `first` of the region on; None leaves one alone."""

    region: int
    first: int
    tags: tuple[Tag, ...]


class Discard(NamedTuple):
    """MADV_DONTNEED; `Engine.discard`."""

    region: int
    first: int
    pages: int


class Unregister(NamedTuple):
    """MADV_UNMERGEABLE; `Engine.unregister`."""

    region: int


class Register(NamedTuple):
    """MADV_MERGEABLE; `Engine.register`. For a region that is not registered."""

    region: int


class Unmap(NamedTuple):
    """The memory ends, by munmap; `Engine.discard`, then `unregister`."""

    region: int


class Exit(NamedTuple):
    """The owner ends, and its memory with it; what `merge` hooks to the end of an array's owner.

    Only with `own_processes`. To ksmd, a process that exits comes first in the next pass.
    """

    region: int


class Set(NamedTuple):
    """Changes a setting. With `refused`, both sides must answer EBUSY and change nothing."""

    name: str
    value: int
    refused: bool = False


class UnmergeAll(NamedTuple):
    """`run=2`, then `run=0`."""


Step = Scan | Write | Discard | Unregister | Register | Unmap | Exit | Set | UnmergeAll


@dataclass(frozen=True)
class Layout:
    """What is played on both sides."""

    name: str
    regions: tuple[tuple[Tag, ...], ...]
    steps: tuple[Step, ...]
    settings: Mapping[str, int] = field(default_factory=dict)
    own_processes: bool = False
    #: Regions that are not registered at the start.
    unregistered: frozenset[int] = frozenset()
    #: Why only the state at rest can be compared; empty: every pass is.
    only_at_rest: str = ""

    @property
    def label(self) -> str:
        """The name and its settings, for a test's id."""
        short = {"smart_scan": "smart", "use_zero_pages": "zero", "max_page_sharing": "max"}
        said = [f"{short[name]}{self.settings[name]}" for name in short if name in self.settings]
        return "-".join([self.name, *said])

    def starts(self) -> list[int]:
        """The page of the arena at which each region begins."""
        sizes = [len(tags) + 1 for tags in self.regions]
        return [0, *itertools.accumulate(sizes)][:-1]

    def arena_pages(self) -> int:
        """How long the arena is."""
        return sum(len(tags) + 1 for tags in self.regions)


def _unique(count: int, first: int = 1000) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def _shuffled(tags: tuple[Tag, ...], seed: int) -> tuple[Tag, ...]:
    mixed = list(tags)
    random.Random(seed).shuffle(mixed)
    return tuple(mixed)


#: 20 x A, 5 x B, 2 x C, 13 unique, 10 zero, 14 untouched.
MIX: tuple[Tag, ...] = (71,) * 20 + (72,) * 5 + (73,) * 2 + _unique(13) + (0,) * 10 + (None,) * 14
CHAIN = {"max_page_sharing": 4}


def _one(name: str, tags: tuple[Tag, ...], *steps: Step, **settings: int) -> Layout:
    """One region; scans until it rests unless there are steps."""
    return Layout(name, (tags,), steps or (Scan(6),), settings)


def _static() -> Iterator[Layout]:
    """Memory that does not change. Played with every combination of settings."""
    yield _one("two_identical", (1, 1))
    yield _one("ten_identical", (1,) * 10)
    yield _one("identical_to_the_limit", (1,) * 256)
    yield _one("identical_one_over", (1,) * 257)
    yield _one("identical_600", (1,) * 600)
    yield _one("unique_64", _unique(64), Scan(24))
    yield _one("unique_descending", tuple(reversed(_unique(64))))
    yield _one("unique_shuffled", _shuffled(_unique(200), 1))
    yield _one("nothing_touched", (None,) * 16, Scan(3))
    yield _one("mix", MIX)
    yield _one("mix_shuffled", _shuffled(MIX, 2))
    yield _one("holes", tuple(t for n in range(20) for t in (1, None, n % 3 + 5, None, None)))
    yield _one("pairs_far_apart", _unique(50) + _unique(50))
    yield _one("runs", tuple(_unique(16)) * 6)
    yield _one("runs_shifted", (*_unique(16), None, *_unique(17), 7, *_unique(16)))
    yield _one("zeros_100", (0,) * 100)
    yield _one("zeros_600", (0,) * 600)
    yield _one("zeros_among_others", (0, 1, 0, 2, 0, 1, 0, 3) * 12)
    yield _one("differ_at_the_end", tuple(-n for n in (1, 2, 3, 2, 1, 4, 5, 4, 4)) * 3)
    yield _one("two_values_in_turn", (1, 2) * 40)
    yield _one("seven_values_many_sharers", _shuffled(tuple(range(1, 8)) * 20, 3))
    yield Layout("two_regions", ((1,) * 7 + (2,) * 3, (2,) * 4 + (1,) * 9), (Scan(6),))
    yield Layout(
        "two_processes",
        (MIX, MIX),
        (Scan(6),),
        own_processes=True,
    )
    yield Layout(
        "four_regions_equal",
        (_unique(12), _unique(12), _unique(12)[::-1], _unique(12)),
        (Scan(6),),
        own_processes=True,
    )


def _changing() -> Iterator[Layout]:
    """Memory that is written, given up and registered while it is scanned."""
    ten = (1,) * 10
    yield _one("three_written_equal", ten, Scan(4), Write(0, 2, (2, None, 2, 2)), Scan(4))
    yield _one("three_written_apart", ten, Scan(4), Write(0, 2, (2, None, 3, 4)), Scan(12))
    yield _one("written_with_the_same", ten, Scan(4), Write(0, 4, (1, 1)), Scan(4))
    yield _one("all_but_one_written", ten, Scan(4), Write(0, 0, _unique(9)), Scan(4))
    yield _one("all_written_apart", ten, Scan(4), Write(0, 0, _unique(10)), Scan(4))
    yield _one("all_written_equal", ten, Scan(4), Write(0, 0, (2,) * 10), Scan(4))
    yield _one("written_to_zero", ten, Scan(3), Write(0, 3, (0,) * 4), Scan(5))
    yield _one("zeros_written", (0,) * 12, Scan(4), Write(0, 2, (5, 5, 0, 6)), Scan(5))
    yield _one(
        "zeros_written_and_back",
        (0,) * 8 + (1,) * 4,
        Scan(4),
        Write(0, 0, (9,) * 4),
        Scan(1),
        Write(0, 0, (0,) * 4),
        Scan(5),
    )
    yield _one("zeros_discarded", (0,) * 12, Scan(4), Discard(0, 3, 5), Scan(3))
    yield _one(
        "written_between_all_passes",
        ten,
        *(step for n in range(12) for step in (Write(0, 3, (50 + n,)), Scan(1))),
        Scan(5),
    )
    yield _one(
        "written_before_the_first_pass_ends_calm",
        (1, 2, 3, 4) * 4,
        Scan(1),
        Write(0, 0, (4, 3, 2, 1)),
        Scan(1),
        Write(0, 4, (4, 3, 2, 1)),
        Scan(5),
    )
    yield _one(
        "back_to_the_old_content",
        (1,) * 6 + (2,) * 6,
        Scan(3),
        Write(0, 0, (2, 9)),
        Scan(1),
        Write(0, 0, (1, 1)),
        Scan(4),
    )
    yield _one(
        "back_before_anyone_looked",
        (1,) * 6 + _unique(4),
        Scan(3),
        Write(0, 1, (9, 9)),
        Write(0, 1, (1, 1)),
        Write(0, 6, (8,)),
        Write(0, 6, (1000,)),
        Scan(3),
    )
    yield _one(
        "two_contents_swap",
        (1,) * 5 + (2,) * 5,
        Scan(3),
        Write(0, 0, (2,) * 5 + (1,) * 5),
        Scan(5),
    )
    yield _one(
        "swap_again_and_again",
        (1, 2) * 5,
        *(
            step
            for n in range(5)
            for step in (Write(0, 0, ((2, 1), (1, 2))[n % 2] * 5), Scan(1 + n % 3))
        ),
        Scan(4),
    )
    yield _one("half_discarded", ten, Scan(4), Discard(0, 0, 5), Scan(3))
    yield _one(
        "discarded_and_written_again",
        ten + (0,) * 4,
        Scan(4),
        Discard(0, 4, 8),
        Write(0, 5, (1, 1, 7)),
        Scan(1),
        Write(0, 8, (1, 0, 0)),
        Scan(4),
    )
    yield _one("discarded_in_the_unstable_tree", _unique(20), Scan(3), Discard(0, 5, 9), Scan(3))
    yield _one(
        "all_discarded",
        (1,) * 12 + (0,) * 3,
        Scan(3),
        Discard(0, 0, 15),
        Scan(3),
        **CHAIN,
    )
    half = ((1,) * 5 + (0,) * 2, (1,) * 5 + (0,) * 2)
    yield Layout("unmerge_first_half", half, (Scan(4), Unregister(0), Scan(4)))
    yield Layout("unmerge_second_half", half, (Scan(4), Unregister(1), Scan(4)))
    yield Layout("unmerge_both", half, (Scan(4), Unregister(0), Unregister(1), Scan(3)))
    again = (Scan(4), Unregister(1), Register(1), Scan(4))
    yield Layout("unmerge_and_back_at_once", half, again)
    yield Layout("unmerge_and_back_at_once_in_a_chain", ((1,) * 7, (1,) * 6), again, CHAIN)
    later = (Scan(4), Unregister(0), Scan(2), Register(0), Scan(5))
    yield Layout("unmerge_and_back_later", half, later, own_processes=True)
    yield Layout(
        "unmerge_write_and_back",
        half,
        (Scan(4), Unregister(1), Write(1, 0, (1, 9, 9)), Register(1), Scan(4)),
    )
    yield Layout(
        "registered_later",
        ((1,) * 4, (1,) * 4 + _unique(3), (1, 1, 1000, 1001)),
        (Scan(3), Register(1), Scan(2), Register(2), Scan(6)),
        own_processes=True,
        unregistered=frozenset({1, 2}),
    )
    yield Layout("owner_exits", half, (Scan(4), Exit(0), Scan(3)), own_processes=True)
    yield Layout("later_owner_exits", half, (Scan(4), Exit(1), Scan(3)), own_processes=True)
    yield Layout("unmapped_in_a_process", half, (Scan(4), Unmap(0), Scan(3)), own_processes=True)
    yield Layout("unmapped", half, (Scan(4), Unmap(1), Scan(3)))
    yield Layout("all_unmapped", ((1,) * 12,), (Scan(3), Unmap(0), Scan(3)), CHAIN)
    yield Layout(
        "owner_of_the_tree_page_exits",
        (_unique(6), _unique(6)[:3]),
        (Scan(1), Exit(0), Scan(4)),
        own_processes=True,
    )
    yield _one("unmerge_all", MIX, Scan(4), UnmergeAll(), Scan(4))
    yield _one("unmerge_all_in_a_chain", (1,) * 30, Scan(3), UnmergeAll(), Scan(4))
    for end in (Unmap, Exit):
        yield _come_and_go(end)


def _come_and_go(end: type[Unmap | Exit]) -> Layout:
    return Layout(
        f"many_regions_come_and_go_by_{end.__name__.lower()}",
        ((1, 2, 3, 0) * 3, (3, 2, 1, 4) * 3, (4, 0, None, 1) * 3, (2,) * 9),
        (
            Scan(2),
            Unregister(2),
            Scan(1),
            Write(0, 2, (4, 4, 4)),
            Scan(2),
            Register(2),
            end(1),
            Scan(2),
            Write(3, 0, (0, 1, 2, 3)),
            Scan(5),
        ),
        own_processes=True,
    )


def _late() -> Iterator[Layout]:
    """Smart scan: pages that are passed over meet late-comers by their ages, or never."""
    for age in (3, 6, 7, 9, 11, 13):
        yield Layout(
            f"late_comer_after_{age}",
            ((1, 2, 3), (1, 2, 3)),
            (Scan(age), Register(1), Scan(16)),
            own_processes=True,
            unregistered=frozenset({1}),
        )
    yield Layout(
        "late_comer_finds_a_frame",
        ((1,) * 3, (1,) * 2),
        (Scan(12), Register(1), Scan(4)),
        own_processes=True,
        unregistered=frozenset({1}),
    )
    yield _one(
        "old_page_is_written",
        (*_unique(4), 1, 1),
        Scan(11),
        Write(0, 0, (1, 7, 7)),
        Scan(14),
    )
    yield _one("merged_late_and_broken", (1, 2), Scan(10), Write(0, 1, (1,)), Scan(20))
    yield _one(
        "changing_all_the_time",
        (1, 2, 3),
        *(step for n in range(20) for step in (Write(0, 0, (90 + n, 90 + n)), Scan(1))),
    )


def _chains() -> Iterator[Layout]:
    """Stale nodes, empty chains, dissolved chains, the choice of a dup. At a fixed limit of 4."""
    twelve = (50,) * 12
    for prune, word in ((NEVER, "never"), (ALWAYS, "always")):
        yield _one(
            f"choice_of_a_dup_pruned_{word}",
            twelve + (None,) * 3,
            Scan(3),
            Write(0, 0, (1000,)),
            Write(0, 4, (1001, 1002, 1003)),
            Scan(1),
            Write(0, 12, (50,)),
            Scan(2),
            Write(0, 13, (50,)),
            Scan(2),
            Write(0, 14, (50,)),
            Scan(3),
            stable_node_chains_prune_millisecs=prune,
            **CHAIN,
        )
        # The dups are emptied one by one, and searches pass the chain on their way to both sides.
        yield _one(
            f"dups_emptied_in_turn_pruned_{word}",
            twelve + (40, 60) * 3,
            Scan(3),
            Write(0, 0, (10, 90, 11, 91)),
            Scan(2),
            Write(0, 8, (12, 92, 13, 93)),
            Scan(2),
            Write(0, 4, (14, 94, 15, 95)),
            Scan(2),
            Write(0, 0, (50, 50)),
            Scan(3),
            stable_node_chains_prune_millisecs=prune,
            **CHAIN,
        )
        yield _one(
            f"all_sharers_written_pruned_{word}",
            twelve,
            Scan(3),
            Write(0, 0, _unique(12)),
            Scan(3),
            Write(0, 3, (50, 50, 50)),
            Scan(4),
            stable_node_chains_prune_millisecs=prune,
            **CHAIN,
        )
        yield _one(
            f"refilled_from_both_ends_pruned_{word}",
            (50,) * 18 + (None,) * 8,
            Scan(3),
            Write(0, 1, (20, None, 80, None, None, 21, 81, None, None, 22, 82)),
            Scan(2),
            Write(0, 18, (50,) * 4),
            Scan(2),
            Write(0, 22, (50,) * 4),
            Scan(4),
            stable_node_chains_prune_millisecs=prune,
            **CHAIN,
        )
    yield _one("empty_chain_lingers", twelve, Scan(3), Discard(0, 0, 12), Scan(3), **CHAIN)
    yield Layout(
        "empty_chain_is_passed",
        (twelve, (None,) * 3),
        (Scan(3), Discard(0, 0, 12), Scan(1), Write(1, 0, (10, 90)), Scan(3)),
        CHAIN,
    )
    yield _one(
        "chain_dissolves_when_passed",
        twelve,
        Scan(3),
        Write(0, 4, _unique(8)),
        Scan(4),
        **CHAIN,
    )
    yield _one(
        "chain_left_with_one_that_nobody_passes",
        twelve,
        Scan(3),
        Discard(0, 4, 8),
        Scan(2),
        Write(0, 5, (50,)),
        Scan(3),
        **CHAIN,
    )
    yield _one(
        "stale_nodes_of_many_contents",
        _shuffled(tuple(range(10, 42)) * 2, 4),
        Scan(3),
        Write(0, 0, _unique(40)),
        Scan(1),
        Write(0, 10, tuple(range(10, 42))),
        Scan(4),
    )
    yield _one("frame_with_one_page_left", (50,) * 3, Scan(3), Discard(0, 0, 2), Scan(4), **CHAIN)
    yield _one(
        "one_page_left_finds_company",
        (50,) * 3 + (None,),
        Scan(3),
        Write(0, 0, (7, 8)),
        Scan(2),
        Write(0, 3, (50,)),
        Scan(3),
    )
    yield _one(
        "leftovers_of_full_frames_meet",
        (50,) * 5 + (51,) * 5 + (52,) * 6,
        Scan(3),
        Write(0, 15, (50,)),
        Scan(3),
        Write(0, 9, (50,)),
        Scan(3),
        **CHAIN,
    )
    yield replace(
        _one("default_prune_interval", twelve + (40, 60) * 3, Scan(3), Write(0, 0, (9,)), Scan(6)),
        settings={**CHAIN, "stable_node_chains_prune_millisecs": 2000},
        only_at_rest="whether a visit prunes a chain depends on the time since the last",
    )


def _tuned() -> Iterator[Layout]:
    """Settings that change while memory is registered."""
    zeros = (0,) * 10 + (None,) * 8
    yield _one(
        "zero_pages_switched_on_and_off",
        zeros,
        Scan(3),
        Set("use_zero_pages", 1),
        Scan(2),
        Write(0, 10, (0,) * 4),
        Scan(3),
        Set("use_zero_pages", 0),
        Write(0, 14, (0,) * 4),
        Scan(4),
        use_zero_pages=0,
    )
    yield _one(
        "smart_scan_switched",
        _unique(8) + (1,) * 4,
        Scan(7),
        Set("smart_scan", 0),
        Scan(3),
        Set("smart_scan", 1),
        Scan(9),
        smart_scan=1,
    )
    yield _one(
        "limit_is_busy_while_pages_are_shared",
        (1,) * 12,
        Scan(3),
        Set("max_page_sharing", 5, refused=True),
        Set("max_page_sharing", 4),  # the present value is never refused
        Discard(0, 0, 12),
        Scan(2),
        Set("max_page_sharing", 5),  # purges the empty chain
        Scan(1),
        Write(0, 0, (1,) * 12),
        Scan(4),
        **CHAIN,
    )
    yield _one(
        "limit_changes_before_anything_merged",
        (1,) * 12,
        Scan(1),
        Set("max_page_sharing", 3),
        Scan(4),
    )


def _has_zeros(layout: Layout) -> bool:
    written = [tag for step in layout.steps if isinstance(step, Write) for tag in step.tags]
    return any(0 in tags for tags in (*layout.regions, written))


def _with(layout: Layout, **more: int) -> Layout:
    return replace(layout, settings={**layout.settings, **more})


def families() -> dict[str, list[Layout]]:
    """The layouts without their combinations of settings, by kind."""
    kinds = (_static, _changing, _late, _chains, _tuned)
    return {kind.__name__[1:]: list(kind()) for kind in kinds}


def layouts() -> list[Layout]:
    """Every layout in every combination of settings in which it is played."""
    found = []
    for family, bare in families().items():
        for layout in bare:
            choices: dict[str, tuple[int, ...]] = {"smart_scan": (0, 1)}
            if _has_zeros(layout):
                choices["use_zero_pages"] = (0, 1)
            if family in ("static", "changing"):
                choices["max_page_sharing"] = (2, 3, 5, 256)
            for name in layout.settings:
                choices.pop(name, None)
            for values in itertools.product(*choices.values()):
                # Explicit, since both sides are compared pass by pass: the default hangs on time.
                more = {"stable_node_chains_prune_millisecs": NEVER}
                more |= zip(choices, values, strict=True)
                found.append(_with(layout, **{**more, **layout.settings}))
    return found


# ------------------------------------------------------------------------------- recorded layouts

ONES: tuple[Tag, ...] = (1,) * 10


def _case(*regions: tuple[Tag, ...], steps: tuple[Step, ...] = (), **settings: int) -> Layout:
    return Layout("golden", regions, steps, settings)


def _processes(*regions: tuple[Tag, ...], steps: tuple[Step, ...] = (), **settings: int) -> Layout:
    return Layout("golden", regions, steps, settings, own_processes=True)


def _select(prune: int) -> Layout:
    """12 equal pages in three dups, cut to 3, 1 and 4 sharers; then three more, one by one."""
    cut = (Write(0, 0, (90,)), Write(0, 4, (91, 92, 93)), Scan(1))
    more = tuple(step for page in (12, 13, 14) for step in (Write(0, page, (1,)), Scan(2)))
    return _case(
        (1,) * 12 + (None,) * 3,
        steps=(Scan(3), *cut, *more),
        max_page_sharing=4,
        stable_node_chains_prune_millisecs=prune,
    )


def _apart(*pages: int) -> tuple[Step, ...]:
    return (Scan(4), *(Write(0, page, (100 + page,)) for page in pages))


#: The steps are those before the last scans; as many of these are added as rows were recorded.
GOLDEN = {
    "a_identical_2": _case((1,) * 2),
    "a_identical_10": _case(ONES),
    "a_identical_256": _case((1,) * 256),
    "a_identical_257": _case((1,) * 257),
    "a_identical_258": _case((1,) * 258),
    "b_513_identical_max256": _case((1,) * 513),
    "b_600_identical_max256": _case((1,) * 600),
    "c_zero_100_use0": _case((0,) * 100),
    "c_zero_100_use1": _case((0,) * 100, use_zero_pages=1),
    "c_zero_300_use0": _case((0,) * 300),
    "c_zero_300_use1": _case((0,) * 300, use_zero_pages=1),
    "d_unique_64": _case(tuple(range(1, 65))),
    "d_unique_64_smart": _case(tuple(range(1, 65)), smart_scan=1),
    "e_mix_use0": _case(MIX),
    "e_mix_use1": _case(MIX, use_zero_pages=1),
    "f_rewrite_same_content": _case(ONES, steps=(Scan(4), Write(0, 4, (1,)))),
    "f_write_3_of_10_distinct": _case(ONES, steps=_apart(2, 5, 9)),
    "f_write_3_of_10_same_value": _case(
        ONES, steps=(Scan(4), Write(0, 2, (2,)), Write(0, 5, (2,)), Write(0, 9, (2,)))
    ),
    "f_write_all": _case(ONES, steps=_apart(*range(10))),
    "f_write_all_but_one": _case(ONES, steps=_apart(*range(9))),
    "g_unmergeable_first_half": _case((1,) * 5, (1,) * 5, steps=(Scan(4), Unregister(0))),
    "g_unmergeable_second_half": _case((1,) * 5, (1,) * 5, steps=(Scan(4), Unregister(1))),
    "g_unmergeable_zero_half": _case(
        (0,) * 50, (0,) * 50, steps=(Scan(4), Unregister(0)), use_zero_pages=1
    ),
    "h_100_identical_max2": _case((1,) * 100, max_page_sharing=2),
    "h_101_identical_max2": _case((1,) * 101, max_page_sharing=2),
    "h_10_identical_max3": _case(ONES, max_page_sharing=3),
    "h_11_identical_max3": _case((1,) * 11, max_page_sharing=3),
    "i_two_procs_10_identical": _processes(ONES, ONES),
    "i_two_procs_mix_use1": _processes(MIX, MIX, use_zero_pages=1),
    "i_two_procs_unique_pairs": _processes(tuple(range(1, 33)), tuple(range(1, 33))),
    "k_exit_of_one_of_two": _processes(ONES, ONES, steps=(Scan(3), Exit(0))),
    "l_dontneed_half": _case(ONES, steps=(Scan(4), Discard(0, 0, 5))),
    "l_munmap_all": _case(ONES, steps=(Scan(3), Unmap(0)), max_page_sharing=4),
    "m_select_dup_no_prune": _select(NEVER),
    "m_select_dup_prune_always": _select(ALWAYS),
    "n_smart_257_identical_12_scans": _case((1,) * 257, smart_scan=1),
    "n_smart_one_unique_page_45_scans": _case((1,), smart_scan=1),
    "n_smart_always_changing_page_24_scans": _case(
        (1,),
        steps=(Scan(1), *(s for n in range(23) for s in (Write(0, 0, (9 + n,)), Scan(1)))),
        smart_scan=1,
    ),
}


def recorded(smart: int) -> dict[str, Any]:
    """The cases of one file of golden rows, by name."""
    text = (Path(__file__).parent / "data" / f"golden_smart{smart}.json").read_text()
    document = json.loads(text)
    assert tuple(document["columns"]) == ksm_kernel.COUNTERS
    assert document["smart_scan"] == smart
    cases: dict[str, Any] = document["cases"]
    return cases


def golden(smart: int) -> Iterator[tuple[Layout, list[list[int]]]]:
    """The recorded layouts, with a row of `ksm_kernel.COUNTERS` for each pass."""
    cases = recorded(smart)
    for name, bare in GOLDEN.items():
        rows: list[list[int]] = cases[name]["rows"]
        passes = sum(step.passes for step in bare.steps if isinstance(step, Scan))
        steps = (*bare.steps, Scan(len(rows) - passes))
        settings = {"smart_scan": smart, **bare.settings}
        yield replace(bare, name=name, steps=steps, settings=settings), rows


# ------------------------------------------------------------------------------- playing a layout

Row = dict[str, int]
PER_PROCESS = ("ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages", "ksm_process_profit")


class Side(Protocol):
    """What plays a layout: ksmd, or an engine. Regions are known by their number."""

    def begin(self, layout: Layout) -> None:
        """Takes the settings and maps the arena, nothing of it written or registered yet."""

    def write(self, region: int, first: int, tags: Sequence[Tag]) -> None: ...
    def discard(self, region: int, first: int, pages: int) -> None: ...
    def register(self, region: int) -> None: ...
    def unregister(self, region: int) -> None: ...
    def unmap(self, region: int) -> None: ...
    def exit(self, region: int) -> None: ...
    def unmerge_all(self) -> None: ...

    def set(self, name: str, value: int) -> int:
        """The errno of a refusal, or 0."""

    def scan(self) -> Row:
        """One full pass; all counters after it, those of `PER_PROCESS` as `name[number]`."""

    def wrong(self, region: int, tags: Sequence[Tag], holes: bool) -> list[int]:
        """Pages that do not read as their tags say. Untouched ones are looked at if `holes`."""


@dataclass
class Played:
    """What came of a layout on one side."""

    rows: list[Row]
    #: The step that each row belongs to.
    steps: list[int]
    #: The errno of each `Set`.
    answers: list[int]


def play(layout: Layout, side: Side) -> Played:
    """Plays it, and checks along the way that every page reads back what was written last."""
    played = Played([], [], [])
    holds: list[list[Tag] | None] = [list(tags) for tags in layout.regions]

    def read_back(after: str, holes: bool = False) -> None:
        for region, tags in enumerate(holds):
            bad = side.wrong(region, tags, holes) if tags is not None else []
            assert not bad, f"{layout.label}: pages {bad} of region {region} are wrong {after}"

    side.begin(layout)
    for region, tags in enumerate(layout.regions):
        side.write(region, 0, tags)
        if region not in layout.unregistered:
            side.register(region)
    for number, step in enumerate(layout.steps):
        match step:
            case Scan(passes):
                for _ in range(passes):
                    played.rows.append(side.scan())
                    played.steps.append(number)
            case Write(region, first, tags):
                side.write(region, first, tags)
                now = holds[region]
                assert now is not None, "a layout writes only to memory that is there"
                for page, tag in enumerate(tags, first):
                    now[page] = now[page] if tag is None else tag
            case Discard(region, first, pages):
                side.discard(region, first, pages)
                now = holds[region]
                assert now is not None, "a layout discards only memory that is there"
                now[first : first + pages] = [None] * pages
            case Register(region):
                side.register(region)
            case Unregister(region):
                side.unregister(region)
            case Unmap(region):
                side.unmap(region)
                holds[region] = None
            case Exit(region):
                assert layout.own_processes, "the end of a process is the end of one region"
                side.exit(region)
                holds[region] = None
            case Set(name, value):
                played.answers.append(side.set(name, value))
            case UnmergeAll():
                side.unmerge_all()
        read_back(f"after step {number}, {step}")
    read_back("at the end", holes=True)
    return played


class KsmdSide:
    """The kernel's side: workers with mergeable memory, and this machine's ksmd."""

    def __init__(self, ksm: ksm_kernel.Ksm) -> None:
        self.ksm = ksm

    def begin(self, layout: Layout) -> None:
        self.layout = layout
        self.starts = layout.starts()
        self.ksm.begin(**layout.settings)
        self.gone: set[int] = set()
        count = len(layout.regions) if layout.own_processes else 1
        self.workers = [self.ksm.worker() for _ in range(count)]
        for worker in self.workers:
            worker.map([None] * layout.arena_pages())

    def _worker(self, region: int) -> ksm_kernel.Worker:
        return self.workers[region if self.layout.own_processes else 0]

    def write(self, region: int, first: int, tags: Sequence[Tag]) -> None:
        self._worker(region).write(self.starts[region] + first, tags)

    def discard(self, region: int, first: int, pages: int) -> None:
        self._worker(region).discard(self.starts[region] + first, pages)

    def register(self, region: int) -> None:
        self._worker(region).mergeable(self.starts[region], len(self.layout.regions[region]))

    def unregister(self, region: int) -> None:
        self._worker(region).unmergeable(self.starts[region], len(self.layout.regions[region]))

    def unmap(self, region: int) -> None:
        self._worker(region).unmap(self.starts[region], len(self.layout.regions[region]))

    def exit(self, region: int) -> None:
        self._worker(region).exit()
        self.gone.add(region)

    def unmerge_all(self) -> None:
        self.ksm.unmerge_all()

    def set(self, name: str, value: int) -> int:
        try:
            self.ksm.set(name, value)
        except OSError as error:
            return error.errno or -1
        return 0

    def scan(self) -> Row:
        row = self.ksm.scan()
        for number, worker in enumerate(self.workers):
            stat = {} if number in self.gone else worker.stat()
            for name in PER_PROCESS:
                row[f"{name}[{number}]"] = stat.get(name, 0)
        return row

    def wrong(self, region: int, tags: Sequence[Tag], holes: bool) -> list[int]:
        return self._worker(region).wrong(self.starts[region], tags, holes)
