//! Whether any descendant of this process, however it was forked, still maps what we mapped.
//!
//! A canary is an empty file that is mapped shared and writable. A fork child inherits that mapping
//! together with all others, by `fork()` and by a raw `clone` alike, and loses it when it ends or
//! executes another program. The kernel counts such mappings, because a file that has one cannot be
//! sealed against writing: so once our own is unmapped, sealing succeeds exactly when nobody else has
//! one. It has no page, so nothing that happens to pages (swap, `mlockall`, copying, migration) can
//! mislead it.
//!
//! Sealing is for good, so each look uses a canary up. [`Canaries`] maps the next one first, so that a
//! child always inherits one.

use super::mapping::{MapStop, Mapping, Protection, Sharing};
use super::memfd::{CreateStop, Memfd};
use super::{Call, Errno, checked, page_size};

/// One file, and our own mapping of it while it is the newest.
#[derive(Debug)]
struct Canary {
    file: Memfd,
    ours: Option<Mapping>,
}

/// The canaries of one generation of frames.
#[derive(Debug)]
pub(crate) struct Canaries {
    /// The last is the one that children inherit now; those before it have been looked at, and
    /// somebody still maps them.
    all: Vec<Canary>,
}

/// Why there is no new canary.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CanaryStop {
    File(CreateStop),
    Mapping(MapStop),
}

impl From<CanaryStop> for std::io::Error {
    fn from(stop: CanaryStop) -> Self {
        match stop {
            CanaryStop::File(stop) => stop.into(),
            CanaryStop::Mapping(stop) => stop.into(),
        }
    }
}

fn hatch() -> Result<Canary, CanaryStop> {
    let file =
        Memfd::unsealed(c"pagemerge-canary", page_size() as u64).map_err(CanaryStop::File)?;
    let ours = Mapping::file(
        &file,
        0,
        page_size(),
        Protection::ReadWrite,
        Sharing::Shared,
    )
    .map_err(CanaryStop::Mapping)?;
    Ok(Canary {
        file,
        ours: Some(ours),
    })
}

impl Canaries {
    /// From here on, forks are noticed.
    ///
    /// # Errors
    /// No descriptor, memory or mapping left.
    pub(crate) fn new() -> Result<Self, CanaryStop> {
        Ok(Self {
            all: vec![hatch()?],
        })
    }

    /// Whether no process forked since [`Canaries::new`] is left. What cannot be found out counts as
    /// "somebody is left".
    pub(crate) fn nobody_else(&mut self) -> bool {
        let Ok(next) = hatch() else { return false };
        self.all.push(next);
        let last = self.all.len() - 1;
        let mut at = 0;
        self.all.retain_mut(|canary| {
            at += 1;
            if at > last {
                return true;
            }
            drop(canary.ours.take());
            // Sealed: nobody has it, and it is done with.
            seal(&canary.file).is_err()
        });
        self.all.len() == 1
    }
}

fn seal(file: &Memfd) -> Result<(), Errno> {
    checked(Call::SealWrite, || {
        // SAFETY: seals our own file, of which no page is mapped or held by us.
        i64::from(unsafe { libc::fcntl(file.raw(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) })
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forks by a raw system call, without any handler. The child waits until `release` is closed.
    fn fork_and_wait(release: &std::io::PipeReader) -> i32 {
        use std::os::fd::AsRawFd;
        let fd = release.as_raw_fd();
        // SAFETY: the child calls nothing but `read` and `_exit`.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            let mut byte = 0u8;
            // SAFETY: one byte, ours.
            unsafe { libc::read(fd, (&raw mut byte).cast(), 1) };
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        i32::try_from(pid).expect("a process number")
    }

    fn reap(pid: i32) {
        // SAFETY: waits for our own child.
        assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }, pid);
    }

    #[test]
    fn raw_fork_is_noticed_until_the_child_is_gone() {
        let mut canaries = Canaries::new().unwrap();
        assert!(canaries.nobody_else());
        assert!(canaries.nobody_else());
        let (release, hold) = std::io::pipe().unwrap();
        let child = fork_and_wait(&release);
        assert!(!canaries.nobody_else());
        assert!(!canaries.nobody_else());
        let second = fork_and_wait(&release);
        // SAFETY: one byte, ours: lets one of the two go.
        let one = unsafe {
            libc::write(
                std::os::fd::AsRawFd::as_raw_fd(&hold),
                [1u8].as_ptr().cast(),
                1,
            )
        };
        assert_eq!(one, 1);
        // SAFETY: waits for whichever child ends.
        let first_gone = unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
        assert!(first_gone == child || first_gone == second);
        assert!(!canaries.nobody_else());
        // SAFETY: as above.
        unsafe {
            libc::write(
                std::os::fd::AsRawFd::as_raw_fd(&hold),
                [1u8].as_ptr().cast(),
                1,
            )
        };
        reap(if first_gone == child { second } else { child });
        assert!(canaries.nobody_else());
    }
}
