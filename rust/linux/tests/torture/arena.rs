//! Arenas: the memory that is tortured, and the oracle of each of its bytes.
//!
//! An arena is memory that is registered with an engine, as a whole, in parts or not at all, and a
//! *shadow* of it: as many bytes elsewhere that no engine ever sees. A page is made of sectors of 512
//! bytes. Who wants to write, or to look, *claims* sectors: nobody else writes them meanwhile, so
//! they must be equal to their shadow when they are claimed, and after each write. Eight actors can
//! be busy in one page at a time; who does something to whole pages claims all their sectors.
//!
//! The claims lie in memory that fork children share, with a number that counts them: a child knows
//! that a page's bytes and shadow belong together if nobody has claimed any of it between a moment
//! before the fork and one after it.
//!
//! # Home
//! Each page has a *class* of content, shared with many others, to which whoever wrote something
//! returns soon: so most pages are equal to others most of the time, and there is something to merge.

use crate::support::os::{page_size, word_of};
use crate::support::raw;
use crate::world::Me;
use pagemerge_linux::RegionHandle;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

pub(crate) const SECTOR: usize = 512;
/// All sectors of a page of 4 KiB.
pub(crate) const WHOLE: u8 = 0xff;
/// Contents that many pages share. Class 0 is all zero.
pub(crate) const CLASSES: u64 = 20;
/// Pages at the end of an arena that an `io_uring` may have pinned: nobody takes those away.
pub(crate) const PINNABLE: usize = 64;
/// Parts in which an arena is registered.
pub(crate) const PARTS: usize = 4;

/// What may be done to an arena's memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rules {
    /// System calls may write to it: not under the barrier that stops user code only.
    pub(crate) calls: bool,
    /// Devices may write to it: only where the quiet time is longer than their I/O.
    pub(crate) devices: bool,
    /// Its owner moves and unmaps it.
    pub(crate) moves: bool,
}

/// Which parts are registered where: (engine, handle).
#[derive(Debug, Default)]
pub(crate) struct Parts(pub(crate) [Option<(usize, RegionHandle)>; PARTS]);

#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) name: &'static str,
    pub(crate) pages: usize,
    pub(crate) rules: Rules,
    /// Engines that it may be registered with.
    pub(crate) engines: &'static [usize],
    base: AtomicUsize,
    shadow: usize,
    /// For each page: the claimed sectors in the low byte, a count of claims above.
    claims: &'static [AtomicU64],
    homes: Vec<AtomicU64>,
    pub(crate) parts: Mutex<Parts>,
}

/// The bytes of a class.
pub(crate) fn content(class: u64, into: &mut [u8]) {
    for (index, word) in into.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_of(class, index).to_ne_bytes());
    }
}

impl Arena {
    pub(crate) fn new(
        name: &'static str,
        pages: usize,
        align: usize,
        rules: Rules,
        engines: &'static [usize],
    ) -> Self {
        let arena = Self {
            name,
            pages,
            rules,
            engines,
            base: AtomicUsize::new(raw::map(pages, align)),
            shadow: raw::map(pages, 0),
            claims: raw::shared_words(pages),
            homes: (0..pages)
                .map(|page| AtomicU64::new((page as u64) % CLASSES))
                .collect(),
            parts: Mutex::default(),
        };
        let mut bytes = vec![0; page_size()];
        for page in 0..pages {
            content(arena.home(page), &mut bytes);
            raw::copy_in(arena.at(page), &bytes);
            raw::copy_in(arena.shadow_of(page), &bytes);
        }
        arena
    }

    pub(crate) fn at(&self, page: usize) -> usize {
        self.base.load(Ordering::Relaxed) + page.min(self.pages - 1) * page_size()
    }

    /// The owner has moved it. All of it is claimed.
    pub(crate) fn moved_to(&self, base: usize) {
        self.base.store(base, Ordering::Relaxed);
    }

    pub(crate) fn shadow_of(&self, page: usize) -> usize {
        self.shadow + page * page_size()
    }

    pub(crate) fn home(&self, page: usize) -> u64 {
        self.homes[page.min(self.pages - 1)].load(Ordering::Relaxed)
    }

    /// A page's claims as one number, for children.
    pub(crate) fn claims_of(&self, page: usize) -> u64 {
        self.claims[page].load(Ordering::Acquire)
    }

    fn try_claim(&self, page: usize, sectors: u8) -> bool {
        let word = &self.claims[page];
        let mut now = word.load(Ordering::Relaxed);
        loop {
            if now & u64::from(sectors) != 0 {
                return false;
            }
            let next = now.wrapping_add(0x100) | u64::from(sectors);
            match word.compare_exchange_weak(now, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(other) => now = other,
            }
        }
    }

    fn let_go(&self, page: usize, sectors: u8) {
        self.claims[page].fetch_and(!u64::from(sectors), Ordering::Release);
    }

    /// Pages of a part: (first, count).
    pub(crate) fn part(&self, part: usize) -> (usize, usize) {
        let each = self.pages / PARTS;
        (part * each, each)
    }

    /// Pages from which content may be taken away.
    pub(crate) fn free_pages(&self) -> usize {
        self.pages - if self.rules.devices { PINNABLE } else { 0 }
    }
}

/// Claimed sectors of neighbouring pages.
pub(crate) struct Claim {
    arena: &'static Arena,
    pub(crate) number: usize,
    pub(crate) page: usize,
    pub(crate) pages: usize,
    sectors: u8,
}

impl Claim {
    /// # Returns
    /// `None` when somebody else is there.
    pub(crate) fn now(me: &Me, number: usize, page: usize, sectors: u8) -> Option<Self> {
        let arena = &me.world.arenas[number];
        // Not `then_some`: a claim that is not ours would be let go.
        arena.try_claim(page, sectors).then(|| Self {
            arena,
            number,
            page,
            pages: 1,
            sectors,
        })
    }

    /// Claims whole pages, waiting for whoever is there. (Everybody who waits claims upwards.)
    pub(crate) fn wait(me: &Me, number: usize, page: usize, pages: usize) -> Self {
        let arena = &me.world.arenas[number];
        for page in page..page + pages {
            while !arena.try_claim(page, WHOLE) {
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        }
        Self {
            arena,
            number,
            page,
            pages,
            sectors: WHOLE,
        }
    }

    pub(crate) fn at(&self) -> usize {
        self.arena.at(self.page)
    }

    pub(crate) fn len(&self) -> usize {
        self.pages * page_size()
    }

    /// Where the claimed bytes of a single page begin, and how many follow: its sectors are
    /// neighbours.
    pub(crate) fn range(&self) -> (usize, usize) {
        let first = self.sectors.trailing_zeros() as usize;
        (first * SECTOR, self.sectors.count_ones() as usize * SECTOR)
    }

    /// Writes to the shadow what is to be in the memory.
    pub(crate) fn expect(&self, offset: usize, bytes: &[u8]) {
        raw::copy_in(self.arena.shadow_of(self.page) + offset, bytes);
    }

    /// What is to be in the memory.
    pub(crate) fn expected(&self, offset: usize, into: &mut [u8]) {
        raw::copy_out(self.arena.shadow_of(self.page) + offset, into);
    }

    /// The content to which a page's sectors return.
    pub(crate) fn homely(&self, page: usize, offset: usize, into: &mut [u8]) {
        let class = self.arena.home(page);
        for (index, word) in into.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&word_of(class, offset / 8 + index).to_ne_bytes());
        }
    }

    /// All of the page is claimed: it gets another class (and no other bytes, yet).
    pub(crate) fn set_home(&self, page: usize, class: u64) {
        assert_eq!(self.sectors, WHOLE, "a class is a page's");
        self.arena.homes[page].store(class, Ordering::Relaxed);
    }

    /// Puts memory and shadow right after I/O that is beyond the promise.
    pub(crate) fn repair(&self) {
        let (offset, len) = self.range();
        let mut bytes = [0; 4096];
        self.expected(offset, &mut bytes[..len]);
        raw::copy_in(self.at() + offset, &bytes[..len]);
    }

    /// Reads the claimed bytes and compares them with their shadow.
    pub(crate) fn verify(&self, me: &mut Me, when: &str) {
        self.verify_by(me, when, raw::copy_out);
    }

    /// The same; `read` gets them.
    pub(crate) fn verify_by(
        &self,
        me: &mut Me,
        when: &str,
        mut read: impl FnMut(usize, &mut [u8]),
    ) {
        let (offset, len) = self.range();
        let (mut seen, mut right) = ([0; 4096], [0; 4096]);
        let (seen, right) = (&mut seen[..len], &mut right[..len]);
        for page in self.page..self.page + self.pages {
            let (at, shadow) = (
                self.arena.at(page) + offset,
                self.arena.shadow_of(page) + offset,
            );
            read(at, seen);
            raw::copy_out(shadow, right);
            if seen != right {
                self.tell(me, when, page, seen, right);
            }
        }
        me.count("bytes verified", (len * self.pages) as u64);
    }

    fn tell(&self, me: &Me, when: &str, page: usize, seen: &[u8], right: &[u8]) -> ! {
        let (offset, len) = self.range();
        let wrong = seen.iter().zip(right).filter(|(a, b)| a != b).count();
        let first = seen
            .iter()
            .zip(right)
            .position(|(a, b)| a != b)
            .unwrap_or(0);
        let last = seen
            .iter()
            .zip(right)
            .rposition(|(a, b)| a != b)
            .unwrap_or(0);
        let mut again = [0; 4096];
        raw::copy_out(self.arena.at(page) + offset, &mut again[..len]);
        let mut home = [0; 4096];
        self.homely(page, offset, &mut home[..len]);
        let span = first / 8 * 8..(last / 8 + 1) * 8;
        let like = |bytes: &[u8]| -> &str {
            if seen[span.clone()] == home[span.clone()] {
                "the bytes of its class"
            } else if bytes.iter().all(|byte| *byte == 0) {
                "zeroes"
            } else {
                "other bytes"
            }
        };
        let hex = |bytes: &[u8]| -> String {
            bytes
                .chunks(8)
                .take(8)
                .map(|word| {
                    let mut whole = [0; 8];
                    whole[..word.len()].copy_from_slice(word);
                    format!("{:016x}", u64::from_le_bytes(whole))
                })
                .collect::<Vec<_>>()
                .join(" ")
        };
        let story = format!(
            "{when}: {wrong} bytes differ, from {} to {} of the page; they are {}; looked at again they are {}\n  \
             seen     {}\n  expected {}",
            offset + first,
            offset + last,
            like(&seen[span.clone()]),
            if again[..len] == *right {
                "right"
            } else if again[..len] == *seen {
                "the same"
            } else {
                "others"
            },
            hex(&seen[span.clone()]),
            hex(&right[span.clone()]),
        );
        me.fail(self.number, page, &story)
    }

    /// Reads the claimed bytes by a system call: `write(2)` to a file and back, or
    /// `process_vm_readv`.
    pub(crate) fn verify_by_call(&self, me: &mut Me, file: &File, when: &str) {
        use std::os::unix::fs::FileExt;
        self.verify_by(me, when, |at, into| {
            let fd = file.as_raw_fd() as usize;
            let wrote = crate::support::os::call(libc::SYS_pwrite64, &[fd, at, into.len(), 0]);
            assert_eq!(wrote.expect("pwrite never says EFAULT"), into.len());
            file.read_exact_at(into, 0).expect("a file of ours");
        });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        for page in self.page..self.page + self.pages {
            self.arena.let_go(page, self.sectors);
        }
    }
}
