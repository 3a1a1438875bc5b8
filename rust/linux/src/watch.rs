//! Quiet watches: pages that must not be moved are kept under one uninterrupted write-protection
//! until they have proved quiet, and that same protection is then their window.
//!
//! A page that was written after merging lives in a private mapping of a memfd, out of which
//! `UFFDIO_MOVE` takes nothing. Copying such a page while a device writes to it loses data: 57,698 of
//! 68,672 `O_DIRECT` reads (finding F2). A device that is to write must first fault the page in for
//! writing, and a write-protection that was there before, and is there still, proves that nobody
//! has done so. So: protect, wait for longer than the longest I/O, and if the protection is still
//! there, merge under it. On kernels without `UFFDIO_MOVE` all pages are merged this way.
//!
//! # How
//! A second, synchronous userfaultfd protects the pages. The *helper thread* reads its faults and
//! lifts the protection of the page that is written, at once: the writer waits for the helper, not
//! for the quiet time. The kernel's write-protect bit is the only record of what was lifted: nobody
//! sets it again but [`Watches::begin`].
//!
//! # Invariants
//! * Q1. The helper lifts nothing while a window over watched pages is open (`in_window`): the window's
//!   own closing lets the writer go on. It never allocates, and waits for nothing but the mmap lock
//!   and that flag.
//! * Q2. A page counts as quiet only if its bit has been set since the time noted for it.
//! * Q3. Not at all while the process has pages pinned (`VmPin`): that is the caller's to check.
//!
//! # Cost
//! One system call for a run to begin with, nothing while it is quiet, and about 5 us for its first
//! write. A run adds up to two mappings.

use crate::fork::Gate;
use crate::handoff::{Helping, Shut};
use crate::sys::Span;
use crate::sys::bare::Thread;
use crate::sys::live::Live;
use crate::sys::mapping::is_mapped;
use crate::sys::pagemap::Pagemap;
use crate::sys::phase::{Phase, enter};
use crate::sys::thread::spawn_helper;
use crate::sys::uffd::{
    Event, Modes, RawEvent, Ready, RegisterStop, UffdHelper, Userfaultfd, Wake, Waker, WakerHelper,
};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// What both threads see.
#[derive(Debug)]
struct Common {
    /// Held by the window while it is open, by the helper while it lifts a protection.
    in_window: Gate,
    /// Over when the helper has had to end all watches, and itself.
    helping: Helping,
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    since: Instant,
    /// How often the scan has been told that it is quiet.
    told: u8,
}

/// A quiet page is offered for merging at so many looks at least, and for so many quiet times, before
/// its watch is given up for [`REST`]: a debugger's write, which a write-protection refuses instead
/// of delaying, must get through some time. Being on offer for longer than half of the whole round
/// makes sure that any two equal pages are on offer together.
const LOOKS: u8 = 4;
const OFFER: u32 = 4;
/// How long a page is left alone then, in quiet times.
const REST: u32 = 1;

/// How often the helper tries before it takes it that no ioctl works any more (a filter that was
/// installed in mid life).
const LIFTING_TRIES: u32 = 50;

/// How long the helper waits at most: should waking it be forbidden, it ends after so long.
const UNWOKEN_MILLIS: u32 = 2000;

/// How long the helper sleeps between looks where the kernel cannot let it wait.
const LOOKING: Duration = Duration::from_millis(1);

/// What a watch says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quiet {
    /// Not watched, or written since: begin (again).
    No,
    /// Watched, not for long enough.
    NotYet,
    /// It has just become quiet.
    Newly,
    /// It was quiet at the last look already, and has been since.
    Still,
    /// It has had its chances, and is left alone for a while: end its watch.
    Resting,
}

/// The watches of one engine, and their helper thread.
#[derive(Debug)]
pub(crate) struct Watches {
    uffd: Userfaultfd,
    waker: Waker,
    common: Arc<Common>,
    helper: Option<Thread>,
    pagemap: Rc<Pagemap>,
    pages: HashMap<usize, Watched>,
    /// Pages whose watch was given up, and until when they rest.
    resting: HashMap<usize, Instant>,
    /// When the last watch began.
    begun: Option<Instant>,
    /// Runs that are still registered although their watch has ended.
    left: Vec<Span>,
    page: usize,
}

impl Watches {
    /// `uffd` delivers write-protection faults synchronously.
    pub(crate) fn new(uffd: Userfaultfd, pagemap: Rc<Pagemap>, page: usize) -> io::Result<Self> {
        let waker = Waker::new()?;
        let common = Arc::new(Common {
            in_window: Gate::new(),
            helping: Helping::of(AtomicBool::new(false), AtomicBool::new(false)),
        });
        let shared = Arc::clone(&common);
        let helper = spawn_helper("pagemerge-help", &uffd, &waker, move |uffd, waker| {
            help(uffd, waker, &shared, page);
        })?;
        Ok(Self {
            uffd,
            waker,
            common,
            helper: Some(helper),
            pagemap,
            pages: HashMap::new(),
            resting: HashMap::new(),
            begun: None,
            left: Vec::new(),
            page,
        })
    }

    /// Protects a run that is watched nowhere yet, or whose pages were written since.
    ///
    /// # Errors
    /// When the kernel does not register or protect it; nothing is watched then.
    pub(crate) fn begin(&mut self, run: Live, now: Instant) -> Result<(), RegisterStop> {
        let _phase = enter(Phase::Watch);
        self.uffd.register(run.span(), Modes::WriteProtect)?;
        if self.uffd.protect(run.span()).is_err() {
            self.end(run);
            return Err(RegisterStop::Invalid);
        }
        self.begun = Some(now);
        for page in pages(run.span(), self.page) {
            self.pages.insert(
                page,
                Watched {
                    since: now,
                    told: 0,
                },
            );
        }
        Ok(())
    }

    /// What is known of a page whose write-protect bit was just seen to be set (`protected`) or not.
    pub(crate) fn look(
        &mut self,
        page: usize,
        protected: bool,
        quiet: Duration,
        now: Instant,
    ) -> Quiet {
        let Some(watched) = self.pages.get_mut(&page) else {
            return match self.resting.get(&page) {
                Some(until) if now < *until => Quiet::NotYet,
                Some(_) => {
                    self.resting.remove(&page);
                    Quiet::No
                }
                None => Quiet::No,
            };
        };
        if !protected {
            self.pages.remove(&page);
            return Quiet::No;
        }
        let held = now.duration_since(watched.since);
        if held < quiet {
            return Quiet::NotYet;
        }
        if watched.told >= LOOKS && held > quiet * (1 + OFFER) {
            self.resting.insert(page, now + quiet * REST);
            return Quiet::Resting;
        }
        watched.told = watched.told.saturating_add(1);
        if watched.told == 1 {
            Quiet::Newly
        } else {
            Quiet::Still
        }
    }

    /// The helper has had to end all watches. New ones need another userfaultfd.
    pub(crate) fn is_over(&self) -> bool {
        self.common.helping.is_over()
    }

    pub(crate) fn is_watched(&self, page: usize) -> bool {
        self.pages.contains_key(&page)
    }

    /// Whether any page of `span` is watched.
    pub(crate) fn any_in(&self, span: Span) -> bool {
        !self.pages.is_empty() && pages(span, self.page).any(|page| self.pages.contains_key(&page))
    }

    /// When all watches have lasted long enough, should no scan come by any more.
    pub(crate) fn last_until(&self, quiet: Duration) -> Option<Instant> {
        let begun = self.begun.filter(|_| !self.pages.is_empty())?;
        begun.checked_add(quiet * (1 + OFFER))
    }

    /// All watched pages, as runs of neighbours.
    pub(crate) fn runs(&self) -> Vec<Span> {
        let mut all: Vec<usize> = self.pages.keys().copied().collect();
        all.sort_unstable();
        all.chunk_by(|&one, &next| one + self.page == next)
            .map(|run| Span::new(run[0], run.len() * self.page))
            .collect()
    }

    /// Ends the watch of a page that is to rest.
    pub(crate) fn give_up(&mut self, page: Live) {
        let _phase = enter(Phase::Watch);
        let _ = self.uffd.unprotect(page.span(), Wake::Now);
        self.pages.remove(&page.span().start);
    }

    /// Ends the watch of a run in which no page has another userfaultfd: takes protection and
    /// registration away, and lets writers go on.
    pub(crate) fn end(&mut self, run: Live) {
        let _phase = enter(Phase::Watch);
        if self.uffd.unregister(run.span()).is_err() {
            self.left.push(run.span());
            // No room to split a mapping. Without protection the registration does nothing.
            let _ = self.uffd.unprotect(run.span(), Wake::Now);
        }
        let _ = self.uffd.wake(run.span());
        self.forget(run.span());
    }

    /// Lets go of runs whose registration could not be taken away when their watch ended: they would be
    /// refused as another userfaultfd's when they are registered again.
    pub(crate) fn end_again(&mut self) {
        let (uffd, pages, page) = (&self.uffd, &self.pages, self.page);
        self.left.retain(|span| {
            // What is watched again is registered by right.
            let watched = (span.start..span.end())
                .step_by(page)
                .any(|at| pages.contains_key(&at));
            !watched && uffd.unregister(*span).is_err() && is_mapped(*span)
        });
    }

    /// These pages are mapped over: nothing is left to end.
    pub(crate) fn forget(&mut self, span: Span) {
        let known = self.pages.len() + self.resting.len();
        if span.pages() > known {
            self.pages.retain(|page, _| !span.contains(*page));
            self.resting.retain(|page, _| !span.contains(*page));
            return;
        }
        for page in pages(span, self.page) {
            self.pages.remove(&page);
            self.resting.remove(&page);
        }
    }

    /// The helper lifts nothing while this lives.
    pub(crate) fn shut(&self) -> Shut<'_, Gate> {
        Shut::new(&self.common.in_window)
    }

    /// From here on the helper lifts nothing.
    pub(crate) fn enter_window(&self) {
        self.common.in_window.close();
    }

    /// The helper goes on.
    pub(crate) fn leave_window(&self) {
        self.common.in_window.open();
    }

    /// In a window: whether the page has been protected all the time.
    pub(crate) fn still_quiet(&self, page: usize) -> bool {
        self.pages.contains_key(&page)
            && self
                .pagemap
                .entry(page)
                .is_ok_and(|e| e.is_present() && e.is_protected())
    }

    /// In a window that is closing: lets a page that was not merged be written again. Its watch is
    /// over for [`look`](Self::look), which sees the bit gone.
    pub(crate) fn let_go(&self, page: Live) {
        let _ = self.uffd.unprotect(page.span(), Wake::Later);
    }

    /// In a window that is closing: wakes whoever waits for these pages.
    pub(crate) fn wake(&self, run: Live) {
        let _ = self.uffd.wake(run.span());
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.pages.capacity() * size_of::<(usize, Watched)>()
            + self.resting.capacity() * size_of::<(usize, Instant)>()) as u64
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.common.helping.end(|| self.waker.wake());
        if let Some(helper) = self.helper.take() {
            // It ends within a system call; a panic of its own has been printed already.
            helper.join();
        }
        // Dropping the userfaultfd lifts every protection that is left and wakes everybody.
    }
}

fn pages(span: Span, page: usize) -> impl Iterator<Item = usize> {
    (span.start..span.end()).step_by(page)
}

/// The helper thread's life: no allocation, no lock, no log (invariant Q1).
fn help(uffd: &UffdHelper, waker: &WakerHelper, common: &Common, page: usize) {
    let mut inbox = Inbox::default();
    common
        .helping
        .help(|| help_on(uffd, waker, common, page, &mut inbox));
}

/// Events that have been read, and how many of them are settled.
struct Inbox {
    events: [RawEvent; 16],
    got: usize,
    settled: usize,
    unlifted: u32,
    /// How often in a row something had come, and could not be read.
    unread: u32,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            events: [RawEvent::EMPTY; 16],
            got: 0,
            settled: 0,
            unlifted: 0,
            unread: 0,
        }
    }
}

impl Inbox {
    /// Takes what has come, if anything has. Should the read not return, all places count: those that
    /// were not filled are empty, and mean nothing.
    fn take(&mut self, uffd: &UffdHelper) {
        self.events.fill(RawEvent::EMPTY);
        (self.settled, self.got) = (0, self.events.len());
        self.got = uffd.events(&mut self.events).unwrap_or(0);
    }
}

/// So many writers in a row could not be let go on, or not be read of.
const UNLIFTED: u32 = 1000;

/// Lets the writers of a page go on. Says whether it could. `unlifted` counts protections that could not
/// be lifted, one after the other.
fn let_go_on(uffd: &UffdHelper, at: Span, unlifted: &mut u32) -> bool {
    for _ in 0..LIFTING_TRIES {
        // If the page has been mapped over or let go meanwhile there is nothing to lift, and then
        // lifting wakes nobody. If lifting fails otherwise, whoever is woken comes again.
        let lifted = uffd.unprotect(at, Wake::Now).is_ok();
        let woken = uffd.wake(at).is_ok();
        *unlifted = if lifted { 0 } else { *unlifted + 1 };
        if *unlifted > UNLIFTED {
            // Whoever is woken comes again, for ever.
            return false;
        }
        if lifted || woken {
            return true;
        }
        std::thread::sleep(LOOKING);
    }
    false
}

/// Nothing can be lifted any more: all watches end at once, since somebody waits.
fn end_all(uffd: &UffdHelper, waker: &WakerHelper, common: &Common) {
    while uffd.end(waker).is_err() {
        std::thread::sleep(LOOKING);
    }
    common.helping.give_up();
}

/// Settles what is in the inbox, then waits for more.
fn help_on(
    uffd: &UffdHelper,
    waker: &WakerHelper,
    common: &Common,
    page: usize,
    inbox: &mut Inbox,
) {
    let _phase = enter(Phase::Helper);
    while inbox.settled < inbox.got {
        if let Event::Fault { address, .. } = inbox.events[inbox.settled].decode() {
            let at = Span::new(address / page * page, page);
            let _shut = Shut::new(&common.in_window);
            if !let_go_on(uffd, at, &mut inbox.unlifted) {
                return end_all(uffd, waker, common);
            }
        }
        inbox.settled += 1;
    }
    match uffd.wait(Some(waker), Some(UNWOKEN_MILLIS)) {
        Ok(Ready::Events) => {
            inbox.take(uffd);
            inbox.unread = if inbox.got > 0 { 0 } else { inbox.unread + 1 };
            // (Once in a while a window has let the writer go on before he was read of.)
            if inbox.unread > UNLIFTED {
                end_all(uffd, waker, common);
            }
        }
        Ok(Ready::Woken) => waker.clear(),
        Ok(Ready::Timeout) => {}
        Err(_) => {
            // No memory to wait with: look from time to time instead.
            std::thread::sleep(LOOKING);
            inbox.take(uffd);
        }
    }
}
