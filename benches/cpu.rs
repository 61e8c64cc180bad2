//! The CPU implementation on the demo pair: an AR step, a round, a prompt. `cargo bench --bench cpu` prints
//! times with intervals, and the change since the last run.

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use dflash::Result;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::Sequence;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::Request;
use dflash::spec::sampling::SamplingParams;
use std::time::{Duration, Instant};

const PROMPT: usize = 128;

fn request(block: usize) -> Request {
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    // Any text will do. Ids from 300 on are words rather than bytes.
    let prompt = (0..PROMPT as u32).map(|i| 300 + i * 13).collect();
    Request { prompt, max_tokens: 64, sampling, stop_ids: vec![], block, spec: Default::default() }
}

/// Runs the part of the prompt that the sequence does not hold.
fn begin(sequence: &mut Sequence, request: &Request) -> Result<()> {
    sequence.start(request)?;
    while sequence.prefill()?.next.is_none() {}
    Ok(())
}

/// The time of `times` rounds after the same prompt. Each is the second round: only then does the drafter
/// have features to absorb, as in any later round.
fn rounds(sequence: &mut Sequence, request: &Request, times: u64) -> Result<Duration> {
    let mut all = Duration::ZERO;
    for _ in 0..times {
        begin(sequence, request)?;
        let mut tokens = vec![];
        sequence.round(&mut tokens)?;
        let start = Instant::now();
        sequence.round(&mut tokens)?;
        all += start.elapsed();
    }
    Ok(all)
}

fn prompts(target: &Target, drafter: &Drafter, request: &Request, times: u64) -> Result<Duration> {
    let start = Instant::now();
    (0..times).try_for_each(|_| begin(&mut Sequence::new(target, Some(drafter)), request))?;
    Ok(start.elapsed())
}

/// Criterion has no errors: ends the program instead.
fn sound<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| {
        eprintln!("{e}");
        std::process::exit(e.exit_code().into())
    })
}

fn demo(criterion: &mut Criterion) {
    let pair = sound(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)));
    let target = sound(Target::load(&pair.target));
    let Some(drafter) = pair.drafter().map(|model| sound(Drafter::load(model))) else { return };
    let mut group = criterion.benchmark_group("cpu, demo pair");
    group.sample_size(20).sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(4));
    for (name, block) in [("AR step", 1), ("round", 16)] {
        let mut sequence = Sequence::new(&target, Some(&drafter));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|times| sound(rounds(&mut sequence, &request(block), times)));
        });
    }
    group.bench_function(format!("prompt of {PROMPT} tokens"), |bencher| {
        bencher.iter_custom(|times| sound(prompts(&target, &drafter, &request(16), times)));
    });
    group.finish();
}

criterion_group!(benches, demo);
criterion_main!(benches);
