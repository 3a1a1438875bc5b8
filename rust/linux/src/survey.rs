//! One reading of the list of mappings for many regions.
//!
//! The kernel tells what is set on a mapping (locks, dumps, forks) only in a list of all of them, at
//! some 5 us each, so an engine with ten thousand regions must not read it for each of them, neither
//! when they are registered nor in a pass.
//!
//! # What holds here
//! * While the list is short it is read anew whenever somebody asks for what is true now.
//! * While it is long it may be as old as [`SHARE`] times what reading it took, so reading takes no more
//!   than a small part of anybody's time. A call that scans reads it anew up to [`LONG`], so that what
//!   owners changed before the call is kept by it; beyond, with ten thousands of mappings, it may be as old. A mapping that the kernel, asked for that one, does not
//!   describe as the list does is not taken from an old list.
//! * A region that was registered by an old list is looked up in a newer one before any of its pages is
//!   merged: see [`Survey::newer_than`].

use crate::mappings::Mappings;
use crate::sys::Span;
use crate::sys::procmap::Procmap;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A list that was read in less than this is read again for everybody who registers memory.
const CHEAP: Duration = Duration::from_millis(5);
/// A list that took longer is not read again for each call that scans.
const LONG: Duration = Duration::from_millis(50);
/// How many times as long as it took to be read an old list may serve.
const SHARE: u32 = 20;

#[derive(Clone, Debug)]
struct Reading {
    list: Rc<Mappings>,
    /// When it was begun.
    at: Instant,
    took: Duration,
}

/// The last reading.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    last: Option<Reading>,
}

impl Survey {
    fn read(&mut self) -> io::Result<&Reading> {
        let at = Instant::now();
        let list = Rc::new(Mappings::read(Span::between(0, usize::MAX))?);
        let took = at.elapsed();
        Ok(self.last.insert(Reading { list, at, took }))
    }

    /// The list for somebody who registers `span`, and when it was read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn for_registering(
        &mut self,
        span: Span,
        maps: &Procmap,
    ) -> io::Result<(Rc<Mappings>, Instant)> {
        if let Some(last) = &self.last
            && last.took > CHEAP
            && last.at.elapsed() < last.took * SHARE
            && maps
                .at(span.start)
                .is_ok_and(|found| found.span.covers(span) && last.list.knows(&found))
        {
            return Ok((Rc::clone(&last.list), last.at));
        }
        let new = self.read()?;
        Ok((Rc::clone(&new.list), new.at))
    }

    /// How old a list may be in the background, where there are so many mappings by now: so that reading it
    /// takes 2 % of the time, or what is left of that at `at_most`, but never more than its share.
    pub(crate) fn lasts(&self, at_most: Duration, mappings: u64) -> Duration {
        let took = self.last.as_ref().map_or(Duration::ZERO, |it| {
            let growth = mappings.div_ceil((it.list.len() as u64).max(1));
            it.took * u32::try_from(growth).unwrap_or(u32::MAX).max(1)
        });
        (took * 50).min(at_most).max(took * SHARE)
    }

    /// Whether the last list took long to read and is still young enough for its share.
    pub(crate) fn still_serves(&self) -> bool {
        self.last
            .as_ref()
            .is_some_and(|it| it.took > CHEAP && it.at.elapsed() < it.took * SHARE)
    }

    /// Whether it is so long that the next call that scans makes do with it, too.
    pub(crate) fn is_long(&self) -> bool {
        self.last.as_ref().is_some_and(|it| it.took > LONG)
    }

    /// How old a list may be where `at_least` is wanted.
    pub(crate) fn patience(&self, at_least: Duration) -> Duration {
        let costly = self
            .last
            .as_ref()
            .map_or(Duration::ZERO, |it| it.took * SHARE);
        at_least.max(costly)
    }

    /// A list that was read after `since`, and when.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn newer_than(&mut self, since: Instant) -> io::Result<(Rc<Mappings>, Instant)> {
        if let Some(last) = &self.last
            && last.at >= since
        {
            return Ok((Rc::clone(&last.list), last.at));
        }
        let new = self.read()?;
        Ok((Rc::clone(&new.list), new.at))
    }

    /// Gives up a list that is too old for anybody.
    pub(crate) fn drop_old(&mut self) {
        if self
            .last
            .as_ref()
            .is_some_and(|it| it.at.elapsed() > (it.took * SHARE).max(Duration::from_secs(1)))
        {
            self.last = None;
        }
    }
}
