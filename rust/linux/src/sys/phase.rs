//! Where the engine is in its work, by names that the tests of faults use: a fault is planned for a
//! call *in a phase*, and a panic for the beginning of one.
//!
//! Without the feature `inject` all of this is nothing.

macro_rules! phases {
    ($($(#[$meta:meta])* $name:ident),* $(,)?) => {
        /// A phase of the engine's work.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(dead_code, reason = "the names are used by the tests of faults")]
        pub(crate) enum Phase { $($(#[$meta])* $name),* }

        #[cfg(feature = "inject")]
        impl Phase {
            pub(super) const NAMED: &'static [(&'static str, Self)] =
                &[$((stringify!($name), Self::$name)),*];

            pub(super) fn named(name: &str) -> Self {
                let phase = Self::NAMED.iter().find(|(known, _)| *known == name);
                phase.unwrap_or_else(|| panic!("no phase is named {name}")).1
            }
        }
    };
}

phases! {
    /// None of the others.
    Elsewhere,
    /// Finding out what the kernel can do.
    Probe,
    /// Starting the merging thread.
    Start,
    /// Making an engine.
    Create,
    /// Registering a region.
    Register,
    /// The look at everything that begins a pass.
    BeginPass,
    /// Asking what pages are now.
    Observe,
    /// Hashing and comparing.
    Digest,
    /// Writing frames, and all that goes before windows.
    Prepare,
    /// A window: registering runs, and moving pages out or holding them.
    WindowOpen,
    /// A window: waiting for whoever holds a page by the mmap lock.
    WindowBarrier,
    /// A window: comparing.
    WindowCompare,
    /// A window: frames and zero pages take the place of pages.
    WindowReplace,
    /// A window: pages go back, runs are let go, waiters are woken.
    WindowClose,
    /// Beginning and ending quiet watches.
    Watch,
    /// The helper thread.
    Helper,
    /// Preparing copies of frames.
    RestorePrepare,
    /// Copies take the place of frames while writers are held off.
    RestoreWindow,
    /// Un-merging, apart from that.
    Unshare,
    /// Giving back what nobody shows any more.
    Settle,
    /// Dropping a region.
    Unregister,
    /// Dropping a region whose memory its owner gives up.
    Forget,
    /// The owner's discarding of memory.
    Discard,
    /// Counting.
    Stats,
    /// Evaluating memory and files.
    Evaluate,
    /// The end of an engine.
    Close,
}

/// As long as it lives this thread is in the phase; then in the one before.
#[must_use]
#[derive(Debug)]
pub(crate) struct Within {
    #[cfg(feature = "inject")]
    before: Phase,
}

/// Begins a phase.
#[inline]
pub(crate) fn enter(phase: Phase) -> Within {
    #[cfg(not(feature = "inject"))]
    {
        let _ = phase;
        Within {}
    }
    #[cfg(feature = "inject")]
    {
        let within = Within {
            before: super::inject::set_phase(phase),
        };
        // A pseudo-call, so that a panic can be planned for the very beginning.
        let _ = super::checked(super::Call::Enter, || 0);
        within
    }
}

#[cfg(feature = "inject")]
impl Drop for Within {
    fn drop(&mut self) {
        super::inject::set_phase(self.before);
    }
}
