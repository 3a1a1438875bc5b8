//! `Block`: memory that frees itself.

use super::{Allocator, AllocatorError};

/// A piece of an allocator's memory, freed when it is dropped.
///
/// It begins on a page, and reads as zero at first, up to the end of its last page. Its bytes are reached
/// by [`read`](Self::read) and [`write`](Self::write), or by its address, which is the business of unsafe
/// code: nobody here looks at it as a slice, since merging replaces its pages at any time.
#[derive(Debug)]
pub struct Block {
    allocator: Allocator,
    addr: usize,
    len: usize,
}

impl Block {
    pub(crate) fn new(allocator: Allocator, addr: usize, len: usize) -> Self {
        Self {
            allocator,
            addr,
            len,
        }
    }

    /// Its address, at the beginning of a page.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The allocator.
    #[must_use]
    pub fn allocator(&self) -> &Allocator {
        &self.allocator
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Only a broken allocator.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), AllocatorError> {
        self.assert_inside(offset, bytes.len());
        self.allocator.heap().write(self.addr, offset, bytes)
    }

    /// Reads what is at `offset`.
    ///
    /// # Errors
    /// Only a broken allocator.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), AllocatorError> {
        self.assert_inside(offset, into.len());
        self.allocator.heap().read(self.addr, offset, into)
    }

    fn assert_inside(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} are not inside a block of {}",
            self.len
        );
    }

    /// Gives its memory back, and keeps its place: it reads as zero, and takes memory again where it is
    /// written.
    ///
    /// # Errors
    /// Only a broken allocator.
    pub fn empty(&self) -> Result<(), AllocatorError> {
        self.allocator.heap().empty(self.addr)
    }

    /// Gives it another size, if need be at another address. What it gains reads as zero.
    ///
    /// # Errors
    /// [`AllocatorError::Memory`]; then it is as it was.
    pub fn resize(&mut self, bytes: usize) -> Result<(), AllocatorError> {
        self.addr = self.allocator.heap().resize(self.addr, bytes)?;
        self.len = bytes;
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.allocator.heap().free(self.addr);
    }
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Block>();
};
