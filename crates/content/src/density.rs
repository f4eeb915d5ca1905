//! Contents that no compressor makes smaller, told apart in two microseconds.

use crate::{BLOCK_BYTES, Block};

/// Random blocks have 1, give or take 0.01; text and code have over 10.
const EVEN: f64 = 1.25;

/// Whether a block's bytes look random: as evenly spread as those of compressed or encrypted data. zstd would make it no
/// smaller, and what shares its entropy tables dearer.
///
/// Two bytes of random data are the same one time in 256. Where it happens [`EVEN`] times as often, the best code for single
/// bytes saves about a hundredth.
pub(crate) fn is_dense(content: &Block) -> bool {
    let mut counts = [0u32; 256];
    for byte in content {
        counts[usize::from(*byte)] += 1;
    }
    let pairs: u32 = counts.iter().map(|count| count * count.saturating_sub(1)).sum();
    const PAIRS: usize = BLOCK_BYTES * (BLOCK_BYTES - 1);
    f64::from(pairs) * 256.0 < PAIRS as f64 * EVEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bases::tests::noise;

    #[test]
    fn noise_is_dense_and_text_is_not() {
        assert!((0..100).all(|seed| is_dense(&noise(seed))));
        let text: Block = std::array::from_fn(|position| b"the guest goes on where it was "[position % 31]);
        assert!(!is_dense(&text) && !is_dense(&[0; BLOCK_BYTES]));
        // A quarter of it suffices to make a block smaller.
        let mut partly = noise(1);
        partly[..BLOCK_BYTES / 4].copy_from_slice(&text[..BLOCK_BYTES / 4]);
        assert!(!is_dense(&partly));
    }
}
