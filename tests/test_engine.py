"""An engine does what its documentation says."""

from __future__ import annotations

import array
import time
from collections.abc import Iterator

import numpy as np
import pagemerge
import pytest
from conftest import PAGE, Arena, page_of, random_array
from pagemerge import Barrier, Engine, RunMode


@pytest.fixture
def eager() -> Iterator[Engine]:
    """For memory from malloc: what an earlier test has merged and freed need not be quiet first."""
    with Engine(remerge="always") as engine:
        yield engine


def counts(stats: pagemerge.Stats) -> tuple[int, int, int]:
    return stats.pages_shared, stats.pages_sharing, stats.ksm_zero_pages


def test_settle_merges_equal_pages_and_every_byte_reads_back(engine: Engine) -> None:
    tags = [1, 2, 1, 3, 2, 1, 4, 0, 0]
    arena = Arena(tags)
    engine.register(arena.map)
    stats = engine.settle()
    assert counts(stats) == (2, 3, 2)
    assert stats.pages_unshared == 2
    assert arena.tags() == tags


def test_write_to_merged_page_changes_only_that_page(engine: Engine) -> None:
    first, second = Arena([7] * 16), Arena([7] * 16)
    for arena in (first, second):
        engine.register(arena.map)
    engine.settle()
    first.map[3 * PAGE + 5] = 99
    assert second.tags() == [7] * 16
    assert first.map[3 * PAGE : 4 * PAGE] == page_of(7)[:5] + b"c" + page_of(7)[6:]
    engine.scan()
    assert engine.stats().cow_broken == 1


def test_frames_take_memory_once(engine: Engine) -> None:
    data = random_array(64 * PAGE, 1)
    copies = [Arena([0] * 64) for _ in range(4)]
    for copy in copies:
        copy.map[:] = data.tobytes()
        engine.register(copy.map)
    stats = engine.settle()
    assert counts(stats) == (64, 3 * 64, 0)
    assert stats.frames == 64
    assert stats.frames_bytes == 64 * PAGE


def test_zero_page_is_counted_until_it_is_written(engine: Engine) -> None:
    arena = Arena([0, 0, 5, 0])
    engine.register(arena.map)
    assert engine.settle().ksm_zero_pages == 3
    arena.write(1, 6)
    assert engine.stats().ksm_zero_pages == 2
    assert arena.tags() == [0, 6, 5, 0]


def test_without_zero_pages_zeroes_share_a_frame() -> None:
    arena = Arena([0] * 5)
    with Engine(use_zero_pages=False) as engine:
        engine.register(arena.map)
        assert counts(engine.settle()) == (1, 4, 0)


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_max_page_sharing_limits_every_frame(limit: int) -> None:
    arena = Arena([8] * 60)
    with Engine(max_page_sharing=limit) as engine:
        engine.register(arena.map)
        stats = engine.settle()
        assert stats.pages_shared + stats.pages_sharing == 60
        assert stats.pages_shared == 60 // limit
        assert stats.stable_node_chains == 1
        assert stats.stable_node_dups == 60 // limit
    assert arena.tags() == [8] * 60


def test_domains_never_share(engine: Engine) -> None:
    arenas = [Arena([1, 1, 2, 3]) for _ in range(3)]
    regions = [
        engine.register(arena.map, domain=domain)
        for arena, domain in zip(arenas, ["a", "b", "b"], strict=True)
    ]
    stats = engine.settle()
    # a: one frame for the two equal pages; b: a frame for each of the three contents.
    assert counts(stats) == (1 + 3, 1 + 5, 0)
    assert [region.domain for region in regions] == ["a", "b", "b"]
    assert regions[0].stats().ksm_merging_pages == 2


def test_engines_never_share() -> None:
    first, second = Arena([4]), Arena([4])
    with Engine() as one, Engine() as two:
        one.register(first.map)
        two.register(second.map)
        assert counts(one.settle()) == counts(two.settle()) == (0, 0, 0)


def test_region_is_the_whole_pages_inside_the_buffer(engine: Engine) -> None:
    arena = Arena([1, 2, 3, 4])
    region = engine.register(memoryview(arena.map)[100 : 4 * PAGE - 1])
    assert region.pages == 2
    assert region.nbytes == 2 * PAGE
    assert region.engine is engine
    assert region.registered
    assert "2 pages" in repr(region)


def test_unregister_gives_back_and_lets_go(eager: Engine) -> None:
    buffer = bytearray(page_of(9) * 40)
    region = eager.register(buffer)
    assert eager.settle().pages_sharing > 30
    with pytest.raises(BufferError):
        buffer.clear()
    eager.unregister(region)
    assert not region.registered
    stats = eager.stats()
    assert counts(stats) == (0, 0, 0)
    assert stats.frames_bytes == 0
    assert buffer == page_of(9) * 40
    buffer.clear()


def test_region_as_context_manager_unregisters(engine: Engine) -> None:
    arena = Arena([1, 1])
    with engine.register(arena.map) as region:
        assert engine.settle().pages_sharing == 1
    assert not region.registered
    region.close()
    again = engine.register(arena.map)
    assert again.registered


def test_dropped_region_stays_registered(engine: Engine) -> None:
    arena = Arena([1, 1])
    engine.register(arena.map)
    assert engine.settle().regions == 1


def test_discard_reads_as_zero(engine: Engine) -> None:
    arena = Arena([1] * 10)
    engine.register(arena.map)
    engine.settle()
    engine.discard(memoryview(arena.map)[2 * PAGE : 5 * PAGE])
    assert arena.tags() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    engine.scan()
    assert engine.stats().pages_sharing == 6
    arena.write(3, 1)
    assert arena.tags() == [1, 1, 0, 1, 0, 1, 1, 1, 1, 1]


def test_scan_of_so_many_pages() -> None:
    arena = Arena(range(1, 101))
    with Engine(**pagemerge.kernel_defaults()) as engine:
        engine.register(arena.map)
        assert engine.scan(30).pages_scanned == 30
        assert engine.scan(50).pages_scanned == 80
        assert engine.stats().full_scans == 0
        assert engine.scan().full_scans == 1


def test_kernel_rule_needs_two_looks_for_calm_and_a_third_for_order() -> None:
    arena = Arena([1, 1, 1])
    with Engine(**pagemerge.kernel_defaults()) as engine:
        engine.register(arena.map)
        assert engine.scan().pages_volatile == 3
        assert counts(engine.scan()) == (1, 2, 0)


def test_merging_again_after_a_write() -> None:
    arena = Arena([1] * 8)
    with Engine(remerge="always", smart_scan=False) as engine:
        engine.register(arena.map)
        engine.settle()
        arena.write(2, 5)
        assert engine.settle().pages_sharing == 6
        arena.write(2, 1)
        assert engine.settle().pages_sharing == 7
    assert arena.tags() == [1] * 8


@pytest.mark.usefixtures("full_barrier")
def test_quiet_pages_merge_again_after_their_time() -> None:
    arena = Arena([1] * 8)
    with Engine(quiet_millisecs=20) as engine:
        engine.register(arena.map)
        engine.settle()
        arena.write(2, 5)
        arena.write(2, 1)
        assert engine.settle().skipped["not_quiet"] == 1
        deadline = time.monotonic() + 60
        while engine.stats().pages_sharing < 7 and time.monotonic() < deadline:
            time.sleep(0.03)
            engine.scan()
        assert engine.stats().pages_sharing == 7
    assert arena.tags() == [1] * 8


@pytest.mark.usefixtures("full_barrier")
def test_remerge_never_leaves_written_pages_alone() -> None:
    arena = Arena([1] * 8)
    with Engine(remerge="never") as engine:
        engine.register(arena.map)
        engine.settle()
        arena.write(2, 5)
        engine.settle()
        arena.write(2, 1)
        stats = engine.settle()
        assert stats.pages_sharing == 6
        assert stats.skipped["broken"] == 1


@pytest.mark.usefixtures("full_barrier")
def test_background_merges_until_stopped(engine: Engine) -> None:
    engine.settings.sleep_millisecs = 1
    arenas = [Arena(range(1, 65)) for _ in range(3)]
    for arena in arenas:
        engine.register(arena.map)
    assert engine.run is RunMode.STOP
    engine.start()
    assert engine.run is RunMode.MERGE
    assert engine.stats().background
    deadline = time.monotonic() + 60
    while engine.stats().pages_sharing < 128 and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.stop()
    stopped = engine.stats()
    assert counts(stopped) == (64, 128, 0)
    assert not stopped.background
    time.sleep(0.05)
    assert engine.stats().pages_scanned == stopped.pages_scanned
    assert [arena.tags() for arena in arenas] == [list(range(1, 65))] * 3


def test_run_2_unmerges_all_and_keeps_regions() -> None:
    arena = Arena([1, 1, 0, 0])
    with Engine(remerge="always") as engine:
        region = engine.register(arena.map)
        engine.settle()
        engine.run = 2
        assert engine.run is RunMode.UNMERGE
        stats = engine.stats()
        assert counts(stats) == (0, 0, 0)
        assert stats.full_scans == 0
        assert region.registered
        assert arena.tags() == [1, 1, 0, 0]
        engine.run = RunMode.STOP
        assert counts(engine.settle()) == (1, 1, 2)


def test_zero_only_merges_zero_pages_and_nothing_else() -> None:
    tags = [0, 1, 1, 2, 0, 1]
    with Engine(zero_only=True) as engine:
        arena = Arena(tags)
        engine.register(arena.map)
        stats = engine.settle()
        assert counts(stats) == (0, 0, 2)
        assert (stats.frames, stats.pages_unshared) == (0, 0)
        assert arena.tags() == tags
        engine.settings.zero_only = False
        assert counts(engine.settle()) == (1, 2, 2)
        assert arena.tags() == tags


def test_excluded_pages_never_merge(eager: Engine) -> None:
    data = np.full((32, PAGE), 7, np.uint8)
    region = eager.register(data)
    before = eager.settle()
    assert region.exclude(data[10:20]) >= 10
    assert region.exclude(data[:0]) == 0
    for _ in range(2):
        after = eager.settle()
        excluded = after.skipped["excluded"]
        assert 10 <= excluded <= 11  # The array need not begin on a page.
        assert after.pages_sharing == before.pages_sharing - excluded
        assert (data == 7).all()
        eager.run = RunMode.UNMERGE
        eager.run = RunMode.STOP
    data[12] = 9
    assert eager.settle().pages_sharing == after.pages_sharing
    assert (data[12] == 9).all()
    assert (data[11] == 7).all()


def test_settings_are_attributes_and_keywords() -> None:
    with Engine(advisor_mode="none", sleep_millisecs=7, smart_scan=0) as engine:
        settings = engine.settings
        assert settings.sleep_millisecs == 7
        assert settings.smart_scan is False
        assert settings.advisor_mode is pagemerge.AdvisorMode.NONE
        settings.pages_to_scan = 4000
        assert engine.settings.pages_to_scan == 4000
        settings.pages_to_scan = np.int64(17)  # type: ignore[assignment]
        assert settings.pages_to_scan == 17
        settings.reserved_mappings = 5000
        assert settings.as_dict()["reserved_mappings"] == 5000
        assert "pages_to_scan=17" in repr(settings)


def test_settings_round_trip() -> None:
    for given in ({}, pagemerge.kernel_defaults()):
        with Engine(**given) as engine:
            everything = engine.settings.as_dict()
            with Engine(**everything) as again:
                assert again.settings.as_dict() == engine.settings.as_dict()


def test_other_settings_change_while_the_advisor_is_on(engine: Engine) -> None:
    arena = Arena(range(1, 50))
    engine.register(arena.map)
    engine.settle()
    engine.settings.sleep_millisecs = 3
    engine.settings.smart_scan = False
    assert engine.settings.sleep_millisecs == 3


def test_kernel_defaults_are_the_kernels() -> None:
    defaults = pagemerge.kernel_defaults()
    assert defaults["pages_to_scan"] == 100
    assert defaults["sleep_millisecs"] == 20
    assert defaults["max_page_sharing"] == 256
    assert defaults["merge_across_nodes"] is True
    assert defaults["use_zero_pages"] is False
    assert defaults["smart_scan"] is True
    assert defaults["stable_node_chains_prune_millisecs"] == 2000
    assert defaults["advisor_mode"] == "none"
    assert defaults["advisor_max_cpu"] == 70
    assert defaults["advisor_min_pages_to_scan"] == 500
    assert defaults["advisor_max_pages_to_scan"] == 30000
    assert defaults["advisor_target_scan_time"] == 200
    assert defaults["tree_order"] == "content"
    assert defaults["write_tracking"] is False


def test_stats_are_attributes_and_a_mapping(engine: Engine) -> None:
    arena = Arena([1, 1, 1])
    engine.register(arena.map)
    before = engine.stats()
    after = engine.settle()
    assert after["pages_sharing"] == after.pages_sharing == 2
    assert dict(after)["pages_shared"] == 1
    assert list(after) == after.keys()
    assert len(after) == len(dict(after))
    assert "pages_shared" in after
    assert "nothing" not in after
    with pytest.raises(KeyError):
        after["nothing"]
    change = after - before
    assert change.pages_sharing == 2
    assert change.full_scans == after.full_scans
    assert change.barrier is after.barrier
    assert isinstance(after.barrier, Barrier)
    assert before == before - (after - after)
    assert "pages_sharing=2" in repr(after)
    assert engine.stats().metadata_bytes > 0


def test_region_stats_carry_the_kernels_names(engine: Engine) -> None:
    arena = Arena([1, 1, 0, 2])
    region = engine.register(arena.map)
    engine.settle()
    stats = region.stats()
    assert stats.keys() == [
        "ksm_rmap_items",
        "ksm_zero_pages",
        "ksm_merging_pages",
        "ksm_process_profit",
        "ksm_merge_any",
        "ksm_mergeable",
    ]
    assert stats.ksm_zero_pages == 1
    assert stats.ksm_merging_pages == 2
    assert stats.ksm_mergeable is True
    assert stats.ksm_merge_any is False


def test_events_have_the_kernels_names(engine: Engine) -> None:
    arena = Arena([1, 1])
    engine.trace()
    engine.register(arena.map)
    engine.settle()
    events, dropped = engine.events()
    names = [name for name, _ in events]
    assert dropped == 0
    assert {"ksm_enter", "ksm_start_scan", "ksm_stop_scan", "ksm_merge_with_ksm_page"} <= set(names)
    assert names.index("ksm_start_scan") < names.index("ksm_stop_scan")
    merges = [given for name, given in events if name == "ksm_merge_with_ksm_page"]
    assert {frozenset(given) for given in merges} == {
        frozenset({"ksm_page", "pfn", "rmap_item", "mm", "err"})
    }
    assert engine.events() == ([], 0)
    engine.trace(False)
    engine.scan()
    assert engine.events() == ([], 0)


def test_close_unmerges_and_lets_go() -> None:
    buffer = bytearray(page_of(3) * 30)
    with Engine() as engine:
        region = engine.register(buffer)
        engine.settle()
        assert not engine.closed
    assert engine.closed
    assert not region.registered
    assert buffer == page_of(3) * 30
    buffer.clear()
    engine.close()
    assert "closed" in repr(engine)


def test_dropped_engine_unmerges_and_lets_go() -> None:
    buffer = bytearray(page_of(3) * 30)
    engine = Engine()
    engine.register(buffer)
    engine.settle()
    del engine
    assert buffer == page_of(3) * 30
    buffer.clear()


def test_every_kind_of_buffer(eager: Engine) -> None:
    size = 8 * PAGE
    buffers = [
        bytearray(b"q" * size),
        b"q" * size,
        array.array("B", b"q" * size),
        memoryview(bytearray(b"q" * size)),
        np.full(size, ord("q"), dtype=np.uint8),
        np.full((8, PAGE // 8, 8), ord("q"), dtype=np.uint8, order="F"),
        np.frombuffer(bytearray(b"q" * size), dtype=np.float64),
        Arena([int.from_bytes(b"q" * 8, "little")] * 8).map,
    ]
    for buffer in buffers:
        eager.register(buffer)
    stats = eager.settle()
    assert stats.pages_shared == 1
    assert stats.pages_sharing >= 7 * len(buffers) - 1
    for buffer in buffers:
        assert bytes(memoryview(buffer).tobytes()) == b"q" * size


def test_array_cannot_be_resized_while_registered(engine: Engine) -> None:
    array_ = np.ones(100_000)
    region = engine.register(array_[10:])
    with pytest.raises(ValueError, match="referenc"):
        array_.resize(200_000, refcheck=False)
    engine.unregister(region)
    array_.resize(200_000, refcheck=False)


def test_huge_pages_merge(eager: Engine) -> None:
    arrays = [np.full(3 << 21, 5, dtype=np.uint8) for _ in range(2)]
    for array_ in arrays:
        eager.register(array_)
    stats = eager.settle()
    pages = 2 * (3 << 21) // PAGE
    # All but the partial pages at both ends of each, with up to 256 to a frame.
    assert stats.pages_shared + stats.pages_sharing >= pages - 4
    assert stats.pages_shared <= pages // 256 + 1
    assert all((array_ == 5).all() for array_ in arrays)


def test_capabilities_are_reported() -> None:
    found = pagemerge.capabilities()
    assert isinstance(found.barrier, Barrier)
    assert found.page_size == PAGE
    assert found.max_map_count > 0
    assert all(isinstance(why, str) and why for why in found.reasons.values())
    assert "barrier" in repr(found)
