//! The parsers of the kernel's texts about this process: any text, and texts as the kernel writes them.

use arbitrary::{Arbitrary, Unstructured};
use pagemerge_linux::fuzzing::{self, Told};

#[derive(Arbitrary, Debug)]
enum Text<'a> {
    Smaps {
        start: u32,
        end: u32,
        text: &'a [u8],
    },
    Mappings(Vec<Mapping<'a>>),
    Pss(&'a str),
    Cgroup {
        groups: &'a str,
        mounts: &'a str,
    },
    MountPoint(&'a str),
}

#[derive(Arbitrary, Debug)]
struct Mapping<'a> {
    gap: u16,
    pages: u16,
    permissions: [bool; 4],
    offset: u32,
    inode: u32,
    name: &'a str,
    may_be_huge: bool,
    flags: u8,
}

const FLAGS: [&str; 4] = [
    "rd wr mr mw me ac",
    "rd wr mr mw me lo ac sd",
    "",
    "rd ex mr um uw dd",
];

/// Reads the text that `input` describes.
///
/// # Panics
/// When the answer cannot be right.
pub fn run(input: &[u8]) {
    match Text::arbitrary_take_rest(Unstructured::new(input)) {
        Ok(Text::Smaps { start, end, text }) => {
            // Also without choosing, so that a plain text file is an input.
            fuzzing::smaps(text, start as usize, end as usize);
            fuzzing::smaps(text, 0, usize::MAX);
        }
        Ok(Text::Mappings(list)) => {
            let mut at = 0;
            let told: Vec<Told<'_>> = list
                .iter()
                .map(|it| {
                    let start = at + usize::from(it.gap) * 4096;
                    let len = (usize::from(it.pages) + 1) * 4096;
                    at = start + len;
                    Told {
                        start,
                        len,
                        permissions: it.permissions,
                        offset: u64::from(it.offset) * 4096,
                        inode: it.inode.into(),
                        name: it.name.lines().next().unwrap_or_default(),
                        may_be_huge: it.may_be_huge,
                        flags: FLAGS[usize::from(it.flags) % FLAGS.len()],
                    }
                })
                .collect();
            fuzzing::smaps_of(&told);
        }
        Ok(Text::Pss(text)) => fuzzing::pss(text),
        Ok(Text::Cgroup { groups, mounts }) => fuzzing::cgroup(groups, mounts),
        Ok(Text::MountPoint(path)) => fuzzing::mount_point(path),
        Err(_) => {}
    }
}
