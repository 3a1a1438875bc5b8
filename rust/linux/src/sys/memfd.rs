//! The file without a name that holds frames.
//!
//! # Invariants
//! * Its size never changes after [`Memfd::create`]: it is sealed, so a mapping inside it can never
//!   raise `SIGBUS`, whatever the program does.
//! * A slot that was ever mapped is written again only after [`Memfd::punch`]: a pipe or a socket
//!   may still hold the old page, and would deliver the new bytes.
//!
//! # Cost
//! A frame written alone 1 to 2.4 us, less in runs. One frame in an otherwise empty range costs
//! some 600 bytes of kernel memory beside its page; in a dense range 10.

use super::{Call, Descriptor, Progress, Span, asked, checked, files, outcomes, to_off, to_usize};
use std::ffi::CStr;
use std::os::fd::RawFd;

const MFD_CLOEXEC: u32 = 1;
const MFD_ALLOW_SEALING: u32 = 2;
/// Linux 6.3. Systems may refuse files that do not say it.
const MFD_NOEXEC_SEAL: u32 = 8;

outcomes! {
    /// Why a file for frames could not be made.
    pub(crate) enum CreateStop {
        /// Not in this kernel, or kept away by a seccomp filter that says so.
        Missing = ENOSYS,
        /// A security policy (seccomp, `vm.memfd_noexec`) forbids it.
        Forbidden = EPERM,
        /// Too many open files in this process.
        TooManyFiles = EMFILE,
        /// Too many open files in this system.
        TooManyFilesInSystem = ENFILE,
        /// Larger than `RLIMIT_FSIZE` allows. (The process also gets SIGXFSZ: look at the limit
        /// first.)
        TooBig = EFBIG,
        /// No memory.
        NoMemory = ENOMEM,
    }
}

outcomes! {
    /// Why frames were not written or punched.
    pub(crate) enum WriteStop {
        /// No memory, or a memory cgroup is at its limit.
        NoMemory = ENOMEM,
        /// A limit of the file system behind memfds.
        Full = ENOSPC,
        /// Beyond `RLIMIT_FSIZE`.
        TooBig = EFBIG,
        /// The source is not readable.
        SourceGone = EFAULT,
        /// The file's seals forbid it.
        Sealed = EPERM,
    }
}

/// A sparse file in memory, of a fixed size.
#[derive(Debug)]
pub(crate) struct Memfd {
    file: Descriptor,
    len: u64,
}

impl Memfd {
    /// Makes a sparse file of `len` bytes. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// [`CreateStop`].
    pub(crate) fn create(name: &CStr, len: u64) -> Result<Self, CreateStop> {
        let made = Self::unsealed(name, len)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        checked(Call::SealSize, || {
            // SAFETY: seals our own file.
            i64::from(unsafe { libc::fcntl(made.raw(), libc::F_ADD_SEALS, seals) })
        })
        .map_err(CreateStop::decode)?;
        Ok(made)
    }

    /// The same, without any seal yet.
    ///
    /// # Errors
    /// [`CreateStop`].
    pub(super) fn unsealed(name: &CStr, len: u64) -> Result<Self, CreateStop> {
        let open = |flags: u32| {
            checked(Call::MemfdCreate, || {
                // SAFETY: `name` is a C string for the whole call.
                unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), flags) }
            })
        };
        let base = MFD_CLOEXEC | MFD_ALLOW_SEALING;
        let fd = open(base | MFD_NOEXEC_SEAL).or_else(|errno| match errno.raw() {
            libc::EINVAL => open(base), // a kernel that does not know NOEXEC_SEAL
            _ => Err(errno),
        });
        let fd = fd.map_err(CreateStop::decode)?;
        // SAFETY: the kernel has just given us this descriptor.
        let file = unsafe { Descriptor::own(fd) };
        checked(Call::Ftruncate, || {
            // SAFETY: sets the size of our own file, which nothing has mapped.
            i64::from(unsafe { libc::ftruncate(file.raw(), to_off(len)) })
        })
        .map_err(CreateStop::decode)?;
        Ok(Self { file, len })
    }

    /// Its size in bytes, holes included.
    #[cfg(test)]
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn raw(&self) -> RawFd {
        self.file.raw()
    }

    /// # Panics
    /// When the range is not inside the file.
    pub(super) fn assert_inside(&self, offset: u64, len: usize) {
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= self.len);
        assert!(
            inside,
            "{len} bytes at {offset} reach beyond a frame store of {}",
            self.len
        );
    }

    /// Writes the bytes of `from` at `offset`, into a slot that is fresh or punched.
    ///
    /// # Safety
    /// `from` stays mapped during the call. (If it does not, the outcome is `SourceGone` or bytes
    /// of what is mapped there instead.)
    pub(crate) unsafe fn write_from(&self, from: Span, offset: u64) -> Progress<WriteStop> {
        self.assert_inside(offset, from.len);
        let mut done = 0;
        while done < from.len {
            let rest = from.part(done, asked(Call::Pwrite, from.len - done, 1));
            let at = to_off(offset + done as u64);
            let wrote = checked(Call::Pwrite, || {
                // SAFETY: the kernel reads `rest`, which the caller keeps mapped, and copes with
                // unmapped memory by EFAULT. The file is ours.
                let got = unsafe { libc::pwrite(self.raw(), rest.as_ptr().cast(), rest.len, at) };
                got as i64
            });
            match wrote {
                Ok(bytes) if bytes > 0 => done += to_usize(bytes),
                Ok(_) => {
                    return Progress {
                        bytes: done,
                        stopped: Some(WriteStop::Full),
                    };
                }
                Err(errno) => {
                    return Progress {
                        bytes: done,
                        stopped: Some(WriteStop::decode(errno)),
                    };
                }
            }
        }
        Progress {
            bytes: done,
            stopped: None,
        }
    }

    /// Reads bytes back, without mapping them.
    ///
    /// # Errors
    /// [`WriteStop`].
    #[cfg(test)]
    pub(crate) fn read_at(&self, into: &mut [u8], offset: u64) -> Result<(), WriteStop> {
        self.assert_inside(offset, into.len());
        let mut done = 0;
        while done < into.len() {
            let rest = &mut into[done..];
            let at = to_off(offset + done as u64);
            let got = checked(Call::PreadFrames, || {
                // SAFETY: `rest` is ours to write for the whole call.
                let got =
                    unsafe { libc::pread(self.raw(), rest.as_mut_ptr().cast(), rest.len(), at) };
                got as i64
            });
            // A file of fixed size that covers the range never says end of file.
            done += to_usize(got.map_err(WriteStop::decode)?).max(1);
        }
        Ok(())
    }

    /// Makes a hole: the pages are given back, and the range reads as zero. Mappings that showed
    /// them show zeroes from now on.
    ///
    /// # Errors
    /// [`WriteStop`].
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<(), WriteStop> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        checked(Call::Fallocate, || {
            // SAFETY: a hole in our own file; what shows it is the business of the frame store.
            i64::from(unsafe { libc::fallocate(self.raw(), mode, to_off(offset), to_off(len)) })
        })
        .map(drop)
        .map_err(WriteStop::decode)
    }

    /// Bytes of memory that its pages take now.
    ///
    /// # Errors
    /// [`WriteStop`], for a file that is no file any more.
    pub(crate) fn allocated_bytes(&self) -> Result<u64, WriteStop> {
        let blocks = self.stat()?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0) * 512)
    }

    /// Its number, by which the list of mappings names it.
    ///
    /// # Errors
    /// [`WriteStop`], for a file that is no file any more.
    pub(crate) fn inode(&self) -> Result<u64, WriteStop> {
        Ok(self.stat()?.st_ino)
    }

    fn stat(&self) -> Result<libc::stat, WriteStop> {
        // SAFETY: all zero is a valid `stat`, which is plain data.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        checked(Call::Fstat, || {
            // SAFETY: `stat` is ours to write for the whole call.
            i64::from(unsafe { libc::fstat(self.raw(), &raw mut stat) })
        })
        .map_err(WriteStop::decode)?;
        Ok(stat)
    }
}

/// Whether files like ours are given huge pages unless told otherwise: a frame written alone would
/// then take 2 MiB.
pub(crate) fn huge_pages_by_default() -> bool {
    // Where the file is not there, huge pages are not either.
    files::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").is_ok_and(|text| {
        ["[always]", "[within_size]", "[force]"]
            .iter()
            .any(|on| text.contains(on))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{self, Mapping, Protection};
    use crate::sys::page_size;

    fn filled(pages: usize, value: u8) -> Mapping {
        let memory = Mapping::anonymous(pages * page_size(), Protection::ReadWrite).unwrap();
        let (start, bytes) = (memory.span().as_mut_ptr(), memory.len());
        // SAFETY: the memory is this test's own, and no reference points into it.
        unsafe { start.write_bytes(value, bytes) };
        memory
    }

    #[test]
    fn sparse_file_takes_only_what_is_written_and_gives_it_back_when_punched() {
        let page = page_size();
        let file = Memfd::create(c"test", 1 << 36).unwrap();
        assert_eq!((file.len(), file.allocated_bytes().unwrap()), (1 << 36, 0));
        let source = filled(3, 0xab);
        // SAFETY: `source` is mapped.
        let wrote = unsafe { file.write_from(source.span(), 1 << 35) };
        assert_eq!(
            wrote,
            Progress {
                bytes: 3 * page,
                stopped: None
            }
        );
        assert_eq!(file.allocated_bytes().unwrap(), 3 * page as u64);
        let mut back = vec![0; 3 * page];
        file.read_at(&mut back, 1 << 35).unwrap();
        assert!(back.iter().all(|&b| b == 0xab));
        file.punch(1 << 35, 2 * page as u64).unwrap();
        assert_eq!(file.allocated_bytes().unwrap(), page as u64);
        file.read_at(&mut back, 1 << 35).unwrap();
        assert!(back[..2 * page].iter().all(|&b| b == 0) && back[2 * page] == 0xab);
    }

    #[test]
    fn size_is_sealed_and_seals_are_final() {
        let file = Memfd::create(c"test", 1 << 20).unwrap();
        // SAFETY: asks our own file for a size that its seals forbid.
        assert_eq!(unsafe { libc::ftruncate(file.raw(), 1 << 10) }, -1);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::ftruncate(file.raw(), 1 << 21) }, -1);
        // SAFETY: as above, for a seal.
        let sealed = unsafe { libc::fcntl(file.raw(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert_eq!(sealed, -1);
        // SAFETY: reads the flags of our own descriptor.
        let flags = unsafe { libc::fcntl(file.raw(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);
    }

    #[test]
    fn unreadable_source_is_an_outcome_with_a_name() {
        let file = Memfd::create(c"test", 1 << 20).unwrap();
        let source = Mapping::anonymous(page_size(), Protection::None).unwrap();
        // SAFETY: `source` is mapped, though not readable.
        let wrote = unsafe { file.write_from(source.span(), 0) };
        assert_eq!(
            wrote,
            Progress {
                bytes: 0,
                stopped: Some(WriteStop::SourceGone)
            }
        );
    }

    #[test]
    fn source_that_ends_in_the_middle_is_written_up_to_there() {
        let page = page_size();
        let file = Memfd::create(c"test", 1 << 20).unwrap();
        let source = filled(2, 1);
        let second = source.span().page_run(1, 1);
        // SAFETY: the memory is this test's own.
        unsafe { mapping::protect(second, Protection::None) }.unwrap();
        // SAFETY: `source` is mapped.
        let wrote = unsafe { file.write_from(source.span(), 0) };
        assert_eq!(
            wrote,
            Progress {
                bytes: page,
                stopped: Some(WriteStop::SourceGone)
            }
        );
    }
}
