//! Which barrier an engine gets, and the userfaultfds for it. Chosen from what probing found;
//! `User` only on request, and never silently less than what was asked for.

use crate::error::Error;
use crate::probe::capabilities;
use crate::settings::Barrier;
use crate::sys::uffd::{Features, Source, Userfaultfd};

/// The barrier for an engine that asks for `wanted`, or for the best.
pub(crate) fn choose(wanted: Option<Barrier>) -> Result<Barrier, Error> {
    let can = capabilities();
    let missing = |name: &str, wanted| {
        let why = can
            .reasons
            .get(name)
            .cloned()
            .unwrap_or_else(|| "it is not there".into());
        Err(Error::NoBarrier { wanted, why })
    };
    if !can.frames {
        let why = can.reasons.get("frames").cloned();
        return Err(Error::Limit(
            why.unwrap_or_else(|| "memfds are not available".into()),
        ));
    }
    match wanted {
        None => Ok(can.barrier),
        Some(Barrier::Full) if can.full.is_none() => missing("barrier", Barrier::Full),
        Some(Barrier::User) if !can.user_barrier => missing("user_barrier", Barrier::User),
        // Without it pages would be held under watches, which are long.
        Some(Barrier::User) if !can.move_pages => missing("move", Barrier::User),
        Some(barrier) => Ok(barrier),
    }
}

/// A userfaultfd for that barrier; without a barrier, one for write tracking.
pub(crate) fn open_uffd(barrier: Barrier, features: Features) -> Result<Userfaultfd, Error> {
    let can = capabilities();
    let source = match barrier {
        Barrier::Full => can.full,
        Barrier::User => Some(Source::UserModeOnly),
        Barrier::None => can.tracking,
    };
    let source = source.ok_or_else(|| Error::NoBarrier {
        wanted: barrier,
        why: can.reasons.get("barrier").cloned().unwrap_or_default(),
    })?;
    Userfaultfd::open(source, features)
        .map_err(|e| Error::os("cannot open a userfaultfd", e.into()))
}
