//! Memory by the million, for counting: a page is one number, and every question about it is counted.
//!
//! The simulator's own space proves that nothing is lost, at the price of some hundred bytes and checks
//! for each page. Here a page costs 14 bytes, digests are whatever the test wants them to be, and a
//! script may act at the moments that matter to somebody who means harm. Reads are still held against
//! the last write, at the end ([`Numbers::assert_reads_match`]).

use super::heap;
use pagemerge_core::{
    Attempt, Content, Digest, FrameId, Look, PageId, PageSpace, PageState, Reason, Request, Window,
    Written,
};
use std::cmp::Ordering;
use std::convert::Infallible;

const NONE: u32 = u32::MAX;

/// What memory was asked to do, ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) observed: u64,
    pub(crate) digests: u64,
    pub(crate) compares: u64,
    pub(crate) promotions: u64,
    pub(crate) shares: u64,
    pub(crate) others: u64,
}

/// A moment at which a script may act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// The page has just been hashed.
    Hashed(PageId),
    /// The request is about to be carried out.
    Before(Request),
}

/// What a script wants to happen to the request that it was called before.
pub(crate) type Answer = Option<Attempt<()>>;
type Script = Box<dyn FnMut(&mut Pages, When) -> Answer>;

/// The pages themselves.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    own: Vec<u64>,
    shown: Vec<u32>,
    written: Vec<bool>,
    frames: Vec<Option<u64>>,
    /// What the program wrote last, as the oracle knows it.
    truth: Vec<u64>,
}

impl Pages {
    pub(crate) fn write(&mut self, page: usize, number: u64) {
        self.own[page] = number;
        self.truth[page] = number;
        self.shown[page] = NONE;
        self.written[page] = true;
    }

    pub(crate) fn read(&self, page: usize) -> u64 {
        match self.shown[page] {
            NONE => self.own[page],
            frame => self.frames[frame as usize].expect("a frame lives while a page shows it"),
        }
    }

    fn frame(&self, frame: FrameId) -> Option<u64> {
        self.frames.get(frame.index()).copied().flatten()
    }
}

pub(crate) struct Numbers {
    pub(crate) pages: Pages,
    pub(crate) asked: Asked,
    digest: fn(u64) -> u64,
    script: Option<Script>,
}

impl Numbers {
    /// Pages with these numbers (0 stands for a page of zeroes), hashed by `digest`.
    pub(crate) fn new(numbers: impl IntoIterator<Item = u64>, digest: fn(u64) -> u64) -> Self {
        heap::aside(|| {
            let own: Vec<u64> = numbers.into_iter().collect();
            let pages = Pages {
                truth: own.clone(),
                shown: vec![NONE; own.len()],
                written: vec![true; own.len()],
                own,
                frames: Vec::new(),
            };
            Self {
                pages,
                asked: Asked::default(),
                digest,
                script: None,
            }
        })
    }

    /// Has `script` called at each [`When`]. What it returns for a request is that request's outcome.
    pub(crate) fn script(&mut self, script: impl FnMut(&mut Pages, When) -> Answer + 'static) {
        self.script = Some(Box::new(script));
    }

    pub(crate) fn end_script(&mut self) {
        self.script = None;
    }

    fn tell(&mut self, when: When) -> Answer {
        let mut script = self.script.take()?;
        let answer = script(&mut self.pages, when);
        self.script = Some(script);
        answer
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.own.len()
    }

    pub(crate) fn write(&mut self, page: usize, number: u64) {
        self.pages.write(page, number);
    }

    /// Which pages show a frame.
    pub(crate) fn merged(&self) -> usize {
        self.pages.shown.iter().filter(|&&at| at != NONE).count()
    }

    pub(crate) fn frames(&self) -> usize {
        self.pages.frames.iter().flatten().count()
    }

    /// # Panics
    /// When a page does not read as it was last written.
    pub(crate) fn assert_reads_match(&self) {
        for (page, &truth) in self.pages.truth.iter().enumerate() {
            assert_eq!(self.pages.read(page), truth, "page {page}");
        }
    }

    fn content(&self, content: Content) -> Option<u64> {
        match content {
            Content::Page(page) => Some(self.pages.read(page.index())),
            Content::Frame(frame) => self.pages.frame(frame),
        }
    }

    fn one(&mut self, request: Request) -> Attempt<()> {
        match request {
            Request::Promote { .. } => self.asked.promotions += 1,
            Request::Share { .. } => self.asked.shares += 1,
            _ => self.asked.others += 1,
        }
        if let Some(answer) = self.tell(When::Before(request)) {
            return answer;
        }
        let at = request.page().index();
        let pages = &mut self.pages;
        match request {
            Request::Promote { frame, .. } => {
                if pages.frames.len() <= frame.index() {
                    pages.frames.resize(frame.index() + 1, None);
                }
                assert_eq!(pages.frames[frame.index()], None, "{frame:?} exists");
                pages.frames[frame.index()] = Some(pages.own[at]);
                pages.shown[at] = frame.0;
            }
            Request::Share { frame, .. } => match pages.frame(frame) {
                None => return Attempt::Gone,
                Some(bytes) if bytes == pages.own[at] => pages.shown[at] = frame.0,
                Some(_) => return Attempt::Changed,
            },
            Request::Zero { .. } => return Attempt::Refused(Reason::Other),
            Request::Unshare { .. } => {
                if pages.shown[at] == NONE {
                    return Attempt::Changed;
                }
                pages.own[at] = pages.read(at);
                pages.shown[at] = NONE;
                pages.written[at] = true;
            }
        }
        Attempt::Done(())
    }
}

impl PageSpace for Numbers {
    type Error = Infallible;

    fn page_size(&self) -> usize {
        4096
    }

    fn observe(
        &mut self,
        window: Window,
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), Infallible> {
        self.asked.observed += into.len() as u64;
        for (page, state) in (window.first.index()..).zip(into) {
            let pages = &mut self.pages;
            if pages.shown[page] != NONE {
                *state = PageState::Merged;
                continue;
            }
            let written = pages.written[page];
            if look == Look::Scan {
                pages.written[page] = false;
            }
            *state = PageState::Resident(if written { Written::Yes } else { Written::No });
        }
        Ok(())
    }

    fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>]) -> Result<(), Infallible> {
        heap::aside(|| {
            self.asked.digests += pages.len() as u64;
            for (&page, into) in pages.iter().zip(into) {
                let number = self.pages.read(page.index());
                *into = Attempt::Done(Digest {
                    hash: (self.digest)(number),
                    zero: number == 0,
                });
                let _ = self.tell(When::Hashed(page));
            }
        });
        Ok(())
    }

    fn digest_frames(
        &mut self,
        frames: &[FrameId],
        into: &mut [Attempt<Digest>],
    ) -> Result<(), Infallible> {
        for (&frame, into) in frames.iter().zip(into) {
            *into = match self.pages.frame(frame) {
                Some(number) => Attempt::Done(Digest {
                    hash: (self.digest)(number),
                    zero: false,
                }),
                None => Attempt::Gone,
            };
        }
        Ok(())
    }

    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Infallible> {
        self.asked.compares += 1;
        Ok(match (self.content(a), self.content(b)) {
            (Some(a), Some(b)) => Attempt::Done(a.cmp(&b)),
            _ => Attempt::Gone,
        })
    }

    fn apply(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Result<(), Infallible> {
        heap::aside(|| {
            for (&request, outcome) in requests.iter().zip(outcomes) {
                *outcome = self.one(request);
            }
        });
        Ok(())
    }

    fn release(&mut self, frame: FrameId) -> Result<(), Infallible> {
        self.pages.frames[frame.index()] = None;
        Ok(())
    }
}
