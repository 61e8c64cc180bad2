//! Rounds on the CPU, by the host's clock: the passes of `dflash::cpu::model`, as `dflash::cpu::decoder` runs
//! them.

use super::point::Point;
use crate::measure::Times;
use crate::model;
use crate::record::Row;
use dflash::checkpoint::config::Stack;
use dflash::checkpoint::pair::Pair;
use dflash::cli::interrupt::is_interrupted;
use dflash::cli::terminal::counted;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::memory::size;
use dflash::{Error, Result};
use serde_json::json;
use std::time::Instant;

/// A pair in memory.
pub struct Models {
    target: Target,
    drafter: Option<Drafter>,
}

/// A sequence between two rounds.
struct Sequence {
    cache: Cache,
    /// The drafter's keys and values, without the pending positions.
    drafter: Option<Cache>,
    /// Features of the positions that the drafter has not absorbed, `[pending][taps * hidden]`.
    features: Vec<f32>,
    logits: Vec<f32>,
}

/// The parts of a round.
const PARTS: [&str; 3] = ["inject", "draft", "verify"];

/// Loads `pair` with random weights, for sequences of the size of `config`.
///
/// # Errors
/// [`Error::Memory`] where weights, keys and values do not fit the memory.
pub fn load(pair: &Pair, config: &BatchConfig) -> Result<Models> {
    let stacks = [Some(&pair.target.config.stack), pair.drafter().map(|drafter| &drafter.config.stack)];
    let position: usize =
        stacks.into_iter().flatten().map(|stack| stack.kv_bytes_per_token(size_of::<f32>())).sum();
    let needed =
        model::bytes(pair).saturating_add(position.saturating_mul(config.sequences * config.positions));
    if let Some(free) = model::available().filter(|free| needed > *free) {
        return Err(Error::Memory(format!(
            "not enough memory for random weights of {} on the CPU ({} of {} positions): {} are needed, {} are available; \
             expected a smaller --model, --batch or --context",
            pair.target.folder.name(),
            counted(config.sequences, "sequence"),
            config.positions,
            size(needed),
            size(free)
        )));
    }
    let pair = model::in_memory(pair)?;
    let drafter = pair.drafter().map(Drafter::load).transpose()?;
    Ok(Models { target: Target::load(&pair.target)?, drafter })
}

impl Models {
    /// Appends the rows of one point: `rounds` rounds of `samples` samples, after a warm-up round. Appends
    /// nothing if it is interrupted before the first of them ends.
    pub fn measure(&self, point: &Point, rounds: usize, samples: usize, rows: &mut Vec<Row>) -> Result<()> {
        let mut batch = (0..point.batch).map(|_| self.sequence(point)).collect::<Result<Vec<Sequence>>>()?;
        let (mut step, mut round) = (Times::default(), Times::default());
        let mut parts = PARTS.map(|_| Times::default());
        for number in (0..=rounds).take_while(|_| !is_interrupted()) {
            for _ in 0..samples {
                let ar = self.timed_step(point, &mut batch)?;
                let taken = match point.block {
                    1 => None,
                    _ => Some(self.timed_round(point, &mut batch)?),
                };
                // The first round warms caches and threads.
                if number == 0 {
                    continue;
                }
                step.samples.push(ar);
                for (all, ms) in parts.iter_mut().zip(taken.into_iter().flatten()) {
                    all.samples.push(ms);
                }
                round.samples.extend(taken.map(|parts| parts.iter().sum::<f64>()));
            }
            if let Some(number) = number.checked_sub(1) {
                [&mut step, &mut round]
                    .into_iter()
                    .chain(&mut parts)
                    .for_each(|t| t.end_round(number, samples, None));
            }
        }
        if step.rounds.is_empty() {
            return Ok(());
        }
        rows.push(point.timed("AR step", point.parameters(json!({})), &step, 0));
        rows.push(point.ar_rate(&step));
        if point.block > 1 {
            rows.push(point.timed("round", point.of_rounds(), &round, 0));
            for (name, times) in PARTS.iter().zip(&parts) {
                rows.push(point.timed(name, point.of_rounds(), times, 0));
            }
            rows.extend(point.synthetic_rates(&step, &round));
        }
        Ok(())
    }

    /// A sequence whose context is noise. Pending are as many positions as a fully accepted block leaves.
    fn sequence(&self, point: &Point) -> Result<Sequence> {
        let filled = |stack: &Stack, positions: usize| {
            let mut cache = Cache::new(stack, point.context + point.block)?;
            cache.fill_synthetic(positions);
            Ok::<_, Error>(cache)
        };
        let pending = if point.block > 1 { point.block.min(point.context) } else { 0 };
        let cache = filled(&self.target.config.stack, point.context)?;
        let drafter = self.drafter.as_ref().map(|drafter| {
            let width = drafter.config.taps.len() * self.target.config.stack.hidden;
            let features: Vec<f32> = (0..pending * width).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
            Ok::<_, Error>((filled(&drafter.config.stack, point.context - pending)?, features))
        });
        let (drafter, features) =
            drafter.transpose()?.map_or((None, vec![]), |(cache, all)| (Some(cache), all));
        Ok(Sequence { cache, drafter, features, logits: vec![] })
    }

    /// Milliseconds of one AR step of every sequence, which it takes back.
    fn timed_step(&self, point: &Point, batch: &mut [Sequence]) -> Result<f64> {
        let clock = Instant::now();
        for (i, sequence) in batch.iter_mut().enumerate() {
            self.verify(point, sequence, &[self.anchor(i)], &[])?;
        }
        Ok(ms(clock))
    }

    /// Milliseconds of the [`PARTS`] of one round of every sequence, which it takes back.
    fn timed_round(&self, point: &Point, batch: &mut [Sequence]) -> Result<[f64; 3]> {
        let mut taken = [0.0; 3];
        let Some(drafter) = &self.drafter else { return Ok(taken) };
        for (i, sequence) in batch.iter_mut().enumerate() {
            let Some(context) = &mut sequence.drafter else { continue };
            let absorbed = context.len();
            let (tokens, mut features) = (vec![self.anchor(i); point.context], sequence.features.clone());
            let clock = Instant::now();
            drafter.absorb(&self.target, &tokens, &mut features, context);
            taken[0] += ms(clock);

            let clock = Instant::now();
            let mut block = vec![self.anchor(i)];
            if let Some(mut chain) = drafter.chain(&self.target, &features, context) {
                for at in 0..point.block - 1 {
                    chain.step(block[at], &mut sequence.logits);
                    block.extend(self.choose(point, &sequence.logits, point.context + 1 + at)?);
                }
            } else {
                let hidden = drafter.predict(&self.target, block[0], point.block - 1, context);
                drafter.logits(&self.target, &hidden, &mut sequence.logits);
                block.extend(self.choose(point, &sequence.logits, point.context + 1)?);
            }
            context.crop(absorbed);
            taken[1] += ms(clock);

            let clock = Instant::now();
            self.verify(point, sequence, &block, &drafter.config.taps)?;
            taken[2] += ms(clock);
        }
        Ok(taken)
    }

    /// Runs the target over `block` and chooses a token for each row: every round costs as much as a fully
    /// accepted one.
    fn verify(&self, point: &Point, sequence: &mut Sequence, block: &[u32], taps: &[usize]) -> Result<()> {
        let mut features = vec![];
        let normed = self.target.forward(block, &mut sequence.cache, taps, &mut features, block.len());
        self.target.logits(&normed, &mut sequence.logits);
        self.choose(point, &sequence.logits, point.context + 1)?;
        sequence.cache.crop(point.context);
        Ok(())
    }

    /// The tokens that logits `[rows][vocab]` give for positions `first..`.
    fn choose(&self, point: &Point, logits: &[f32], first: usize) -> Result<Vec<u32>> {
        let rows = logits.chunks(self.target.config.vocab).zip(first as u32..);
        let tokens: Option<Vec<u32>> = rows.map(|(row, at)| point.sampling.choose(row, at)).collect();
        tokens.ok_or_else(|| Error::Internal("logits of random weights hold a NaN or infinity".into()))
    }

    fn anchor(&self, sequence: usize) -> u32 {
        (sequence % self.target.config.vocab) as u32
    }
}

fn ms(clock: Instant) -> f64 {
    clock.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use dflash::spec::sampling::SamplingParams;

    /// Times differ; the rows and their samples do not.
    #[test]
    fn rows_have_every_sample_and_parts_sum_to_the_round() {
        let pair = model::pair("demo", None, &Default::default()).unwrap();
        let models = load(&pair, &BatchConfig::new(2, 4, 64)).unwrap();
        for temperature in [0.0, 1.0] {
            let sampling =
                SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
            let acceptance = [2.0, 3.5];
            let mut point = Point {
                pair: &pair,
                card: None,
                context: 20,
                batch: 2,
                block: 4,
                sampling,
                acceptance: &acceptance,
            };
            let mut rows = vec![];
            models.measure(&point, 2, 3, &mut rows).unwrap();
            let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
            let synthetic = "DFlash, synthetic acceptance";
            let expected = [
                "AR step",
                "autoregressive decoding",
                "round",
                "inject",
                "draft",
                "verify",
                synthetic,
                synthetic,
            ];
            assert_eq!(names, expected);
            let flat = |i: usize| rows[i].samples.clone().unwrap();
            for (i, row) in rows.iter().enumerate() {
                assert_eq!((flat(i).len(), &row.rounds, &row.throttled), (6, &Some(vec![3, 3]), &None));
            }
            for i in 0..6 {
                let sum = flat(3)[i] + flat(4)[i] + flat(5)[i];
                assert!((sum / flat(2)[i] - 1.0).abs() < 1e-9);
                // Two sequences.
                assert!((flat(1)[i] * flat(0)[i] / 2e3 - 1.0).abs() < 1e-9);
                assert!((flat(7)[i] * flat(2)[i] / 7e3 - 1.0).abs() < 1e-9);
            }
            (point.block, point.acceptance, point.context) = (1, &[], 0);
            let mut alone = vec![];
            models.measure(&point, 1, 1, &mut alone).unwrap();
            let names: Vec<&str> = alone.iter().map(|row| row.name.as_str()).collect();
            assert_eq!(names, expected[..2]);
        }
    }

    /// Sequences are as they were after a round: samples of a point measure the same work.
    #[test]
    fn a_round_leaves_the_sequence_as_it_was() {
        let pair = model::pair("demo", None, &Default::default()).unwrap();
        let models = load(&pair, &BatchConfig::new(1, 16, 64)).unwrap();
        let sampling =
            SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
        for context in [0, 5, 40] {
            let sampling = sampling.clone();
            let point =
                Point { pair: &pair, card: None, context, batch: 1, block: 16, sampling, acceptance: &[] };
            let mut batch = [models.sequence(&point).unwrap()];
            let lengths =
                |batch: &[Sequence]| (batch[0].cache.len(), batch[0].drafter.as_ref().unwrap().len());
            let before = lengths(&batch);
            assert_eq!(before, (context, context - context.min(16)));
            models.timed_round(&point, &mut batch).unwrap();
            let first = batch[0].logits.clone();
            models.timed_step(&point, &mut batch).unwrap();
            models.timed_round(&point, &mut batch).unwrap();
            assert_eq!(lengths(&batch), before);
            assert!(first == batch[0].logits && first.len() == 16 * models.target.config.vocab);
        }
    }
}
