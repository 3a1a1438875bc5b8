//! Memory that many threads share without any lock: pages with a sequence number and a checksum, and
//! counters.
//!
//! *Sequences.* A writer gives its pages one number after the other; all words of a page follow from
//! its number. Number 2n + 1 stands in the first word while number 2n + 2 is being written. Readers
//! look all the time, without asking anybody: what they see must be whole, never go back, and lie
//! between what is known to be finished and what is known to be begun.
//!
//! *Counters.* Threads add to the same words. A word lies between the additions that are known to be
//! finished before a look and those that are known to be begun after it.
//!
//! Pages of one number, and counters between two rounds, are equal: they are merged, and broken by
//! the next write.

use crate::support::os::page_size;
use crate::support::raw;
use crate::world::Me;
use std::sync::atomic::{AtomicU64, Ordering, fence};

pub(crate) const SEQUENCE_PAGES: usize = 384;
/// Pages that get the same numbers at about the same time.
const GROUP: usize = 16;
pub(crate) const SEQUENCE_WRITERS: usize = 2;
const LAST: usize = 511;

#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) base: usize,
    /// For each page: the last number that is finished, and the last that is begun. Children share
    /// them.
    pub(crate) finished: &'static [AtomicU64],
    pub(crate) begun: &'static [AtomicU64],
}

fn payload(number: u64, index: usize) -> u64 {
    (number ^ 0x5bd1_e995)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add((index as u64).wrapping_mul(0xd6e8_feb8_6659_fd93))
}

fn checksum(number: u64) -> u64 {
    (1..LAST).fold(number, |sum, index| {
        sum.rotate_left(1) ^ payload(number, index)
    })
}

impl Sequences {
    pub(crate) fn new() -> Self {
        let base = raw::map(SEQUENCE_PAGES, 0);
        let this = Self {
            base,
            finished: raw::shared_words(SEQUENCE_PAGES),
            begun: raw::shared_words(SEQUENCE_PAGES),
        };
        for page in 0..SEQUENCE_PAGES {
            this.write(page, 2);
        }
        this
    }

    pub(crate) fn at(&self, page: usize) -> usize {
        self.base + page * page_size()
    }

    fn write(&self, page: usize, number: u64) {
        let word = |index: usize| raw::word(self.at(page) + index * 8);
        self.begun[page].store(number, Ordering::SeqCst);
        word(0).store(number - 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for index in 1..LAST {
            word(index).store(payload(number, index), Ordering::Relaxed);
        }
        word(LAST).store(checksum(number), Ordering::Relaxed);
        word(0).store(number, Ordering::Release);
        self.finished[page].store(number, Ordering::SeqCst);
    }

    /// Looks at a page: its number if it is whole, `None` while it is being written.
    ///
    /// # Errors
    /// A word that does not follow from the number: its index, and what it is.
    pub(crate) fn look(&self, page: usize) -> Result<Option<u64>, (usize, u64)> {
        let word = |index: usize| raw::word(self.at(page) + index * 8);
        let number = word(0).load(Ordering::Acquire);
        if number % 2 == 1 {
            return Ok(None);
        }
        let mut wrong = None;
        for index in 1..LAST {
            let seen = word(index).load(Ordering::Relaxed);
            if seen != payload(number, index) && wrong.is_none() {
                wrong = Some((index, seen));
            }
        }
        let sum = word(LAST).load(Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if word(0).load(Ordering::Relaxed) != number {
            return Ok(None);
        }
        match wrong {
            Some(wrong) => Err(wrong),
            None if sum != checksum(number) => Err((LAST, sum)),
            None => Ok(Some(number)),
        }
    }

    /// In a child, where nobody writes: each word belongs to the number in the first word or, if that
    /// is odd, to the one before or the one after it, in this order.
    pub(crate) fn is_a_moment(
        &self,
        page: usize,
        finished: u64,
        begun: u64,
    ) -> Result<(), (usize, u64)> {
        let word = |index: usize| raw::word(self.at(page) + index * 8).load(Ordering::Relaxed);
        let first = word(0);
        let number = first.next_multiple_of(2);
        if number < finished || number > begun {
            return Err((0, first));
        }
        if first % 2 == 0 {
            return match (1..LAST).find(|&index| word(index) != payload(number, index)) {
                Some(index) => Err((index, word(index))),
                None => Ok(()),
            };
        }
        let mut new = true;
        for index in 1..LAST {
            let seen = word(index);
            new &= seen == payload(number, index);
            if !new && seen != payload(number - 2, index) {
                return Err((index, seen));
            }
        }
        Ok(())
    }

    /// Looks at a page until it is whole.
    fn check(&self, me: &Me, page: usize, last: &mut u64) {
        let finished = self.finished[page].load(Ordering::SeqCst);
        for _ in 0..1000 {
            match self.look(page) {
                Ok(None) => std::hint::spin_loop(),
                Ok(Some(number)) => {
                    let begun = self.begun[page].load(Ordering::SeqCst);
                    if number < finished || number < *last || number > begun {
                        me.fail(usize::MAX, page, &format!(
                            "sequence page {page} shows number {number}; {finished} was finished, {last} was seen, {begun} is begun; {}",
                            crate::support::os::describe(self.at(page))
                        ));
                    }
                    *last = number;
                    return;
                }
                Err((index, seen)) => me.fail(usize::MAX, page, &format!(
                    "sequence page {page} is not whole: word {index} is {seen:x}, number {}; {}",
                    raw::word(self.at(page)).load(Ordering::Relaxed),
                    crate::support::os::describe(self.at(page))
                )),
            }
        }
    }

    /// At the end, when nobody writes any more.
    pub(crate) fn check_end(&self, me: &Me) {
        let wrong: Vec<usize> = (0..SEQUENCE_PAGES)
            .filter(|&page| self.look(page).is_err())
            .collect();
        if !wrong.is_empty() {
            println!("sequence pages that are not whole: {wrong:?}");
        }
        for page in 0..SEQUENCE_PAGES {
            self.check(me, page, &mut 0);
        }
    }
}

pub(crate) fn write(me: &mut Me, part: usize) {
    let groups = SEQUENCE_PAGES / GROUP / SEQUENCE_WRITERS;
    while !me.is_over() {
        let group = part * groups + me.random.below(groups);
        let sequences = &me.world.sequences;
        let number = sequences.finished[group * GROUP].load(Ordering::SeqCst) + 2;
        for page in group * GROUP..(group + 1) * GROUP {
            me.begin("sequence", usize::MAX, page, 1, number);
            sequences.write(page, number);
        }
        me.count("writes", GROUP as u64);
        me.count("bytes written", (GROUP * page_size()) as u64);
        me.pause(20_000);
    }
}

pub(crate) fn read(me: &mut Me) {
    let mut last = vec![0; SEQUENCE_PAGES];
    while !me.is_over() {
        let from = me.random.below(SEQUENCE_PAGES);
        me.begin("sequences", usize::MAX, from, 32, 0);
        for (page, last) in last.iter_mut().enumerate().skip(from).take(32) {
            me.world.sequences.check(me, page, last);
            me.count("bytes verified", page_size() as u64);
        }
        me.pause(2000);
    }
}

pub(crate) const COUNTER_PAGES: usize = 256;
pub(crate) const COUNTING: usize = 3;
/// Words of each page that are counters.
const COUNTERS: [usize; 3] = [3, 200, 511];

#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) base: usize,
    pub(crate) finished: &'static [AtomicU64],
    pub(crate) begun: &'static [AtomicU64],
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            base: raw::map(COUNTER_PAGES, 0),
            finished: raw::shared_words(COUNTER_PAGES),
            begun: raw::shared_words(COUNTER_PAGES),
        }
    }

    pub(crate) fn at(&self, page: usize) -> usize {
        self.base + page * page_size()
    }

    /// A counter that is not between `finished` and what is begun; the other words are zero.
    pub(crate) fn wrong(&self, page: usize, finished: u64) -> Option<(usize, u64)> {
        for index in 0..512 {
            let seen = raw::word(self.at(page) + index * 8).load(Ordering::SeqCst);
            let right = if COUNTERS.contains(&index) {
                finished..=self.begun[page].load(Ordering::SeqCst)
            } else {
                0..=0
            };
            if !right.contains(&seen) {
                return Some((index, seen));
            }
        }
        None
    }

    fn check(&self, me: &Me, page: usize) {
        let finished = self.finished[page].load(Ordering::SeqCst);
        if let Some((index, seen)) = self.wrong(page, finished) {
            me.fail(usize::MAX, page, &format!(
                "counter {index} of page {page} is {seen}; {finished} additions were finished, {} are begun; {}",
                self.begun[page].load(Ordering::SeqCst),
                crate::support::os::describe(self.at(page))
            ));
        }
    }

    pub(crate) fn check_end(&self, me: &Me) {
        for page in 0..COUNTER_PAGES {
            assert_eq!(
                self.begun[page].load(Ordering::SeqCst),
                self.finished[page].load(Ordering::SeqCst)
            );
            self.check(me, page);
        }
    }
}

pub(crate) fn count(me: &mut Me) {
    let counters = &me.world.counters;
    let mut pages: Vec<usize> = (0..COUNTER_PAGES).collect();
    while !me.is_over() {
        for n in (1..pages.len()).rev() {
            pages.swap(n, me.random.below(n + 1));
        }
        for &page in &pages {
            me.begin("count", usize::MAX, page, 1, 0);
            counters.begun[page].fetch_add(1, Ordering::SeqCst);
            for index in COUNTERS {
                raw::word(counters.at(page) + index * 8).fetch_add(1, Ordering::SeqCst);
            }
            counters.finished[page].fetch_add(1, Ordering::SeqCst);
            if me.chance(10) {
                counters.check(me, page);
                me.count("bytes verified", page_size() as u64);
            }
            if me.chance(10) {
                me.pause(300);
            }
        }
        me.count("writes", (COUNTERS.len() * COUNTER_PAGES) as u64);
        me.count("bytes written", (8 * COUNTERS.len() * COUNTER_PAGES) as u64);
        me.rest(300);
    }
}
