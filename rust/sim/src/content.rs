//! The palette: a few page contents that are easily confused.
//!
//! Contents come in families that differ in one byte only, some of them at the very end, so that a
//! comparison which stops early, or a merge that trusts a digest, is found out.

use crate::rng::mix;

/// Content number `value`. Number 0 is all zeroes, 1 and 2 are zero but for the last byte.
#[must_use]
pub fn palette(value: u8, page_size: usize) -> Box<[u8]> {
    let (family, member) = (value / 3, value % 3);
    let mut bytes: Box<[u8]> = if family == 0 {
        vec![0; page_size].into()
    } else {
        distinct(u64::from(family), page_size)
    };
    if let Some(last) = bytes.last_mut() {
        *last = last.wrapping_add(member);
    }
    bytes
}

/// A page whose every byte depends on `tag`; different tags give different pages.
#[must_use]
pub fn distinct(tag: u64, page_size: usize) -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(page_size + 8);
    let mut word = mix(tag);
    // The tag itself leads, so that two pages can never be equal by accident.
    bytes.extend_from_slice(&tag.to_be_bytes());
    while bytes.len() < page_size {
        word = mix(word.wrapping_add(0x9e37_79b9_7f4a_7c15));
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(page_size);
    bytes.into()
}

/// A keyed hash of `bytes`, cut down to its lowest `bits` bits.
#[must_use]
pub fn digest(key: u64, bytes: &[u8], bits: u32) -> u64 {
    let mut hash = mix(key);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = mix(hash ^ u64::from_le_bytes(word)).wrapping_add(key);
    }
    if bits >= 64 {
        hash
    } else {
        hash & ((1 << bits) - 1)
    }
}
