//! Smart scan: pages that have not merged for some scans are looked at less often.
//!
//! A record counts looks (`age`) and how many looks are still to be left out (`remaining_skips`).
//! Neither is ever reset while the record lives: not by a write, not by a merge. With nothing but
//! looks, a page is examined at looks 1, 2, 3, 4, 6, 9, 14, 23 and every ninth from there on.

/// Looks after which skipping begins.
const SKIPPING_FROM: u8 = 3;

/// How many looks a page of this age is left out after it has been examined.
fn skips(age: u8) -> u8 {
    match age {
        0..=3 => 1,
        4..=5 => 2,
        6..=8 => 4,
        _ => 8,
    }
}

/// Counts one look and says whether it is left out.
pub(crate) fn leave_out(age: &mut u8, remaining_skips: &mut u8) -> bool {
    let now = *age;
    *age = now.saturating_add(1);
    if now < SKIPPING_FROM {
        return false;
    }
    if *remaining_skips == 0 {
        *remaining_skips = skips(now);
        return false;
    }
    *remaining_skips -= 1;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leave_out_over_many_looks_follows_the_kernels_schedule() {
        let (mut age, mut left) = (0, 0);
        let examined: Vec<u32> = (1..=50)
            .filter(|_| !leave_out(&mut age, &mut left))
            .collect();
        assert_eq!(examined, [1, 2, 3, 4, 6, 9, 14, 23, 32, 41, 50]);
    }

    #[test]
    fn leave_out_at_the_greatest_age_stays_there() {
        let (mut age, mut left) = (255, 0);
        assert!(!leave_out(&mut age, &mut left));
        assert_eq!((age, left), (255, 8));
    }
}
