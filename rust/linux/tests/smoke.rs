//! The shortest way through the whole crate: what everybody should see who uses it once.

mod support;

use std::process::ExitCode;
use support::case;
use support::engines::{engine, register, scan};
use support::os::{self, Memory};

/// Goal: equal pages become one, zero pages the zero page; reading shows no difference, writing and
/// un-merging neither, and everything is given back.
fn equal_pages_are_merged_and_read_back() {
    const PAGES: usize = 2000;
    let memory = Memory::new(PAGES);
    // Content 0 is the zero page: four of them, and four of each of 499 others.
    let content = |page: usize| (page % 500) as u64;
    (0..PAGES).for_each(|page| memory.fill(page, content(page)));
    let engine = engine(pagemerge_linux::Remerge::Quiet);
    let region = register(&engine, &memory);
    (0..4).for_each(|_| drop(scan(&engine)));
    let stats = engine.stats().expect("stats");
    assert_eq!(
        (
            stats.core.pages_shared,
            stats.core.pages_sharing,
            stats.core.ksm_zero_pages
        ),
        (499, 499 * 3, 4)
    );
    assert_eq!(stats.space.frames_bytes, 499 * os::page_size() as u64);
    (0..PAGES).for_each(|page| memory.assert_shows(page, content(page), "merged"));
    let told = engine.region_stats(region).expect("registered");
    assert_eq!((told.ksm_merging_pages, told.ksm_zero_pages), (499 * 4, 4));

    memory.fill(7, 1_000_000);
    memory.assert_shows(507, content(507), "a twin of a page that was written");
    memory.fill(7, content(7));

    engine.unregister(region).expect("un-merged");
    (0..PAGES).for_each(|page| memory.assert_shows(page, content(page), "un-merged"));
    let stats = engine.stats().expect("stats");
    assert_eq!((stats.space.frames, stats.space.frames_bytes), (0, 0));
    engine.close().expect("closed");
}

fn main() -> ExitCode {
    support::run(vec![case!(equal_pages_are_merged_and_read_back)])
}
