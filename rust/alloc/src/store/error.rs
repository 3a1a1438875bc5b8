//! What can go wrong with a store. Whatever it is, the store is as it was before.

use std::io;

/// Every error of a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the engine said: closed, forked, or refused by the kernel.
    #[error(transparent)]
    Engine(#[from] pagemerge_linux::Error),
    /// The store belongs to the parent process.
    #[error(
        "this store belongs to the parent process: after a fork its blobs stay readable in the child, \
         but only the parent can use the store; make a new one here"
    )]
    Forked,
    /// `max_bytes` would be exceeded.
    #[error(
        "cannot keep {asked} more bytes: the store holds {held} of at most {max} (unique bytes and \
         metadata); drop some blobs or raise max_bytes"
    )]
    Full {
        /// Bytes that the value needs beside what it shares.
        asked: u64,
        /// Bytes held, metadata included.
        held: u64,
        /// The limit.
        max: u64,
    },
    /// The kernel has no memory, or no mapping, for it.
    #[error(
        "cannot keep the value: no memory for {bytes} more bytes ({source}); nothing was changed"
    )]
    NoMemory {
        /// Bytes that were asked for.
        bytes: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// More than can be numbered.
    #[error(
        "cannot keep the value: a store has at most 64 GiB of small values and 16 TiB of pages"
    )]
    TooMuch,
}

impl Error {
    pub(super) fn no_memory(bytes: usize, source: io::Error) -> Self {
        Self::NoMemory { bytes, source }
    }
}
