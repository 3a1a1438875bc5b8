//! One mapping looked up by address (`PROCMAP_QUERY`, Linux 6.11), without reading the whole list.
//!
//! # Cost
//! Below 1 us, whatever the number of mappings. `/proc/self/maps` costs that for each mapping.

use super::{
    Call, Descriptor, Errno, IOCTL_READ_WRITE, Span, checked, ioctl, ioctl_number, outcomes,
};
use std::mem::{offset_of, size_of};

#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}
const PROCMAP_QUERY: u32 = ioctl_number(IOCTL_READ_WRITE, b'f', 17, size_of::<ProcmapQuery>());
/// The next one where there is none at the address.
const OR_NEXT: u64 = 16;
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const SHARED: u64 = 8;
const _: () = {
    assert!(size_of::<ProcmapQuery>() == 104 && PROCMAP_QUERY == 0xc068_6611);
    assert!(offset_of!(ProcmapQuery, vma_flags) == 40 && offset_of!(ProcmapQuery, inode) == 64);
};

outcomes! {
    /// Why no mapping was found.
    pub(crate) enum QueryStop {
        /// None there, nor (where that was asked for) further up.
        NotMapped = ENOENT,
        /// Not in this kernel (before Linux 6.11).
        Missing = ENOTTY,
    }
}

/// A mapping, as far as the kernel tells it for one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// All of it.
    pub(crate) span: Span,
    /// Readable, writable, and not shared.
    pub(crate) private_and_writable: bool,
    /// The file's number, or 0 for anonymous memory.
    pub(crate) inode: u64,
    /// Where in the file it begins.
    pub(crate) offset: u64,
}

/// An open `/proc/self/maps`.
#[derive(Debug)]
pub(crate) struct Procmap {
    file: Descriptor,
}

impl Procmap {
    /// This process's.
    ///
    /// # Errors
    /// When `/proc` is not there, or descriptors are used up.
    pub(crate) fn own() -> Result<Self, Errno> {
        let path = c"/proc/self/maps";
        let fd = checked(Call::OpenProcmap, || {
            // SAFETY: `path` is a C string.
            i64::from(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) })
        })?;
        // SAFETY: the kernel has just given us this descriptor.
        let file = unsafe { Descriptor::own(fd) };
        Ok(Self { file })
    }

    /// The mapping that holds `address`.
    ///
    /// # Errors
    /// [`QueryStop`].
    pub(crate) fn at(&self, address: usize) -> Result<Found, QueryStop> {
        self.query(address, 0)
    }

    /// The same, or the next one above it.
    ///
    /// # Errors
    /// [`QueryStop`].
    pub(crate) fn at_or_above(&self, address: usize) -> Result<Found, QueryStop> {
        self.query(address, OR_NEXT)
    }

    fn query(&self, address: usize, flags: u64) -> Result<Found, QueryStop> {
        let mut argument = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: flags,
            query_addr: address as u64,
            ..ProcmapQuery::default()
        };
        // SAFETY: PROCMAP_QUERY takes this structure; without buffers for a name and a build id it
        // writes nowhere else.
        unsafe {
            ioctl(
                Call::ProcmapQuery,
                self.file.raw(),
                PROCMAP_QUERY,
                &mut argument,
            )
        }
        .map_err(QueryStop::decode)?;
        #[allow(clippy::cast_possible_truncation, reason = "addresses of this machine")]
        let span = Span::between(argument.vma_start as usize, argument.vma_end as usize);
        Ok(Found {
            span,
            private_and_writable: argument.vma_flags & (READABLE | WRITABLE | SHARED)
                == READABLE | WRITABLE,
            inode: argument.inode,
            offset: argument.vma_offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{self, Mapping, Protection};
    use crate::sys::page_size;

    #[test]
    fn mapping_is_found_by_any_address_in_it() {
        let page = page_size();
        let maps = Procmap::own().unwrap();
        let memory = Mapping::anonymous(3 * page, Protection::ReadWrite).unwrap();
        let middle = memory.span().page_run(1, 1);
        // SAFETY: the memory is this test's own.
        unsafe { mapping::protect(middle, Protection::Read) }.unwrap();
        match maps.at(middle.start + 5) {
            Err(stop) => assert_eq!(stop, QueryStop::Missing), // before Linux 6.11
            Ok(found) => {
                assert_eq!(found.span, middle);
                assert!(!found.private_and_writable);
                assert_eq!(found.inode, 0);
                let above = maps.at(middle.end()).unwrap();
                assert!(above.private_and_writable && above.span.start == middle.end());
                assert_eq!(maps.at(0), Err(QueryStop::NotMapped));
            }
        }
    }
}
