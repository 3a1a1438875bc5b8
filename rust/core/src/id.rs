//! Numbers that name things, each its own type so that one cannot stand in for another.

use std::fmt;

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl $name {
            /// The number as an index.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

id! {
    /// A page of some registered region: an index into the engine's own page number space.
    ///
    /// A region's pages are numbered consecutively, in ascending address order, from the number
    /// that [`register`](crate::Scanner::register) returned. A number stays with its page until
    /// the region's record is dropped; then it may be given out again.
    PageId
}
id! {
    /// A registered region: the engine's counterpart of the kernel's `mm_slot` and area in one.
    RegionId
}
id! {
    /// A frame: one shared, immutable page (the kernel's "KSM page"). Named by the scanner before
    /// it exists; unused again after [`PageSpace::release`](crate::PageSpace::release).
    FrameId
}

impl PageId {
    /// The page `pages` places further on.
    #[must_use]
    pub fn plus(self, pages: u32) -> Self {
        Self(self.0 + pages)
    }
}

/// A NUMA node, as the kernel numbers them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u16);

/// A moment, in milliseconds of a monotonic clock whose origin is the caller's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

/// What the caller's clocks show at the beginning of a step. The scanner never reads a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Monotonic time.
    pub now: Tick,
    /// CPU time that this engine's scanning has used since it was made, in nanoseconds.
    pub cpu_nanos: u64,
}
