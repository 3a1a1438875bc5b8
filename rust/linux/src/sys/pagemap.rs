//! What each page of a process is now: `PAGEMAP_SCAN`, and the older 64-bit entries.
//!
//! # What holds here
//! * A scan that protects must ask for present pages only (mask `WRITTEN | PRESENT`): with
//!   `WRITTEN` alone the kernel builds page tables for all the empty space of the range.
//! * [`Categories::SWAPPED`] alone does not tell: it is a swapped page, a guard page, or a mark on
//!   an absent page.
//!
//! # Cost
//! 2 ns a page for a scan; runs of pages of the same categories come as one region.

use super::{
    Call, Descriptor, Errno, IOCTL_READ_WRITE, Span, asked, checked, ioctl, ioctl_number, outcomes,
    page_size, to_off, to_usize,
};
use std::mem::{offset_of, size_of};
use std::ops::BitOr;
use std::os::fd::RawFd;

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const PAGEMAP_SCAN: u32 = ioctl_number(IOCTL_READ_WRITE, b'f', 16, size_of::<PmScanArg>());
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
const _: () = {
    assert!(PAGEMAP_SCAN == 0xc060_6610);
    assert!(offset_of!(PmScanArg, walk_end) == 32 && offset_of!(PmScanArg, return_mask) == 88);
    assert!(size_of::<PageRegion>() == 24 && size_of::<Entry>() == 8);
};

/// What is true of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(crate) struct Categories(u64);

impl Categories {
    /// None.
    pub(crate) const NONE: Self = Self(0);
    /// Its writes are tracked without waiting (registered with `WP_ASYNC`).
    pub(crate) const WP_ALLOWED: Self = Self(1 << 0);
    /// Written since it was last protected.
    pub(crate) const WRITTEN: Self = Self(1 << 1);
    /// Backed by a file (or shared memory).
    pub(crate) const FILE: Self = Self(1 << 2);
    /// Present in memory.
    pub(crate) const PRESENT: Self = Self(1 << 3);
    /// In swap, or a mark that takes the same place.
    pub(crate) const SWAPPED: Self = Self(1 << 4);
    /// The zero page.
    pub(crate) const ZERO_PAGE: Self = Self(1 << 5);
    /// Part of a huge page that is mapped as one.
    pub(crate) const HUGE: Self = Self(1 << 6);
    /// A guard page (Linux 6.15; older kernels refuse to be asked).
    pub(crate) const GUARD: Self = Self(1 << 8);

    /// Whether all of `other` are true.
    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether one of `other` is true.
    pub(crate) const fn any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both, in constants.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOr for Categories {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.and(other)
    }
}

/// A run of pages of which the same is true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct PageRegion {
    start: u64,
    end: u64,
    categories: Categories,
}

impl PageRegion {
    /// An empty one, to be scanned into.
    pub(crate) const EMPTY: Self = Self {
        start: 0,
        end: 0,
        categories: Categories::NONE,
    };

    /// Where.
    #[allow(clippy::cast_possible_truncation, reason = "addresses of this machine")]
    pub(crate) fn span(&self) -> Span {
        Span::between(self.start as usize, self.end as usize)
    }

    /// What is true there, of what was asked.
    pub(crate) fn categories(&self) -> Categories {
        self.categories
    }
}

outcomes! {
    /// Why a scan could not be done.
    pub(crate) enum ScanStop {
        /// The kernel does not have it (before Linux 6.7).
        Missing = ENOTTY,
        /// Protecting was asked for, and the range is not registered with `WP_ASYNC` throughout.
        NotTracked = EPERM,
        /// The kernel does not know a category or flag.
        Invalid = EINVAL,
        /// The range or the result buffer is no memory of this process.
        Fault = EFAULT,
        /// No memory.
        NoMemory = ENOMEM,
    }
}

/// Which pages a scan reports, and what it does to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// All of these must be true of a page...
    pub(crate) all_of: Categories,
    /// ... and, unless it is empty, at least one of these...
    pub(crate) any_of: Categories,
    /// ... where each of these counts as true when it is false.
    pub(crate) inverted: Categories,
    /// What is told of each page.
    pub(crate) told: Categories,
    /// Protect each page that is reported, in the same moment.
    pub(crate) protect: bool,
    /// Fail with `NotTracked` where writes are not tracked. (Otherwise such memory is passed over.)
    pub(crate) must_be_tracked: bool,
    /// Stop after so many pages reported; 0 for no limit.
    pub(crate) max_pages: u64,
}

impl Query {
    /// Every page of which at least one of `told` is true.
    pub(crate) const fn look(told: Categories) -> Self {
        Self {
            all_of: Categories::NONE,
            any_of: told,
            inverted: Categories::NONE,
            told,
            protect: false,
            must_be_tracked: false,
            max_pages: 0,
        }
    }

    /// Every present page that was written, each protected in the same moment.
    pub(crate) const fn written_and_protect(told: Categories) -> Self {
        Self {
            all_of: Categories::WRITTEN.and(Categories::PRESENT),
            any_of: Categories::NONE,
            inverted: Categories::NONE,
            told,
            protect: true,
            must_be_tracked: true,
            max_pages: 0,
        }
    }
}

/// How far a scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Scanned {
    /// Regions filled in.
    pub(crate) regions: usize,
    /// The address at which to go on; the end of the range when all is done.
    pub(crate) walk_end: usize,
}

/// One page's entry in `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Present in memory.
    pub(crate) fn is_present(self) -> bool {
        self.0 >> 63 & 1 != 0
    }

    /// In swap, or a mark that takes the same place.
    pub(crate) fn is_swapped(self) -> bool {
        self.0 >> 62 & 1 != 0
    }

    /// Backed by a file, or shared memory.
    pub(crate) fn is_file(self) -> bool {
        self.0 >> 61 & 1 != 0
    }

    /// A guard page (Linux 6.15).
    #[cfg(test)]
    pub(crate) fn is_guard(self) -> bool {
        self.0 >> 58 & 1 != 0
    }

    /// Write-protected by a userfaultfd.
    pub(crate) fn is_protected(self) -> bool {
        self.0 >> 57 & 1 != 0
    }

    /// Mapped by this process alone, once.
    pub(crate) fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 != 0
    }
}

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: Descriptor,
}

impl Pagemap {
    /// This process's.
    ///
    /// # Errors
    /// When `/proc` is not there, or descriptors are used up.
    pub(crate) fn own() -> Result<Self, Errno> {
        Self::open(c"/proc/self/pagemap")
    }

    fn open(path: &std::ffi::CStr) -> Result<Self, Errno> {
        let fd = checked(Call::OpenPagemap, || {
            // SAFETY: `path` is a C string for the whole call.
            i64::from(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) })
        })?;
        // SAFETY: the kernel has just given us this descriptor.
        let file = unsafe { Descriptor::own(fd) };
        Ok(Self { file })
    }

    pub(super) fn raw(&self) -> RawFd {
        self.file.raw()
    }

    /// Reports the pages of `span` that `query` asks for, as regions in ascending order. When
    /// `into` is full it stops there, and `walk_end` says where to go on.
    ///
    /// # Errors
    /// [`ScanStop`].
    pub(crate) fn scan(
        &self,
        span: Span,
        query: &Query,
        into: &mut [PageRegion],
    ) -> Result<Scanned, ScanStop> {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: if query.protect {
                PM_SCAN_WP_MATCHING
            } else {
                0
            } | if query.must_be_tracked {
                PM_SCAN_CHECK_WPASYNC
            } else {
                0
            },
            start: span.start as u64,
            end: span.end() as u64,
            walk_end: 0,
            vec: if into.is_empty() {
                0
            } else {
                into.as_mut_ptr().expose_provenance() as u64
            },
            vec_len: asked(Call::PagemapScan, into.len(), 1) as u64,
            max_pages: query.max_pages,
            category_inverted: query.inverted.0,
            category_mask: query.all_of.0,
            category_anyof_mask: query.any_of.0,
            return_mask: if into.is_empty() { 0 } else { query.told.0 },
        };
        // SAFETY: PAGEMAP_SCAN takes this structure, and writes at most `vec_len` regions to
        // `vec`: plain data, and ours to write for the whole call. Protecting changes no byte of
        // memory.
        let got = unsafe { ioctl(Call::PagemapScan, self.raw(), PAGEMAP_SCAN, &mut argument) };
        let regions = to_usize(got.map_err(ScanStop::decode)?);
        #[allow(
            clippy::cast_possible_truncation,
            reason = "an address of this machine"
        )]
        let walk_end = argument.walk_end as usize;
        Ok(Scanned { regions, walk_end })
    }

    /// Reads the entries of the pages from `start` on, one for each place in `into`. Returns how
    /// many were read, fewer only at the end of the address space.
    ///
    /// # Errors
    /// Of the read.
    pub(crate) fn entries(&self, start: usize, into: &mut [Entry]) -> Result<usize, Errno> {
        let mut done = 0;
        while done < into.len() {
            let at = to_off(((start / page_size() + done) * size_of::<Entry>()) as u64);
            let rest = &mut into[done..];
            let bytes = asked(Call::PagemapRead, size_of_val(rest), size_of::<Entry>());
            let got = checked(Call::PagemapRead, || {
                // SAFETY: the kernel writes whole entries to `rest`, which is plain data, and no
                // more bytes than it has.
                let got = unsafe { libc::pread(self.raw(), rest.as_mut_ptr().cast(), bytes, at) };
                got as i64
            })?;
            match to_usize(got) / size_of::<Entry>() {
                0 => break,
                read => done += read,
            }
        }
        Ok(done)
    }

    /// The entry of the page at `address`.
    ///
    /// # Errors
    /// Of the read.
    pub(crate) fn entry(&self, address: usize) -> Result<Entry, Errno> {
        let mut one = [Entry::default()];
        match self.entries(address, &mut one)? {
            // Nothing read is not "nothing there".
            0 => Err(Errno(libc::EIO)),
            _ => Ok(one[0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{self, Advice, Mapping, Protection};
    use crate::sys::memfd::Memfd;
    use crate::sys::uffd::{Features, Modes, Source, Userfaultfd};

    const STATE: Categories = Categories::PRESENT
        .and(Categories::FILE)
        .and(Categories::SWAPPED)
        .and(Categories::ZERO_PAGE);

    fn memory(pages: usize) -> Mapping {
        let memory = Mapping::anonymous(pages * page_size(), Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        memory
    }

    fn write(at: Span) {
        // SAFETY: the tests write only to memory that they have mapped, and hold no reference.
        unsafe { at.as_mut_ptr().write_volatile(1) };
    }

    fn scan(map: &Pagemap, span: Span, query: &Query) -> Vec<(usize, usize, Categories)> {
        let mut found = [PageRegion::EMPTY; 16];
        let scanned = map.scan(span, query, &mut found).unwrap();
        assert_eq!(scanned.walk_end, span.end());
        let page = page_size();
        found[..scanned.regions]
            .iter()
            .map(|r| {
                (
                    (r.span().start - span.start) / page,
                    r.span().len / page,
                    r.categories(),
                )
            })
            .collect()
    }

    #[test]
    fn states_of_untouched_written_zero_and_frame_pages_are_told_apart() {
        let page = page_size();
        let map = Pagemap::own().unwrap();
        let memory = memory(6);
        write(memory.span().page_run(1, 1));
        write(memory.span().page_run(2, 1));
        memory
            .advise_part(memory.span().page_run(3, 1), Advice::PopulateRead)
            .unwrap();
        let frames = Memfd::create(c"test", page as u64).unwrap();
        let over = memory.span().page_run(5, 1);
        // SAFETY: the place is this test's own.
        unsafe { mapping::map_frames(over, &frames, 0) }.unwrap();
        memory.advise_part(over, Advice::PopulateRead).unwrap();
        let present = Categories::PRESENT;
        assert_eq!(
            scan(&map, memory.span(), &Query::look(STATE)),
            [
                (1, 2, present),
                (3, 1, present | Categories::ZERO_PAGE),
                (5, 1, present | Categories::FILE),
            ]
        );
        write(over); // a private copy is no file page any more
        let states = scan(&map, over, &Query::look(STATE));
        assert_eq!(states, [(0, 1, present)]);
    }

    #[test]
    fn full_buffer_stops_the_scan_and_says_where_to_go_on() {
        let map = Pagemap::own().unwrap();
        let memory = memory(6);
        for page in [0, 2, 4] {
            write(memory.span().page_run(page, 1));
        }
        let mut two = [PageRegion::EMPTY; 2];
        let scanned = map
            .scan(memory.span(), &Query::look(STATE), &mut two)
            .unwrap();
        assert_eq!(scanned.regions, 2);
        assert!(scanned.walk_end < memory.span().end());
        let rest = Span::between(scanned.walk_end, memory.span().end());
        let scanned = map.scan(rest, &Query::look(STATE), &mut two).unwrap();
        assert_eq!(
            scanned,
            Scanned {
                regions: 1,
                walk_end: memory.span().end()
            }
        );
    }

    #[test]
    fn written_pages_are_reported_once_and_again_after_the_next_write() {
        let map = Pagemap::own().unwrap();
        let features = Features::WP | Features::WP_UNPOPULATED | Features::WP_ASYNC;
        let uffd = Userfaultfd::open(Source::UserModeOnly, features).unwrap();
        let memory = memory(8);
        for page in [1, 2, 5] {
            write(memory.span().page_run(page, 1));
        }
        let query = Query::written_and_protect(Categories::WRITTEN);
        let mut none = [PageRegion::EMPTY; 4];
        let got = map.scan(memory.span(), &query, &mut none);
        assert_eq!(got, Err(ScanStop::NotTracked));
        uffd.register(memory.span(), Modes::WriteProtect).unwrap();
        let pages = |runs: Vec<(usize, usize, Categories)>| -> Vec<(usize, usize)> {
            runs.into_iter()
                .map(|(first, pages, _)| (first, pages))
                .collect()
        };
        assert_eq!(pages(scan(&map, memory.span(), &query)), [(1, 2), (5, 1)]);
        assert_eq!(pages(scan(&map, memory.span(), &query)), []);
        write(memory.span().page_run(2, 1));
        assert_eq!(pages(scan(&map, memory.span(), &query)), [(2, 1)]);
    }

    /// Goal: tracking needs no privilege, and still sees what the kernel writes for the program.
    #[test]
    fn writes_by_the_kernel_are_seen_by_a_userfaultfd_for_user_mode_only() {
        let map = Pagemap::own().unwrap();
        let features = Features::WP | Features::WP_UNPOPULATED | Features::WP_ASYNC;
        let uffd = Userfaultfd::open(Source::UserModeOnly, features).unwrap();
        let memory = memory(3);
        uffd.register(memory.span(), Modes::WriteProtect).unwrap();
        write(memory.span());
        let query = Query::written_and_protect(Categories::WRITTEN);
        assert_eq!(scan(&map, memory.span(), &query).len(), 1);
        let source = Memfd::create(c"test", page_size() as u64).unwrap();
        for page in [0, 2] {
            let into = memory.span().page_run(page, 1).as_mut_ptr().cast();
            // SAFETY: the kernel writes 100 bytes to memory of this test's own, into which no
            // reference points.
            assert_eq!(unsafe { libc::pread(source.raw(), into, 100, 0) }, 100);
        }
        let runs = scan(&map, memory.span(), &query);
        let pages: Vec<_> = runs
            .iter()
            .map(|&(first, pages, _)| (first, pages))
            .collect();
        assert_eq!(pages, [(0, 1), (2, 1)]);
    }

    #[test]
    fn guard_pages_are_seen_where_the_kernel_has_them() {
        let map = Pagemap::own().unwrap();
        let memory = memory(2);
        if memory
            .advise_part(memory.span().page_run(1, 1), Advice::GuardInstall)
            .is_err()
        {
            return; // before Linux 6.13 there are no guard pages to be seen
        }
        let mut found = [PageRegion::EMPTY; 4];
        match map.scan(memory.span(), &Query::look(Categories::GUARD), &mut found) {
            Ok(scanned) => {
                assert_eq!(scanned.regions, 1);
                assert_eq!(found[0].span(), memory.span().page_run(1, 1));
                assert!(
                    map.entry(memory.span().page_run(1, 1).start)
                        .unwrap()
                        .is_guard()
                );
            }
            Err(stop) => assert_eq!(stop, ScanStop::Invalid),
        }
    }

    #[test]
    fn entry_tells_presence_and_exclusiveness() {
        let map = Pagemap::own().unwrap();
        let memory = memory(2);
        write(memory.span());
        let mut entries = [Entry::default(); 2];
        assert_eq!(map.entries(memory.span().start, &mut entries).unwrap(), 2);
        assert!(entries[0].is_present() && entries[0].is_exclusive() && !entries[0].is_file());
        assert!(!entries[1].is_present() && !entries[1].is_swapped());
    }

    #[test]
    fn empty_buffer_protects_without_reporting() {
        let map = Pagemap::own().unwrap();
        let features = Features::WP | Features::WP_UNPOPULATED | Features::WP_ASYNC;
        let uffd = Userfaultfd::open(Source::UserModeOnly, features).unwrap();
        let memory = memory(2);
        write(memory.span());
        uffd.register(memory.span(), Modes::WriteProtect).unwrap();
        let query = Query::written_and_protect(Categories::WRITTEN);
        assert_eq!(map.scan(memory.span(), &query, &mut []).unwrap().regions, 0);
        let written = Query::look(Categories::WRITTEN);
        let runs = scan(&map, memory.span().page_run(0, 1), &written);
        assert_eq!(runs, []);
    }
}
