//! What can go wrong in simulated memory, as plain data.

use pagemerge_core::Reason;

/// How often each kind of failure is injected, in 256ths of the occasions. All 0: a calm machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A `Promote` is refused, though nothing is wrong with the page.
    pub promote: u8,
    /// A `Share` is refused.
    pub share: u8,
    /// A `Share` that follows its own `Promote` is refused: the partner is lost, the examined
    /// page has already become a frame.
    pub partner: u8,
    /// A `Zero` is refused.
    pub zero: u8,
    /// An `Unshare` is refused: no memory for the copy.
    pub unshare: u8,
    /// An attempt ends as `Changed` though the bytes are what they were.
    pub race: u8,
    /// A digest cannot be had, or a comparison unless it is of two frames.
    pub look: u8,
    /// A page that was moved back after a failed attempt, or any page now and then, reads as written
    /// though nobody wrote.
    pub spurious: u8,
    /// The whole space fails in the middle of `apply`. The requests before keep their outcome.
    pub apply_error: u8,
    /// The whole space fails in `observe`, `nids`, `digest`, or `compare`.
    pub look_error: u8,
    /// `release` fails. The frame's name is free all the same; its place is lost.
    pub release_error: u8,
}

impl Faults {
    /// Whether nothing is injected.
    #[must_use]
    pub fn are_off(&self) -> bool {
        *self == Self::default()
    }
}

/// What is the matter with one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    #[default]
    Fine,
    /// `observe` says so. A page that still shows a frame is reported as merged all the same.
    Ineligible(Reason),
    /// `observe` does not see it, but the attempt is refused.
    Refusing(Reason),
    /// Swapped out: a page that was merged cannot be told apart from its private copy, and nothing
    /// can be read or attempted. Any write brings the page back.
    Swapped,
}

/// What a page that was merged and then written must do before it may be merged again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remerge {
    /// Nothing.
    Always,
    /// Stay unwritten for so many scan looks.
    Quiet(u8),
    /// It is left alone for good.
    Never,
}

/// Something that the program does in the middle of a call of the scanner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Writes a whole page of the palette's content number `value`.
    Write(u8),
    /// Writes one byte.
    Poke {
        /// Where, modulo the page size.
        at: u16,
        /// What.
        byte: u8,
    },
    /// Writes what is there already.
    Rewrite,
    /// Discards the page without a word to the scanner.
    Discard,
    /// Reads the page, so that an absent one maps the zero page.
    Touch,
    /// Changes the page's condition.
    Become(Condition),
}

/// The space as a whole failed, because it was told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimError(pub &'static str);

impl std::fmt::Display for SimError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "injected failure in {}", self.0)
    }
}

impl std::error::Error for SimError {}
