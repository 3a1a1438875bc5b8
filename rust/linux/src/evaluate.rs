//! What merging would save, found out without changing anything.
//!
//! Pages are told apart by 128 bits of keyed hash (two hashes of 64 bits with secrets of their own,
//! drawn anew each time), so nothing is read twice. Among 2^40 pages, two of different bytes are
//! taken for equal with a probability of 2^-49; an engine would compare the bytes.
//!
//! # What the figures mean
//! A *frame* is a content, other than zero, that two pages or more have: what an engine would keep
//! once. A page that is all zero needs no frame. So `saved = zero + duplicate - frames` pages.
//!
//! # Cost
//! Files: reading them, 0.2 us a page, and 24 bytes of memory a page. Memory: 0.2 us and 16 bytes a
//! page that is present.

// Only for reading live memory through `sys::memory`.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::hash::PageHasher;
use crate::mappings::Mappings;
use crate::sys::pagemap::{Categories, Entry, PageRegion, Pagemap, Query, ScanStop};
use crate::sys::phase::{Phase, enter};
use crate::sys::sparse::{self, SeekStop};
use crate::sys::{Errno, Span, files, memory, page_size, process};
use pagemerge_core::{Reason, SettingError};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Pages looked at between two calls of `between`: about a millisecond.
const PAGES_BETWEEN: usize = 4096;
/// Bytes of a file that are read at once.
const BLOCK: usize = 1 << 20;

/// What merging a range of memory would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Whole pages in the ranges.
    pub pages: u64,
    /// Pages that are in memory and may be merged: those that were read.
    pub present: u64,
    /// Of these, pages that are zero throughout.
    pub zero: u64,
    /// Of these, pages whose bytes at least one other has, zero pages aside.
    pub duplicate: u64,
    /// Contents that the duplicates have: what would be kept of them.
    pub frames: u64,
    /// Pages that show the kernel's zero page, and so take no memory.
    pub zero_mapped: u64,
    /// Pages that an engine has merged already.
    pub merged: u64,
    /// Pages that were not read, by the reason why they cannot be merged.
    pub skipped: BTreeMap<Reason, u64>,
    /// Bytes in a page.
    pub page_size: u64,
    /// Bytes that would be saved, the engine's own records and the kernel's not deducted.
    pub bytes_saved: u64,
}

/// 128 bits that stand for a page's bytes.
type Fingerprint = [u64; 2];

/// Two hashes with secrets of their own.
struct Fingerprinter([PageHasher; 2]);

impl Fingerprinter {
    fn new(page_size: usize) -> Result<Self, Error> {
        let seed = || {
            process::random_u64()
                .map_err(|e| Error::os("cannot draw a random secret (getrandom)", e.into()))
        };
        Ok(Self([
            PageHasher::with_page_size(seed()?, page_size),
            PageHasher::with_page_size(seed()?, page_size),
        ]))
    }

    /// `None` for a page of zeroes.
    fn of(&self, page: &[u64]) -> Option<Fingerprint> {
        let zero = page.iter().all(|&word| word == 0);
        (!zero).then(|| [self.0[0].hash_slice(page), self.0[1].hash_slice(page)])
    }

    /// `None` for a page of zeroes.
    ///
    /// # Safety
    /// As [`PageHasher::digest`].
    unsafe fn of_live(&self, page: *const u8, next: Option<*const u8>) -> Option<Fingerprint> {
        // SAFETY: our caller's promise.
        let first = unsafe { self.0[0].digest(page, next) };
        // SAFETY: our caller's promise. (A page that is written meanwhile gets a fingerprint that
        // no other has, or is counted as what it was for a moment.)
        let second = unsafe { self.0[1].digest(page, None) };
        (!first.zero).then_some([first.hash, second.hash])
    }
}

/// What merging these ranges (address and length in bytes) of this process would do. Nothing is
/// changed; only pages that are in memory are read. Ranges may overlap; each page counts once.
///
/// `between` is called every few thousand pages; when it returns false the evaluation ends.
///
/// # Errors
/// [`Error::Interrupted`], or [`Error::Os`] when `/proc` does not tell about the memory.
///
/// # Safety
/// The ranges stay mapped and readable, as far as they are, until this returns.
pub unsafe fn evaluate_memory(
    ranges: &[(usize, usize)],
    between: &mut dyn FnMut() -> bool,
) -> Result<Evaluation, Error> {
    let _phase = enter(Phase::Evaluate);
    let fingerprinter = Fingerprinter::new(page_size())?;
    let map = Pagemap::own().map_err(|e| Error::os("cannot open /proc/self/pagemap", e.into()))?;
    let mut found = Evaluation {
        page_size: page_size() as u64,
        ..Evaluation::default()
    };
    let mut fingerprints = Vec::new();
    let ranges = union(ranges);
    let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
        return Ok(found);
    };
    let mappings = Mappings::read(Span::between(first.start, last.end()))
        .map_err(|e| Error::os("cannot read the list of mappings", e))?;
    for range in ranges.iter().copied() {
        found.pages += range.pages() as u64;
        for stretch in mappings.survey(range, |_| true) {
            if let Some(reason) = stretch.refusal.filter(|_| !stretch.shows_frames) {
                *found.skipped.entry(reason).or_default() += stretch.span.pages() as u64;
                continue;
            }
            // A swapped page in frames may be a copy of its own, or not: nothing tells.
            let mut live = Vec::new();
            each_run(&map, stretch.span, |run, categories| {
                let pages = run.pages() as u64;
                if categories.any(Categories::SWAPPED) {
                    *found.skipped.entry(Reason::Swapped).or_default() += pages;
                } else if categories.any(Categories::ZERO_PAGE) {
                    found.zero_mapped += pages;
                } else if categories.has(Categories::PRESENT)
                    && !(stretch.shows_frames && categories.any(Categories::FILE))
                {
                    live.push(run);
                } else if stretch.shows_frames {
                    found.merged += pages;
                }
            })
            .map_err(|e| Error::os("cannot look up the state of pages", e.into()))?;
            for run in live {
                found.present += run.pages() as u64;
                for pages in chunks(run.pages()) {
                    if !between() {
                        return Err(Error::Interrupted);
                    }
                    for page in pages {
                        let at = run.page_run(page, 1);
                        let next =
                            (page + 1 < run.pages()).then(|| at.as_ptr().wrapping_add(at.len));
                        // SAFETY: the caller keeps what is mapped readable, and the page was
                        // present, inside a readable mapping, a moment ago.
                        match unsafe { fingerprinter.of_live(at.as_ptr(), next) } {
                            None => found.zero += 1,
                            Some(fingerprint) => fingerprints.push(fingerprint),
                        }
                    }
                }
            }
        }
    }
    fingerprints.sort_unstable();
    for group in fingerprints
        .chunk_by(|a, b| a == b)
        .filter(|group| group.len() > 1)
    {
        found.duplicate += group.len() as u64;
        found.frames += 1;
    }
    found.bytes_saved = (found.zero + found.duplicate - found.frames) * found.page_size;
    Ok(found)
}

/// The whole pages in `ranges`, each once, in ascending order.
fn union(ranges: &[(usize, usize)]) -> Vec<Span> {
    let mut spans: Vec<Span> = ranges
        .iter()
        .map(|&(start, len)| Span::new(start, len.min(usize::MAX - start)).whole_pages())
        .filter(|span| !span.is_empty())
        .collect();
    spans.sort_unstable();
    let mut union: Vec<Span> = Vec::new();
    for span in spans {
        match union.last_mut() {
            Some(last) if span.start <= last.end() => {
                *last = Span::between(last.start, last.end().max(span.end()));
            }
            _ => union.push(span),
        }
    }
    union
}

/// `0..pages` in parts of [`PAGES_BETWEEN`].
fn chunks(pages: usize) -> impl Iterator<Item = Range<usize>> {
    (0..pages)
        .step_by(PAGES_BETWEEN)
        .map(move |from| from..pages.min(from + PAGES_BETWEEN))
}

/// Tells `tell` what is true of each run of pages in `span`. Runs of which nothing is true may be
/// left out, except in mappings of files, where they are told like all others.
fn each_run(
    map: &Pagemap,
    span: Span,
    mut tell: impl FnMut(Span, Categories),
) -> Result<(), Errno> {
    let told = Categories::PRESENT | Categories::FILE | Categories::SWAPPED | Categories::ZERO_PAGE;
    // Every page, whatever is true of it.
    let query = Query {
        any_of: Categories::NONE,
        ..Query::look(told)
    };
    let mut regions = [PageRegion::EMPTY; 256];
    let mut at = span.start;
    while at < span.end() {
        match map.scan(Span::between(at, span.end()), &query, &mut regions) {
            Ok(scanned) => {
                for region in &regions[..scanned.regions] {
                    tell(region.span(), region.categories());
                }
                at = scanned.walk_end;
            }
            Err(ScanStop::Missing) => return each_entry(map, Span::between(at, span.end()), tell),
            Err(stop) => return Err(stop.errno()),
        }
    }
    Ok(())
}

/// The same by the older interface, which does not tell the zero page: it is read, and found to be
/// zero.
fn each_entry(
    map: &Pagemap,
    span: Span,
    mut tell: impl FnMut(Span, Categories),
) -> Result<(), Errno> {
    let mut entries = [Entry::default(); 512];
    for pages in (0..span.pages()).step_by(entries.len()) {
        let wanted = entries.len().min(span.pages() - pages);
        let first = span.page_run(pages, wanted);
        let read = map.entries(first.start, &mut entries[..wanted])?;
        for (page, entry) in entries[..read].iter().enumerate() {
            let mut categories = Categories::NONE;
            for (holds, category) in [
                (entry.is_present(), Categories::PRESENT),
                (entry.is_swapped(), Categories::SWAPPED),
                (entry.is_file(), Categories::FILE),
            ] {
                if holds {
                    categories = categories | category;
                }
            }
            tell(first.page_run(page, 1), categories);
        }
    }
    Ok(())
}

/// How files are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Bytes in a page: a power of two from 256 to 2 MiB. What if pages were smaller?
    pub page_size: usize,
    /// Take the files in directories, and in theirs. Symbolic links in them are not followed.
    pub recursive: bool,
    /// Go on with the other files when one cannot be read.
    pub keep_going: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            page_size: page_size(),
            recursive: false,
            keep_going: false,
        }
    }
}

/// Why a file was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileProblem {
    /// It could not be opened or read.
    Unreadable,
    /// It is a directory.
    Directory,
    /// It is a device, a socket or a pipe.
    Special,
    /// It is a file that was named before, under this name or another. Not an error.
    Repeated,
}

impl FileProblem {
    /// The name that programs see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Directory => "directory",
            Self::Special => "special",
            Self::Repeated => "repeated",
        }
    }
}

impl fmt::Display for FileProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A file that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftOut {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub problem: FileProblem,
    /// The same in words.
    pub message: String,
}

/// One file's pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Whole pages in it. A partial last page never merges, and counts nowhere but in `bytes`.
    pub pages: u64,
    /// Pages that are zero throughout.
    pub zero: u64,
    /// Pages, zero pages aside, whose bytes another page of this file has.
    pub twin_within: u64,
    /// Pages, zero pages aside, whose bytes a page of another file has. (Both may hold.)
    pub twin_elsewhere: u64,
    /// Pages, zero pages aside, whose bytes no other page has.
    pub unique: u64,
}

/// What merging the contents of files would do, if they were in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEvaluation {
    /// Bytes in a page.
    pub page_size: u64,
    /// Each file that was read, in the order in which they were named.
    pub files: Vec<FileReport>,
    /// Files that were left out.
    pub left_out: Vec<LeftOut>,
    /// Bytes in all files.
    pub bytes: u64,
    /// Whole pages in all files.
    pub pages: u64,
    /// Pages that are zero throughout.
    pub zero: u64,
    /// Pages whose bytes another page has, zero pages aside.
    pub duplicate: u64,
    /// Contents that the duplicates have: what would be kept of them.
    pub frames: u64,
    /// Different contents in all, zero aside: `frames`, and those that one page has alone.
    pub distinct: u64,
    /// Pages that would be saved: `zero + duplicate - frames`.
    pub pages_saved: u64,
    /// The same in bytes.
    pub bytes_saved: u64,
}

/// How far an evaluation of files has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileProgress {
    /// Files read to their end.
    pub files_done: usize,
    /// Files to be read in all.
    pub files: usize,
    /// Bytes dealt with, holes included.
    pub bytes_done: u64,
    /// Bytes to be dealt with in all.
    pub bytes: u64,
}

/// A page of some file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct FilePage {
    fingerprint: Fingerprint,
    file: u32,
}
const _: () = assert!(
    size_of::<FilePage>() == 24,
    "this is the memory that each page takes"
);

/// What merging the contents of these files would do, if they were in memory.
///
/// `progress` is called at least once for each MiB; when it returns false the evaluation ends.
///
/// ```
/// use pagemerge_linux::evaluate::{FileOptions, evaluate_files};
///
/// let this = std::env::current_exe()?;
/// let found = evaluate_files(&[this], &FileOptions::default(), &mut |_| true)?;
/// assert_eq!(found.files.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Interrupted`]; [`Error::Setting`] for a page size that is none; and, unless
/// [`FileOptions::keep_going`] is set, [`Error::Os`] for the first file that cannot be read.
pub fn evaluate_files(
    paths: &[PathBuf],
    options: &FileOptions,
    progress: &mut dyn FnMut(&FileProgress) -> bool,
) -> Result<FileEvaluation, Error> {
    let _phase = enter(Phase::Evaluate);
    let page_size = options.page_size;
    if !page_size.is_power_of_two() || !(256..=2 << 20).contains(&page_size) {
        return Err(Error::Setting(SettingError::Invalid {
            name: "page_size",
            value: page_size.to_string(),
            need: "a power of two from 256 to 2097152".into(),
        }));
    }
    let mut found = FileEvaluation {
        page_size: page_size as u64,
        ..FileEvaluation::default()
    };
    let chosen = choose(paths, options, &mut found.left_out)?;
    let mut done = FileProgress {
        files: chosen.len(),
        bytes: chosen.iter().map(|(_, bytes)| bytes).sum(),
        ..FileProgress::default()
    };
    let mut reader = Reader {
        fingerprinter: Fingerprinter::new(page_size)?,
        page_size,
        block: vec![0; BLOCK.max(page_size) / 8],
        pages: Vec::new(),
    };
    for (path, _) in chosen {
        let number = u32::try_from(found.files.len())
            .map_err(|_| Error::os("cannot number the files", io::ErrorKind::OutOfMemory.into()))?;
        let before = (done.bytes_done, reader.pages.len());
        match reader.read(&path, number, &mut done, progress) {
            Ok(report) => found.files.push(report),
            Err(Stop::Interrupted) => return Err(Error::Interrupted),
            Err(Stop::File(error)) => {
                let message = format!("cannot read {}", path.display());
                if !options.keep_going {
                    return Err(Error::os(message, error));
                }
                // What was read of it does not count.
                reader.pages.truncate(before.1);
                done.bytes_done = before.0;
                let message = format!("{message}: {error}");
                found.left_out.push(LeftOut {
                    path,
                    problem: FileProblem::Unreadable,
                    message,
                });
            }
        }
        done.files_done += 1;
    }
    found.count(reader.pages);
    Ok(found)
}

impl FileEvaluation {
    fn count(&mut self, mut pages: Vec<FilePage>) {
        pages.sort_unstable();
        for group in pages.chunk_by(|a, b| a.fingerprint == b.fingerprint) {
            self.distinct += 1;
            if group.len() > 1 {
                self.frames += 1;
                self.duplicate += group.len() as u64;
            }
            for same in group.chunk_by(|a, b| a.file == b.file) {
                let file = &mut self.files[same[0].file as usize];
                let count = same.len() as u64;
                if group.len() == 1 {
                    file.unique += 1;
                }
                if same.len() > 1 {
                    file.twin_within += count;
                }
                if same.len() < group.len() {
                    file.twin_elsewhere += count;
                }
            }
        }
        for file in &self.files {
            self.bytes += file.bytes;
            self.pages += file.pages;
            self.zero += file.zero;
        }
        self.pages_saved = self.zero + self.duplicate - self.frames;
        self.bytes_saved = self.pages_saved * self.page_size;
    }
}

/// The files to be read, with their lengths.
fn choose(
    paths: &[PathBuf],
    options: &FileOptions,
    left_out: &mut Vec<LeftOut>,
) -> Result<Vec<(PathBuf, u64)>, Error> {
    let mut chosen = Vec::new();
    let mut known: HashMap<(u64, u64), PathBuf> = HashMap::new();
    // A stack, so that the order is that of the arguments, and of the names in a directory.
    let mut next: Vec<(PathBuf, bool)> = paths.iter().rev().map(|p| (p.clone(), true)).collect();
    while let Some((path, named)) = next.pop() {
        // Links are followed where somebody named them, never in the middle of a directory: they
        // may lead in a circle.
        let about = if named {
            files::metadata(&path)
        } else {
            files::symlink_metadata(&path)
        };
        let (problem, error) = match about {
            Err(error) => (FileProblem::Unreadable, error),
            Ok(about) if about.is_file() => match known.get(&(about.dev(), about.ino())) {
                None => {
                    known.insert((about.dev(), about.ino()), path.clone());
                    chosen.push((path, about.len()));
                    continue;
                }
                Some(first) => {
                    let message =
                        format!("{} is the same file as {}", path.display(), first.display());
                    left_out.push(LeftOut {
                        path,
                        problem: FileProblem::Repeated,
                        message,
                    });
                    continue;
                }
            },
            Ok(about) if about.is_dir() && options.recursive => match names_in(&path) {
                Ok(names) => {
                    next.extend(names.into_iter().rev().map(|name| (name, false)));
                    continue;
                }
                Err(error) => (FileProblem::Unreadable, error),
            },
            Ok(about) if about.is_dir() => (
                FileProblem::Directory,
                io::Error::from_raw_os_error(libc::EISDIR),
            ),
            // Met in a directory, devices and links are nothing that anybody asked for.
            Ok(_) if !named => continue,
            Ok(_) => (
                FileProblem::Special,
                io::Error::from_raw_os_error(libc::ENOTSUP),
            ),
        };
        let message = match problem {
            FileProblem::Directory => format!(
                "cannot evaluate {}, a directory; name its files, or ask for directories to be \
                 walked (recursive)",
                path.display()
            ),
            FileProblem::Special => format!(
                "cannot evaluate {}, which is a device, a socket or a pipe; copy its contents to \
                 a file",
                path.display()
            ),
            _ => format!("cannot read {}", path.display()),
        };
        if !options.keep_going {
            return Err(Error::os(message, error));
        }
        let message = format!("{message}: {error}");
        left_out.push(LeftOut {
            path,
            problem,
            message,
        });
    }
    Ok(chosen)
}

/// What is in a directory, in the order of the names, so that two runs say the same.
fn names_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let names: io::Result<Vec<_>> = files::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect();
    let mut names = names?;
    names.sort();
    Ok(names)
}

enum Stop {
    Interrupted,
    File(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

struct Reader {
    fingerprinter: Fingerprinter,
    page_size: usize,
    /// Where a block is read to; numbers, so that it is aligned for hashing.
    block: Vec<u64>,
    /// All pages so far that are not zero.
    pages: Vec<FilePage>,
}

impl Reader {
    fn read(
        &mut self,
        path: &Path,
        number: u32,
        done: &mut FileProgress,
        progress: &mut dyn FnMut(&FileProgress) -> bool,
    ) -> Result<FileReport, Stop> {
        // Should it have become a pipe since it was chosen, opening it must not wait for a writer.
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = files::open_with(&options, path)?;
        let about = files::metadata_of(&file)?;
        if !about.is_file() {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP).into());
        }
        let page_size = self.page_size as u64;
        let bytes = about.len();
        let mut report = FileReport {
            path: path.to_owned(),
            bytes,
            pages: bytes / page_size,
            ..FileReport::default()
        };
        let whole = report.pages * page_size;
        let started = done.bytes_done;
        let mut at = 0;
        while at < whole {
            let (data, end) = next_data(&file, at, whole, page_size)?;
            report.zero += (data - at) / page_size; // a hole reads as zero
            at = data;
            while at < end {
                done.bytes_done = started + at;
                if !progress(done) {
                    return Err(Stop::Interrupted);
                }
                let room = (self.block.len() * 8) as u64;
                let len = usize::try_from(room.min(end - at)).expect("no more than the block");
                let words = &mut self.block[..len / 8];
                files::read_exact_at(&file, memory::as_bytes_mut(words), at).map_err(|error| {
                    match error.kind() {
                        io::ErrorKind::UnexpectedEof => io::Error::new(
                            error.kind(),
                            "the file became shorter while it was read; try again when nobody \
                             writes to it",
                        ),
                        _ => error,
                    }
                })?;
                for page in words.chunks_exact(self.page_size / 8) {
                    match self.fingerprinter.of(page) {
                        None => report.zero += 1,
                        Some(fingerprint) => self.pages.push(FilePage {
                            fingerprint,
                            file: number,
                        }),
                    }
                }
                at += len as u64;
            }
        }
        done.bytes_done = started + bytes;
        if !progress(done) {
            return Err(Stop::Interrupted);
        }
        Ok(report)
    }
}

/// The next range from `at` on that has to be read: whole pages, of which none before it has data.
fn next_data(file: &File, at: u64, whole: u64, page_size: u64) -> io::Result<(u64, u64)> {
    let data = match sparse::data_from(file, at) {
        Ok(data) => data,
        Err(SeekStop::End) => return Ok((whole, whole)),
        // Then all of it counts as data.
        Err(SeekStop::NotTold | SeekStop::NoSeek) => return Ok((at, whole)),
        Err(stop) => return Err(stop.into()),
    };
    let data = (data / page_size * page_size).clamp(at, whole);
    let end = match sparse::hole_from(file, data) {
        Ok(hole) => hole.div_ceil(page_size) * page_size,
        Err(_) => whole,
    };
    // A page at least, so that this comes to its end whatever the file system says.
    Ok((data, end.clamp((data + page_size).min(whole), whole)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{Advice, Mapping, Protection, map_frames};
    use crate::sys::memfd::Memfd;
    use std::fs;
    use std::os::unix::fs::FileExt;

    /// A directory of its own, which is removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("pagemerge-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, pages: &[u8], tail: usize) -> PathBuf {
            let bytes: Vec<u8> = pages
                .iter()
                .flat_map(|&value| vec![value; 4096])
                .chain(std::iter::repeat_n(9, tail))
                .collect();
            let path = self.0.join(name);
            fs::write(&path, bytes).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn options() -> FileOptions {
        FileOptions {
            page_size: 4096,
            ..FileOptions::default()
        }
    }

    fn evaluate(paths: &[PathBuf], options: FileOptions) -> Result<FileEvaluation, Error> {
        evaluate_files(paths, &options, &mut |_| true)
    }

    #[test]
    fn every_page_of_every_file_is_counted_where_it_belongs() {
        let folder = Folder::new("counted");
        let a = folder.file("a", &[1, 1, 2, 0, 3], 100);
        let b = folder.file("b", &[0, 2, 2, 4], 0);
        let c = folder.file("c", &[], 4095);
        let found = evaluate(&[a, b, c], options()).unwrap();
        let figures: Vec<_> = found
            .files
            .iter()
            .map(|f| {
                (
                    f.bytes,
                    f.pages,
                    f.zero,
                    f.twin_within,
                    f.twin_elsewhere,
                    f.unique,
                )
            })
            .collect();
        assert_eq!(
            figures,
            [
                (5 * 4096 + 100, 5, 1, 2, 1, 1),
                (4 * 4096, 4, 1, 2, 2, 1),
                (4095, 0, 0, 0, 0, 0)
            ]
        );
        assert_eq!((found.pages, found.zero, found.duplicate), (9, 2, 5));
        assert_eq!((found.frames, found.distinct), (2, 4));
        assert_eq!((found.pages_saved, found.bytes_saved), (5, 5 * 4096));
        assert_eq!(found.bytes, 9 * 4096 + 100 + 4095);
        assert!(found.left_out.is_empty());
    }

    #[test]
    fn smaller_pages_find_more() {
        let folder = Folder::new("smaller");
        let bytes: Vec<u8> = (0..16_u8)
            .flat_map(|i| vec![if i % 2 == 0 { 99 } else { i }; 1024])
            .collect();
        let path = folder.0.join("x");
        fs::write(&path, bytes).unwrap();
        let large = evaluate(std::slice::from_ref(&path), options()).unwrap();
        assert_eq!(large.pages_saved, 0);
        let small = evaluate(
            &[path],
            FileOptions {
                page_size: 1024,
                ..options()
            },
        )
        .unwrap();
        assert_eq!((small.pages, small.duplicate, small.frames), (16, 8, 1));
    }

    #[test]
    fn holes_count_as_zero_without_being_read() {
        let folder = Folder::new("holes");
        let path = folder.0.join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 30).unwrap();
        file.write_all_at(&[5; 10], (1 << 30) + 4000).unwrap();
        file.write_all_at(&[5; 1], (64 << 30) - 1).unwrap();
        let mut calls = 0;
        let found = evaluate_files(&[path], &options(), &mut |_| {
            calls += 1;
            true
        })
        .unwrap();
        assert_eq!(found.pages, (64 << 30) / 4096);
        assert_eq!((found.pages - found.zero, found.distinct), (2, 2));
        // Reading 64 GiB would take 65,536 blocks.
        assert!(calls < 100, "{calls} blocks were read");
    }

    #[test]
    fn what_cannot_be_read_stops_with_a_name_or_is_left_out() {
        let folder = Folder::new("problems");
        let good = folder.file("good", &[1, 1], 0);
        let gone = folder.0.join("gone");
        let directory = folder.0.join("directory");
        fs::create_dir(&directory).unwrap();
        let pipe = folder.0.join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: the path is a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let link = folder.0.join("link");
        fs::hard_link(&good, &link).unwrap();

        for (path, words) in [
            (&gone, "cannot read"),
            (&directory, "a directory"),
            (&pipe, "a pipe"),
        ] {
            let error = evaluate(&[good.clone(), path.clone()], options()).unwrap_err();
            let Error::Os { attempted, source } = error else {
                panic!("{error}")
            };
            assert!(attempted.contains(words), "{attempted}");
            assert!(attempted.contains(path.to_str().unwrap()));
            assert!(source.raw_os_error().is_some());
        }
        let all = [gone, good.clone(), directory, pipe, link];
        let found = evaluate(
            &all,
            FileOptions {
                keep_going: true,
                ..options()
            },
        )
        .unwrap();
        assert_eq!(found.files.len(), 1);
        assert_eq!(
            (found.files[0].path.as_path(), found.frames),
            (good.as_path(), 1)
        );
        let problems: Vec<_> = found.left_out.iter().map(|left| left.problem).collect();
        assert_eq!(
            problems,
            [
                FileProblem::Unreadable,
                FileProblem::Directory,
                FileProblem::Special,
                FileProblem::Repeated
            ]
        );
    }

    #[test]
    fn directories_are_walked_only_when_asked_and_links_in_them_are_not_followed() {
        let folder = Folder::new("walk");
        folder.file("b", &[1], 0);
        fs::create_dir(folder.0.join("a")).unwrap();
        folder.file("a/inner", &[1], 0);
        std::os::unix::fs::symlink(&folder.0, folder.0.join("a/circle")).unwrap();
        let root = [folder.0.clone()];
        assert!(evaluate(&root, options()).is_err());
        let found = evaluate(
            &root,
            FileOptions {
                recursive: true,
                ..options()
            },
        )
        .unwrap();
        let names: Vec<_> = found
            .files
            .iter()
            .map(|f| f.path.strip_prefix(&folder.0).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["a/inner", "b"]);
        assert_eq!((found.duplicate, found.frames), (2, 1));
    }

    #[test]
    fn page_size_that_is_none_is_refused_by_name() {
        for page_size in [0, 100, 128, 3000, 4 << 20] {
            let error = evaluate(
                &[],
                FileOptions {
                    page_size,
                    ..options()
                },
            )
            .unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Setting(SettingError::Invalid {
                        name: "page_size",
                        ..
                    })
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn evaluation_ends_when_it_is_told_to() {
        let folder = Folder::new("interrupt");
        let path = folder.file("x", &[1; 1000], 0);
        let mut calls = 0;
        let error = evaluate_files(&[path], &options(), &mut |progress| {
            assert_eq!((progress.files, progress.bytes), (1, 1000 * 4096));
            calls += 1;
            calls < 3
        });
        assert!(matches!(error, Err(Error::Interrupted)));
        assert_eq!(calls, 3);
    }

    fn fill(memory: &Mapping, page: usize, value: u8) {
        let at = memory.span().page_run(page, 1);
        // SAFETY: the memory is this test's own, and no reference points into it.
        unsafe { at.as_mut_ptr().write_bytes(value, at.len) };
    }

    fn evaluate_spans(spans: &[Span]) -> Evaluation {
        let ranges: Vec<_> = spans.iter().map(|span| (span.start, span.len)).collect();
        // SAFETY: the tests keep their memory mapped.
        unsafe { evaluate_memory(&ranges, &mut || true) }.unwrap()
    }

    #[test]
    fn memory_is_counted_by_content_and_untouched_pages_stay_untouched() {
        let page = page_size();
        let memory = Mapping::anonymous(10 * page, Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        for (at, value) in [(0, 1), (1, 2), (2, 1), (3, 0), (5, 3), (6, 2)] {
            fill(&memory, at, value);
        }
        memory
            .advise_part(memory.span().page_run(8, 1), Advice::PopulateRead)
            .unwrap();
        let found = evaluate_spans(&[memory.span(), memory.span().part(page / 2, 3 * page)]);
        assert_eq!((found.pages, found.present, found.zero), (10, 6, 1));
        assert_eq!((found.duplicate, found.frames), (4, 2));
        assert_eq!(found.bytes_saved, 3 * page as u64);
        assert_eq!(
            (found.zero_mapped, found.merged, found.skipped.len()),
            (1, 0, 0)
        );
        let map = Pagemap::own().unwrap();
        assert!(
            !map.entry(memory.span().start + 9 * page)
                .unwrap()
                .is_present()
        );
    }

    #[test]
    fn memory_that_cannot_be_merged_is_skipped_by_reason_and_merged_memory_is_told() {
        let page = page_size();
        let memory = Mapping::anonymous(6 * page, Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        (0..6).for_each(|at| fill(&memory, at, 8));
        memory
            .advise_part(memory.span().page_run(0, 2), Advice::DontDump)
            .unwrap();
        let frames = Memfd::create(c"pagemerge", page as u64).unwrap();
        let merged = memory.span().page_run(4, 2);
        for at in 4..6 {
            // SAFETY: the place is this test's own.
            unsafe { map_frames(memory.span().page_run(at, 1), &frames, 0) }.unwrap();
        }
        fill(&memory, 5, 8); // written since: a page like any other
        let found = evaluate_spans(&[memory.span()]);
        assert_eq!(found.skipped, BTreeMap::from([(Reason::DontDump, 2)]));
        assert_eq!((found.pages, found.present, found.merged), (6, 3, 1));
        assert_eq!((found.duplicate, found.frames), (3, 1));
        assert_eq!(evaluate_spans(&[merged]).merged, 1);
    }

    #[test]
    fn ranges_without_a_whole_page_hold_nothing() {
        let found = evaluate_spans(&[Span::new(1, 100)]);
        assert_eq!((found.pages, found.bytes_saved), (0, 0));
        let unmapped = evaluate_spans(&[Span::new(page_size(), page_size())]);
        assert_eq!(unmapped.skipped, BTreeMap::from([(Reason::Unmapped, 1)]));
    }

    #[test]
    fn entries_of_the_older_interface_tell_the_same() {
        let page = page_size();
        let memory = Mapping::anonymous(4 * page, Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        fill(&memory, 1, 1);
        fill(&memory, 2, 1);
        let map = Pagemap::own().unwrap();
        let (mut new, mut old) = (Vec::new(), Vec::new());
        let present = |into: &mut Vec<usize>, run: Span, categories: Categories| {
            if categories.has(Categories::PRESENT) {
                into.extend((0..run.pages()).map(|p| run.page_run(p, 1).start));
            }
        };
        each_run(&map, memory.span(), |run, c| present(&mut new, run, c)).unwrap();
        each_entry(&map, memory.span(), |run, c| present(&mut old, run, c)).unwrap();
        assert_eq!(new, old);
        assert_eq!(
            new,
            [memory.span().start + page, memory.span().start + 2 * page]
        );
    }
}
