//! Smart scan: pages that have not merged for some scans are looked at less often.
//!
//! ksmd keeps two numbers for each page: its `age`, the looks so far, and how many looks are still to be
//! left out (`remaining_skips`). The first three looks are examined; from then on, each look that is
//! examined is followed by 1, 2, 4 or 8 that are left out, by age. Neither number is ever reset while the
//! record lives: not by a write, not by a merge. So both follow from the number of looks, and with
//! nothing but looks a page is examined at looks 1, 2, 3, 4, 6, 9, 14, 23 and every ninth from there on.
//! A record counts looks, and of those beyond the 23rd only where in the nine it is.

use crate::rmap::LOOKS_MAX;

/// Looks, counted from 0, that are examined: a bit for each.
const EXAMINED: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 13 | 1 << LAST;

/// The last look that is told apart from all before it. It is followed by the first of [`ROUND`].
const LAST: u8 = 22;

/// The looks that go round at last: eight left out, one examined.
const ROUND: u8 = 9;

const _: () = assert!(LAST <= LOOKS_MAX, "a record has room for as many looks");

/// Counts one look and says whether it is left out.
#[doc(alias = "age")]
#[doc(alias = "remaining_skips")]
pub(crate) fn leave_out(looks: &mut u8) -> bool {
    let now = *looks;
    *looks = if now == LAST {
        now + 1 - ROUND
    } else {
        now + 1
    };
    EXAMINED & 1 << now == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leave_out_over_many_looks_follows_the_kernels_schedule() {
        let mut looks = 0;
        let examined: Vec<u32> = (1..=50).filter(|_| !leave_out(&mut looks)).collect();
        assert_eq!(examined, [1, 2, 3, 4, 6, 9, 14, 23, 32, 41, 50]);
    }

    /// Goal: one number says the same as the kernel's two. Method: those two beside it, beyond the
    /// greatest age.
    #[test]
    fn leave_out_agrees_with_age_and_remaining_skips() {
        let (mut age, mut remaining_skips) = (0_u8, 0_u8);
        let mut looks = 0;
        for look in 0..1000 {
            let now = age;
            age = now.saturating_add(1);
            let left_out = now >= 3 && remaining_skips > 0;
            if left_out {
                remaining_skips -= 1;
            } else if now >= 3 {
                remaining_skips = match now {
                    3 => 1,
                    4..=5 => 2,
                    6..=8 => 4,
                    _ => 8,
                };
            }
            assert_eq!(leave_out(&mut looks), left_out, "look {look}");
            assert!(looks <= LAST);
        }
    }
}
