//! Settings: sysfs names, sysfs ranges, sysfs errors; validated once, when they come in.
//!
//! # Departures from ksmd
//! [`Settings::default`] differs from the kernel's defaults where those are known to be unfit: write
//! tracking, the scan-time advisor and zero pages are on, and trees are ordered by digest.
//! [`Settings::kernel_defaults`] is the kernel, to the letter.
//!
//! In scan-time mode [`Settings::pages_to_scan`] is where the advisor started; what it has made of it
//! is [`Scanner::pages_to_scan`](crate::Scanner::pages_to_scan). So settings may be read, changed in
//! one place and written back while the advisor goes on working.

use thiserror::Error;

/// `pages_to_scan` of a kernel that nobody has tuned, and after the advisor is switched off.
pub(crate) const KERNEL_PAGES_TO_SCAN: u32 = 100;
const MAX_PAGE_SHARING: u32 = i32::MAX as u32;

/// What the trees are ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TreeOrder {
    /// By hash, then by bytes: a search touches two pages' bytes only where hashes are equal.
    Digest,
    /// By bytes alone, as in the kernel.
    Content,
}

/// Who decides how many pages one batch examines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdvisorMode {
    /// The setting does.
    None,
    /// The advisor, after each full scan, from the time and CPU that it took.
    ScanTime,
}

/// The tunables. Fields carry the names of `/sys/kernel/mm/ksm/`; the last four are our own.
///
/// ```
/// use pagemerge_core::Settings;
/// let settings = Settings { max_page_sharing: 1, ..Settings::default() };
/// let refused = settings.validate().unwrap_err();
/// assert_eq!(refused.to_string(), "max_page_sharing must be at least 2, got 1");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Pages that one batch examines.
    pub pages_to_scan: u32,
    /// Pause between batches.
    pub sleep_millisecs: u32,
    /// Whether pages of different NUMA nodes may share a frame.
    pub merge_across_nodes: bool,
    /// Sharers that one frame takes before a second frame is made for the same bytes; 2 to
    /// 2147483647.
    pub max_page_sharing: u32,
    /// Whether pages of zeroes go to the kernel's zero page instead of a frame.
    pub use_zero_pages: bool,
    /// Whether pages that have not merged for some scans are looked at less often.
    pub smart_scan: bool,
    /// How long a chain is left alone between two prunings.
    pub stable_node_chains_prune_millisecs: u32,
    /// Who sets `pages_to_scan`.
    pub advisor_mode: AdvisorMode,
    /// Per cent of one CPU that the advisor stays below.
    pub advisor_max_cpu: u32,
    /// Where the advisor starts. As in the kernel, not a floor.
    pub advisor_min_pages_to_scan: u64,
    /// What the advisor never exceeds.
    pub advisor_max_pages_to_scan: u64,
    /// Seconds that a full scan should take; at least 1.
    pub advisor_target_scan_time: u64,
    /// What the trees are ordered by.
    pub tree_order: TreeOrder,
    /// Whether the memory side's knowledge of writes replaces the kernel's checksum rule, for each
    /// page for which it has any.
    pub write_tracking: bool,
    /// Whether records outlive what they describe until the next pass comes by, as the kernel's do:
    /// those of zero-merged pages and of unregistered regions. For comparison with the kernel.
    pub lagging_records: bool,
    /// Whether pages of zeroes, and no others, are merged. Then no page ever shares memory with one
    /// that somebody else fills, and what others hold cannot be learned from what has been merged.
    /// Needs `use_zero_pages`, and can be switched on only while no frame is in use.
    pub zero_only: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let kernel = Self::kernel_defaults();
        Self {
            pages_to_scan: 500,
            use_zero_pages: true,
            advisor_mode: AdvisorMode::ScanTime,
            tree_order: TreeOrder::Digest,
            write_tracking: true,
            lagging_records: false,
            ..kernel
        }
    }
}

impl Settings {
    /// The kernel's defaults, and its ways: content order, checksum rule, lagging records.
    #[must_use]
    pub fn kernel_defaults() -> Self {
        Self {
            pages_to_scan: KERNEL_PAGES_TO_SCAN,
            sleep_millisecs: 20,
            merge_across_nodes: true,
            max_page_sharing: 256,
            use_zero_pages: false,
            smart_scan: true,
            stable_node_chains_prune_millisecs: 2000,
            advisor_mode: AdvisorMode::None,
            advisor_max_cpu: 70,
            advisor_min_pages_to_scan: 500,
            advisor_max_pages_to_scan: 30_000,
            advisor_target_scan_time: 200,
            tree_order: TreeOrder::Content,
            write_tracking: false,
            lagging_records: true,
            zero_only: false,
        }
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value that is out of range, with the kernel's class of error.
    pub fn validate(&self) -> Result<(), SettingError> {
        if self.max_page_sharing < 2 {
            return Err(SettingError::Invalid {
                name: "max_page_sharing",
                value: self.max_page_sharing.to_string(),
                need: "be at least 2".into(),
            });
        }
        if self.max_page_sharing > MAX_PAGE_SHARING {
            return Err(SettingError::OutOfRange {
                name: "max_page_sharing",
                value: self.max_page_sharing.to_string(),
                need: format!("be at most {MAX_PAGE_SHARING}"),
            });
        }
        if self.advisor_target_scan_time < 1 {
            return Err(SettingError::Invalid {
                name: "advisor_target_scan_time",
                value: self.advisor_target_scan_time.to_string(),
                need: "be at least 1".into(),
            });
        }
        if self.zero_only && !self.use_zero_pages {
            return Err(SettingError::Invalid {
                name: "zero_only",
                value: "on".into(),
                need: "be off while use_zero_pages is off".into(),
            });
        }
        Ok(())
    }

    /// These settings as a new scanner takes them: while the advisor decides `pages_to_scan`, that is where
    /// it starts, not what it has made of it.
    ///
    /// ```
    /// use pagemerge_core::{Scanner, Settings};
    /// let in_use = Settings { pages_to_scan: 30_000, ..Settings::default() };
    /// assert!(Scanner::new(in_use.clone()).is_err());
    /// assert!(Scanner::new(in_use.for_a_new_scanner()).is_ok());
    /// ```
    #[must_use]
    pub fn for_a_new_scanner(mut self) -> Self {
        if self.advisor_mode == AdvisorMode::ScanTime {
            self.pages_to_scan = self.advisor_start();
        }
        self
    }

    /// `pages_to_scan` when the advisor begins.
    pub(crate) fn advisor_start(&self) -> u32 {
        u32::try_from(self.advisor_min_pages_to_scan).unwrap_or(u32::MAX)
    }

    /// Whether an unchanged page keeps its place in the unstable tree from one pass to the next.
    pub(crate) fn keeps_unstable(&self) -> bool {
        self.write_tracking && self.tree_order == TreeOrder::Digest
    }
}

/// Why a setting was not accepted. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SettingError {
    /// Where the kernel says `EINVAL`.
    #[error("{name} must {need}, got {value}")]
    Invalid {
        /// The setting.
        name: &'static str,
        /// What it was to become.
        value: String,
        /// What is needed, as the end of a sentence that begins "NAME must".
        need: String,
    },
    /// Where the kernel says `ERANGE`.
    #[error("{name} must {need}, got {value}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// What it was to become.
        value: String,
        /// What is needed, as the end of a sentence that begins "NAME must".
        need: String,
    },
    /// Where the kernel says `EBUSY`.
    #[error("{name} cannot change now: {why}")]
    Busy {
        /// The setting.
        name: &'static str,
        /// What stands in the way, and what to do about it.
        why: String,
    },
}
