//! Counters, and what each one means.
//!
//! # Lag
//! As in the kernel the state counters move only when the scan comes by: a merged page that has been
//! written still counts as sharing until its next visit. Only `ksm_zero_pages` is current, after
//! [`Scanner::refresh`](crate::Scanner::refresh).

use crate::Reason;

/// Bytes that the kernel's profit formula takes for one `rmap_item`, whatever ours costs.
pub(crate) const KERNEL_RMAP_ITEM_BYTES: u64 = 64;

/// Counters of the whole engine. Names up to `general_profit` are sysfs files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames with at least one page recorded as a sharer.
    pub pages_shared: u64,
    /// Pages that share a frame, beyond the first of each frame: what is saved.
    pub pages_sharing: u64,
    /// Pages that are unique so far: those in the unstable tree.
    pub pages_unshared: u64,
    /// All other pages with a record: changing, skipped, refused, or not yet looked at twice.
    pub pages_volatile: u64,
    /// Examinations, ever.
    pub pages_scanned: u64,
    /// Pages passed over by smart scan, ever.
    pub pages_skipped: u64,
    /// Full scans completed since the beginning or the last unmerging of everything.
    pub full_scans: u64,
    /// Chains, emptied ones included.
    pub stable_node_chains: u64,
    /// Frames that are in a chain.
    pub stable_node_dups: u64,
    /// Pages that this engine put onto the zero page and that are still there.
    pub ksm_zero_pages: u64,
    /// Bytes saved by sharing and zero pages, less the kernel's price of the records. The kernel's
    /// formula; `metadata_bytes` is our real cost.
    pub general_profit: i64,
    /// Pages with a record.
    pub rmap_items: u64,
    /// Merges done, ever, those with the zero page included.
    pub pages_merged: u64,
    /// Merged pages seen to have been written, ever.
    pub cow_broken: u64,
    /// Bytes that the engine's own records take now.
    pub metadata_bytes: u64,
    /// Pages left alone, by [`Reason`] (indexed by its place in [`Reason::ALL`]): the figure of the
    /// last completed pass, or of the running one where that is higher already. A page counts once
    /// in a pass, with the first reason met.
    pub skipped: [u64; Reason::ALL.len()],
    /// Regions in the scan list.
    pub regions: u64,
}

/// Counters of one region: the lines of `/proc/PID/ksm_stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionStats {
    /// Pages with a record.
    pub ksm_rmap_items: u64,
    /// Pages of this region on the zero page.
    pub ksm_zero_pages: u64,
    /// Pages of this region attached to a frame, first sharers included.
    pub ksm_merging_pages: u64,
    /// Bytes saved less the kernel's price of the records.
    pub ksm_process_profit: i64,
    /// Always false: what the kernel's process-wide switch stands for is the caller's affair here.
    pub ksm_merge_any: bool,
    /// Whether the region is registered at present.
    pub ksm_mergeable: bool,
}

/// What the algorithm itself has had to do, ever: the part of a pass's cost that memory's own counters
/// do not show. Tests prove by it that no content makes a pass endless.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Times that it was decided what becomes of a page: once each time it is examined, and once more
    /// for each plan for it that came to nothing.
    pub decisions: u64,
    /// Nodes of trees passed in searches.
    pub tree_nodes: u64,
    /// Nodes of chains looked at in choosing one, and nodes looked at for being stale.
    pub dups: u64,
}

/// The counters that are kept rather than computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) shared: u64,
    pub(crate) sharing: u64,
    pub(crate) unshared: u64,
    pub(crate) items: u64,
    pub(crate) zero: u64,
    pub(crate) scanned: u64,
    pub(crate) smart_skipped: u64,
    pub(crate) merged_ever: u64,
    pub(crate) cow_broken: u64,
    pub(crate) skipped_last: [u64; Reason::ALL.len()],
    pub(crate) skipped_now: [u64; Reason::ALL.len()],
}

/// Bytes gained by `pages` saved pages at the price of `items` records.
pub(crate) fn profit(pages: u64, page_size: u64, items: u64) -> i64 {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    signed(pages.saturating_mul(page_size))
        .saturating_sub(signed(items.saturating_mul(KERNEL_RMAP_ITEM_BYTES)))
}
