//! Memory of our own for benchmarks, which may be handed to an engine or to the kernel.

// What one program leaves aside another one uses.
#![allow(dead_code)]
#![allow(unsafe_code)]

use pagemerge_linux::page_size;
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};

/// Copies of what has any.
pub(crate) const COPIES: usize = 4;

/// Private anonymous memory without huge pages; never unmapped.
pub(crate) struct Memory {
    words: &'static [AtomicU64],
    per_page: usize,
}

impl Memory {
    /// A new mapping; in the place of `old`, if there is one, which is as long and not registered.
    pub(crate) fn map(mib: usize, old: Option<&Self>) -> Result<Self, Box<dyn Error>> {
        let bytes = mib << 20;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        let (at, fixed) = match old {
            Some(old) if old.bytes() == bytes => {
                (old.words.as_ptr().cast_mut().cast(), libc::MAP_FIXED)
            }
            Some(_) => return Err("the memory keeps its size".into()),
            None => (std::ptr::null_mut(), 0),
        };
        // SAFETY: it replaces nothing, or memory of ours that is read and written by atomics only,
        // which go on in the new one. The engine does not have it any more.
        let at = unsafe { libc::mmap(at, bytes, prot, flags | fixed, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: advice for the mapping made above. A kernel without huge pages refuses it, which
        // is as good.
        unsafe { libc::madvise(at, bytes, libc::MADV_NOHUGEPAGE) };
        // SAFETY: the mapping is `bytes` long, aligned to a page, zeroed, and never unmapped.
        let words = unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), bytes / 8) };
        Ok(Self {
            words,
            per_page: page_size() / 8,
        })
    }

    pub(crate) fn addr(&self) -> usize {
        self.words.as_ptr().addr()
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.words)
    }

    pub(crate) fn pages(&self) -> usize {
        self.words.len() / self.per_page
    }

    pub(crate) fn word(&self, page: usize) -> &AtomicU64 {
        &self.words[page * self.per_page + 1]
    }

    /// Half of all runs of `run` pages have four copies; with 0 none.
    pub(crate) fn fill(&self, run: usize, dice: &mut Dice) {
        let pages = self.pages();
        let mut content: Vec<u64> = (0..pages as u64).collect();
        if let Some(runs) = pages.checked_div(run) {
            let mut order: Vec<usize> = (0..runs).collect();
            for at in (1..runs).rev() {
                order.swap(at, dice.below(at + 1));
            }
            for group in order[..runs / 2].chunks_exact(COPIES) {
                for copy in &group[1..] {
                    for page in 0..run {
                        content[copy * run + page] = content[group[0] * run + page];
                    }
                }
            }
        }
        let salt = dice.roll();
        for (page, tag) in content.into_iter().enumerate() {
            let mut state = Dice(salt ^ tag.wrapping_mul(0xd6e8_feb8_6659_fd93));
            for word in &self.words[page * self.per_page..(page + 1) * self.per_page] {
                word.store(state.roll(), Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn advise(&self, advice: i32) -> Result<(), Box<dyn Error>> {
        let at = self.words.as_ptr().cast_mut().cast();
        // SAFETY: the whole of a mapping that is ours, and advice that changes no byte.
        if unsafe { libc::madvise(at, self.bytes(), advice) } == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error().into())
    }
}

/// A seeded source of numbers.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut n = self.0;
        n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ (n >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from((u128::from(self.roll()) * end as u128) >> 64).expect("less than end")
    }
}
