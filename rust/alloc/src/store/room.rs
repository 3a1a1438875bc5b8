//! Memory that may be taken without asking again.
//!
//! A page that is made at a memory cgroup's limit brings in the OOM killer instead of an error. So before
//! memory is made there is a look at what is left, and nothing is made that does not fit.
//!
//! # Cost
//! A look reads some files of `/proc` and of the cgroup, some 100 us. It allows a sixteenth of what is
//! left, so it is repeated the more often the less that is, and at least every 64 MiB.

use super::error::Error;
use pagemerge_linux::accounting;
use std::io;

/// So much is left to the program.
const RESERVE: u64 = 1 << 20;
/// One look allows no more than this.
const MOST: u64 = 64 << 20;
const SHARE: u64 = 16;

/// What the last look allowed, less what has been taken since.
#[derive(Debug, Default)]
pub(super) struct Room(u64);

impl Room {
    /// Refuses to make more memory than there is.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), Error> {
        let wanted = bytes as u64;
        if self.0 < wanted {
            // What cannot be asked is not a limit.
            let left = accounting::headroom().unwrap_or(u64::MAX);
            if left < wanted.saturating_add(RESERVE) {
                return Err(Error::no_memory(bytes, io::ErrorKind::OutOfMemory.into()));
            }
            self.0 = ((left - RESERVE) / SHARE).min(MOST).max(wanted);
        }
        self.0 -= wanted;
        Ok(())
    }
}
