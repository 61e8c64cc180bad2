//! The candidate selector against its definition in f64: candidates, scores, drafts; what a launch leaves to the next.

use crate::markov::sequence;
use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::round::DraftShape;
use dflash::gpu::kernels::selector::{Codebooks, Selector, SelectorRows};
use kernel::*;

const NONE: u32 = u32::MAX;

struct Case {
    selector: Selector,
    predecessor: Vec<u16>, // [vocab][rank]
    successor: Vec<u16>,   // [vocab][rank]
    weights: Vec<f32>,     // [rows][rank]
    logits: Vec<f32>,      // [rows][vocab]
    active: Vec<bool>,     // [rows]: the row has a sequence
}

/// A selector's buffers on a device.
struct State {
    candidates: Buffer,
    candidate_logits: Buffer,
    scores: Buffer,
    best: Buffer,
    drafts: Buffer,
}

impl Case {
    fn new(seed: u64, [sequences, block, vocab, candidates, rank]: [usize; 5]) -> Case {
        let mut random = Random::new(seed);
        let (rows, blocks) = (sequences * block, vocab.div_ceil(128));
        Case {
            selector: Selector { sequences, block, vocab, blocks, candidates, rank },
            predecessor: random.bf16(vocab * rank, 1.0),
            successor: random.bf16(vocab * rank, 1.0),
            weights: random.normals(rows * rank, 1.0),
            logits: (0..rows).flat_map(|_| logits(&mut random, vocab)).collect(),
            // The last sequence has only its first three rows.
            active: (0..rows).map(|row| row / block + 1 < sequences || row % block < 3).collect(),
        }
    }

    fn rows(&self) -> usize {
        self.selector.sequences * self.selector.block
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.selector.vocab..][..self.selector.vocab]
    }

    fn state(&self, device: &dyn Device) -> State {
        let (rows, Selector { vocab, candidates, .. }) = (self.rows(), self.selector);
        State {
            candidates: upload(device, &vec![NONE; rows * candidates]),
            candidate_logits: poisoned::<f32>(device, rows * candidates),
            scores: upload(device, &vec![f32::NEG_INFINITY; rows * vocab]),
            best: upload(device, &vec![0u64; rows]),
            drafts: upload(device, &vec![77u32; rows]),
        }
    }

    fn find(&self, device: &dyn Device, state: &State) {
        let keys: Vec<u64> = (0..self.rows()).flat_map(|row| best_keys(self.row(row))).collect();
        let table: Vec<u32> = (0..self.rows())
            .flat_map(|row| {
                let sequence = (row / self.selector.block) as u32;
                [if self.active[row] { sequence } else { NONE }, 0, NONE, NONE]
            })
            .collect();
        let (best, logits, table) =
            (upload(device, &keys), upload(device, &self.logits), upload(device, &table));
        let [predecessor, successor] = self.codebooks(device);
        let codebooks = Codebooks { predecessor: &predecessor, successor: &successor };
        self.selector.find(device, state.rows(), &best, &logits, &table, codebooks).unwrap();
    }

    fn codebooks(&self, device: &dyn Device) -> [Buffer; 2] {
        [&self.predecessor, &self.successor].map(|book| constant(device, book))
    }

    /// Every second sequence is a tree.
    fn form(&self, sequence: usize) -> DraftShape {
        if sequence % 2 == 1 { DraftShape::BestFirst } else { DraftShape::Chain }
    }

    fn anchor(&self, sequence: usize) -> u32 {
        (sequence * 5 % self.selector.vocab) as u32
    }

    fn walk(&self, device: &dyn Device, state: &State, depths: std::ops::Range<usize>) {
        let states: Vec<u8> = (0..self.selector.sequences)
            .flat_map(|i| sequence(self.anchor(i), self.form(i)).to_bytes().unwrap())
            .collect();
        let (weights, states) = (upload(device, &self.weights), upload(device, &states));
        let [predecessor, successor] = self.codebooks(device);
        let codebooks = Codebooks { predecessor: &predecessor, successor: &successor };
        let (rows, best, drafts) = (state.rows(), &state.best, &state.drafts);
        self.selector.walk(device, depths, rows, best, drafts, &weights, codebooks, &states).unwrap();
    }

    /// The candidates of a row, the best first.
    fn candidates(&self, row: usize) -> Vec<usize> {
        let logits = self.row(row);
        let valid = logits.iter().all(|logit| !logit.is_nan() && *logit < f32::INFINITY);
        let mut ids: Vec<usize> =
            (0..logits.len()).filter(|&id| valid && logits[id] > f32::NEG_INFINITY).collect();
        ids.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
        ids.truncate(if self.active[row] { self.selector.candidates } else { 0 });
        ids
    }

    /// The score of a candidate after a token, and the sum of the magnitudes of what is added.
    fn score(&self, row: usize, previous: u32, id: usize) -> [f64; 2] {
        let rank = self.selector.rank;
        let mut score = [f64::from(self.row(row)[id]); 2];
        score[1] = score[1].abs();
        for j in 0..rank {
            let of = |book: &[u16], id: usize| f64::from(from_bf16(&book[id * rank + j..][..1])[0]);
            let a = if previous == NONE { 0.0 } else { of(&self.predecessor, previous as usize) };
            let product = a * f64::from(self.weights[row * rank + j]) * of(&self.successor, id);
            score[0] += product;
            score[1] += product.abs();
        }
        score
    }
}

impl State {
    fn rows(&self) -> SelectorRows<'_> {
        SelectorRows { candidates: &self.candidates, logits: &self.candidate_logits, scores: &self.scores }
    }

    fn bytes(&self, device: &dyn Device) -> Vec<u8> {
        let all = [&self.candidates, &self.scores, &self.best, &self.drafts];
        all.into_iter().flat_map(|buffer| bytes_of(device, buffer)).collect()
    }
}

/// Sequences, rows of a block, vocabulary, candidates, rank: vocabularies of a part of a block of ids, with fewer
/// tokens than candidates, and with more blocks than threads.
const CASES: [[usize; 5]; 6] = [
    [2, 8, 512, 16, 32],
    [3, 5, 1001, 16, 256],
    [1, 16, 130, 64, 64],
    [4, 4, 11, 16, 32],
    [2, 5, 66_000, 7, 288],
    [33, 4, 300, 1, 32],
];

#[test]
fn candidates_are_the_best_tokens_and_old_scores_are_reset() {
    for (seed, sizes) in CASES.into_iter().enumerate() {
        let [first, second] = [0, 100].map(|more| Case::new(seed as u64 + more, sizes));
        let bytes = same_bits(|device| {
            let state = first.state(device);
            first.find(device, &state);
            let found = [bytes_of(device, &state.candidates), bytes_of(device, &state.candidate_logits)];
            // A round gives all of them scores, as the walk does.
            first.walk(device, &state, 1..first.selector.block);
            second.find(device, &state);
            [found.concat(), bytes_of(device, &state.candidates), bytes_of(device, &state.scores)].concat()
        });
        let size = first.rows() * first.selector.candidates * 4;
        let logits: Vec<f32> = from_bytes(&bytes[size..2 * size]);
        for (case, ids) in [(&first, &bytes[..size]), (&second, &bytes[2 * size..3 * size])] {
            let count = case.selector.candidates;
            for (row, ids) in from_bytes::<u32>(ids).chunks(count).enumerate() {
                let mut expected: Vec<u32> = match row % case.selector.block {
                    0 => vec![],
                    _ => case.candidates(row).into_iter().map(|id| id as u32).collect(),
                };
                if std::ptr::eq(case, &first) {
                    for (at, id) in expected.iter().enumerate() {
                        assert_eq!(logits[row * count + at], case.row(row)[*id as usize]);
                    }
                }
                expected.resize(count, NONE);
                assert_eq!(ids, expected, "{sizes:?}, row {row}");
            }
        }
        let scores: Vec<f32> = from_bytes(&bytes[3 * size..]);
        assert!(scores.iter().all(|score| *score == f32::NEG_INFINITY), "{sizes:?}: a score is left");
    }
}

#[test]
fn a_walk_scores_candidates_by_the_token_before() {
    for (seed, sizes) in CASES.into_iter().enumerate() {
        let case = Case::new(seed as u64, sizes);
        let Selector { block, vocab, .. } = case.selector;
        let bytes = same_bits(|device| {
            let state = case.state(device);
            case.find(device, &state);
            case.walk(device, &state, 1..block);
            state.bytes(device)
        });
        let (rows, lists) = (case.rows(), case.rows() * case.selector.candidates * 4);
        let (scores, rest) = bytes[lists..].split_at(rows * vocab * 4);
        let (best, drafts) = rest.split_at(rows * 8);
        let (scores, best): (Vec<f32>, Vec<u64>) = (from_bytes(scores), from_bytes(best));
        let drafts: Vec<u32> = from_bytes(drafts);
        for row in 0..rows {
            let scores = &scores[row * vocab..][..vocab];
            if row % block == 0 {
                assert_eq!((best[row], drafts[row]), (0, 77), "{sizes:?}: the anchor's row");
                continue;
            }
            let previous = if row % block == 1 { case.anchor(row / block) } else { drafts[row - 1] };
            let candidates = case.candidates(row);
            for (id, found) in scores.iter().enumerate() {
                if !candidates.contains(&id) {
                    assert_eq!(*found, f32::NEG_INFINITY, "{sizes:?}, row {row}, token {id}");
                    continue;
                }
                let [score, magnitude] = case.score(row, previous, id);
                let apart = (f64::from(*found) - score).abs();
                let exact = score.abs() > f64::from(f32::MAX) || apart <= magnitude * 1e-6;
                assert!(exact, "{sizes:?}, row {row}, token {id}: {found}, not {score}");
            }
            // The best key is that of the scores, of equal ones the lowest id.
            let keys: Vec<u64> = best_keys(scores);
            let expected = keys.into_iter().max().unwrap();
            let valid = !candidates.is_empty() && expected != u64::MAX;
            match candidates.is_empty() {
                true => assert_eq!(best[row], 0, "{sizes:?}, row {row}"),
                false => assert_eq!(best[row], expected, "{sizes:?}, row {row}"),
            }
            assert_eq!(drafts[row], if valid { !(expected as u32) } else { NONE }, "{sizes:?}, row {row}");
        }
    }
}

/// A walk in steps follows the drafts of chains, which a sampler may have replaced, and the best tokens of trees.
#[test]
fn a_walk_in_steps_follows_the_drafts_of_chains() {
    let case = Case::new(9, [4, 6, 700, 16, 64]);
    let Selector { block, vocab, .. } = case.selector;
    on_gpu(|device| {
        let (whole, steps) = (case.state(device), case.state(device));
        case.find(device, &whole);
        case.find(device, &steps);
        case.walk(device, &whole, 1..block);
        (1..block).for_each(|depth| case.walk(device, &steps, depth..depth + 1));
        assert!(whole.bytes(device) == steps.bytes(device), "steps differ from the whole");

        // Other drafts at depth 2.
        let mut drafts: Vec<u32> = download(device, &steps.drafts);
        let own = drafts.clone();
        (0..4).for_each(|sequence| drafts[sequence * block + 2] = 3 + sequence as u32);
        device.upload(&steps.drafts, &to_bytes(&drafts)).unwrap();
        case.walk(device, &steps, 3..4);
        let [before, after]: [Vec<f32>; 2] = [&whole, &steps].map(|state| download(device, &state.scores));
        for sequence in 0..4 {
            let row = sequence * block + 3;
            let (before, after) = (&before[row * vocab..][..vocab], &after[row * vocab..][..vocab]);
            let chain = case.form(sequence) == DraftShape::Chain;
            let previous = if chain { 3 + sequence as u32 } else { own[row - 1] };
            for id in case.candidates(row) {
                let [score, magnitude] = case.score(row, previous, id);
                assert!((f64::from(after[id]) - score).abs() <= magnitude * 1e-6, "sequence {sequence}");
            }
            if !case.candidates(row).is_empty() && case.active[row] {
                assert_eq!(before == after, !chain, "sequence {sequence}");
            }
        }
    });
}

#[test]
fn a_selector_reads_little_and_refuses_other_sizes() {
    let Some(device) = TestGpu::counting() else { return };
    let case = Case::new(1, [1, 8, 66_000, 16, 256]);
    let (state, selector) = (case.state(&device), case.selector);
    case.find(&device, &state);
    let counts = device.counts()["selector_candidates"];
    // Best keys are read once for each candidate.
    let again = (selector.blocks * 8 * 15 * 7) as u64;
    let least = selector.find_bytes();
    assert!((counts.read..=least + again + 4096).contains(&(least + again)), "{}, {least}", counts.read);
    case.walk(&device, &state, 1..8);
    let counts = device.counts()["selector_walk"];
    // Every candidate's warp reads the row of the first codebook and the projected row.
    let again = (7 * 15 * 256 * 6) as u64;
    let moved = counts.streamed + counts.read + counts.written;
    assert!(moved <= selector.walk_bytes(7) + again + 4096, "{moved}, at least {}", selector.walk_bytes(7));

    let small = device.allocate(64, "too little").unwrap();
    let [predecessor, successor] = case.codebooks(&device);
    let codebooks = Codebooks { predecessor: &predecessor, successor: &successor };
    let refused = |selector: Selector, depths: std::ops::Range<usize>, part: &str| {
        let (rows, best) = (state.rows(), &state.best);
        let walk = selector.walk(&device, depths, rows, best, &state.drafts, &small, codebooks, &small);
        let error = walk.unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    refused(Selector { candidates: 65, ..selector }, 1..8, "65 candidates");
    refused(Selector { rank: 40, ..selector }, 1..8, "rank 40");
    refused(Selector { block: 1, ..selector }, 1..8, "blocks of 1");
    refused(selector, 0..8, "depths 0..8");
    refused(selector, 3..9, "depths 3..9");
    refused(selector, 1..8, "weights has 64 bytes");
}
