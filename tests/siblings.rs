//! Trees drawn and judged on a device, decision for decision against `draw_shape` and `recursive` of `src/rules.rs`.

#[path = "support/kernel.rs"]
mod kernel;

use dflash::device::Device;
use dflash::emulator::Emulator;
use dflash::kernels::round::{Finish, Form, Sequence};
use dflash::kernels::rules::{LAW_BYTES, Rows, Rules};
use dflash::kernels::sample::tables;
use dflash::kernels::siblings::{Drawn, Siblings};
use dflash::kernels::verify::Verdict;
use dflash::rules::{self, Dice, Probabilities, Purpose, Rule, Word};
use dflash::tree::shape;
use dflash::verify::Sampling;
use kernel::*;

const NONE: u32 = u32::MAX;

/// What was there before, where a kernel is to leave it.
const OLD: u32 = 0x0bad_cafe;

/// A sequence of a batch, and its tree.
#[derive(Clone)]
struct Request {
    rule: Rule,
    length: u32,
    rounds: u32,
    sampling: Sampling,
    drafting: Sampling,
    /// As many as the tree has rows.
    parents: Vec<u32>,
}

impl Request {
    fn state(&self, sampling: &Sampling) -> Vec<u8> {
        let state = Sequence {
            active: true,
            length: self.length,
            anchor: 7,
            pending: 0,
            budget: 0,
            end: 0,
            draft_end: 0,
            block: 0,
            rows: 64,
            form: Form::Drawn,
            sampling: sampling.clone(),
            stop_ids: vec![],
            finish: Finish::Running,
            rounds: self.rounds,
            drafted: 0,
            accepted: 0,
            rule: self.rule,
        };
        state.to_bytes().unwrap()
    }

    fn dice(&self) -> Dice {
        let Sampling { seed, stream, .. } = self.sampling;
        Dice { seed, stream, round: self.rounds + 1, anchor: self.length }
    }

    fn depth(&self, mut row: usize) -> usize {
        let mut depth = 0;
        while row > 0 {
            row = self.parents[row] as usize;
            depth += 1;
        }
        depth
    }

    fn takes_part(&self) -> bool {
        self.rule == Rule::Rejection && self.parents.len() >= 2
    }
}

/// Logits of `[sequences][wide]` rows of the target and of `[sequences][block]` of the drafter.
#[derive(Clone)]
struct Batch {
    vocab: usize,
    block: usize,
    wide: usize,
    requests: Vec<Request>,
    target: Vec<f32>,
    drafter: Vec<f32>,
    /// `[sequences][wide]`, in place of what was drawn; `None` there: what was.
    tokens: Vec<Option<u32>>,
}

/// What the kernels make of a batch.
#[derive(Debug, PartialEq)]
struct Outcome {
    drafts: Vec<u32>,
    tokens: Vec<u32>,
    accepted: Vec<u32>,
    next: Vec<u32>,
    path: Vec<u32>,
}

impl Batch {
    fn kernels(&self) -> Siblings {
        let Batch { vocab, block, wide, .. } = *self;
        Siblings { sequences: self.requests.len(), block, wide, vocab }
    }

    /// The laws of rows, `of_each` of a sequence.
    fn laws(
        &self,
        device: &dyn Device,
        logits: &[f32],
        of_each: usize,
        settings: fn(&Request) -> &Sampling,
    ) -> (dflash::device::Buffer, dflash::device::Buffer) {
        let (sequences, vocab) = (self.requests.len(), self.vocab);
        let kernels = Rules { sequences, block: of_each, vocab, blocks: vocab.div_ceil(128) };
        let states: Vec<u8> = self.requests.iter().flat_map(|r| r.state(settings(r))).collect();
        let best: Vec<u64> = logits.chunks(vocab).flat_map(best_keys).collect();
        let table: Vec<u32> =
            (0..sequences * of_each).flat_map(|row| [(row / of_each) as u32, 0, NONE, NONE]).collect();
        let rows = (upload(device, logits), poisoned::<u8>(device, sequences * of_each * LAW_BYTES));
        let [states, table] = [upload(device, &states), upload(device, &table)];
        let (best, tables) = (upload(device, &best), constant(device, &tables()));
        let both = Rows { logits: &rows.0, laws: &rows.1 };
        kernels.law(device, both, &best, &table, &states, &tables).unwrap();
        rows
    }

    fn run(&self, device: &dyn Device) -> Outcome {
        let Batch { block, wide, .. } = *self;
        let (kernels, sequences) = (self.kernels(), self.requests.len());
        let drafter = self.laws(device, &self.drafter, block, |r| &r.drafting);
        let target = self.laws(device, &self.target, wide, |r| &r.sampling);
        let drafter = Rows { logits: &drafter.0, laws: &drafter.1 };
        let target = Rows { logits: &target.0, laws: &target.1 };
        let states: Vec<u8> = self.requests.iter().flat_map(|r| r.state(&r.sampling)).collect();
        let (states, tables) = (upload(device, &states), constant(device, &tables()));
        // Rows behind the tree's follow anything.
        let parents = |r: &Request| [&r.parents[..], &vec![0; wide - r.parents.len()]].concat();
        let parents: Vec<u32> = self.requests.iter().flat_map(parents).collect();
        let spans: Vec<u32> = self.requests.iter().flat_map(|r| [r.length, r.parents.len() as u32]).collect();
        let (parents, spans) = (upload(device, &parents), upload(device, &spans));
        let drafts = upload(device, &vec![OLD; sequences * wide]);
        let trees = Drawn { tokens: &drafts, parents: &parents, spans: &spans };
        kernels.draw(device, trees, drafter, &states, &tables).unwrap();
        let drafts: Vec<u32> = download(device, &drafts);

        let token = |(row, given): (usize, &Option<u32>)| given.unwrap_or(drafts[row]);
        let tokens: Vec<u32> = self.tokens.iter().enumerate().map(token).collect();
        let on_device = upload(device, &tokens);
        let [accepted, next] = [(); 2].map(|()| upload(device, &vec![OLD; sequences]));
        let path = upload(device, &vec![OLD; sequences * wide]);
        let verdict = Verdict { accepted: &accepted, next: &next, path: &path };
        let trees = Drawn { tokens: &on_device, parents: &parents, spans: &spans };
        kernels.judge(device, verdict, trees, target, drafter, &states, &tables).unwrap();
        let [accepted, next, path] = [&accepted, &next, &path].map(|b| download::<u32>(device, b));
        Outcome { drafts, tokens, accepted, next, path }
    }

    /// The laws of depths 1, 2, .. as the definition has them.
    fn drafts_laws(&self, own: usize) -> Vec<Option<Probabilities>> {
        let rows = self.drafter[own * self.block * self.vocab..].chunks(self.vocab).take(self.block).skip(1);
        rows.map(|row| self.requests[own].drafting.probabilities(row)).collect()
    }

    fn check(&self, device: &dyn Device, what: &str) -> Seen {
        let (got, wide) = (self.run(device), self.wide);
        let mut seen = Seen::default();
        for (own, request) in self.requests.iter().enumerate() {
            let at = own * wide;
            let parents = &request.parents;
            let context = format!("{what}, vocabulary {}, sequence {own}, {parents:?}", self.vocab);
            let drawn = &got.drafts[at..][..wide];
            let (accepted, next) = (got.accepted[own], got.next[own]);
            let path = &got.path[at..][..wide];
            if !request.takes_part() {
                assert!(drawn.iter().chain(path).all(|&word| word == OLD), "{context}");
                assert_eq!((accepted, next), (OLD, OLD), "{context}");
                continue;
            }
            let rows = parents.len();
            assert!(drawn[rows..].iter().all(|&token| token == NONE), "{context}: padding");
            let laws = self.drafts_laws(own);
            let deepest = (0..rows).map(|row| request.depth(row)).max().unwrap();
            // What a damaged depth has, the others are as they would be: any law stands in for it.
            let any = laws.iter().flatten().next().cloned();
            let Some(any) = any else { continue };
            let whole: Vec<Probabilities> =
                laws.iter().map(|law| law.clone().unwrap_or(any.clone())).collect();
            let expected =
                rules::draw_shape(7, parents, &whole, rules::Siblings::Distinct, &mut request.dice())
                    .unwrap();
            for row in 0..rows {
                let depth = request.depth(row);
                let damaged = depth > 0 && laws[depth - 1].is_none();
                assert_eq!(drawn[row], if damaged { NONE } else { expected[row] }, "{context}, row {row}");
                let before = (1..row).filter(|&other| parents[other] == parents[row]);
                seen.repeats +=
                    usize::from(before.into_iter().any(|other| drawn[other] == drawn[row]) && !damaged);
            }
            // A draft that has no law ends its round; what is said of it does not matter.
            if laws[..deepest].iter().any(Option::is_none) {
                seen.damaged += 1;
                continue;
            }
            let tokens = &got.tokens[at..][..rows];
            let rows_of = |row| &self.target[(at + row) * self.vocab..][..self.vocab];
            let target = |row: usize| request.sampling.probabilities(rows_of(row));
            let siblings = rules::Siblings::Distinct;
            let judged = rules::recursive(tokens, parents, &whole, siblings, target, &mut request.dice());
            let Some((stood, token)) = judged else {
                assert_eq!(next, NONE, "{context}: damaged");
                seen.damaged += 1;
                continue;
            };
            assert_eq!((accepted as usize, next), (stood.len() - 1, token), "{context}, drafts {tokens:?}");
            let mut way: Vec<u32> = stood.iter().map(|&row| row as u32).collect();
            way.resize(wide, NONE);
            assert_eq!(path, way, "{context}");
            seen.stood[(stood.len() - 1).min(3)] += 1;
            for &row in &stood[1..] {
                let place = (1..row).filter(|&other| parents[other] == parents[row]).count();
                seen.places[place.min(3)] += 1;
            }
            let last = *stood.last().unwrap();
            seen.none_of += usize::from(parents[1..].iter().filter(|&&p| p as usize == last).count() > 2);
        }
        seen
    }
}

/// How verdicts were spread.
#[derive(Default, Debug, PartialEq)]
struct Seen {
    /// Drafts that stood, up to three.
    stood: [usize; 4],
    /// Of those, the siblings before each.
    places: [usize; 4],
    /// Rows of which three children or more fell.
    none_of: usize,
    repeats: usize,
    damaged: usize,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        (0..4).for_each(|i| self.stood[i] += other.stood[i]);
        (0..4).for_each(|i| self.places[i] += other.places[i]);
        self.none_of += other.none_of;
        self.repeats += other.repeats;
        self.damaged += other.damaged;
    }
}

/// Parents of a tree of so many rows: a shape of the engine's, a star, or anything.
fn parents(random: &mut Random, rows: usize, depth: usize) -> Vec<u32> {
    if rows == 0 || depth == 0 {
        return vec![0; rows.min(1)];
    }
    let mut tree = vec![0u32];
    match random.below(4) {
        0 => return shape(rows, depth).parents,
        1 => return vec![0; rows],
        _ => {}
    }
    let mut depths = vec![0];
    while tree.len() < rows {
        let parent = random.below(tree.len());
        if depths[parent] < depth {
            tree.push(parent as u32);
            depths.push(depths[parent] + 1);
        }
    }
    tree
}

/// A row of logits that is sound.
fn row(random: &mut Random, vocab: usize) -> Vec<f32> {
    let mut row = match random.below(11) {
        0 => vec![random.normal(5.0); vocab],
        1 => (0..vocab).map(|_| (random.normal(2.0) * 2.0).round() / 2.0).collect(),
        2 => (0..vocab)
            .map(|_| if random.below(3) == 0 { f32::NEG_INFINITY } else { random.normal(4.0) })
            .collect(),
        3 => {
            let mut row = random.normals(vocab, 1.0);
            row[random.below(vocab)] = 60.0;
            row
        }
        4 => (0..vocab).map(|_| f32::from_bits(20f32.to_bits() - random.below(40) as u32)).collect(),
        5 => (0..vocab).map(|id| -(id as f32) / 16.0).collect(),
        6 => random.normals(vocab, 3.0),
        _ => random.normals(vocab, 0.7),
    };
    if row.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        row[random.below(vocab)] = 1.0;
    }
    row
}

fn settings(random: &mut Random, vocab: usize) -> Sampling {
    let temperature = [0.0, 1e4, 1e-4, 0.7, 1.0, 1.0, 1.0, 2.0][random.below(8)];
    let top_k = match random.below(6) {
        0 => 1 + random.below(vocab.min(4)),
        1 => 1 + random.below(vocab),
        _ => 0,
    };
    let top_p = [1.0, 1.0, 1.0, 1.0, 0.9, 1e-12][random.below(6)];
    let min_p = if random.below(4) == 0 { f64::from(random.unit()) } else { 0.0 };
    Sampling { temperature, top_k, top_p, min_p, seed: random.next(), stream: random.next() as u32 }
}

/// The target's rows are often like those their drafts were drawn from; sometimes nothing like them.
fn batch(random: &mut Random, (vocab, block, wide): (usize, usize, usize), sequences: usize) -> Batch {
    let (mut requests, mut target, mut drafter, mut tokens) = (vec![], vec![], vec![], vec![]);
    for _ in 0..sequences {
        let rule = match random.below(10) {
            0 => Rule::Match,
            1 => Rule::Block,
            _ => Rule::Rejection,
        };
        // Both laws broad and nothing alike: it takes some siblings until one stands.
        let broad = random.below(3) == 0;
        let plain = |own: Sampling| Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..own };
        let sampling = match broad {
            true => plain(settings(random, vocab)),
            false => settings(random, vocab),
        };
        let drafting = match random.below(if broad { 1 } else { 2 }) {
            0 => sampling.clone(),
            _ => Sampling { seed: sampling.seed, stream: sampling.stream, ..settings(random, vocab) },
        };
        let rows = match random.below(8) {
            0 => random.below(3).min(wide),
            1 => random.below(wide + 1),
            _ => wide,
        };
        let request = Request {
            rule,
            length: random.next() as u32 >> (1 + random.below(31)),
            rounds: random.below(1000) as u32,
            sampling,
            drafting,
            parents: parents(random, rows, block - 1),
        };
        let draft = |_| if broad { random.normals(vocab, 1.5) } else { row(random, vocab) };
        let drafts: Vec<Vec<f32>> = (0..block).map(draft).collect();
        for at in 0..wide {
            let depth = if at < request.parents.len() { request.depth(at) } else { 0 };
            let like = &drafts[(depth + 1).min(block - 1)];
            target.extend(match random.below(6) {
                _ if broad => random.normals(vocab, 1.5),
                0 => like.clone(),
                1 => row(random, vocab),
                // Nothing in common, where there are two tokens.
                2 => {
                    let other = |x: f32| if x == f32::NEG_INFINITY { random.normal(2.0) } else { -9e3 };
                    like.iter().copied().map(other).collect()
                }
                3 => like.iter().map(|x| x + random.normal(0.3)).collect(),
                _ => like.iter().map(|x| x + random.normal(2.0)).collect::<Vec<f32>>(),
            });
        }
        drafter.extend(drafts.concat());
        // Damage, seldom.
        let (end, own) = (drafter.len(), target.len());
        match random.below(24) {
            0 => target[own - 1 - random.below(wide * vocab)] = f32::NAN,
            1 => drafter[end - 1 - random.below(block * vocab)] = f32::INFINITY,
            2 => target[own - wide * vocab..][..vocab].fill(f32::NEG_INFINITY),
            _ => {}
        }
        // Mostly what was drawn; else anything, also what the law cannot draw and what no vocabulary has.
        tokens.extend((0..wide).map(|_| match random.below(25) {
            0 => Some(random.below(vocab) as u32),
            1 if random.below(8) == 0 => Some(vocab as u32 + random.below(3) as u32),
            2 if random.below(8) == 0 => Some(NONE),
            _ => None,
        }));
        requests.push(request);
    }
    Batch { vocab, block, wide, requests, target, drafter, tokens }
}

#[test]
fn trees_are_drawn_and_judged_as_the_rules_say() {
    let mut random = Random::new(1);
    let shrink = if cfg!(feature = "sanitize") { 20 } else { 1 };
    let mut seen = Seen::default();
    for (vocab, block, wide, batches) in [
        (1, 4, 5, 5),
        (2, 4, 8, 30),
        (3, 5, 16, 40),
        (17, 6, 16, 40),
        (130, 16, 64, 10),
        (257, 8, 12, 20),
        (2048, 4, 9, 10),
        (9001, 3, 6, 4),
        (32000, 3, 6, 2),
    ] {
        for i in 0..(batches / shrink).max(1) {
            let batch = batch(&mut random, (vocab, block, wide), 8);
            every_device_in_turn(i, |device| seen.add(batch.check(device, &format!("batch {i}"))));
        }
    }
    println!("{seen:?}");
    if shrink == 1 {
        let Seen { stood: [none, one, two, more], places, none_of, repeats, damaged } = seen;
        assert!(none > 100 && one > 50 && two > 20 && more > 50, "{none} {one} {two} {more}");
        assert!(places.iter().all(|&n| n > 20), "{places:?}");
        assert!(none_of > 50 && repeats > 100 && damaged > 20, "{none_of} {repeats} {damaged}");
    }
}

#[test]
fn trees_are_the_same_under_every_schedule() {
    for sizes in [(3, 4, 64), (17, 5, 9), (257, 8, 16), (2047, 4, 8)] {
        let batch = batch(&mut Random::new(sizes.0 as u64), sizes, 5);
        same_bits(|device| {
            let Outcome { drafts, tokens, accepted, next, path } = batch.run(device);
            to_bytes(&[drafts, tokens, accepted, next, path].concat())
        });
        let parallel = Emulator::new();
        parallel.set_threads(2);
        batch.check(&parallel, "two threads");
    }
}

#[test]
fn laws_that_are_alike_let_the_first_of_siblings_stand() {
    every_device(|device| {
        let mut random = Random::new(4);
        let (vocab, block, wide) = (257, 8, 16);
        for temperature in [0.0, 1.0] {
            let row = random.normals(vocab, 2.0);
            let how =
                Sampling { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: random.next(), stream: 9 };
            let request = Request {
                rule: Rule::Rejection,
                length: 70,
                rounds: 3,
                sampling: how.clone(),
                drafting: how,
                parents: shape(wide, block - 1).parents,
            };
            let batch = Batch {
                vocab,
                block,
                wide,
                requests: vec![request],
                target: row.repeat(wide),
                drafter: row.repeat(block),
                tokens: vec![None; wide],
            };
            let seen = batch.check(device, "alike");
            assert_eq!((seen.places[0] > 3, seen.places[1..].iter().sum::<usize>()), (true, 0));
        }
    });
}

/// What is beyond `q` of `p`, and the law it makes.
fn beyond(p: &Probabilities, q: &Probabilities) -> (Vec<(u32, u64)>, Probabilities) {
    let over = p.tokens().iter().map(|&(id, w)| (id, w.saturating_sub(q.of(id))));
    let over: Vec<(u32, u64)> = over.filter(|&(_, w)| w > 0).collect();
    let most = over.iter().map(|&(_, w)| w).max().unwrap();
    let heir = over.iter().find(|&&(_, w)| w == most).unwrap().0;
    (over.clone(), Probabilities::new(over, heir).unwrap())
}

#[test]
fn the_last_units_between_siblings_count() {
    // The first sibling always falls, and what is left of both laws is nearly all on the same tokens: on one, or on two
    // that weigh the same, of which the lower takes what rounding leaves. After the second sibling, which the target never
    // emits, what is left is a handful of units, those tokens' among them.
    let none = f32::NEG_INFINITY;
    let half = |n: f32| -n * 2f32.ln();
    let how = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 11, stream: 5 };
    let mut tried = 0;
    for heavy in [&[2usize][..], &[2, 5], &[3, 4]] {
        let (mut target, mut drafter) = (vec![none; 8], vec![none; 8]);
        for &id in heavy {
            (target[id], drafter[id]) = (0.0, half(1.0));
        }
        drafter[7] = 0.0; // the first sibling
        (target[0], drafter[0]) = (half(31.0), half(32.0));
        (target[6], drafter[6]) = (half(30.0), half(32.0));
        drafter[1] = half(30.0); // the second
        let [p, q] = [&target, &drafter].map(|row| how.probabilities(row).unwrap());
        let (p, q) = (beyond(&p, &q).1, q.without(7).unwrap());
        let (rest, _) = beyond(&p, &q);
        let total: u64 = rest.iter().map(|&(_, w)| w).sum();
        assert!(total < 1 << 20 && heavy.iter().any(|&id| rest.iter().any(|r| r.0 == id as u32)), "{rest:?}");
        let bits = |rounds: u32| {
            let dice = Dice { seed: how.seed, stream: how.stream, round: rounds + 1, anchor: 9 };
            dice.bits(Word { purpose: Purpose::Residual, depth: 1, row: 0 })
        };
        let unit = |rounds: u32| ((u128::from(bits(rounds)) * u128::from(total)) >> 64) as u64;
        // The last unit of each token and the first of the next.
        let mut ends = Vec::new();
        let mut end = 0;
        for &(_, w) in &rest {
            end += w;
            ends.extend([end - 1, end % total]);
        }
        let found: Vec<u32> =
            ends.iter().map(|&goal| (0..1 << 25).find(|&rounds| unit(rounds) == goal).unwrap()).collect();
        let request = |&rounds: &u32| Request {
            rule: Rule::Rejection,
            length: 9,
            rounds,
            sampling: how.clone(),
            drafting: how.clone(),
            parents: vec![0, 0, 0],
        };
        for stride in [1, 4, 700] {
            let apart = |row: &[f32]| {
                let mut all = vec![none; 7 * stride + 1];
                row.iter().enumerate().for_each(|(i, &logit)| all[i * stride] = logit);
                all
            };
            let (drafts, sequences) = ([Some(7), Some(7 * stride as u32), Some(stride as u32)], found.len());
            let batch = Batch {
                vocab: 7 * stride + 1,
                block: 2,
                wide: 3,
                requests: found.iter().map(request).collect(),
                target: apart(&target).repeat(3 * sequences),
                drafter: apart(&drafter).repeat(2 * sequences),
                tokens: drafts.repeat(sequences),
            };
            every_device(|device| {
                let seen = batch.check(device, "units");
                assert_eq!(seen.stood, [sequences, 0, 0, 0]);
                tried += sequences;
            });
        }
    }
    assert!(tried >= 3 * 3 * 6, "{tried}");
}

#[test]
fn garbage_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(12);
        for i in 0..40 {
            let (vocab, sequences) = ([1, 7, 300, 3001][i % 4], 3);
            let (block, wide) = ([1, 4, 16][i % 3], [1, 5, 12, 64][i / 3 % 4]);
            let kernels = Siblings { sequences, block, wide, vocab };
            let mut noise = |bytes: usize| {
                // Small words too, which pass for ids, rows, rules and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                let words: Vec<u32> = (0..bytes / 4).map(word).collect();
                words
            };
            let [tokens, parents, path] = [(); 3].map(|()| upload(device, &noise(sequences * wide * 4)));
            let [accepted, next] = [(); 2].map(|()| upload(device, &noise(sequences * 4)));
            let spans = upload(device, &noise(sequences * 8));
            let mut states = noise(sequences * 128);
            // Its rule is the last word, its form the upper half of the eighth; let some be those that take part.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) =
                    (Rule::Rejection as u32, words[7] & 0xffff | (Form::Drawn as u32) << 16);
            }
            let states = upload(device, &states);
            let (target, drafter) = (
                [noise(sequences * wide * vocab * 4), noise(sequences * wide * LAW_BYTES)],
                [noise(sequences * block * vocab * 4), noise(sequences * block * LAW_BYTES)],
            );
            let [target, drafter] = [target, drafter].map(|rows| rows.map(|words| upload(device, &words)));
            let tables = constant(device, &tables());
            let trees = Drawn { tokens: &tokens, parents: &parents, spans: &spans };
            let verdict = Verdict { accepted: &accepted, next: &next, path: &path };
            let [target, drafter] = [&target, &drafter].map(|[logits, laws]| Rows { logits, laws });
            kernels.judge(device, verdict, trees, target, drafter, &states, &tables).unwrap();
            kernels.draw(device, trees, drafter, &states, &tables).unwrap();
        }
    });
}

#[test]
fn launches_refuse_what_does_not_fit() {
    let device = Emulator::new();
    let kernels = Siblings { sequences: 2, block: 4, wide: 8, vocab: 40 };
    let get = |bytes: usize| device.allocate(bytes, "test").unwrap();
    let (logits, laws) = (get(16 * 160), get(16 * LAW_BYTES));
    let rows = Rows { logits: &logits, laws: &laws };
    let (tokens, parents, spans) = (get(64), get(64), get(16));
    let trees = Drawn { tokens: &tokens, parents: &parents, spans: &spans };
    let (states, tables, small) = (get(256), get(2048), get(48));
    let draw = |kernels: Siblings, trees, rows| {
        kernels.draw(&device, trees, rows, &states, &tables).unwrap_err().to_string()
    };
    let message = draw(kernels, Drawn { parents: &small, ..trees }, rows);
    assert_eq!(message, "kernel draw_siblings: parents has 48 bytes, needs 64");
    let message = draw(Siblings { wide: 65, ..kernels }, trees, rows);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let message = draw(Siblings { vocab: 0, ..kernels }, trees, rows);
    assert_eq!(message, "kernel draw_siblings: 0 tokens; possible are 1 to 2^26");
    let message = draw(kernels, trees, Rows { laws: &small, ..rows });
    assert_eq!(message, "kernel draw_siblings: the drafter's laws has 48 bytes, needs 384");
    let [accepted, next, path] = [8, 8, 60].map(get);
    let verdict = Verdict { accepted: &accepted, next: &next, path: &path };
    let judge = |verdict, target| {
        kernels.judge(&device, verdict, trees, target, rows, &states, &tables).unwrap_err().to_string()
    };
    assert_eq!(judge(verdict, rows), "kernel judge_tree: path has 60 bytes, needs 64");
    let path = get(64);
    let message = judge(Verdict { path: &path, ..verdict }, Rows { logits: &small, ..rows });
    assert_eq!(message, "kernel judge_tree: the target's logits has 48 bytes, needs 2560");
}
