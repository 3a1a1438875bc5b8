//! Looking at pages of which much is known: what has not been written is not looked at.
//!
//! A look in full asks the kernel twice about each page, and costs some 40 ns for each; where merged pages
//! lie scattered, each of them is a mapping, and costs a microsecond. Most pages are what they were at the
//! last look. So this remembers what they were, asks the kernel only which tracked pages were written (for
//! thousands of pages in one call, which has a path of its own for just this question), and looks in full
//! at those.
//!
//! # What is remembered
//! Two bits for each page besides `mapped`, true as of the last look in full:
//!
//! | mapped | own | zero | the page |
//! |---|---|---|---|
//! | no | yes | no | had bytes of its own, and its writes are tracked |
//! | no | no | yes | was on the zero page, and its writes are tracked |
//! | yes | no | no | showed its frame |
//! | yes | yes | no | did not, or nobody could tell: it is looked at in full each time |
//! | no | no | no | anything else: it is looked at in full each time |
//!
//! and one for each page that the kernel has called written, until the scan has been told.
//!
//! # When nobody tells
//! * A write to a merged page makes a copy, and of that nobody is told. So merged pages are looked for
//!   copies when a scan begins, mapping by mapping.
//! * Nobody is asked at all while nothing has happened: no other thread has had a page fault since the last
//!   pass began (the first write to a protected page is one, and so is making a copy), and as many pages are
//!   mapped as then, of files and in all (a copy made for another process counts there, and so do pages
//!   that are given up). What was written after that is found out in the next pass; what another process
//!   writes to a page that is not merged, by the next look in full.
//! * A page that goes to swap is not noticed by the quick look, and is asked about before it is read.
//! * An owner who maps something else over a region without a word is not noticed by the quick look. Nothing
//!   is merged wrongly by that, since a page that is not anonymous memory of his own cannot be moved out, and
//!   bytes are compared. (So there are quick looks only where pages are moved.) For the sake of counters and
//!   reasons there is a look in full now and then ([`FULL_AFTER`]).
//! * If all looks of a pass would be quick, and nothing has happened, the pass itself is left out
//!   ([`PageSpace::is_still`](pagemerge_core::PageSpace::is_still)).
//!
//! # Invariants
//! * K1. A page that is `own` without `mapped`, or `zero`, was protected when the bit was set, and whoever
//!   took its protection away has made it *written* in the kernel's books: a write is told of, at this
//!   look or at the next.
//! * K2. What the kernel has called written is remembered until a scan's look has reported it.
//!
//! # Cost
//! Two bits for each page; 3 ns for each page while nothing happens, else 2 ns more, some 0.4 us for each
//! mapping, and what a look in full costs for each page that was written.

use super::{LinuxSpace, Region};
use crate::error::Error;
use crate::sys::files;
use crate::sys::live::Live;
use crate::sys::pagemap::{Categories, Entry, Query};
use pagemerge_core::{
    Attempt, Look, PageId, PageState, Reason, RegionId, Request, Window, Written,
};
use std::time::{Duration, Instant};

/// Pages about which the kernel is asked in one call: it holds the mmap lock for so long.
const FETCH: usize = 4096;
/// Stretches of known pages in them, at most.
const STRETCHES: usize = 32;
/// How old an answer may be when it is used.
const FRESH: Duration = Duration::from_millis(10);
/// How long it takes, at least, until everything is looked at in full again; so long for each page; and so
/// many times as long as the last such looks took. So they cost a hundredth of the time at most.
const FULL_AFTER: Duration = Duration::from_secs(1);
const FULL_AFTER_EACH: Duration = Duration::from_micros(10);
const FULL_SHARE: u32 = 100;

/// Bits of one word of a bitmap.
const WORD: usize = u64::BITS as usize;

/// What tells whether anybody can have copied a merged page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Faults {
    /// Of all threads but this one.
    others: u64,
    /// Pages that are mapped, and those of them that are of files and of shared memory.
    pages: (u64, u64),
}

impl Faults {
    /// `None` where that cannot be read.
    fn now() -> Option<Self> {
        let of = |path: &str| -> Option<u64> {
            let text = files::read_to_string(path).ok()?;
            // The name, in parentheses, may hold anything.
            let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
            let minor: u64 = fields.nth(7)?.parse().ok()?;
            let major: u64 = fields.nth(1)?.parse().ok()?;
            Some(minor + major)
        };
        let mine = of("/proc/thread-self/stat")?;
        let all = of("/proc/self/stat")?;
        // A fault of this thread in between would pass for one of another, now or next time.
        if of("/proc/thread-self/stat")? != mine {
            return None;
        }
        let statm = files::read_to_string("/proc/self/statm").ok()?;
        let mut fields = statm.split_ascii_whitespace().skip(1);
        let pages = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Self {
            others: all.checked_sub(mine)?,
            pages,
        })
    }
}

/// Whether this process has anything in swap.
fn swaps() -> bool {
    let status = files::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSwap:"));
    line.and_then(|line| line.split_ascii_whitespace().next()) != Some("0")
}

/// What the quick look goes by.
#[derive(Debug, Default)]
pub(super) struct Quick {
    /// Quick looks are right for this engine.
    pub(super) on: bool,
    /// In this pass all looks are in full.
    full: bool,
    /// Nothing can have been written between the beginnings of the last two passes.
    undisturbed: bool,
    /// No merged page can have been copied, and no zero page written, since all of them were looked at.
    unparted: bool,
    /// This process has something in swap, or nobody can tell.
    swaps: bool,
    /// As of the beginning of the last pass.
    faults: Option<Faults>,
    /// As of the beginning of the last sweep over merged and zero pages.
    swept: Option<Faults>,
    /// When the last pass of looks in full began.
    full_at: Option<Instant>,
    /// What looks in full have taken since.
    full_took: Duration,
    /// Which pages of which region the kernel has just been asked about, and when.
    fetched: Option<(RegionId, usize, usize, Instant)>,
}

impl Quick {
    pub(super) fn new(on: bool) -> Self {
        Self {
            on,
            ..Self::default()
        }
    }

    /// A full pass over so many pages begins.
    pub(super) fn begin_pass(&mut self, pages: usize, swept: bool) {
        let now = Instant::now();
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let lasts = FULL_AFTER
            .max(FULL_AFTER_EACH.saturating_mul(pages))
            .max(self.full_took * FULL_SHARE);
        self.fetched = None;
        self.full = !self.on || self.full_at.is_none_or(|at| now.duration_since(at) > lasts);
        if self.full {
            (self.full_at, self.full_took) = (Some(now), Duration::ZERO);
        }
        self.swaps = swaps();
        let faults = Faults::now();
        self.undisturbed = !self.full && faults.is_some() && faults == self.faults;
        self.faults = faults;
        self.begin_sweep_at(faults, swept);
    }

    /// A sweep over merged and zero pages begins; `swept`: the last one came to its end.
    pub(super) fn begin_sweep(&mut self, swept: bool) {
        self.begin_sweep_at(Faults::now(), swept);
    }

    fn begin_sweep_at(&mut self, faults: Option<Faults>, swept: bool) {
        self.unparted = swept && !self.full && faults.is_some() && faults == self.swept;
        self.swept = faults;
    }

    /// Whether no page that is looked at quickly has changed since the last pass began, or (in a sweep) no
    /// merged or zero page since the last sweep over them.
    pub(super) fn is_still(&self, look: Look) -> bool {
        match look {
            Look::Scan => self.goes() && self.undisturbed && self.unparted,
            Look::Sweep => self.goes() && self.unparted,
        }
    }

    /// Whether looks are quick in this pass.
    pub(super) fn goes(&self) -> bool {
        self.on && !self.full
    }

    /// A look in full has been made, which began then.
    pub(super) fn note_full_look(&mut self, begun: Instant) {
        if self.full {
            self.full_took += begun.elapsed();
        }
    }

    /// Something is not as it was: everything is looked at in full in the next pass.
    pub(super) fn forget(&mut self) {
        (self.full_at, self.fetched) = (None, None);
        (self.faults, self.swept) = (None, None);
        (self.full, self.undisturbed, self.unparted) = (true, false, false);
    }
}

impl Region {
    /// What pages of `from..to` are is not known any more.
    pub(super) fn forget_state(&mut self, from: usize, to: usize) {
        for page in from..to {
            self.own.set(page, false);
            self.zero.set(page, false);
            self.written.set(page, false);
        }
    }

    /// Notes what a look in full at the pages from `from` on has found.
    fn note_states(&mut self, from: usize, states: &[PageState]) {
        for (page, state) in (from..).zip(states) {
            let mapped = self.mapped.get(page);
            let own = match state {
                PageState::Resident(Written::Yes | Written::No) => true,
                PageState::Merged | PageState::Absent => false,
                _ => mapped,
            };
            self.own.set(page, own);
            let zero = *state == PageState::ZeroPage && !mapped && self.tracked;
            self.zero.set(page, zero);
        }
    }

    /// For 64 pages from `from` on: which of them are mapped over, own, zero.
    fn known(&self, from: usize) -> (u64, u64, u64) {
        (
            self.mapped.word(from),
            self.own.word(from),
            self.zero.word(from),
        )
    }
}

/// The pages of a word that lie before page `to`, if its first is `from`.
fn below(from: usize, to: usize) -> u64 {
    match to - from {
        left if left >= WORD => u64::MAX,
        left => (1 << left) - 1,
    }
}

impl LinuxSpace {
    /// Refuses what lies in swap, which a quick look does not see: merging would read it in.
    pub(super) fn refuse_swapped(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) {
        if !self.quick.swaps {
            return;
        }
        for (request, outcome) in requests.iter().zip(outcomes) {
            if let Request::Promote { page, .. }
            | Request::Share { page, .. }
            | Request::Zero { page } = *request
                && self.live(page).is_some_and(|live| self.is_swapped(live))
            {
                *outcome = Attempt::Refused(Reason::Swapped);
            }
        }
    }

    /// Whether a page, which a quick look has not seen the state of, lies in swap.
    pub(super) fn is_swapped(&self, page: Live) -> bool {
        let at = page.span().start;
        self.quick.swaps && self.quick.goes() && self.pagemap.entry(at).is_ok_and(Entry::is_swapped)
    }

    /// What a page is has changed by our own doing: it is looked at in full.
    pub(super) fn doubt(&mut self, page: PageId) {
        if let Some((region, at)) = self.known_of(page) {
            region.own.set(at, region.mapped.get(at));
            region.zero.set(at, false);
        }
    }

    /// Looks at pages `from..to` of a region, at what may have changed in full.
    pub(super) fn look_quickly(
        &mut self,
        window: Window,
        (from, to): (usize, usize),
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), Error> {
        match look {
            Look::Scan if !self.quick.undisturbed => self.fetch(window.region, from, to)?,
            Look::Sweep if !self.quick.unparted => {
                let looked = self
                    .look_for_copies(window.region, from, to)
                    .and_then(|()| self.look_for_written_zeroes(window.region, from, to));
                if looked.is_err() {
                    self.quick.swept = None;
                }
                looked?;
            }
            // What the bits say is what there is.
            _ => {}
        }
        let sweeps = !self.quick.unparted;
        let Some(region) = self.region_mut(window.region) else {
            return Ok(());
        };
        let mut doubtful: Vec<(usize, usize)> = Vec::new();
        for at in (from..to).step_by(WORD) {
            let all = below(at, to);
            let (mapped, own, zero) = region.known(at);
            let written = region.written.word(at);
            let doubt = match look {
                Look::Scan => !(mapped | own | zero) | (mapped & own) | (!mapped & written),
                // Other pages are the scan's affair.
                Look::Sweep if sweeps => (mapped & own | zero) & written,
                Look::Sweep => 0,
            } & all;
            let states = &mut into[at - from..(at - from + WORD).min(to - from)];
            let sure = |merged: bool, zero: bool| match (merged, look, zero) {
                (true, ..) => PageState::Merged,
                (false, Look::Sweep, _) => PageState::Unknown,
                (false, Look::Scan, true) => PageState::ZeroPage,
                (false, Look::Scan, false) => PageState::Resident(Written::No),
            };
            if mapped & !own & all == all || mapped & all == 0 && zero & all == 0 {
                states.fill(sure(mapped & all == all, false));
            } else {
                for (n, state) in states.iter_mut().enumerate() {
                    let bit = |word: u64| word >> n & 1 != 0;
                    *state = sure(bit(mapped & !own), bit(zero));
                }
            }
            let mut rest = doubt;
            while rest != 0 {
                let first = rest.trailing_zeros() as usize;
                let pages = (!(rest >> first)).trailing_zeros() as usize;
                match doubtful.last_mut() {
                    Some((_, end)) if *end == at + first => *end += pages,
                    _ => doubtful.push((at + first, at + first + pages)),
                }
                let done = first + pages;
                rest &= if done < WORD { u64::MAX << done } else { 0 };
            }
        }
        // Each look has its price, so what lies close together is looked at in one.
        doubtful.dedup_by(|next, last| {
            let near = next.0 - last.1 <= NEAR;
            if near {
                last.1 = next.1;
            }
            near
        });
        for (first, end) in doubtful {
            let states = &mut into[first - from..end - from];
            let part = Window {
                first: window.first.plus(offset(first - from)),
                pages: offset(end - first),
                ..window
            };
            self.look_in_full(part, (first, end), look, states)?;
        }
        Ok(())
    }

    /// Notes what a look in full has found, and adds what the kernel has called written before.
    pub(super) fn note_look(&mut self, region: RegionId, from: usize, into: &mut [PageState]) {
        let Some(region) = self.region_mut(region) else {
            return;
        };
        let to = from + into.len();
        let mut at = region.written.next(true, from, to);
        while at < to {
            region.written.set(at, false);
            let state = &mut into[at - from];
            if *state == PageState::Resident(Written::No) {
                *state = PageState::Resident(Written::Yes);
            }
            at = region.written.next(true, at + 1, to);
        }
        region.note_states(from, into);
    }

    /// A page has just become a zero page: it is one, and counts as written until a look has protected it.
    pub(super) fn note_fresh_zero(&mut self, page: PageId) {
        if let Some((region, at)) = self.known_of(page) {
            region.zero.set(at, region.tracked);
            region.written.set(at, region.tracked);
        }
    }

    /// A zero page that was not protected before its look may have been written right after it, and then
    /// nobody tells any more (K1): it counts as written until it has been looked at in full once more.
    pub(super) fn doubt_unsure_zeroes(&mut self, id: RegionId) {
        let mut unsure = std::mem::take(&mut self.unsure_zeroes);
        if let Some(region) = self.region_mut(id) {
            for page in unsure.drain(..) {
                region.written.set(page, true);
            }
        }
        self.unsure_zeroes = unsure;
    }

    /// Has the kernel say which tracked pages were written, from `from` on and beyond `to`, and protect
    /// them again.
    fn fetch(&mut self, id: RegionId, from: usize, to: usize) -> Result<(), Error> {
        let now = Instant::now();
        if let Some((region, first, end, at)) = self.quick.fetched
            && region == id
            && first <= from
            && to <= end
            && now.duration_since(at) < FRESH
        {
            // Once for each page: who looks again wants to know what has been written since.
            self.quick.fetched = Some((id, to, end, at));
            return Ok(());
        }
        self.quick.fetched = None;
        let (page, huge) = (self.page, self.huge.pages);
        let Some(region) = self.region_mut(id) else {
            return Ok(());
        };
        let mut end = (from + FETCH).max(to).min(region.pages());
        if let Some(huge) = huge {
            // Pages that were all written may have become a huge page since the last look, of which nobody
            // knows yet: it is not to be cut.
            end = region.block_end(end - 1, page, huge);
        }
        let (live, mut stretches) = (region.live, Vec::with_capacity(4));
        let mut at = from;
        while at < end {
            let (mapped, own, zero) = region.known(at);
            let known = (mapped | own | zero) & below(at, end);
            if known & 1 == 0 {
                let unknown = (known.trailing_zeros() as usize).min(end - at);
                at += unknown;
                continue;
            }
            let pages = (!known).trailing_zeros() as usize;
            let enough = stretches.len() == STRETCHES && at >= to;
            match stretches.last_mut() {
                Some((_, last)) if *last == at => *last = at + pages,
                _ if enough => {
                    end = at;
                    break;
                }
                _ => stretches.push((at, at + pages)),
            }
            at += pages;
        }
        let query = Query {
            must_be_tracked: false,
            all_of: Categories::WRITTEN,
            ..Query::written_and_protect(Categories::WRITTEN)
        };
        for (first, last) in stretches {
            let span = live.part(first * page, (last - first) * page).span();
            let mut written = std::mem::take(&mut self.told_written);
            written.clear();
            let asked = self.scan(span, &query, |at, pages, _| {
                written.push((first + at, first + at + pages));
            });
            self.note_written(id, &written);
            self.told_written = written;
            asked?;
        }
        self.quick.fetched = Some((id, to, end, now));
        Ok(())
    }

    /// Finds those of the zero pages `from..to` that were written since.
    fn look_for_written_zeroes(
        &mut self,
        id: RegionId,
        from: usize,
        to: usize,
    ) -> Result<(), Error> {
        let any = self
            .region_mut(id)
            .is_some_and(|region| region.zero.any(from, to));
        if any {
            self.fetch(id, from, to)?;
        }
        Ok(())
    }

    /// Remembers what the kernel has called written, until a scan's look has reported it.
    pub(super) fn note_written(&mut self, id: RegionId, written: &[(usize, usize)]) {
        if let Some(region) = self.region_mut(id) {
            for &(first, last) in written {
                for page in first..last {
                    region.written.set(page, true);
                }
            }
        }
    }

    /// Finds those of the merged pages `from..to` that have become somebody's own since, in one call for
    /// all of them.
    fn look_for_copies(&mut self, id: RegionId, from: usize, to: usize) -> Result<(), Error> {
        let Some(region) = self.region_mut(id) else {
            return Ok(());
        };
        let span = region
            .live
            .part(from * self.page, (to - from) * self.page)
            .span();
        // (Merged mappings are not tracked, so the kernel passes over all others as a whole.)
        let query = Query {
            all_of: Categories::PRESENT
                .and(Categories::FILE)
                .and(Categories::WP_ALLOWED),
            any_of: Categories::NONE,
            inverted: Categories::FILE.and(Categories::WP_ALLOWED),
            ..Query::look(Categories::PRESENT)
        };
        let mut copies = std::mem::take(&mut self.told_written);
        copies.clear();
        let asked = self.scan(span, &query, |at, pages, _| {
            copies.push((from + at, from + at + pages));
        });
        if let Some(region) = self.region_mut(id) {
            for &(first, last) in &copies {
                for page in first..last {
                    if region.mapped.get(page) && !region.own.get(page) {
                        // Both bits: the sweep is to look at it in full.
                        region.own.set(page, true);
                        region.written.set(page, true);
                    }
                }
            }
        }
        self.told_written = copies;
        asked
    }
}

/// Pages between two that are looked at, at most, for one look at both.
const NEAR: usize = 8;

fn offset(pages: usize) -> u32 {
    u32::try_from(pages).expect("a region's pages fit 32 bits")
}
