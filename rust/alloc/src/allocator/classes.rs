//! Size classes: how many pages a block gets.
//!
//! Up to [`EXACT`] pages a block gets what it needs; above, sizes come four to a doubling. A block that is
//! freed so fits the next one of about its size. What a class has beyond the payload is address space
//! that nobody touches, and takes no memory.

/// Up to so many pages there is a class for each number.
pub(crate) const EXACT: u32 = 16;

/// A size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    /// Its number, without gaps.
    pub(crate) index: usize,
    /// What its blocks have.
    pub(crate) pages: u32,
}

/// The class of blocks that need `pages` pages, of which there is at least one.
pub(crate) fn class_of(pages: u32) -> Class {
    if pages <= EXACT {
        return Class {
            index: pages as usize - 1,
            pages,
        };
    }
    // Of the number before it, the highest three bits: 4 to 7 within a doubling.
    let last = pages - 1;
    let doubling = last.ilog2();
    let shift = doubling - 2;
    let step = last >> shift;
    Class {
        index: (EXACT + (doubling - EXACT.ilog2()) * 4 + (step - 4)) as usize,
        pages: (step + 1) << shift,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_they_are_for_and_follow_one_another() {
        let mut before = Class { index: 0, pages: 1 };
        for pages in 1..=1 << 16 {
            let class = class_of(pages);
            assert!(class.pages >= pages, "{pages}: {class:?}");
            assert!(
                class.pages - pages <= pages / 4,
                "{pages}: {class:?} wastes more than a quarter"
            );
            assert_eq!(class_of(class.pages), class, "a class is of itself");
            let same = class.index == before.index;
            let next = class.index == before.index + 1 && class.pages > before.pages;
            assert!(same && class.pages == before.pages || next, "{pages}");
            before = class;
        }
    }
}
