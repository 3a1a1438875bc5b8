//! Just enough of `io_uring` to pin pages and have the kernel write to them much later.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the kernel's structures are made of 32-bit numbers"
)]

use super::os::{self, call};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const ENTRIES: usize = 8;
const REGISTER_BUFFERS: usize = 0;
const READ_FIXED: u64 = 4;
const ENTER_GETEVENTS: usize = 1;

/// A ring with its three mappings, which would keep it (and what it pins) alive.
#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    submissions: usize,
    completions: usize,
    entries: usize,
    parameters: [u32; 30],
}

fn shared(addr: usize, offset: u32) -> &'static AtomicU32 {
    #[allow(unsafe_code, reason = "the ring's mappings live as long as the ring")]
    // SAFETY: a number inside a mapping that is unmapped with the ring, which is borrowed by the
    // only caller for longer than the reference is used; shared with the kernel as an atomic.
    unsafe {
        AtomicU32::from_ptr(std::ptr::without_provenance_mut(addr + offset as usize))
    }
}

fn entry_word(addr: usize, index: usize) -> &'static AtomicU64 {
    #[allow(unsafe_code, reason = "the ring's mappings live as long as the ring")]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(std::ptr::without_provenance_mut(addr + index * 8))
    }
}

impl Ring {
    pub(crate) fn new() -> io::Result<Self> {
        let mut parameters = [0_u32; 30];
        let at = [ENTRIES, parameters.as_mut_ptr().addr()];
        let fd = os::own_fd(call(libc::SYS_io_uring_setup, &at)?);
        let map = |offset: usize, len: usize| {
            let flags = libc::MAP_SHARED as usize;
            call(
                libc::SYS_mmap,
                &[
                    0,
                    len,
                    os::RW as usize,
                    flags,
                    fd.as_raw_fd() as usize,
                    offset,
                ],
            )
        };
        // One page holds each ring of this size.
        let submissions = map(0, 4096)?;
        let completions = map(0x0800_0000, 4096)?;
        let entries = map(0x1000_0000, ENTRIES * 64)?;
        Ok(Self {
            fd,
            submissions,
            completions,
            entries,
            parameters,
        })
    }

    /// Pins these ranges until the ring is gone.
    pub(crate) fn pin(&self, ranges: &[(usize, usize)]) -> io::Result<()> {
        let fd = self.fd.as_raw_fd() as usize;
        let at = [fd, REGISTER_BUFFERS, ranges.as_ptr().addr(), ranges.len()];
        call(libc::SYS_io_uring_register, &at).map(drop)
    }

    /// Reads from a file to pinned memory: range number `range`, address `to` inside it.
    pub(crate) fn read_fixed(
        &self,
        file: RawFd,
        range: u16,
        to: usize,
        len: u32,
        offset: u64,
    ) -> i32 {
        // Offsets in the parameters: sq_off at 40 bytes (head, tail, ring_mask, ring_entries, flags,
        // dropped, array), cq_off at 80 (head, tail, ring_mask, ring_entries, overflow, cqes).
        let p = &self.parameters;
        let tail = shared(self.submissions, p[11]);
        let mask = shared(self.submissions, p[12]).load(Ordering::Relaxed);
        let now = tail.load(Ordering::Relaxed);
        let at = now & mask;
        let words = [
            READ_FIXED | (file as u64) << 32,
            offset,
            to as u64,
            u64::from(len),
            0,
            u64::from(range),
            0,
            0,
        ];
        for (index, word) in words.into_iter().enumerate() {
            entry_word(self.entries + at as usize * 64, index).store(word, Ordering::Relaxed);
        }
        shared(self.submissions, p[16] + 4 * at).store(at, Ordering::Relaxed);
        tail.store(now.wrapping_add(1), Ordering::Release);
        let enter = [self.fd.as_raw_fd() as usize, 1, 1, ENTER_GETEVENTS, 0, 0];
        call(libc::SYS_io_uring_enter, &enter).expect("the ring takes a request");
        let head = shared(self.completions, p[20]);
        let mask = shared(self.completions, p[22]).load(Ordering::Relaxed);
        let first = head.load(Ordering::Acquire);
        // A completion: user_data (8 bytes), result (4), flags (4).
        let result =
            shared(self.completions, p[25] + 16 * (first & mask) + 8).load(Ordering::Acquire);
        head.store(first.wrapping_add(1), Ordering::Release);
        result as i32
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for (addr, len) in [
            (self.submissions, 4096),
            (self.completions, 4096),
            (self.entries, ENTRIES * 64),
        ] {
            call(libc::SYS_munmap, &[addr, len]).expect("our own mapping");
        }
    }
}
