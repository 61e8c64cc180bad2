//! The lookup of drafts against its definition on the host.

use crate::support::kernel;

use dflash::checkpoint::pair;
use dflash::gpu::kernels::lookup::Lookup;
use dflash::gpu::kernels::rejection::DISTRIBUTION_BYTES;
use dflash::gpu::kernels::round::{DraftShape, Sequence};
use dflash::spec;
use kernel::*;

const NGRAM: pair::Lookup = pair::Lookup::NGRAM;
const SUFFIX: pair::Lookup = pair::Lookup::SUFFIX;

#[test]
fn drafts_equal_those_of_the_definition() {
    let one = pair::Lookup { least: 1, most: 1 };
    let long = pair::Lookup { least: 9, most: 200 };
    for (turn, (lengths, vocab, positions)) in
        [(NGRAM, 9, 700), (SUFFIX, 2, 1100), (one, 40, 90), (long, 2, 600), (NGRAM, 1, 80)]
            .into_iter()
            .enumerate()
    {
        let (mut random, block) = (Random::new(turn as u64), 3 + turn * 4);
        // No text, one token, less than a step of the threads, and up to the last position; the last one is inactive.
        let counts = [1, 2, positions / 3, positions - 7, positions, positions];
        let sequences = counts.len();
        let history: Vec<u32> = (0..sequences * positions).map(|_| random.below(vocab) as u32).collect();
        let states: Vec<u8> = (counts.iter().enumerate())
            .flat_map(|(i, count)| {
                let length = *count as u32 - 1;
                let state =
                    Sequence { length, active: i < 5, ..crate::markov::sequence(7, DraftShape::Chain) };
                state.to_bytes().unwrap()
            })
            .collect();
        let kernel = Lookup { sequences, block, positions, lengths };
        let bytes = same_bits(|device| {
            let (drafts, kept) =
                (upload(device, &vec![77u32; sequences * block]), poisoned::<u32>(device, sequences));
            let distributions = upload(device, &vec![1u8; sequences * block * DISTRIBUTION_BYTES]);
            let (history, states) = (upload(device, &history), upload(device, &states));
            kernel.launch(device, &drafts, &kept, Some(&distributions), &history, &states).unwrap();
            let with = [bytes_of(device, &drafts), bytes_of(device, &kept)].concat();
            kernel.launch(device, &drafts, &kept, None, &history, &states).unwrap();
            assert_eq!(with, [bytes_of(device, &drafts), bytes_of(device, &kept)].concat());
            [with, bytes_of(device, &distributions)].concat()
        });
        let (tokens, distributions) = bytes.split_at(sequences * (block + 1) * 4);
        let tokens: Vec<u32> = from_bytes(tokens);
        let (drafts, kept) = tokens.split_at(sequences * block);
        let mut found = 0;
        for (i, count) in counts.into_iter().enumerate() {
            let tokens = if i < 5 { &history[i * positions..][..count] } else { &[] };
            let expected = spec::lookup::drafts(lengths, tokens, block - 1);
            assert_eq!(
                kept[i] as usize,
                if expected.is_empty() { 1 } else { block },
                "sequence {i} of {turn}"
            );
            found += usize::from(!expected.is_empty());
            for row in 0..block {
                let draft = row.checked_sub(1).and_then(|draft| expected.get(draft));
                assert_eq!(
                    drafts[i * block + row],
                    *draft.unwrap_or(&77),
                    "sequence {i} of {turn}, row {row}"
                );
                let words: Vec<u32> =
                    from_bytes(&distributions[(i * block + row) * DISTRIBUTION_BYTES..][..48]);
                // The token that gets the remainder, and the remainder of 2^48.
                match draft {
                    Some(token) => assert_eq!((words[7], &words[8..]), (*token, &[0, 0, 0, 1 << 16][..])),
                    None => assert_eq!(words, [0x0101_0101; 12]),
                }
            }
        }
        assert!(found > 1, "drafts in {found} sequences of {turn}");
    }
}
