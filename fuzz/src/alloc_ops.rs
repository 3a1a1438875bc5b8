//! The allocator against a plain model of it, on live memory: see the model.

#[path = "../../rust/alloc/tests/support/model.rs"]
mod model;

/// Does what `input` says.
///
/// # Panics
/// When a block does not read as its model, or the books are wrong.
pub fn run(input: &[u8]) {
    model::run(input);
}
