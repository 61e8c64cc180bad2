//! Random weights: bytes that are computed from a seed whenever they are read. A model of any size can be
//! loaded onto a device without a file and without host memory, for measurements in which the text does not
//! matter.

/// Writes bytes `at..at + to.len()` of the random stream `seed` into `to`.
///
/// The stream is a sequence of 8-byte groups. Each group is splitmix64 of its index and the seed, masked so
/// that every two bytes are a little-endian bf16 with random sign and mantissa and a magnitude in [2^-6,
/// 2^-5). A byte depends only on the seed and its position, not on how the stream is divided into reads.
pub fn random_bytes(seed: u64, at: usize, to: &mut [u8]) {
    let group = |index: usize| {
        // The multiplication places the streams of neighbouring seeds far apart in splitmix64's sequence.
        let start = seed.wrapping_mul(0xd134_2543_de82_ef95);
        let mut x = start.wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) & 0x807f_807f_807f_807f | 0x3c80_3c80_3c80_3c80).to_le_bytes()
    };
    let first = at / 8;
    let skipped = at % 8;
    let head = if skipped == 0 { 0 } else { to.len().min(8 - skipped) };
    let (head, rest) = to.split_at_mut(head);
    head.copy_from_slice(&group(first)[skipped..][..head.len()]);
    let whole = at.div_ceil(8);
    for (i, to) in rest.chunks_mut(8).enumerate() {
        to.copy_from_slice(&group(whole + i)[..to.len()]);
    }
}
