//! Which memory may be merged now: what the list of mappings tells, as the engine asks for it.

use crate::error::Error;
use crate::mappings::{self, Mappings, Stretch};
use crate::sys::procmap::{Procmap, QueryStop};
use crate::sys::{Span, files, page_size, process};
use pagemerge_core::Reason;
use std::io;
use std::time::Instant;

/// File systems whose `O_DIRECT` holds pages by plain references (finding F6).
const NETWORK: [&str; 6] = ["nfs", "nfs4", "ceph", "9p", "cifs", "smb3"];
/// Bytes around the head of a thread's robust list in which its tid word lies.
const NEAR: usize = 1024;
/// Pages of a thread's own record that a buffer may touch at its border and still be registered.
const RECORD_PAGES: usize = 2;

/// What is known of memory that may be registered.
#[derive(Debug, Default)]
pub(crate) struct Eligible {
    /// Stretches over which frames were mapped before, for a region that has ended since.
    pub(crate) frames: Vec<Span>,
    /// What its owner told the kernel about huge pages: wanted, refused, or nothing.
    pub(crate) huge: Option<bool>,
    /// When the list of mappings was read, if that was for this.
    pub(crate) read: Option<Instant>,
    /// Stretches that are left alone although the rest can be merged, and why.
    pub(crate) left_alone: Vec<(Span, Reason)>,
}

/// What stays as it is within a buffer that is merged otherwise: memory that its owner wants to stay
/// where it is, and memory that he keeps out of core dumps, which is likely to be secret.
const KEPT: [Reason; 2] = [Reason::Mlocked, Reason::DontDump];

/// Refuses, by name, memory that cannot be merged.
pub(crate) fn check(span: Span, read: &Mappings) -> Result<Eligible, Error> {
    let stretches = read.survey(span, |_| false);
    let found = Eligible {
        frames: stretches
            .iter()
            .filter(|s| shows_frames(s))
            .map(|s| s.span)
            .collect(),
        huge: read.huge_page_advice(span.start),
        read: None,
        left_alone: stretches
            .iter()
            .filter_map(|stretch| Some((stretch.span, stretch.refusal?)))
            .filter(|(_, reason)| KEPT.contains(reason))
            .collect(),
    };
    let kept: usize = found.left_alone.iter().map(|(part, _)| part.pages()).sum();
    let own: usize = found.frames.iter().map(|part| part.pages()).sum();
    let refused = |reason: Reason| -> usize {
        let all: usize = stretches
            .iter()
            .filter(|stretch| stretch.refusal == Some(reason))
            .map(|stretch| stretch.span.pages())
            .sum();
        match reason {
            Reason::FileBacked => all.saturating_sub(own),
            // A buffer may share a page with the end of a thread's stack. Such pages are left out
            // of every pass, and the rest of the buffer is none the worse.
            Reason::ThreadStack if all <= RECORD_PAGES && all < span.pages() => 0,
            // Nothing would be left to merge if that were all of it.
            _ if KEPT.contains(&reason) && kept < span.pages() => 0,
            _ => all,
        }
    };
    let worst = Reason::ALL
        .iter()
        .map(|&reason| (refused(reason), reason))
        .max();
    if let Some((pages, reason)) = worst
        && pages > 0
    {
        return Err(Error::NotMergeable {
            pages: span.pages(),
            refused: pages,
            reason,
            advice: mappings::what_to_do(reason),
        });
    }
    Ok(found)
}

/// Whether frames of a region that has ended lie there, and can be merged again.
fn shows_frames(stretch: &Stretch) -> bool {
    stretch.shows_frames && stretch.refusal == Some(Reason::FileBacked)
}

/// Why the kernel does not let this memory be moved or written, found after it refused.
pub(crate) fn reason_at(span: Span) -> Reason {
    let found = mappings::survey(span, |_| true).unwrap_or_default();
    let refusal = found.into_iter().find_map(|stretch| stretch.refusal);
    refusal.unwrap_or(Reason::Other)
}

/// Descriptors through which devices and the kernel pin memory for long. What `io_uring`'s provided
/// buffer rings and VFIO hold does not show in `VmPin`.
const PINNING: [&str; 7] = [
    "anon_inode:[io_uring]",
    "/dev/vfio",
    "/dev/video",
    "/dev/infiniband",
    "/dev/dri",
    "/dev/nvidia",
    "/dev/kvm",
];

/// Whether any page of this process may be pinned for long: `io_uring` buffers, RDMA, VFIO and the like.
pub(crate) fn has_pinned_pages() -> bool {
    // What cannot be read is taken as pinned: that refuses re-merging, and loses nothing.
    let counted = files::read_to_string("/proc/self/status").map_or(true, |status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmPin:"))
            .is_some_and(|value| value.trim() != "0 kB")
    });
    // `/proc/self` is the process's first thread, whose descriptors are the program's.
    counted
        || files::read_dir("/proc/self/fd").map_or(true, |mut open| {
            open.any(|entry| {
                let target = entry.and_then(|entry| files::read_link(entry.path()));
                // One that has been closed meanwhile pins nothing.
                target.is_ok_and(|path| {
                    let path = path.to_string_lossy();
                    PINNING.iter().any(|device| path.starts_with(device))
                })
            })
        })
}

/// Whether the program has a file of a network file system open for `O_DIRECT`.
///
/// # Errors
/// When that cannot be told.
pub(crate) fn network_direct_io() -> io::Result<bool> {
    let mounts = files::read_to_string("/proc/self/mounts")?;
    let network: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (place, kind) = (words.next()?, words.next()?);
            (NETWORK.contains(&kind) || kind.starts_with("fuse.glusterfs")).then_some(place)
        })
        .collect();
    if network.is_empty() {
        return Ok(false);
    }
    // `/proc/self` is the process's first thread, whose descriptors are the program's.
    for entry in files::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry.file_name();
        let info = format!("/proc/self/fdinfo/{}", number.to_string_lossy());
        let looked = files::read_to_string(info)
            .and_then(|info| Ok((info, files::read_link(entry.path())?)));
        let (info, path) = match looked {
            Ok(seen) => seen,
            // It has been closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let direct = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
            .is_some_and(|flags| flags & libc::O_DIRECT != 0);
        if direct && network.iter().any(|place| path.starts_with(place)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The last mapping that was found readable: looked up once for a run of pages.
///
/// Registered memory is read directly. Its owner promised to keep it mapped; that he has not taken
/// away the permission to read it is looked at here, right before. (Whoever does so in another
/// thread at that very moment ends the program, as his own reads would.) Kernels before 6.11 do not
/// tell about one mapping without telling about all: there his promise has to do.
#[derive(Debug)]
pub(crate) struct Readable<'a> {
    maps: &'a Procmap,
    known: Span,
}

impl<'a> Readable<'a> {
    pub(crate) fn new(maps: &'a Procmap) -> Self {
        Self::knowing(maps, Span::default())
    }

    /// One that need not look at `known`, because that has just been done.
    pub(crate) fn knowing(maps: &'a Procmap, known: Span) -> Self {
        Self { maps, known }
    }

    /// What was found readable last.
    pub(crate) fn known(&self) -> Span {
        self.known
    }

    pub(crate) fn covers(&mut self, span: Span) -> bool {
        self.refusal(span).is_none()
    }

    /// Why these pages must not be read, if so.
    pub(crate) fn refusal(&mut self, span: Span) -> Option<Reason> {
        if self.known.covers(span) {
            return None;
        }
        let (known, refusal) = match self.maps.at(span.start) {
            Ok(found) if found.private_and_writable && found.span.covers(span) => {
                (found.span, None)
            }
            Ok(_) => (Span::default(), Some(Reason::ReadOnly)),
            Err(QueryStop::Missing) => (span, None),
            Err(_) => (Span::default(), Some(Reason::Unmapped)),
        };
        self.known = known;
        refusal
    }
}

/// Pages that hold threads' own records (finding F13): the kernel writes a thread's tid word there at
/// its end, without waiting for any window.
///
/// # Errors
/// When the list of threads cannot be read.
pub(crate) fn thread_records() -> io::Result<Vec<Span>> {
    let page = page_size();
    let mut heads = Vec::new();
    for entry in files::read_dir("/proc/self/task")? {
        let name = entry?.file_name();
        if let Some(thread) = name.to_str().and_then(|text| text.parse().ok()) {
            heads.extend(process::robust_list_head(thread)?);
        }
    }
    let records = heads
        .into_iter()
        // The head of the list of robust mutexes lies in the record, 16 bytes from the tid word in
        // glibc, and never far.
        .map(|head| {
            let first = head.saturating_sub(NEAR) & !(page - 1);
            let end = ((head + NEAR) & !(page - 1)) + page;
            Span::between(first, end)
        });
    Ok(records.collect())
}
