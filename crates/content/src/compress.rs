//! zstd, bounded on both sides.
//!
//! A *section* is a part of a message that is compressed on its own: its size, its size as sent, and its bytes. Equal
//! sizes mean that it is sent as it is, because compression didn't shrink it or wasn't wanted.

use std::io;

use crate::batch::Columns;

/// What one sealing thread keeps between batches: a zstd context and buffers. Its history never changes what it
/// produces.
pub struct Compressor {
    /// `None` where zstd could not get its memory; sections are then sent as they are.
    zstd: Option<zstd::bulk::Compressor<'static>>,
    level: i32,
    compressed: Vec<u8>,
    pub(crate) columns: Columns,
    pub(crate) control: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self::new()
    }
}

impl Compressor {
    /// A compressor for one thread.
    pub fn new() -> Self {
        Self {
            zstd: zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL).ok(),
            level: zstd::DEFAULT_COMPRESSION_LEVEL,
            compressed: Vec::new(),
            columns: Columns::default(),
            control: Vec::new(),
        }
    }

    /// Appends `bytes` as a section; a level of `None` leaves them as they are.
    pub(crate) fn put_section(&mut self, level: Option<i32>, bytes: &[u8], out: &mut Vec<u8>) {
        let compressed = match level {
            Some(level) => self.compress(level, bytes).unwrap_or(bytes),
            None => bytes,
        };
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        out.extend_from_slice(compressed);
    }

    /// The bytes compressed, if that makes them smaller.
    pub(crate) fn compress(&mut self, level: i32, bytes: &[u8]) -> Option<&[u8]> {
        self.set_level(level)?;
        self.compressed.clear();
        self.compressed.reserve(zstd::zstd_safe::compress_bound(bytes.len()));
        self.zstd.as_mut()?.compress_to_buffer(bytes, &mut self.compressed).ok()?;
        (self.compressed.len() < bytes.len()).then_some(&self.compressed)
    }

    fn set_level(&mut self, level: i32) -> Option<()> {
        if level != self.level {
            self.zstd.as_mut()?.set_compression_level(level).ok()?;
            self.level = level;
        }
        Some(())
    }
}

/// What one opening thread keeps between sections.
#[derive(Default)]
pub(crate) struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Decompressor {
    /// Whether `packed`, which a [`Compressor`] made of as many bytes as `out` has, could be unpacked into it.
    pub(crate) fn unpack(&mut self, packed: &[u8], out: &mut [u8]) -> bool {
        self.zstd.decompress_to_buffer(packed, out).is_ok_and(|bytes| bytes == out.len())
    }

    /// Takes a section off the front of `bytes` and puts its content, at most `limit` bytes, into `out`.
    pub(crate) fn take_section(
        &mut self,
        bytes: &mut &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let size_bytes = take_u32(bytes)?;
        let sealed_bytes = take_u32(bytes)?;
        if size_bytes > limit {
            return Err(OpenError::TooLarge { size_bytes, limit_bytes: limit });
        }
        let (sealed, rest) = bytes.split_at_checked(sealed_bytes).ok_or(OpenError::Truncated)?;
        *bytes = rest;
        out.clear();
        if sealed_bytes == size_bytes {
            out.extend_from_slice(sealed);
            return Ok(());
        }
        out.resize(size_bytes, 0);
        let opened_bytes = self.zstd.decompress_to_buffer(sealed, &mut out[..]).map_err(OpenError::Zstd)?;
        match opened_bytes == size_bytes {
            true => Ok(()),
            false => Err(OpenError::SizeDiffers { size_bytes, opened_bytes }),
        }
    }
}

/// Seals opaque bytes, such as a part of QEMU's stream, for the way. [`open_bytes`] is the inverse.
///
/// # Panics
/// If there are 4 GiB or more.
pub fn seal_bytes(compressor: &mut Compressor, level: i32, bytes: &[u8]) -> Vec<u8> {
    assert!(u32::try_from(bytes.len()).is_ok(), "{} bytes do not fit a section", bytes.len());
    let mut sealed = Vec::with_capacity(8 + bytes.len() / 2);
    compressor.put_section(Some(level), bytes, &mut sealed);
    sealed
}

/// Opens what [`seal_bytes`] sealed, unless it is larger than `limit_bytes`. Allocates nothing beyond that limit.
pub fn open_bytes(mut sealed: &[u8], limit_bytes: usize) -> Result<Vec<u8>, OpenError> {
    let mut opened = Vec::new();
    Decompressor::default().take_section(&mut sealed, limit_bytes, &mut opened)?;
    match sealed.len() {
        0 => Ok(opened),
        excess_bytes => Err(OpenError::Excess { excess_bytes }),
    }
}

/// Why sealed bytes could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// They end too early.
    #[error("sealed bytes are truncated")]
    Truncated,
    /// They say that they would become larger than allowed.
    #[error("sealed bytes would open to {size_bytes} bytes, over the limit of {limit_bytes}")]
    TooLarge {
        /// The size they announce.
        size_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// zstd refuses them.
    #[error("cannot decompress")]
    Zstd(#[source] io::Error),
    /// They opened to another size than they announced.
    #[error("sealed bytes announced {size_bytes} bytes and opened to {opened_bytes}")]
    SizeDiffers {
        /// The size they announce.
        size_bytes: usize,
        /// The size they have.
        opened_bytes: usize,
    },
    /// Something follows that doesn't belong to them.
    #[error("{excess_bytes} bytes follow the sealed ones")]
    Excess {
        /// How much.
        excess_bytes: usize,
    },
}

fn take_u32(bytes: &mut &[u8]) -> Result<usize, OpenError> {
    let (number, rest) = bytes.split_first_chunk().ok_or(OpenError::Truncated)?;
    *bytes = rest;
    Ok(u32::from_le_bytes(*number) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn opening_gives_what_was_sealed(bytes: Vec<u8>, repeats in 0usize..50, level in -7i32..9) {
            let bytes = bytes.repeat(repeats);
            let sealed = seal_bytes(&mut Compressor::new(), level, &bytes);
            prop_assert!(sealed.len() <= bytes.len() + 8);
            prop_assert_eq!(open_bytes(&sealed, bytes.len()).unwrap(), bytes);
        }

        #[test]
        fn opening_anything_neither_panics_nor_exceeds_the_limit(bytes: Vec<u8>) {
            if let Ok(opened) = open_bytes(&bytes, 100) {
                prop_assert!(opened.len() <= 100);
            }
        }
    }

    #[test]
    fn each_refusal_says_why() {
        let sealed = seal_bytes(&mut Compressor::new(), 1, &[1; 1000]);
        assert!(matches!(open_bytes(&sealed, 999), Err(OpenError::TooLarge { size_bytes: 1000, .. })));
        assert!(matches!(open_bytes(&sealed[..sealed.len() - 1], 1000), Err(OpenError::Truncated)));
        assert!(matches!(open_bytes(&[&sealed[..], &[0]].concat(), 1000), Err(OpenError::Excess { .. })));
        let mut longer = sealed.clone();
        longer[0] += 1;
        assert!(matches!(open_bytes(&longer, 2000), Err(OpenError::SizeDiffers { .. })));
        let mut broken = sealed;
        broken[8] ^= 0xff;
        assert!(matches!(open_bytes(&broken, 2000), Err(OpenError::Zstd(_))));
    }
}
