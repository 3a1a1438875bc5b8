//! `PageSpace`: the only door between the algorithm and memory.
//!
//! Live memory is never lent as `&[u8]`: another thread may write it at any moment. The algorithm
//! sees states and digests, and says what it wants done; bytes are compared on the other side of
//! this door, once more, while nobody can write. Everything takes a batch, so that memory can be
//! fast about it.
//!
//! # What the two sides may rely on
//! * **The scanner** names a frame ([`FrameId`]) in [`Request::Promote`]; the frame exists from the
//!   moment that request is done until [`PageSpace::release`]. Requests of one batch take effect
//!   in order, so a `Share` may follow the `Promote` of its frame in the same batch.
//! * **The space** changes a page only in [`PageSpace::apply`], and only so that a reader sees no
//!   difference. It remembers which pages it has mapped onto frames and reports each of them as
//!   [`PageState::Merged`] until a write (or an `Unshare`) parts them.
//! * A lost race is an [`Attempt`], never an error. An error means that the space as a whole can
//!   no longer be used.

use crate::{FrameId, Nid, PageId, RegionId};
use std::cmp::Ordering;
use std::fmt;

/// A run of pages of one region, in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The region that holds them.
    pub region: RegionId,
    /// The first page.
    pub first: PageId,
    /// How many pages, at least 1.
    pub pages: u32,
}

/// Why the space is asked to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// The scan examines these pages now: with write tracking, each page's changed bit is consumed
    /// and the page is armed again.
    Scan,
    /// Only to learn which merged pages and zero pages are still what they were: no side effect,
    /// and a changed bit stays for the next `Scan`. [`Written`] may be reported as `Unknown`.
    Sweep,
}

/// Whether a page was written since the last [`Look::Scan`] at it.
///
/// A look may use up a page's changed bit only when it reports that page as [`PageState::Resident`]:
/// nobody would hear of that write again, and the page's old hash would be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// This page is not tracked: only its digest can tell.
    Unknown,
    /// Written, or looked at for the first time.
    Yes,
    /// Not written.
    No,
}

/// What a page is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Nothing is mapped there (never touched, discarded, or swapped out).
    Absent,
    /// It maps the zero page, whoever put it there.
    ZeroPage,
    /// It still shows the frame onto which it was merged.
    Merged,
    /// An ordinary page with bytes of its own, which may be examined. A page that was merged and
    /// has been written since is reported like this, too.
    Resident(Written),
    /// A page with bytes of its own that must be left alone, and why. If it was merged, it is not
    /// any more.
    Ineligible(Reason),
    /// Nobody can tell at the moment; whatever is recorded of it stays as it is. (A swapped-out
    /// page inside a merged mapping: it may be a private copy.)
    Unknown,
}

/// A keyed hash of a page's bytes, and whether all of them are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest {
    /// Equal bytes have equal hashes, within one engine. The other direction is never relied on. The
    /// scanner goes by the lowest 48 bits alone, which is what its records have room for.
    pub hash: u64,
    /// All bytes are zero. Exact, not a guess by the hash.
    pub zero: bool,
}

impl Digest {
    /// The part of the hash that records keep and trees are ordered by: 48 bits, the highest of a word,
    /// since trees are divided by the highest.
    pub(crate) fn kept(self) -> u64 {
        self.hash << 16
    }
}

/// Something with bytes: a page as it is now, or a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A page of a registered region.
    Page(PageId),
    /// A frame that exists.
    Frame(FrameId),
}

/// One change asked of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make a new frame of the page's bytes, and the page its first sharer.
    Promote {
        /// The page that is examined.
        page: PageId,
        /// The name of the frame to be.
        frame: FrameId,
    },
    /// Put the page onto an existing frame, provided that their bytes are equal.
    Share {
        /// The page.
        page: PageId,
        /// The frame.
        frame: FrameId,
    },
    /// Put the page onto the zero page, provided that all its bytes are zero.
    Zero {
        /// The page.
        page: PageId,
    },
    /// Give a merged page (`frame` is given) or a page on the zero page (`None`) its own copy back.
    Unshare {
        /// The page.
        page: PageId,
        /// The frame that it shows, or `None` for the zero page.
        frame: Option<FrameId>,
    },
}

impl Request {
    /// The page that the request is about.
    #[must_use]
    pub fn page(&self) -> PageId {
        match *self {
            Self::Promote { page, .. }
            | Self::Share { page, .. }
            | Self::Zero { page }
            | Self::Unshare { page, .. } => page,
        }
    }
}

/// How a request ended when nothing is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Attempt<T> {
    /// Done.
    Done(T),
    /// The page's bytes are not (or no longer) what the request was based on. Nothing was changed.
    Changed,
    /// The page, or the frame that it was to join, is not there. Nothing was changed.
    Gone,
    /// It cannot be done now, and why. Nothing was changed.
    Refused(Reason),
}

impl<T> Attempt<T> {
    /// Whether it was done.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

macro_rules! reasons {
    ($($(#[$meta:meta])* $name:ident = $text:literal),* $(,)?) => {
        /// Why a page was left alone. A closed list; each has a name for programs and users.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[$meta])* $name),* }

        impl Reason {
            /// Every reason, in declaration order.
            pub const ALL: &'static [Reason] = &[$(Reason::$name),*];

            /// The name that programs see: lower case, words joined by underscores.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Reason::$name => $text),* }
            }
        }
    };
}

reasons! {
    /// A device or the kernel holds the page for I/O (`O_DIRECT`, `io_uring` buffers, `vmsplice`).
    Pinned = "pinned",
    /// A forked child still shares the page.
    SharedByFork = "shared_by_fork",
    /// `mlock`ed: the owner asked that it stay where it is.
    Mlocked = "mlocked",
    /// Sealed by `mseal`.
    Sealed = "sealed",
    /// A guard page (`MADV_GUARD_INSTALL`).
    Guard = "guard",
    /// Not readable and writable any more.
    ReadOnly = "read_only",
    /// Shared memory.
    SharedMapping = "shared_mapping",
    /// Backed by a file.
    FileBacked = "file_backed",
    /// A `hugetlbfs` page.
    Hugetlb = "hugetlb",
    /// Holds a thread's stack or thread-local storage, which the kernel writes at the thread's end.
    ThreadStack = "thread_stack",
    /// Memory that the owner keeps out of core dumps (`MADV_DONTDUMP`): likely secrets.
    DontDump = "dontdump",
    /// Has an attribute that a new mapping would lose (`DONTFORK`, `WIPEONFORK`, NUMA policy,
    /// protection key).
    Attributes = "attributes",
    /// The program uses userfaultfd on this memory itself.
    ForeignUserfaultfd = "foreign_userfaultfd",
    /// Swapped out, or in a state that does not tell.
    Swapped = "swapped",
    /// Nothing is mapped there any more.
    Unmapped = "unmapped",
    /// Was merged and has been written; `remerge="never"` leaves such pages alone.
    Broken = "broken",
    /// Was merged and has been written; `remerge="quiet"` is waiting until it has been quiet.
    NotQuiet = "not_quiet",
    /// The mapping budget (`vm.max_map_count`) is used up.
    MappingBudget = "mapping_budget",
    /// The frame store is full, or a limit (`RLIMIT_FSIZE`, a memory cgroup) keeps it from growing.
    FramesFull = "frames_full",
    /// Not enough memory to begin safely.
    NoMemory = "no_memory",
    /// An `O_DIRECT` file on a network file system is open: its I/O holds pages without pinning them.
    NetworkDirectIo = "network_direct_io",
    /// `/proc` cannot be read any more, so nobody can tell what must not be merged.
    ProcUnreadable = "proc_unreadable",
    /// Set aside by the caller.
    Excluded = "excluded",
    /// Part of a huge page that too few pages of would merge to be worth splitting
    /// (`thp_min_duplicates`), or a twin of nothing else.
    HugePage = "huge_page",
    /// Not attempted, because the space failed before its turn.
    NotTried = "not_tried",
    /// The kernel refused for a reason that is not in this list.
    Other = "other",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the algorithm may ask of memory.
pub trait PageSpace {
    /// Why the space as a whole can no longer be used.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Bytes in a page.
    fn page_size(&self) -> usize;

    /// Writes what each page of `window` is now to `into`, which has `window.pages` entries.
    ///
    /// # Errors
    /// When the space is unusable; `into` is then unspecified.
    fn observe(
        &mut self,
        window: Window,
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), Self::Error>;

    /// Whether nothing about any page has changed since this was last asked about the same look, and
    /// all that had changed before has been told. Of [`Look::Sweep`] only merged and zero pages count, and
    /// having been asked about [`Look::Scan`] counts, too. Asked when a scan or a sweep begins: one that
    /// could find nothing new is left out.
    ///
    /// A space that cannot tell says no.
    fn is_still(&mut self, look: Look) -> bool {
        let _ = look;
        false
    }

    /// The first page of `window`, which may be as long as a region, that a [`Look::Scan`] would not
    /// find [`PageState::Absent`]; `None` if it would find all of them so. Asked where nothing was at
    /// the page before, about pages that the algorithm knows nothing of. Has no side effect.
    ///
    /// A space that cannot tell names the first page, and a pass then looks at every page.
    ///
    /// # Errors
    /// When the space is unusable.
    fn next_present(&mut self, window: Window) -> Result<Option<PageId>, Self::Error> {
        Ok(Some(window.first))
    }

    /// Writes the NUMA node of each page of `window` to `into`. Asked only while
    /// `merge_across_nodes` is off.
    ///
    /// # Errors
    /// When the space is unusable.
    fn nids(&mut self, window: Window, into: &mut [Nid]) -> Result<(), Self::Error> {
        let _ = window;
        into.fill(Nid(0));
        Ok(())
    }

    /// Hashes each page of `pages` into `into`, of the same length.
    ///
    /// # Errors
    /// When the space is unusable.
    fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>])
    -> Result<(), Self::Error>;

    /// Hashes frames, as [`PageSpace::digest`] hashes pages.
    ///
    /// Asked in digest order after each batch of promotions: a page may have been written between
    /// being hashed and becoming a frame, and then the frame's bytes are not those of that hash. A
    /// space that leaves this out (nothing is `Done`) has such a frame kept under the wrong key, which
    /// costs later matches and nothing else.
    ///
    /// # Errors
    /// When the space is unusable.
    fn digest_frames(
        &mut self,
        frames: &[FrameId],
        into: &mut [Attempt<Digest>],
    ) -> Result<(), Self::Error> {
        let _ = (frames, into);
        Ok(())
    }

    /// Byte order (as `memcmp`) of two contents as they are now.
    ///
    /// # Errors
    /// When the space is unusable.
    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Self::Error>;

    /// Carries out `requests` in order and says how each one ended.
    ///
    /// `outcomes` has the same length and comes in filled with `Refused(NotTried)`. A `Share` whose
    /// frame was to come from a `Promote` of the same batch that failed ends as `Gone`.
    ///
    /// # Errors
    /// When the space is unusable; the outcomes that it wrote before hold all the same.
    fn apply(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Result<(), Self::Error>;

    /// Says that the algorithm has noticed, by [`PageSpace::observe`], that `page` no longer shows
    /// `frame`: it was written, discarded or unmapped. (Not said after an `Unshare`.) What is
    /// mapped there may still refer to the frame's place.
    fn parted(&mut self, page: PageId, frame: FrameId) {
        let _ = (page, frame);
    }

    /// Says that no page shows `frame` any more and that its name will be used again.
    ///
    /// # Errors
    /// When the space is unusable. The name is free all the same: the space may lose the frame's place,
    /// not its name.
    fn release(&mut self, frame: FrameId) -> Result<(), Self::Error>;
}
