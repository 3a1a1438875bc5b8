//! What the counters must be when nothing changes any more: worked out from the contents of memory
//! alone, by counting equal pages, without trees, digests or history.

use crate::space::{Backing, PageView, SimSpace};
use pagemerge_core::Scanner;
use std::collections::BTreeMap;

/// The pages that could share one frame: same domain, same node where that matters, same bytes.
#[derive(Debug, Default)]
struct Group {
    /// Pages with bytes of their own that nothing keeps from merging.
    alone: u64,
    /// Sharers of each frame.
    frames: BTreeMap<u32, u64>,
}

/// Pages that are merged, with a frame or the zero page, among those that `which` picks.
#[must_use]
pub fn merged(pages: &[PageView], which: impl Fn(&PageView) -> bool) -> u64 {
    let merged = |page: &&PageView| {
        which(page)
            && matches!(
                page.backing,
                Backing::Frame(_) | Backing::Zero { ours: true }
            )
    };
    pages.iter().filter(merged).count() as u64
}

/// Asserts that everything that can be merged has been, as the rules say, and that the counters say
/// exactly what is there.
///
/// The rules: of equal pages at most one is alone, and only while all frames of its content have as
/// many sharers as they may (so n fresh pages make n / max full frames, one more for a rest of two or
/// more, and none for a rest of one); with `use_zero_pages` no page of zeroes is alone.
///
/// # Panics
/// With the group or the counter that is wrong.
pub fn assert_at_rest(scanner: &Scanner, space: &SimSpace) {
    let settings = scanner.settings();
    let stats = scanner.stats();
    let (mut left_alone, mut alone) = (0, 0);
    let mut groups: BTreeMap<(String, u16, Box<[u8]>), Group> = BTreeMap::new();
    for page in space.view() {
        let node = if settings.merge_across_nodes {
            0
        } else {
            page.nid.0
        };
        let zero = page.bytes.iter().all(|byte| *byte == 0);
        let group = groups.entry((page.domain, node, page.bytes)).or_default();
        match page.backing {
            Backing::Absent | Backing::Zero { .. } => {}
            Backing::Frame(frame) => *group.frames.entry(frame.0).or_default() += 1,
            Backing::Own(_) if page.left_alone => left_alone += 1,
            Backing::Own(_) => {
                assert!(
                    !(zero && settings.use_zero_pages),
                    "{:?} is all zero and not on the zero page; {stats:?}",
                    page.page
                );
                group.alone += 1;
                alone += 1;
            }
        }
    }
    let max = u64::from(settings.max_page_sharing);
    let (mut chains, mut dups) = (0, 0);
    for (content, group) in &groups {
        assert!(
            group.alone <= 1,
            "{} equal pages did not merge: {content:x?}",
            group.alone
        );
        assert!(
            group.alone == 0 || group.frames.values().all(|sharers| *sharers == max),
            "a page is alone though a frame has room: {group:?}, {content:x?}"
        );
        if group.frames.len() > 1 {
            chains += 1;
            dups += group.frames.len() as u64;
        }
    }
    let truth = space.truth();
    assert_eq!(
        truth.frames, truth.frames_shown,
        "a frame that no page shows was not released"
    );
    assert_eq!(
        stats.pages_shared, truth.frames,
        "pages_shared: {truth:?} {stats:?}"
    );
    assert_eq!(
        stats.pages_sharing,
        truth.merged - truth.frames,
        "pages_sharing: {truth:?} {stats:?}"
    );
    assert_eq!(
        stats.ksm_zero_pages, truth.zeroed,
        "ksm_zero_pages: {truth:?} {stats:?}"
    );
    assert_eq!(stats.pages_unshared, alone, "pages_unshared: {stats:?}");
    assert!(
        stats.pages_volatile <= left_alone,
        "pages_volatile, with {left_alone} pages left alone: {stats:?}"
    );
    assert!(
        stats.stable_node_chains >= chains,
        "{chains} chains at least: {stats:?}"
    );
    assert!(
        (dups..=truth.frames).contains(&stats.stable_node_dups),
        "{dups} dups at least: {stats:?}"
    );
    assert_eq!(
        stats.general_profit,
        profit(
            space,
            stats.pages_sharing + stats.ksm_zero_pages,
            stats.rmap_items
        ),
        "general_profit: {stats:?}"
    );
    assert_regions(scanner, space);
}

/// The same for each region's own figures.
fn assert_regions(scanner: &Scanner, space: &SimSpace) {
    let view = space.view();
    for (region, ..) in space.regions().filter(|(.., live)| *live) {
        let own = scanner
            .region_stats(region)
            .expect("a registered region has figures");
        let zeroes = |page: &PageView| page.backing == Backing::Zero { ours: true };
        let zero = merged(&view, |page| page.region == region && zeroes(page));
        let merging = merged(&view, |page| page.region == region && !zeroes(page));
        assert_eq!(own.ksm_zero_pages, zero, "ksm_zero_pages of {region:?}");
        assert_eq!(
            own.ksm_merging_pages, merging,
            "ksm_merging_pages of {region:?}"
        );
        assert_eq!(
            own.ksm_process_profit,
            profit(space, zero + merging, own.ksm_rmap_items),
            "ksm_process_profit of {region:?}"
        );
    }
}

/// Bytes gained, by the kernel's formula.
fn profit(space: &SimSpace, pages: u64, items: u64) -> i64 {
    let signed = |n: u64| i64::try_from(n).expect("simulated memory is small");
    let page_size = i64::try_from(space.habits().page_size).expect("a page is small");
    signed(pages) * page_size - signed(items) * 64
}
