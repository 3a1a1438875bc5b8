//! Where a file has data, and where holes.

use super::{Call, checked, outcomes, to_off};
use std::fs::File;
use std::os::fd::AsRawFd;

outcomes! {
    /// Why no data, or no hole, was found.
    pub(crate) enum SeekStop {
        /// None from there on.
        End = ENXIO,
        /// The file system does not tell.
        NotTold = EINVAL,
        /// Not a file in which one can seek.
        NoSeek = ESPIPE,
    }
}

/// The first place from `offset` on that has data. Moves the file's position.
///
/// # Errors
/// [`SeekStop`].
pub(crate) fn data_from(file: &File, offset: u64) -> Result<u64, SeekStop> {
    seek(file, offset, libc::SEEK_DATA)
}

/// The first place from `offset` on that is in a hole; the end of the file counts as one. Moves the
/// file's position.
///
/// # Errors
/// [`SeekStop`].
pub(crate) fn hole_from(file: &File, offset: u64) -> Result<u64, SeekStop> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: &File, offset: u64, what: i32) -> Result<u64, SeekStop> {
    let got = checked(Call::Lseek, || {
        // SAFETY: moves the position of an open file.
        unsafe { libc::lseek(file.as_raw_fd(), to_off(offset), what) }
    });
    got.map(i64::unsigned_abs).map_err(SeekStop::decode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_between_holes_is_found() {
        let path = std::env::temp_dir().join(format!("pagemerge-sparse-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&[1; 4096], 8 << 20).unwrap();
        match data_from(&file, 0) {
            Err(stop) => assert_eq!(stop, SeekStop::NotTold),
            Ok(data) => {
                assert!(data <= 8 << 20);
                let hole = hole_from(&file, 8 << 20).unwrap();
                assert!(((8 << 20) + 4096..=16 << 20).contains(&hole));
                assert_eq!(data_from(&file, 16 << 20), Err(SeekStop::End));
            }
        }
    }
}
