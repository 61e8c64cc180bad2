//! The kernel that measures the read bandwidth: it reads every byte once and adds it to a sum.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::read::Read;
use kernel::*;

/// Sizes around a warp, a block and a run of 2048 chunks, in chunks of 16 bytes.
const CHUNKS: [usize; 10] = [1, 31, 32, 255, 257, 2047, 2048, 2049, 3 * 2048, 5 * 2048 + 300];

fn sums(device: &dyn Device, data: &[u32], blocks: usize) -> Vec<u8> {
    let (from, out) = (constant(device, data), poisoned::<u32>(device, blocks));
    Read { bytes: data.len() * 4, blocks }.launch(device, &out, &from).unwrap();
    bytes_of(device, &out)
}

fn total(words: &[u32]) -> u32 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[test]
fn block_sums_add_up_to_the_sum_of_all_words() {
    let mut random = Random::new(1);
    for chunks in CHUNKS {
        let data: Vec<u32> = (0..chunks * 4).map(|_| random.next() as u32).collect();
        for blocks in [1, 2, 3, 7] {
            let bytes = same_bits(|device| sums(device, &data, blocks));
            let found: Vec<u32> = from_bytes(&bytes);
            // Block b adds runs b, b + blocks, ...
            let runs = |block: usize| data.chunks(2048 * 4).skip(block).step_by(blocks);
            let expected: Vec<u32> =
                (0..blocks).map(|block| total(&runs(block).map(total).collect::<Vec<_>>())).collect();
            assert_eq!(found, expected, "{chunks} chunks on {blocks} blocks");
            assert_eq!(total(&found), total(&data));
        }
    }
}

#[test]
fn a_change_of_any_byte_changes_the_sum() {
    let (device, mut random) = (TestGpu::new(), Random::new(2));
    let mut data: Vec<u8> = (0..(2048 + 40) * 16).map(|_| random.next() as u8).collect();
    let sum = |data: &[u8]| total(&from_bytes::<u32>(&sums(&device, &from_bytes(data), 2)));
    let before = sum(&data);
    let positions = [0, 1, 2, 3, 15, 16, 4095, 4096, 2048 * 16 - 1, 2048 * 16, data.len() - 1];
    for index in positions.into_iter().chain((0..30).map(|_| random.below(2088 * 16)).collect::<Vec<_>>()) {
        let bit = 1 << random.below(8);
        data[index] ^= bit;
        assert_ne!(sum(&data), before, "byte {index}");
        data[index] ^= bit;
    }
    assert_eq!(sum(&data), before);
}

#[test]
fn every_byte_is_read_once_and_little_is_written() {
    for chunks in CHUNKS {
        for blocks in [1, 4] {
            let Some(device) = TestGpu::counting() else { return };
            sums(&device, &vec![7; chunks * 4], blocks);
            let (counts, read) = (device.counts()["read_all"], Read { bytes: chunks * 16, blocks });
            assert_eq!((counts.streamed, counts.read), (chunks as u64 * 16, 0));
            assert_eq!(counts.streamed + counts.written, read.bytes());
            assert_eq!((counts.launches, counts.blocks, counts.conflicts), (1, blocks as u64, 0));
        }
    }
    assert_eq!([1, 2048, 2049].map(|chunks| Read::max_blocks(chunks * 16)), [1, 1, 2]);
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let (from, out) = (upload(&device, &[0u32; 64]), poisoned::<u32>(&device, 4));
    let refused = |bytes: usize, blocks: usize, part: &str| {
        let error = Read { bytes, blocks }.launch(&device, &out, &from).unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    refused(0, 1, "0 bytes on 1 blocks");
    refused(24, 1, "24 bytes on 1 blocks");
    refused(16, 0, "16 bytes on 0 blocks");
    refused(64 << 30, 1, "68719476736 bytes");
    refused(272, 1, "from has 256 bytes, needs 272");
    refused(256, 5, "out has 16 bytes, needs 20");
    let odd = from.slice(8, 64).unwrap();
    let error = Read { bytes: 64, blocks: 1 }.launch(&device, &out, &odd).unwrap_err().to_string();
    assert!(error.contains("not a multiple of 16"), "{error}");
    Read { bytes: 256, blocks: 4 }.launch(&device, &out, &from).unwrap();
}
