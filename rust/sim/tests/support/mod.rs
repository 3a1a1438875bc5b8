//! What the tests of this crate share.

pub(crate) mod heap;
pub(crate) mod numbers;
