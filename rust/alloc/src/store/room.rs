//! Memory that may be taken without asking again.
//!
//! A page that is made at a memory cgroup's limit brings in the OOM killer instead of an error. So before
//! memory is made there is a look at what is left, and nothing is made that does not fit.
//!
//! # Cost
//! A look reads some files of `/proc` and of the cgroup, some 100 us. It allows a sixteenth of what is
//! left, for a short time, since others take memory, too.

use super::error::Error;
use pagemerge_linux::accounting;
use std::io;
use std::time::{Duration, Instant};

/// So much is left to the program.
pub(super) const RESERVE: u64 = 4 << 20;
/// One look allows no more than this.
const MOST: u64 = 64 << 20;
const SHARE: u64 = 16;
/// And for no longer than this.
const FRESH: Duration = Duration::from_millis(50);

/// What the last look allowed, less what has been taken since.
#[derive(Debug, Default)]
pub(super) struct Room {
    allowed: u64,
    looked: Option<Instant>,
}

impl Room {
    /// Refuses to make more memory than there is.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), Error> {
        let wanted = bytes as u64;
        if self.allowed < wanted || self.looked.is_none_or(|at| at.elapsed() > FRESH) {
            // What cannot be asked is not a limit.
            let left = accounting::headroom().unwrap_or(u64::MAX);
            if left < wanted.saturating_add(RESERVE) {
                return Err(Error::no_memory(bytes, io::ErrorKind::OutOfMemory.into()));
            }
            self.allowed = ((left - RESERVE) / SHARE).min(MOST).max(wanted);
            self.looked = Some(Instant::now());
        }
        self.allowed -= wanted;
        Ok(())
    }
}
