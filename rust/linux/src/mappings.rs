//! Which of a program's memory can be merged, and why the rest cannot.
//!
//! The kernel's list of mappings (`/proc/self/smaps`) is the only thing that tells: registering with
//! a userfaultfd accepts shared and file mappings, too, so it is no test of anything.
//!
//! # What holds here
//! * Every byte of the range asked about is in exactly one [`Stretch`]; holes are `Unmapped`.
//! * What is said is true of the moment of reading. A mapping that changes later is met again in the
//!   window, where the kernel refuses it with a name.
//!
//! # Thread stacks
//! When a thread ends, the kernel clears its thread number in the C library's record of it without
//! waiting for any window, so the write would be lost and whoever joins the thread would wait for
//! ever. The record is found through the head of the robust mutex list, which lies in it, and which
//! the kernel tells for each thread. The stack is below it in the same mapping. (The main thread's
//! record is not on its stack, but in a mapping that may have grown together with the program's
//! own memory: there only the pages around it are refused.)
//!
//! # Cost
//! The kernel tells the flags of a mapping only together with a count of its pages, and only for all
//! mappings from the lowest up to the range: 5 us for each, 0.3 s near the limit of 65,530. Many
//! ranges are better surveyed by one [`Mappings`]: [`crate::survey`] keeps one for a while.

use crate::sys::procmap::{Found, Procmap, QueryStop};
use crate::sys::{Span, files, page_size, process};
use pagemerge_core::Reason;
use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::BitOr;

/// How the kernel calls the files that hold frames.
pub(crate) const FRAMES: &str = "/memfd:pagemerge";

/// A mapping's flags that mean something here, by their names in `VmFlags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u32);

macro_rules! flags {
    ($($(#[$meta:meta])* $name:ident = $text:literal),* $(,)?) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        #[derive(Clone, Copy)]
        #[repr(u32)]
        enum Bit { $($name),* }

        impl Flags {
            $($(#[$meta])* pub(crate) const $name: Self = Self(1 << Bit::$name as u32);)*

            fn named(text: &str) -> Self {
                match text { $($text => Self::$name,)* _ => Self(0) }
            }
        }
    };
}

flags! {
    /// `mlock`ed.
    LOCKED = "lo",
    /// `mseal`ed.
    SEALED = "sl",
    /// `hugetlbfs`.
    HUGETLB = "ht",
    /// Not in core dumps.
    DONT_DUMP = "dd",
    /// Not for children.
    DONT_FORK = "dc",
    /// Zeroes for children.
    WIPE_ON_FORK = "wf",
    /// A userfaultfd waits for missing pages.
    UFFD_MISSING = "um",
    /// A userfaultfd protects against writes.
    UFFD_PROTECT = "uw",
    /// A userfaultfd waits for minor faults.
    UFFD_MINOR = "ui",
    /// Grows downwards: a stack.
    GROWS_DOWN = "gd",
    /// A shadow stack.
    SHADOW_STACK = "ss",
    /// Memory of a device.
    DEVICE = "io",
    /// Page numbers without pages.
    NO_PAGES = "pf",
    /// Pages and page numbers, mixed.
    MIXED = "mm",
    /// arm64 memory tags.
    TAGGED = "mt",
    /// May be dropped by the kernel.
    DROPPABLE = "dp",
    /// No huge pages.
    NO_HUGE_PAGES = "nh",
    /// Huge pages welcome.
    HUGE_PAGES = "hg",
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Flags {
    /// Whether one of `other` is set.
    pub(crate) fn any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// A mapping of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vma {
    /// Where.
    pub(crate) span: Span,
    readable: bool,
    writable: bool,
    executable: bool,
    shared: bool,
    /// Where in the file it begins.
    pub(crate) offset: u64,
    /// The file's number, or 0.
    pub(crate) inode: u64,
    /// The file's path, or what the kernel calls it: `[heap]`, `[stack]`, `[anon:...]`.
    pub(crate) name: Cow<'static, str>,
    /// Its flags.
    pub(crate) flags: Flags,
    protection_key: u32,
    /// Whether huge pages may come to be in it.
    pub(crate) may_be_huge: bool,
}

impl Vma {
    /// The first line of a mapping in `maps` or `smaps`; `None` for any other line.
    fn parse(line: &str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16)
            .ok()
            .filter(|end| start <= *end)?;
        let mut fields = rest.splitn(5, ' ');
        let permissions = fields.next()?.as_bytes();
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let _device = fields.next()?;
        let inode = fields.next()?.trim().parse().ok()?;
        // Frames may be mapped in very many places.
        let name = match fields.next().unwrap_or_default().trim() {
            "" => Cow::Borrowed(""),
            frames if frames.starts_with(FRAMES) => Cow::Borrowed(FRAMES),
            other => Cow::Owned(other.to_owned()),
        };
        let [read, write, execute, sharing] = *permissions else {
            return None;
        };
        Some(Self {
            span: Span::between(start, end),
            readable: read == b'r',
            writable: write == b'w',
            executable: execute == b'x',
            shared: sharing == b's',
            offset,
            inode,
            name,
            ..Self::default()
        })
    }

    /// A later line of a mapping in `smaps`.
    fn add(&mut self, line: &str) {
        let Some((name, value)) = line.split_once(':') else {
            return;
        };
        let value = value.trim();
        match name {
            "VmFlags" => {
                self.flags = value
                    .split(' ')
                    .map(Flags::named)
                    .fold(self.flags, Flags::bitor);
            }
            "ProtectionKey" => self.protection_key = value.parse().unwrap_or(0),
            "THPeligible" => self.may_be_huge = value != "0",
            _ => {}
        }
    }

    /// Whether frames of ours are mapped there, or were until they were written.
    pub(crate) fn shows_frames(&self) -> bool {
        self.readable && self.writable && !self.shared && self.name.starts_with(FRAMES)
    }

    /// Whether a userfaultfd has it, ours or the program's.
    pub(crate) fn has_userfaultfd(&self) -> bool {
        self.flags
            .any(Flags::UFFD_MISSING | Flags::UFFD_PROTECT | Flags::UFFD_MINOR)
    }

    /// Why its pages cannot be merged; `None` if they can. `ours` says that the userfaultfd that it
    /// may have is ours. Memory policies and thread stacks are not seen from here.
    pub(crate) fn refusal(&self, ours: bool) -> Option<Reason> {
        let flags = self.flags;
        let special = Flags::DEVICE | Flags::NO_PAGES | Flags::MIXED | Flags::DROPPABLE;
        let lost = Flags::DONT_FORK | Flags::WIPE_ON_FORK | Flags::TAGGED;
        // From what it is, over what it may not be used for, to what is set on it: the first is the
        // one that somebody who wants it merged has to know.
        let checks = [
            (flags.any(Flags::HUGETLB), Reason::Hugetlb),
            (self.shared, Reason::SharedMapping),
            (
                flags.any(Flags::GROWS_DOWN | Flags::SHADOW_STACK) || self.name == "[stack]",
                Reason::ThreadStack,
            ),
            (
                self.inode != 0 || self.name.starts_with('/'),
                Reason::FileBacked,
            ),
            (flags.any(special), Reason::Other),
            (!self.readable || !self.writable, Reason::ReadOnly),
            (flags.any(Flags::SEALED), Reason::Sealed),
            (flags.any(Flags::LOCKED), Reason::Mlocked),
            (flags.any(Flags::DONT_DUMP), Reason::DontDump),
            (
                flags.any(lost) || self.protection_key != 0 || self.executable,
                Reason::Attributes,
            ),
            (self.has_userfaultfd() && !ours, Reason::ForeignUserfaultfd),
        ];
        checks
            .into_iter()
            .find(|(holds, _)| *holds)
            .map(|(_, reason)| reason)
    }
}

/// A part of a range about which one thing is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Where.
    pub(crate) span: Span,
    /// Why it cannot be merged; `None` if it can.
    pub(crate) refusal: Option<Reason>,
    /// Whether huge pages may come to be in it.
    pub(crate) may_be_huge: bool,
    /// Whether it shows frames of an engine of this process: refused as `FileBacked`, although the
    /// pages in it that were written since are ordinary ones.
    pub(crate) shows_frames: bool,
}

/// What can be merged in `range`, and why the rest cannot: stretches in ascending order that cover
/// it. `ours` says of a mapping with a userfaultfd whether that is ours.
///
/// # Errors
/// When `/proc/self/smaps` or the list of threads cannot be read.
pub(crate) fn survey(range: Span, ours: impl FnMut(Span) -> bool) -> io::Result<Vec<Stretch>> {
    Ok(Mappings::read(range)?.survey(range, ours))
}

/// The mappings of a part of the address space, read once for many ranges in it.
#[derive(Debug)]
pub(crate) struct Mappings {
    vmas: Vec<Vma>,
    records: Vec<ThreadRecord>,
}

impl Mappings {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.vmas.len()
    }

    /// Reads the mappings that have an address in `range`.
    ///
    /// # Errors
    /// When `/proc/self/smaps` or the list of threads cannot be read.
    pub(crate) fn read(range: Span) -> io::Result<Self> {
        Ok(Self {
            vmas: read(range)?,
            records: thread_records(range)?,
        })
    }

    /// These mappings, as if nobody had a thread.
    #[cfg(feature = "fuzz")]
    pub(crate) fn of(vmas: Vec<Vma>) -> Self {
        Self {
            vmas,
            records: Vec::new(),
        }
    }

    /// The first mapping that ends behind `address`.
    fn first_reaching(&self, address: usize) -> usize {
        self.vmas.partition_point(|vma| vma.span.end() <= address)
    }

    /// Whether `found`, a mapping as it is now, is (a part of) one in the list, of the same kind.
    pub(crate) fn knows(&self, found: &Found) -> bool {
        self.vmas
            .get(self.first_reaching(found.span.start))
            .is_some_and(|vma| {
                vma.span.covers(found.span)
                    && vma.inode == found.inode
                    && (vma.readable && vma.writable && !vma.shared) == found.private_and_writable
            })
    }

    /// What the owner told the kernel about huge pages in the mapping at `address`: wanted, refused,
    /// or nothing.
    pub(crate) fn huge_page_advice(&self, address: usize) -> Option<bool> {
        let flags = self.vmas.get(self.first_reaching(address))?.flags;
        if flags.any(Flags::HUGE_PAGES) {
            return Some(true);
        }
        flags.any(Flags::NO_HUGE_PAGES).then_some(false)
    }

    /// What of `range` its owner has changed since it was registered, so that a new mapping in its
    /// place would undo that: protection, locks, what children and core dumps get. Frames of ours
    /// and userfaultfds are no such change; holes are told as `Unmapped`.
    pub(crate) fn altered(&self, range: Span) -> Vec<(Span, Reason)> {
        let mut found = Vec::new();
        let mut at = range.start;
        let first = self.first_reaching(range.start);
        for vma in &self.vmas[first..] {
            if vma.span.start >= range.end() {
                break;
            }
            let Some(part) = vma.span.intersection(range) else {
                continue;
            };
            if part.start > at {
                found.push((Span::between(at, part.start), Reason::Unmapped));
            }
            at = part.end();
            let mut plain = vma.clone();
            if plain.name.starts_with(FRAMES) {
                (plain.inode, plain.name) = (0, Cow::Borrowed(""));
            }
            if let Some(reason) = plain.refusal(true) {
                found.push((part, reason));
            }
        }
        if at < range.end() {
            found.push((Span::between(at, range.end()), Reason::Unmapped));
        }
        found
    }

    /// As [`survey`], for a range inside the one that was read.
    pub(crate) fn survey(&self, range: Span, mut ours: impl FnMut(Span) -> bool) -> Vec<Stretch> {
        let mut found: Vec<Stretch> = Vec::new();
        let mut add = |span: Span, refusal, of: Option<&Vma>| {
            let may_be_huge = of.is_some_and(|vma| vma.may_be_huge);
            let shows_frames = of.is_some_and(Vma::shows_frames);
            let next = Stretch {
                span,
                refusal,
                may_be_huge,
                shows_frames,
            };
            match found.last_mut() {
                _ if span.is_empty() => {}
                Some(last) if (Stretch { span, ..*last }) == next => {
                    last.span = Span::between(last.span.start, span.end());
                }
                _ => found.push(next),
            }
        };
        let mut at = range.start;
        let first = self.first_reaching(range.start);
        for vma in &self.vmas[first..] {
            if vma.span.start >= range.end() {
                break;
            }
            // Mappings may have changed while the list was read, and so seem to overlap.
            let Some(part) = vma.span.intersection(Span::between(at, range.end())) else {
                continue;
            };
            add(Span::between(at, part.start), Some(Reason::Unmapped), None);
            at = part.end();
            let refusal = vma
                .refusal(vma.has_userfaultfd() && ours(part))
                .or_else(|| process::has_memory_policy(part.start).then_some(Reason::Attributes));
            if refusal.is_some() {
                add(part, refusal, Some(vma));
                continue;
            }
            let mut from = part.start;
            for stack in self
                .records
                .iter()
                .filter_map(|record| record.refused(vma.span))
            {
                let Some(stack) = stack.intersection(Span::between(from, part.end())) else {
                    continue;
                };
                add(Span::between(from, stack.start), None, Some(vma));
                add(stack, Some(Reason::ThreadStack), Some(vma));
                from = stack.end();
            }
            add(Span::between(from, part.end()), None, Some(vma));
        }
        add(Span::between(at, range.end()), Some(Reason::Unmapped), None);
        found
    }
}

/// The mappings that have an address in `range`, with their flags.
///
/// # Errors
/// When `/proc/self/smaps` cannot be read.
pub(crate) fn read(range: Span) -> io::Result<Vec<Vma>> {
    parse(
        BufReader::with_capacity(1 << 16, files::open("/proc/self/smaps")?),
        range,
    )
}

pub(crate) fn parse(mut lines: impl BufRead, range: Span) -> io::Result<Vec<Vma>> {
    let mut found: Vec<Vma> = Vec::new();
    let (mut line, mut inside) = (Vec::new(), false);
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(found);
        }
        // A file's name may be anything but a line break; nothing else here is not ASCII.
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\n');
        // Only a mapping's first line begins with a lower-case digit of an address.
        let first = line
            .bytes()
            .next()
            .is_some_and(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if first && let Some(vma) = Vma::parse(line) {
            if vma.span.start >= range.end() {
                return Ok(found);
            }
            inside = vma.span.overlaps(range);
            if inside {
                // The list may be long, and the program at a limit.
                found
                    .try_reserve(1)
                    .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
                found.push(vma);
            }
        } else if inside && let Some(vma) = found.last_mut() {
            vma.add(line);
        }
    }
}

/// How many mappings this process has.
///
/// # Errors
/// When `/proc/self/maps` cannot be read.
pub(crate) fn count() -> io::Result<u64> {
    let mut file = files::open("/proc/self/maps")?;
    let mut buffer = [0; 1 << 14];
    let mut lines = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(lines),
            Ok(bytes) => {
                lines += buffer[..bytes]
                    .iter()
                    .map(|&b| u64::from(b == b'\n'))
                    .sum::<u64>();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// How many mappings lie outside of `regions`, which are in ascending order; `None` where the kernel does
/// not tell of single ones. Costs what a count of those costs, however many there are inside.
pub(crate) fn count_outside(maps: &Procmap, regions: &[Span]) -> Option<u64> {
    let (mut at, mut count) = (0, 0);
    let mut regions = regions.iter().peekable();
    loop {
        while regions.next_if(|region| region.end() <= at).is_some() {}
        match maps.at_or_above(at) {
            Ok(found) => {
                while regions
                    .next_if(|region| region.end() <= found.span.start)
                    .is_some()
                {}
                at = match regions.peek() {
                    Some(region) if region.overlaps(found.span) => region.end(),
                    _ => {
                        count += 1;
                        found.span.end()
                    }
                };
            }
            Err(QueryStop::NotMapped) => return Some(count),
            Err(_) => return None,
        }
    }
}

/// The C library's record of a thread.
#[derive(Clone, Copy, Debug)]
struct ThreadRecord {
    /// The head of its list of robust mutexes, which lies in it.
    head: usize,
    /// Bytes below it that are its stack, at most.
    stack: usize,
}

impl ThreadRecord {
    /// What of `vma` is this thread's, if its record lies there: whole pages.
    fn refused(self, vma: Span) -> Option<Span> {
        if !vma.contains(self.head) {
            return None;
        }
        let page = page_size();
        // The thread number is right before the head. What lies above the head's page may already
        // be somebody else's memory, for neighbouring mappings of a kind are one.
        let start = self.head.saturating_sub(self.stack.max(page)) & !(page - 1);
        let end = (self.head & !(page - 1)) + page;
        Some(Span::between(start.max(vma.start), end.min(vma.end())))
    }
}

/// The records of all threads that may have part of `range`, by ascending address.
fn thread_records(range: Span) -> io::Result<Vec<ThreadRecord>> {
    /// What the C library gives a thread when the limit says "unlimited", and somewhat more.
    const STACK_WITHOUT_LIMIT: u64 = 8 << 20;
    let limit = process::limit(process::Resource::Stack).ok().flatten();
    let stack = usize::try_from(limit.unwrap_or(STACK_WITHOUT_LIMIT)).unwrap_or(usize::MAX);
    let main = std::process::id();
    let mut records = Vec::new();
    for entry in files::read_dir("/proc/self/task")? {
        let name = entry?.file_name();
        let Some(thread) = name.to_str().and_then(|text| text.parse::<i32>().ok()) else {
            continue;
        };
        // A thread that has ended meanwhile has no record any more.
        let Some(head) = process::robust_list_head(thread)? else {
            continue;
        };
        let stack = if thread.unsigned_abs() == main {
            0
        } else {
            stack
        };
        // Somewhat more than what it can refuse: the mapping's borders are not known here.
        let reach = Span::between(
            head.saturating_sub(stack.saturating_add(2 * page_size())),
            head.saturating_add(2 * page_size()),
        );
        if reach.overlaps(range) {
            records.push(ThreadRecord { head, stack });
        }
    }
    records.sort_unstable_by_key(|record| record.head);
    Ok(records)
}

/// What somebody can do who wants memory merged that was refused for `reason`.
pub(crate) fn what_to_do(reason: Reason) -> &'static str {
    match reason {
        Reason::Mlocked => "munlock it first; locked memory stays where its owner put it",
        Reason::Sealed => "mseal cannot be taken back; copy the data to other memory",
        Reason::Guard => "leave guard pages out of the buffer",
        Reason::ReadOnly => "make it readable and writable (mprotect) first",
        Reason::SharedMapping => {
            "shared memory has one copy already; copy the data to private memory to merge it"
        }
        Reason::FileBacked => {
            "a file's pages are shared through the page cache already; read the data into memory \
             to merge it"
        }
        Reason::Hugetlb => "use ordinary pages; hugetlbfs pages cannot be split",
        Reason::ThreadStack => "copy the data off the thread's stack",
        Reason::DontDump => "undo MADV_DONTDUMP (MADV_DODUMP) if it holds no secrets",
        Reason::Attributes => {
            "undo what is set on it (MADV_DONTFORK, MADV_WIPEONFORK, mbind, a protection key, \
             execute permission); a merged page would lose it"
        }
        Reason::ForeignUserfaultfd => "unregister it from the other userfaultfd first",
        Reason::Unmapped => "give an address range that is mapped throughout",
        _ => "copy the data to ordinary private memory",
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::sys::mapping::{self, Advice, Mapping, Protection, Sharing, kinds};
    use crate::sys::memfd::Memfd;
    use crate::sys::uffd::{Features, Modes, Source, Userfaultfd};
    use std::sync::mpsc;

    fn only_reason(span: Span) -> Option<Reason> {
        let found = survey(span, |_| false).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].span, span);
        found[0].refusal
    }

    fn memory(pages: usize) -> Mapping {
        Mapping::anonymous(pages * page_size(), Protection::ReadWrite).unwrap()
    }

    #[test]
    fn lines_of_every_shape_are_read() {
        let text = "\
55f0-55f5 r-xp 00002000 fe:00 247030                     /usr/bin/odd name (deleted)
VmFlags: rd ex mr mw me \n\
7000-9000 rw-p 00000000 00:00 0 \n\
Size:                  8 kB
THPeligible:           1
ProtectionKey:         3
VmFlags: rd wr mr mw me ac sd lo dd uw ??\n\
a000-b000 rw-s 00000000 00:01 7                          /memfd:x (deleted)
VmFlags: rd wr sh\n";
        let all = parse(text.as_bytes(), Span::between(0, 0xffff)).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].name, "/usr/bin/odd name (deleted)");
        assert_eq!(
            (all[0].offset, all[0].inode, all[0].executable),
            (0x2000, 247_030, true)
        );
        assert_eq!(all[0].refusal(false), Some(Reason::FileBacked));
        assert_eq!(all[1].span, Span::between(0x7000, 0x9000));
        assert!(all[1].may_be_huge && all[1].protection_key == 3);
        assert_eq!(
            all[1].flags,
            Flags::LOCKED | Flags::DONT_DUMP | Flags::UFFD_PROTECT
        );
        assert_eq!(all[2].refusal(false), Some(Reason::SharedMapping));
        let some = parse(text.as_bytes(), Span::between(0x8000, 0xa000)).unwrap();
        assert_eq!(some, all[1..2]);
        assert_eq!(
            parse(&b"nonsense\n\nVmFlags: lo\n"[..], Span::new(0, 1)).unwrap(),
            []
        );
    }

    /// A line whose range ended before it began was a panic on the merging thread, instead of a line
    /// that is none. No kernel is known to write one; found by fuzzing.
    #[test]
    fn range_that_ends_before_it_begins_is_no_mapping() {
        let text = "9000-7000 rw-p 00000000 00:00 0 \n";
        let all = parse(text.as_bytes(), Span::between(0, 0xffff)).unwrap();
        assert_eq!(all, []);
    }

    #[test]
    fn plain_memory_can_be_merged_and_a_hole_in_it_is_unmapped() {
        let page = page_size();
        let span = memory(5).into_span();
        assert_eq!(only_reason(span), None);
        kinds::unmap_all(span.page_run(2, 1));
        let found: Vec<_> = survey(span, |_| false)
            .unwrap()
            .into_iter()
            .map(|s| {
                (
                    (s.span.start - span.start) / page,
                    s.span.pages(),
                    s.refusal,
                )
            })
            .collect();
        // Nothing may be mapped there by another test meanwhile, or its neighbours: so look only at
        // what is ours.
        assert_eq!(found[0], (0, 2, None));
        assert_eq!(found[found.len() - 1], (3, 2, None));
        kinds::unmap_all(span.page_run(0, 2));
        kinds::unmap_all(span.page_run(3, 2));
    }

    #[test]
    fn each_kind_of_memory_has_its_reason() {
        let page = page_size();
        let advised = |advice| {
            let memory = memory(2);
            memory.advise(advice).unwrap();
            memory
        };
        let kept = [
            (advised(Advice::DontDump), Reason::DontDump),
            (advised(Advice::DontFork), Reason::Attributes),
            (advised(Advice::WipeOnFork), Reason::Attributes),
            (
                Mapping::anonymous(2 * page, Protection::Read).unwrap(),
                Reason::ReadOnly,
            ),
            (
                Mapping::anonymous(2 * page, Protection::None).unwrap(),
                Reason::ReadOnly,
            ),
        ];
        for (memory, reason) in &kept {
            assert_eq!(only_reason(memory.span()), Some(*reason));
        }
        let locked = memory(2);
        kinds::lock(locked.span());
        assert_eq!(only_reason(locked.span()), Some(Reason::Mlocked));

        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let span = kinds::with_flags(2 * page, rw, shared).unwrap();
        assert_eq!(only_reason(span), Some(Reason::SharedMapping));
        kinds::unmap_all(span);

        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let span = kinds::with_flags(2 * page, rw | libc::PROT_EXEC, anonymous).unwrap();
        assert_eq!(only_reason(span), Some(Reason::Attributes));
        kinds::unmap_all(span);

        let span = kinds::with_flags(2 * page, rw, anonymous | libc::MAP_GROWSDOWN).unwrap();
        assert_eq!(only_reason(span), Some(Reason::ThreadStack));
        kinds::unmap_all(span);

        let file = Memfd::create(c"test", 2 * page as u64).unwrap();
        for (sharing, reason) in [
            (Sharing::Private, Reason::FileBacked),
            (Sharing::Shared, Reason::SharedMapping),
        ] {
            let mapped = Mapping::file(&file, 0, 2 * page, Protection::ReadWrite, sharing).unwrap();
            assert_eq!(only_reason(mapped.span()), Some(reason));
        }
    }

    #[test]
    fn sealed_memory_is_told_where_there_is_such_a_thing() {
        let span = memory(1).into_span(); // it can never be unmapped
        if kinds::seal(span) && std::env::consts::ARCH == "x86_64" {
            // The flag is shown since Linux 6.16; before that the window finds out.
            assert!(matches!(only_reason(span), Some(Reason::Sealed) | None));
        }
    }

    #[test]
    fn memory_with_a_policy_of_its_own_would_lose_it() {
        let memory = memory(4);
        if kinds::set_policy(memory.span().page_run(1, 1)) {
            let found = survey(memory.span(), |_| false).unwrap();
            let reasons: Vec<_> = found.iter().map(|s| (s.span.pages(), s.refusal)).collect();
            assert_eq!(
                reasons,
                [(1, None), (1, Some(Reason::Attributes)), (2, None)]
            );
        }
    }

    #[test]
    fn userfaultfd_of_somebody_else_refuses_and_ours_does_not() {
        let memory = memory(2);
        let uffd = Userfaultfd::open(Source::UserModeOnly, Features::WP).unwrap();
        uffd.register(memory.span(), Modes::WriteProtect).unwrap();
        assert_eq!(only_reason(memory.span()), Some(Reason::ForeignUserfaultfd));
        let found = survey(memory.span(), |_| true).unwrap();
        assert_eq!(found[0].refusal, None);
        drop(uffd);
        assert_eq!(only_reason(memory.span()), None);
    }

    #[test]
    fn stack_and_record_of_a_thread_are_refused() {
        let (tell, told) = mpsc::channel();
        let (go, going) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let local = 0_u8;
            let head = process::robust_list_head(process::thread_id())
                .unwrap()
                .unwrap();
            tell.send(((&raw const local).addr(), head)).unwrap();
            going.recv().unwrap();
        });
        let (local, head) = told.recv().unwrap();
        let page_of = |address: usize| Span::new(address & !(page_size() - 1), page_size());
        assert_eq!(only_reason(page_of(local)), Some(Reason::ThreadStack));
        assert_eq!(only_reason(page_of(head)), Some(Reason::ThreadStack));
        go.send(()).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn record_of_the_main_thread_is_refused_but_not_all_below_it() {
        let record = ThreadRecord {
            head: 0x10_0a00,
            stack: 0,
        };
        let page = page_size();
        if page == 0x1000 {
            let vma = Span::between(0x0, 0x20_0000);
            assert_eq!(
                record.refused(vma),
                Some(Span::between(0xf_f000, 0x10_1000))
            );
            assert_eq!(record.refused(Span::between(0, 0x10_0000)), None);
        }
        let main = i32::try_from(std::process::id()).unwrap();
        let head = process::robust_list_head(main).unwrap().unwrap();
        let span = Span::new(head & !(page - 1), page);
        assert!(only_reason(span).is_some());
    }

    #[test]
    fn mappings_inside_of_regions_are_not_counted_outside() {
        let maps = Procmap::own().unwrap();
        let memory = memory(4000);
        let span = memory.span();
        for page in (0..4000).step_by(2) {
            // SAFETY: the memory is this test's own.
            unsafe { mapping::protect(span.page_run(page, 1), Protection::Read) }.unwrap();
        }
        // Other tests map and unmap at the same time: so all that is not this memory is a region, too.
        let below = Span::between(0, span.start);
        let above = Span::between(span.end(), usize::MAX / 2);
        let halves = [span.page_run(0, 2000), span.page_run(2000, 2000)];
        let count = |regions: &[Span]| count_outside(&maps, regions);
        if count(&[below, above]).is_none() {
            return; // before Linux 6.11
        }
        // Its first or last mapping may have become one with a neighbour.
        for (regions, expected) in [
            (&[below, above][..], 3998..=4000),
            (&[below, halves[0], above], 1999..=2000),
            (&[below, halves[0], halves[1], above], 0..=0),
        ] {
            let found = count(regions).unwrap();
            assert!(expected.contains(&found), "{found} of {expected:?}");
        }
    }

    #[test]
    fn count_grows_with_mappings() {
        // Other tests map and unmap at the same time, so only a large step can be told.
        let before = count().unwrap();
        let memory = memory(4000);
        for page in (0..4000).step_by(2) {
            // SAFETY: the memory is this test's own.
            unsafe { mapping::protect(memory.span().page_run(page, 1), Protection::Read) }.unwrap();
        }
        assert!(count().unwrap() > before + 3000);
    }
}
