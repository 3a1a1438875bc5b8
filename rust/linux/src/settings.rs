//! The settings of an engine: the algorithm's own ([`pagemerge_core::Settings`]) and those of live
//! memory.

use pagemerge_core::{SettingError, Settings};
use std::fmt;

/// What keeps a page still while it is merged. Found by probing, reported, never silently chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Barrier {
    /// userfaultfd that stops every access, the kernel's own included.
    Full,
    /// userfaultfd that stops the program's own code only: a system call that meets an open window
    /// fails with `EFAULT`. Only on request.
    User,
    /// Nothing: the caller promises that nobody writes during the call.
    None,
}

impl Barrier {
    /// The name that programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::User => "user",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What happens to a page that was merged and has been written since (finding F2: copying such a
/// page while a device writes to it loses data).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remerge {
    /// Merge it again after one uninterrupted write-protection for `quiet_millisecs` saw no write.
    Quiet,
    /// Leave it alone.
    Never,
    /// Merge it again like any other page: only where no device ever writes to registered memory.
    /// The kernel's behaviour, for parity and tests.
    Always,
}

impl Remerge {
    /// The name that programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Never => "never",
            Self::Always => "always",
        }
    }
}

/// Everything that can be set on an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineSettings {
    /// The algorithm's settings.
    pub scan: Settings,
    /// The barrier to use; `None` takes `Full` where it is available and `None` elsewhere. Fixed
    /// once the engine is made.
    pub barrier: Option<Barrier>,
    /// What to do with pages that were written after merging.
    pub remerge: Remerge,
    /// How long such a page must have been quiet, in milliseconds; longer than the longest I/O
    /// into registered memory. At least 1.
    pub quiet_millisecs: u32,
    /// How long one window may hold pages, in microseconds, about: a writer that meets it waits
    /// that long. At least 1.
    pub max_pause_micros: u32,
    /// Mappings of `vm.max_map_count` that are left to the program; `None` keeps a tenth, at least
    /// 1,000.
    pub reserved_mappings: Option<u64>,
    /// Pages of one transparent huge page that would have to merge before it is split for them (512 of
    /// 4 KiB each on most machines). 1 splits it for the first, as the kernel does; more than it has
    /// pages, never, and whole huge pages are left alone. At least 1.
    pub thp_min_duplicates: u32,
    /// Threads that hash pages in large batches. The merging itself is done by one: the kernel's
    /// mapping lock lets no second one gain anything. At least 1.
    pub threads: u32,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            scan: Settings::default(),
            barrier: None,
            remerge: Remerge::Quiet,
            quiet_millisecs: 1000,
            max_pause_micros: 100,
            reserved_mappings: None,
            thp_min_duplicates: 32,
            threads: 1,
        }
    }
}

impl EngineSettings {
    /// Exactly the kernel's behaviour.
    #[must_use]
    pub fn kernel_defaults() -> Self {
        Self {
            scan: Settings::kernel_defaults(),
            remerge: Remerge::Always,
            thp_min_duplicates: 1,
            ..Self::default()
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// The first setting that is out of its range.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.scan.validate()?;
        for (name, value) in [
            ("quiet_millisecs", self.quiet_millisecs),
            ("max_pause_micros", self.max_pause_micros),
            ("thp_min_duplicates", self.thp_min_duplicates),
            ("threads", self.threads),
        ] {
            if value == 0 {
                return Err(SettingError::Invalid {
                    name,
                    value: value.to_string(),
                    need: "at least 1".into(),
                });
            }
        }
        Ok(())
    }
}
