//! Pairs with random weights, for measurements without weight files.

use crate::support;
use crate::support::requests;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::checkpoint::folder::PUBLISHED;
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{Dtype, Tensor};
use dflash::cpu::decoder::Cpu;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::{Backend, Outcome, generate};
use dflash::engine::lossless::check_lossless;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, DeviceBackend, Loading};
use dflash::gpu::memory::MemoryPlan;
use half::bf16;
use requests::{AcceptAll, request};
use std::fs;
use support::disk;

fn published(name: &str) -> Pair {
    let (_, target, drafter) = PUBLISHED.into_iter().find(|pair| pair.0 == name).unwrap();
    Pair::with_random_weights(target, Some(drafter)).unwrap()
}

/// A small pair that the kernels support. Only the configs are on the disk.
fn tiny() -> (tempfile::TempDir, Pair) {
    let (target, drafter) = support::odd();
    let drafter = support::Drafter { layers: 2, taps: vec![0, 1], ..drafter };
    let root = tempfile::tempdir().unwrap();
    let (target_dir, drafter_dir) = (root.path().join("target"), root.path().join("drafter"));
    fs::create_dir_all(&target_dir).unwrap();
    fs::create_dir_all(&drafter_dir).unwrap();
    support::write_json(&target_dir, "config.json", &support::target_config(&target));
    support::write_json(&drafter_dir, "config.json", &support::drafter_config(&target, &drafter));
    let pair = Pair::with_random_weights(disk(&target_dir), Some(disk(&drafter_dir))).unwrap();
    (root, pair)
}

fn read(tensor: &Tensor, at: usize, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    tensor.read(at, &mut bytes).unwrap();
    bytes
}

fn q_proj(pair: &Pair) -> Tensor {
    let stack = &pair.target.config.stack;
    let shape = [stack.heads * stack.head_dim, stack.hidden];
    pair.target.weights.tensor("model.layers.1.self_attn.q_proj.weight", &shape).unwrap()
}

#[test]
fn random_bytes_do_not_depend_on_how_they_are_read() {
    let (_root, pair) = tiny();
    let tensor = q_proj(&pair);
    let whole = read(&tensor, 0, 192 * 192 * 2);
    assert_eq!(whole, read(&q_proj(&tiny().1), 0, 192 * 192 * 2));
    let mut random = support::Random::new(3);
    for _ in 0..1000 {
        let at = random.below(whole.len());
        let count = random.below(40).min(whole.len() - at);
        assert_eq!(read(&tensor, at, count), whole[at..at + count], "{count} bytes at {at}");
    }
    let error = tensor.read(whole.len() - 1, &mut [0; 2]).unwrap_err();
    assert!(matches!(error, Error::Internal(_)), "{error:?}");
}

#[test]
fn random_weights_are_small_and_differ_between_tensors() {
    let pair = published("qwen3-8b");
    let tensor = q_proj(&pair);
    assert_eq!(tensor.dtype, Dtype::Bf16);
    let bytes = read(&tensor, 0, 1 << 20);
    let values: Vec<f32> =
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    assert!(values.iter().all(|v| (1.0 / 64.0..1.0 / 32.0).contains(&v.abs())));
    // 2^19 random signs: half of them are negative, within six standard deviations.
    let negative = values.iter().filter(|v| **v < 0.0).count();
    assert!(negative.abs_diff(1 << 18) < 6 * 362, "{negative} of {} are negative", values.len());
    let mean = values.iter().map(|v| f64::from(v.abs())).sum::<f64>() / values.len() as f64;
    assert!((mean * 64.0 - 1.496).abs() < 0.005, "mean magnitude {mean}");
    // Rows differ, and so do tensors and the two models.
    let (first, second) = bytes.split_at(8192);
    assert_ne!(first, &second[..8192]);
    let embedding = pair.target.weights.tensor("model.embed_tokens.weight", &[151_936, 4096]).unwrap();
    let fc = pair.drafter().unwrap().weights.tensor("fc.weight", &[4096, 5 * 4096]).unwrap();
    // Each is the first tensor of its checkpoint.
    let [embedding, fc] = [embedding, fc].map(|tensor| read(&tensor, 0, 1 << 16));
    assert_ne!(bytes[..1 << 16], embedding);
    let words = |bytes: &[u8]| -> std::collections::HashSet<u64> {
        bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
    };
    // A word has 32 random bits: two sets of 2^13 words share one with a probability of 1/64.
    assert!(words(&embedding).intersection(&words(&fc)).count() < 3);
}

#[test]
fn a_random_pair_has_the_published_number_of_parameters() {
    // The counts of the model cards.
    for (name, parameters) in
        [("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360), ("llama-3.1-8b", 8_030_261_248)]
    {
        let pair = published(name);
        assert_eq!(support::parameters(&pair.target.config.tensors()), parameters, "{name}");
        let alone = Pair::with_random_weights(pair.target.folder.clone(), None).unwrap();
        let plan = MemoryPlan::new(&alone, BatchConfig::new(1, 1, 4096)).unwrap();
        assert_eq!(plan.file_bytes as u64, parameters * 2, "{name}");
        assert_eq!(pair.target.weights.files().iter().map(|file| file.1).sum::<usize>(), plan.file_bytes);
    }
}

#[test]
fn the_plan_of_qwen3_8b() {
    let plan = MemoryPlan::new(&published("qwen3-8b"), BatchConfig::new(1, 16, 4096)).unwrap();
    let line = |what: &str| plan.lines.iter().find(|line| line.what == what).unwrap().bytes;
    // Norms are f32 on a device, and the table of angles is 4096 x 128 f32.
    let (layer, norms, angles) = (385_875_968, (2 * 4096 + 2 * 128) * 4, 4096 * 128 * 4);
    assert_eq!(line("target weights"), 36 * (layer + norms) + 4096 * 4 + angles);
    assert_eq!(line("vocabulary"), 2 * 151_936 * 4096 * 2);
    assert_eq!(line("drafter weights"), 5 * (layer + norms) + 5 * 4096 * 4096 * 2 + 2 * 4096 * 4 + angles);
    assert_eq!(line("keys and values"), 4096 * (147_456 + 20_480));
}

#[test]
fn a_random_pair_is_lossless_on_a_device() {
    let (_root, pair) = tiny();
    let load = || {
        let device = TestGpu::new();
        let config = BatchConfig::new(1, 8, 128);
        let mut told = vec![];
        let loaded =
            DeviceBackend::load("cuda", Box::new(device), &pair, config, &mut |part| told.push(part))
                .unwrap();
        // First all weights, then each kernel once.
        let kernels = Batch::kernels(&pair, config).unwrap();
        let (weights, compiled) = told.split_at(told.len() - kernels.len());
        assert!(matches!(weights.last(), Some(Loading::Weights(done, total)) if done == total), "{told:?}");
        for (i, part) in compiled.iter().enumerate() {
            let named = |name| kernels.iter().any(|kernel| kernel.name == name);
            let right = matches!(*part, Loading::Kernels(done, total, name)
                if (done, total) == (i + 1, kernels.len()) && named(name));
            assert!(right, "{part:?}");
        }
        loaded
    };
    let run = |backend: &DeviceBackend, block: usize| -> Outcome {
        let request = request(&[5, 6, 7], 8, block, 0.0);
        generate(&mut *backend.decoder().unwrap(), &request, &mut AcceptAll).unwrap()
    };
    let backend = load();
    let (ar, fast) = (run(&backend, 1), run(&backend, 8));
    assert_eq!(ar.tokens.len(), 8);
    assert!(!fast.accepted.is_empty());
    check_lossless(&ar, &fast).unwrap();
    assert_eq!(run(&load(), 8).tokens, fast.tokens);
    // Greedy decoding with random weights does not repeat one token.
    assert!(ar.tokens.iter().any(|token| *token != ar.tokens[0]), "{:?}", ar.tokens);
}

#[test]
fn the_cpu_refuses_random_weights_that_are_not_in_memory() {
    let (_root, pair) = tiny();
    let path = |folder: &dflash::checkpoint::folder::Folder| folder.path("random weights");
    let sentence = |path: String| {
        Error::Unsupported(format!(
            "{path} are not in memory, so only a device can load them: expected a pair with weight files on the CPU"
        ))
    };
    let drafter = pair.drafter().unwrap();
    assert_eq!(Target::load(&pair.target).err(), Some(sentence(path(&pair.target.folder))));
    assert_eq!(Drafter::load(drafter).err(), Some(sentence(path(&drafter.folder))));
    assert_eq!(Cpu::load(&pair, 1, 64).err(), Some(sentence(path(&drafter.folder))));
}
