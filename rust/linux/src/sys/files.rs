//! Reading files, through the standard library: `/proc`, `/sys`, and those that the user names.
//!
//! Thin functions, here and nowhere else, so that these calls can be made to fail like any other
//! (see [`super::checked`]). None of them is made inside a window.

use super::{Call, fallible};
use std::fs::{self, DirEntry, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// As [`fs::read_to_string`].
pub(crate) fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    fallible(Call::FileText, || fs::read_to_string(&path))
}

/// As [`fs::read_link`].
pub(crate) fn read_link(path: impl AsRef<Path>) -> io::Result<PathBuf> {
    fallible(Call::FileLink, || fs::read_link(&path))
}

/// As [`fs::metadata`].
pub(crate) fn metadata(path: impl AsRef<Path>) -> io::Result<Metadata> {
    fallible(Call::FileMetadata, || fs::metadata(&path))
}

/// As [`fs::symlink_metadata`].
pub(crate) fn symlink_metadata(path: impl AsRef<Path>) -> io::Result<Metadata> {
    fallible(Call::FileOwnMetadata, || fs::symlink_metadata(&path))
}

/// As [`File::metadata`].
pub(crate) fn metadata_of(file: &File) -> io::Result<Metadata> {
    fallible(Call::FileOpenMetadata, || file.metadata())
}

/// As [`fs::read_dir`].
pub(crate) fn read_dir(
    path: impl AsRef<Path>,
) -> io::Result<impl Iterator<Item = io::Result<DirEntry>>> {
    let mut entries = fallible(Call::Directory, || fs::read_dir(&path))?;
    let mut failed = false;
    Ok(std::iter::from_fn(move || {
        if failed {
            // As in the standard library, a failure ends the list: whoever passes over it must not
            // meet it for ever.
            return None;
        }
        // The end of the list is no failure, so it is taken out of the way of those.
        let next = fallible(Call::DirectoryEntry, || entries.next().transpose()).transpose();
        failed = matches!(next, Some(Err(_)));
        next
    }))
}

/// A file opened for reading, whose reads go through the same place.
#[derive(Debug)]
pub(crate) struct Reading(File);

/// As [`File::open`].
pub(crate) fn open(path: impl AsRef<Path>) -> io::Result<Reading> {
    fallible(Call::FileOpen, || File::open(&path)).map(Reading)
}

impl Read for Reading {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = super::asked(Call::FileRead, into.len(), 1);
        fallible(Call::FileRead, || self.0.read(&mut into[..len]))
    }
}

/// As [`OpenOptions::open`].
pub(crate) fn open_with(options: &OpenOptions, path: impl AsRef<Path>) -> io::Result<File> {
    fallible(Call::FileOpenWith, || options.open(&path))
}

/// As [`FileExt::read_exact_at`].
pub(crate) fn read_exact_at(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        let len = super::asked(Call::FileReadAt, into.len() - done, 1);
        let part = &mut into[done..done + len];
        match fallible(Call::FileReadAt, || file.read_at(part, at + done as u64))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => done += got,
        }
    }
    Ok(())
}
