//! Doors for the fuzzer (`fuzz/`) to the parsers of what the kernel writes about this process, with what
//! must be true of any answer. File names and group names in those texts are the program's own choice, so
//! no text at all may make them panic.

use crate::accounting;
use crate::mappings::{self, Mappings};
use crate::sys::Span;
use std::fmt::Write;
use std::path::Path;

/// A mapping as the kernel would tell it.
#[derive(Clone, Debug)]
pub struct Told<'a> {
    /// Its first address.
    pub start: usize,
    /// Bytes in it.
    pub len: usize,
    /// `r`, `w`, `x` and `p` or `s`.
    pub permissions: [bool; 4],
    /// Where in its file it begins.
    pub offset: u64,
    /// The file's number.
    pub inode: u64,
    /// The file's name, without line breaks (the kernel writes those as `\012`).
    pub name: &'a str,
    /// Whether huge pages may come to be in it.
    pub may_be_huge: bool,
    /// What stands behind `VmFlags:`.
    pub flags: &'a str,
}

/// Reads `text` as `/proc/self/smaps`, and asks what can be merged between two addresses.
///
/// # Panics
/// When the answer does not cover the range once and in order, or names mappings outside of it.
pub fn smaps(text: &[u8], start: usize, end: usize) {
    let range = Span::between(start.min(end), start.max(end));
    let vmas = mappings::parse(text, range).expect("reading from memory does not fail");
    for vma in &vmas {
        assert!(vma.span.overlaps(range), "{vma:?} is not in {range:?}");
    }
    let mappings = Mappings::of(vmas);
    let _ = mappings.huge_page_advice(range.start);
    for (part, _) in mappings.altered(range) {
        assert!(range.covers(part), "{part:?} is not in {range:?}");
    }
    let mut at = range.start;
    for stretch in mappings.survey(range, |span| span.start % 2 == 0) {
        assert_eq!(stretch.span.start, at, "a gap or an overlap");
        assert!(!stretch.span.is_empty());
        at = stretch.span.end();
    }
    assert_eq!(at, range.end());
}

/// Writes a list of mappings down as the kernel does, reads it, and compares.
///
/// # Panics
/// When something was read that was not written.
pub fn smaps_of(told: &[Told<'_>]) {
    let mut text = String::new();
    for it in told {
        let letters: String = it
            .permissions
            .iter()
            .zip(["r-", "w-", "x-", "sp"])
            .map(|(&set, pair)| &pair[usize::from(!set)..][..1])
            .collect();
        let end = it.start + it.len;
        let _ = writeln!(
            text,
            "{:x}-{end:x} {letters} {:08x} 00:1f {:<26} {}",
            it.start, it.offset, it.inode, it.name
        );
        let _ = writeln!(text, "Size:               {} kB", it.len / 1024);
        let _ = writeln!(text, "THPeligible:           {}", u8::from(it.may_be_huge));
        let _ = writeln!(text, "ProtectionKey:         0");
        let _ = writeln!(text, "VmFlags: {} ", it.flags);
    }
    let everything = Span::between(0, usize::MAX);
    let read = mappings::parse(text.as_bytes(), everything).expect("memory does not fail");
    assert_eq!(read.len(), told.len(), "{text}");
    for (vma, it) in read.iter().zip(told) {
        // All memfds of ours have one name here.
        let name = match it.name.trim() {
            frames if frames.starts_with(mappings::FRAMES) => mappings::FRAMES,
            other => other,
        };
        let same = (
            vma.span.start == it.start && vma.span.len == it.len,
            vma.offset == it.offset,
            vma.name == name,
            vma.may_be_huge == it.may_be_huge,
        );
        assert_eq!(same, (true, true, true, true), "{vma:?} was {it:?}");
    }
}

/// Reads `text` as a `smaps_rollup`.
pub fn pss(text: &str) {
    let _ = accounting::parse_pss(text);
}

/// Looks for this process's memory cgroup in two texts.
///
/// # Panics
/// When the group is found outside of the place where its hierarchy is mounted.
pub fn cgroup(groups: &str, mounts: &str) {
    if let Some(place) = accounting::find_cgroup(groups, mounts) {
        assert!(matches!(place.version, 1 | 2));
        assert!(place.path.starts_with(&place.mount), "{place:?}");
        let parent = std::path::Component::ParentDir;
        let below = place
            .path
            .strip_prefix(&place.mount)
            .unwrap_or(Path::new(""));
        assert!(below.components().all(|part| part != parent), "{place:?}");
    }
}

/// Writes a path as the kernel does in `mountinfo`, and reads it.
///
/// # Panics
/// When it is another.
pub fn mount_point(path: &str) {
    let mut text = String::new();
    for letter in path.chars() {
        match letter {
            ' ' | '\t' | '\n' | '\\' => {
                let _ = write!(text, "\\{:03o}", u32::from(letter));
            }
            other => text.push(other),
        }
    }
    assert_eq!(accounting::unescape(&text), path);
}
