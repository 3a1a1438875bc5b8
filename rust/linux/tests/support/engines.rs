//! Engines as the tests want them.

use super::os::{self, Memory};
use pagemerge_linux::core::{AdvisorMode, Reason, Settings};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, Error, RegionHandle, Remerge};
use std::time::Duration;

/// Fast and without moods: large batches, no sleep, no advisor, no skipping of pages.
pub(crate) fn settings() -> EngineSettings {
    EngineSettings {
        scan: Settings {
            pages_to_scan: 100_000,
            sleep_millisecs: 0,
            advisor_mode: AdvisorMode::None,
            smart_scan: false,
            ..Settings::default()
        },
        quiet_millisecs: 5,
        ..EngineSettings::default()
    }
}

pub(crate) fn engine(remerge: Remerge) -> Engine {
    Engine::new(EngineSettings {
        remerge,
        ..settings()
    })
    .expect("an engine")
}

pub(crate) fn try_register(
    engine: &Engine,
    addr: usize,
    len: usize,
    domain: &str,
) -> Result<RegionHandle, Error> {
    #[allow(unsafe_code, reason = "the promise of `register`")]
    // SAFETY: a `Memory` of the test, which it keeps until the engine is closed or the region
    // unregistered (or the process ends).
    unsafe {
        engine.register(addr, len, domain)
    }
}

pub(crate) fn register(engine: &Engine, memory: &Memory) -> RegionHandle {
    try_register(engine, memory.addr(), memory.len(), "").expect("plain memory is registered")
}

/// One full pass.
pub(crate) fn scan(engine: &Engine) -> EngineStats {
    engine.scan(None, &mut || true).expect("a pass")
}

/// As many passes as merging takes: a page must be seen unchanged before it is looked for, and
/// pages that were written after merging must be quiet first.
pub(crate) fn merge(engine: &Engine) -> EngineStats {
    let mut stats = scan(engine);
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(6));
        stats = scan(engine);
    }
    stats
}

/// Pages that were passed by for `reason` in the last pass.
pub(crate) fn skipped(stats: &EngineStats, reason: Reason) -> u64 {
    let at = Reason::ALL
        .iter()
        .position(|r| *r == reason)
        .expect("every reason is listed");
    stats.core.skipped[at]
}

/// Every reason with a count, for messages.
pub(crate) fn reasons(stats: &EngineStats) -> Vec<(&'static str, u64)> {
    let all = Reason::ALL
        .iter()
        .map(|reason| (reason.name(), skipped(stats, *reason)));
    all.filter(|(_, count)| *count > 0).collect()
}

/// Fills a region with `contents` contents in turn, never the zero one.
pub(crate) fn fill(memory: &Memory, contents: usize) {
    for page in 0..memory.pages() {
        memory.fill(page, content(page, contents));
    }
}

pub(crate) fn content(page: usize, contents: usize) -> u64 {
    (page % contents + 1) as u64
}

/// # Panics
/// Unless the region is still as [`fill`] left it.
pub(crate) fn assert_filled(memory: &Memory, contents: usize, when: &str) {
    for page in 0..memory.pages() {
        memory.assert_shows(page, content(page, contents), when);
    }
}

/// Which pages are merged by the kernel's own account: in a mapping of frames, and not a copy.
pub(crate) fn merged(memory: &Memory) -> Vec<bool> {
    let frames: Vec<_> = os::mappings_of(memory)
        .into_iter()
        .filter(in_frames)
        .collect();
    let here = |page| {
        let at = memory.at(page);
        frames.iter().any(|vma| (vma.start..vma.end).contains(&at))
    };
    let shown = |e: &os::Entry| e.is_file() || !e.is_present() && !e.is_swapped();
    os::entries(memory)
        .iter()
        .enumerate()
        .map(|(page, e)| shown(e) && here(page))
        .collect()
}

pub(crate) fn merged_pages(memory: &Memory) -> usize {
    merged(memory).into_iter().filter(|merged| *merged).count()
}

/// Whether a mapping is one of frames.
pub(crate) fn in_frames(vma: &os::Vma) -> bool {
    vma.name.starts_with("/memfd:pagemerge")
}

/// # Panics
/// When a page is merged still.
pub(crate) fn assert_nothing_merged(memory: &Memory) {
    assert_eq!(merged_pages(memory), 0, "pages are merged still");
}
