//! Trace events: the kernel's `events/ksm/` tracepoints by name and argument, through one sink.
//!
//! Where the kernel prints a page frame number we give the [`FrameId`] or [`PageId`] that plays its
//! part; its `mm` is our region, its `rmap_item` is named by the page whose record it is.

use crate::{FrameId, PageId, RegionId};

/// One event. Variants are the kernel's tracepoint names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `ksm_start_scan`: a full scan begins, before its first page.
    StartScan {
        /// Full scans completed so far.
        seq: u64,
        /// `rmap_item`s at this moment.
        rmap_entries: u64,
    },
    /// `ksm_stop_scan`: a full scan is done; the same `seq` as its start.
    StopScan {
        /// Full scans completed before this one.
        seq: u64,
        /// `rmap_item`s at this moment.
        rmap_entries: u64,
    },
    /// `ksm_enter`: a region is registered.
    Enter {
        /// The region.
        mm: RegionId,
    },
    /// `ksm_exit`: a registered region is dropped.
    Exit {
        /// The region.
        mm: RegionId,
    },
    /// `ksm_merge_one_page`: an attempt to merge with the zero page.
    MergeOnePage {
        /// The page (the kernel prints the zero page's number).
        pfn: PageId,
        /// Its record.
        rmap_item: PageId,
        /// Its region.
        mm: RegionId,
        /// 0, or -14 (`EFAULT`) when it failed.
        err: i32,
    },
    /// `ksm_merge_with_ksm_page`: an attempt to put a page onto a frame, or (with `ksm_page`
    /// `None`) to make one of it.
    MergeWithKsmPage {
        /// The frame joined, or `None` when the page itself becomes one.
        ksm_page: Option<FrameId>,
        /// The page.
        pfn: PageId,
        /// Its record.
        rmap_item: PageId,
        /// Its region.
        mm: RegionId,
        /// 0, or -14 (`EFAULT`) when it failed.
        err: i32,
    },
    /// `ksm_remove_ksm_page`: a stable node is removed (stale, `run = 2`, or a knob was turned).
    RemoveKsmPage {
        /// Its frame.
        pfn: FrameId,
    },
    /// `ksm_remove_rmap_item`: inside the removal of a stale node, for each item still attached but
    /// the last.
    RemoveRmapItem {
        /// The frame.
        pfn: FrameId,
        /// The record.
        rmap_item: PageId,
        /// Its region.
        mm: RegionId,
    },
    /// `ksm_advisor`: the advisor ran, just before `ksm_stop_scan`.
    Advisor {
        /// Seconds that the scan took.
        scan_time: u64,
        /// The new `pages_to_scan`.
        pages_to_scan: u64,
        /// CPU per cent used.
        cpu_percent: u32,
    },
}

impl Event {
    /// The kernel's name of the tracepoint.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::StartScan { .. } => "ksm_start_scan",
            Self::StopScan { .. } => "ksm_stop_scan",
            Self::Enter { .. } => "ksm_enter",
            Self::Exit { .. } => "ksm_exit",
            Self::MergeOnePage { .. } => "ksm_merge_one_page",
            Self::MergeWithKsmPage { .. } => "ksm_merge_with_ksm_page",
            Self::RemoveKsmPage { .. } => "ksm_remove_ksm_page",
            Self::RemoveRmapItem { .. } => "ksm_remove_rmap_item",
            Self::Advisor { .. } => "ksm_advisor",
        }
    }
}

/// Where events go. Called in the middle of a step: it must be quick, and must not call back.
pub trait TraceSink: Send {
    /// Takes one event.
    fn event(&mut self, event: Event);
}
