//! The memory plan and the launch listing, which need no device, compared with a device's allocations and
//! captured graphs.

use crate::support;
use crate::support::program;
use crate::support::software_gpu;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::checkpoint::config::{DrafterConfig, TargetConfig};
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::{Arg, Buffer, Device, Node};
use dflash::gpu::dry_run::DryRunDevice;
use dflash::gpu::graph_listing::{Group, layers, of_round, outline};
use dflash::gpu::kernels::attention::MAX_SLOTS;
use dflash::gpu::memory::{MemoryPlan, Overhead};
use dflash::gpu::model::PAGE;
use serde_json::{Value, json};
use std::collections::HashMap;
use support::disk;

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

/// A pair of these sizes with weights of zeros.
fn sparse_pair(target: &support::Target, drafter: &support::Drafter) -> (support::Pair, Pair) {
    let root = tempfile::tempdir().unwrap();
    let files =
        support::Pair { target: root.path().join("target"), drafter: root.path().join("drafter"), root };
    let (target_dir, drafter_dir) = (disk(&files.target), disk(&files.drafter));
    support::write_sparse(&files.target, &support::target_config(target), || {
        TargetConfig::open(&target_dir).unwrap().tensors()
    });
    support::write_sparse(&files.drafter, &support::drafter_config(target, drafter), || {
        DrafterConfig::open(&drafter_dir).unwrap().tensors()
    });
    let pair = Pair::open(target_dir, Some(drafter_dir)).unwrap();
    (files, pair)
}

fn qwen3_8b() -> (support::Target, support::Drafter) {
    let target = support::Target {
        hidden: 4096,
        intermediate: 12288,
        layers: 36,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        tied: false,
        max_positions: 40960,
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 12288,
        layers: 5,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        taps: vec![1, 9, 17, 25, 33],
        mask_token: 151_669,
        block: 16,
        max_positions: 40960,
        ..Default::default()
    };
    (target, drafter)
}

/// A pair that runs other kernels than the demo pair, with `layers` layers in the target.
fn small_pair(layers: usize, sliding: Vec<bool>) -> (support::Pair, Pair) {
    let (target, drafter) = support::odd();
    let target = support::Target { layers, ..target };
    let drafter = support::Drafter {
        layers: sliding.len(),
        taps: (0..layers - 1).rev().collect(),
        window: Some(40),
        sliding,
        ..drafter
    };
    let files = support::write_pair(&target, &drafter);
    let pair = Pair::open(disk(&files.target), Some(disk(&files.drafter))).unwrap();
    (files, pair)
}

/// The demo pair, two small ones, and a target alone.
fn pairs() -> Vec<(Option<support::Pair>, Pair)> {
    let (files, alternating) = small_pair(3, vec![true, false, true, false]);
    let (single_files, single) = small_pair(2, vec![false]);
    let target_only = Pair::open(disk(&single_files.target), None).unwrap();
    vec![(None, demo()), (Some(files), alternating), (Some(single_files), single), (None, target_only)]
}

/// Batch configurations that the pair supports.
fn configs(pair: &Pair) -> Vec<BatchConfig> {
    let max = pair.drafter().map_or(1, |drafter| drafter.config.block);
    let new = |(sequences, block, positions)| BatchConfig::new(sequences, block, positions);
    let mut configs = [(1, 1, 64), (1, max, 256), (3, max.min(7), 200), (16, max, 65)].map(new).to_vec();
    if max > 1 {
        let (small, large) = (new((2, max, 100)), new((3, max, 200)));
        configs.extend([small.with_trees(5), BatchConfig { draft_probs: true, ..small }]);
        configs.push(BatchConfig { draft_probs: true, ..large.with_trees(64) });
    }
    configs
}

fn batch<'a>(device: &'a dyn Device, models: &'a Models, config: BatchConfig) -> Batch<'a> {
    Batch::new(device, models, config).unwrap()
}

// ---- memory ----

#[test]
fn memory_table_of_the_demo_pair() {
    let plan = MemoryPlan::new(&demo(), BatchConfig::new(1, 16, 4096)).unwrap();
    let expected = "\
memory for 1 sequence of 4096 positions in blocks of 16:
  target weights                  4007424 bytes      3.8 MiB
  vocabulary                       524288 bytes    512.0 KiB
  drafter weights                 2627072 bytes      2.5 MiB
  keys and values                18874368 bytes     18.0 MiB
  page tables                         512 bytes      0.5 KiB
  workspaces                       676224 bytes    660.4 KiB
  activations and state           3196404 bytes      3.0 MiB
  in all                         29906292 bytes     28.5 MiB
  at most while loading           7684608 bytes      7.3 MiB
  to be free on a GPU           568328480 bytes    542.0 MiB
  page-locked on the host             288 bytes      0.3 KiB
pages of keys and values: 64 of 294912 bytes, 4608 a position";
    assert_eq!(plan.to_string(), expected);
}

#[test]
fn gpu_memory_is_rounded_allocations_plus_a_reserve() {
    for (_files, pair) in pairs() {
        for config in configs(&pair) {
            let plan = MemoryPlan::new(&pair, config).unwrap();
            let dry_run = DryRunDevice::new();
            let round = |taken: &[(String, usize)]| -> usize {
                taken.iter().map(|(_, bytes)| bytes.next_multiple_of(2 << 20)).sum()
            };
            let models = Models::load(&dry_run, &pair, config.positions).unwrap();
            let loaded = dry_run.take();
            let (weights, staging) = loaded.split_at(loaded.len() - 2);
            batch(&dry_run, &models, config);
            let rest = dry_run.take();
            let running = round(weights) + round(&rest) + dry_run.pinned_bytes();
            let needed = plan.needed(Overhead::GPU) - (256 << 20);
            let loading = round(weights) + round(staging);
            assert!(loading < running, "{config:?}");
            assert_eq!(needed, running, "{config:?}");
            assert_eq!(plan.allocations(), weights.len() + rest.len());
        }
    }
}

/// The staging memory of a large matrix can exceed the memory of a small batch.
#[test]
fn loading_can_need_more_memory_than_running() {
    let large = support::Target {
        hidden: 2048,
        intermediate: 4096,
        layers: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        vocab: 301,
        ..Default::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let folder = disk(dir.path());
    let tensors = || TargetConfig::open(&folder).unwrap().tensors();
    support::write_sparse(dir.path(), &support::target_config(&large), tensors);
    let pair = Pair::open(disk(dir.path()), None).unwrap();
    let plan = MemoryPlan::new(&pair, BatchConfig::new(1, 1, 64)).unwrap();
    assert!(plan.loading() > plan.total());
    let needed = plan.needed(Overhead::NONE);
    let load = |bytes: usize| Models::load(&TestGpu::with_memory(bytes as u64), &pair, 64).is_ok();
    assert!(load(needed) && !load(needed - 1));
    assert!(plan.check(&pair, needed - 1, Overhead::NONE).is_err());
    let granule = Overhead { granule: 1 << 20, reserve: 5 };
    let dry_run = DryRunDevice::new();
    drop(Models::load(&dry_run, &pair, 64).unwrap());
    let rounded = dry_run.take().iter().map(|(_, bytes)| bytes.next_multiple_of(1 << 20)).sum::<usize>();
    assert!(plan.needed(granule) >= rounded + 5);
}

#[test]
fn the_largest_context_fits_and_one_more_page_does_not() {
    for (_files, pair) in &pairs() {
        let block = pair.drafter().map_or(1, |drafter| drafter.config.block);
        let max = pair.target.config.stack.max_positions;
        let plan = |pages: usize| MemoryPlan::new(pair, BatchConfig::new(2, block, pages * PAGE)).unwrap();
        for overhead in [Overhead::NONE, Overhead::GPU] {
            let needed = |pages| plan(pages).needed(overhead);
            let largest = |free| {
                MemoryPlan::largest_context(pair, BatchConfig::new(2, block, 1), free, overhead).unwrap()
            };
            assert_eq!(largest(needed(1) - 1), 0);
            assert_eq!(largest(usize::MAX), max);
            // On a GPU, allocations are rounded up, so several numbers of pages need the same memory.
            let last_like_three = (3..).take_while(|&pages| needed(pages) == needed(3)).last().unwrap();
            assert_eq!(largest(needed(3)), max.min(last_like_three * PAGE));
            if needed(2) < needed(3) {
                assert_eq!(largest(needed(3) - 1), 2 * PAGE);
            }
        }
        // The device runs this context and not one page more.
        for free in [plan(1).needed(Overhead::NONE), plan(3).needed(Overhead::NONE) - 1] {
            let largest =
                MemoryPlan::largest_context(pair, BatchConfig::new(2, block, 1), free, Overhead::NONE)
                    .unwrap();
            let runs = |positions: usize| {
                // The plan includes page-locked memory.
                let device = TestGpu::with_memory((free - plan(1).pinned) as u64);
                let config = BatchConfig::new(2, block, positions);
                let models = Models::load(&device, pair, positions);
                models.is_ok_and(|models| Batch::new(&device, &models, config).is_ok())
            };
            assert!(runs(largest) && !runs(largest + PAGE), "{largest}");
        }
    }
}

#[test]
fn too_little_memory_is_one_sentence_with_the_largest_context() {
    let pair = demo();
    let plan = MemoryPlan::new(&pair, BatchConfig::new(2, 8, 4096)).unwrap();
    let check =
        |free, overhead| plan.check(&pair, free, overhead).map_err(|e| (e.exit_code(), e.to_string()));
    for overhead in [Overhead::NONE, Overhead::GPU] {
        let needed = plan.needed(overhead);
        assert_eq!(check(needed, overhead), Ok(()));
        assert_eq!(check(needed - 1, overhead).unwrap_err().0, 5);
    }
    let needed = plan.needed(Overhead::NONE);
    assert_eq!(needed, 48_781_812);
    assert_eq!(
        check(needed - 1, Overhead::NONE).unwrap_err().1,
        "not enough memory on the device for 2 sequences of 4096 positions in blocks of 8: 48781812 bytes (46.5 MiB) are \
         needed, 48781811 bytes (46.5 MiB) are free; the largest context that fits is 4032"
    );
    let sentence = check(5 << 20, Overhead::GPU).unwrap_err().1;
    assert!(
        sentence.ends_with("5242880 bytes (5.0 MiB) are free; not even 64 positions of each sequence fit"),
        "{sentence}"
    );
}

// ---- launches ----

/// The kernel, grid, shared memory and arguments of each launch. Buffers are numbered in the order of their
/// first use, because two captures have different addresses.
fn normalized(nodes: &[Node]) -> Vec<(&'static str, [u32; 3], u32, Vec<String>)> {
    let mut seen: HashMap<(u64, usize), usize> = HashMap::new();
    let mut name = |buffer: &Buffer| {
        let next = seen.len();
        let number = *seen.entry((buffer.address(), buffer.bytes())).or_insert(next);
        format!("buffer {number} of {} bytes", buffer.bytes())
    };
    let mut out = vec![];
    for node in nodes {
        let Node::Launch(launch) = node else { panic!("a round has only launches: {node:?}") };
        let mut args = vec![];
        for arg in &launch.args {
            args.push(match arg {
                Arg::Buffer(buffer) => name(buffer),
                other => format!("{other:?}"),
            });
        }
        out.push((launch.kernel.name, launch.grid, launch.shared, args));
    }
    out
}

#[test]
fn planned_launches_equal_the_captured_graph() {
    for (_files, pair) in &pairs() {
        for config in configs(pair) {
            let device = TestGpu::new();
            let models = Models::load(&device, pair, config.positions).unwrap();
            let batch = batch(&device, &models, config);
            for sampled in [false, true] {
                let counted = normalized(&of_round(pair, config, sampled).unwrap());
                let captured = normalized(&batch.largest(sampled).unwrap().nodes);
                assert_eq!(counted.len(), captured.len());
                for (counted, captured) in counted.iter().zip(&captured) {
                    assert_eq!(counted, captured, "{config:?}, sampled {sampled}");
                }
            }
        }
    }
}

/// The launches of a layer: a sequence of more than 128 positions has several splits, which another launch merges.
fn of_a_layer(config: BatchConfig) -> usize {
    if config.positions + config.tree > 128 { 6 } else { 5 }
}

/// The number of launches of a round, and the number of layers with the launches of each.
fn count(pair: &Pair, config: BatchConfig) -> (usize, Option<(usize, usize)>) {
    let nodes = of_round(pair, config, false).unwrap();
    (nodes.len(), layers(&outline(&nodes)))
}

#[test]
fn a_round_has_six_launches_per_layer_and_a_few_more() {
    for (_files, pair) in &pairs() {
        let own = pair.target.config.stack.attention.len();
        let drafters = pair.drafter().map_or(0, |drafter| drafter.config.stack.attention.len());
        for config in configs(pair) {
            let (layers, more) = if config.block > 1 { (own + drafters, 13) } else { (own, 8) };
            let more = more + if config.tree > 0 { 2 } else { 0 };
            let each = of_a_layer(config);
            assert_eq!(count(pair, config), (each * layers + more, Some((layers, each))), "{config:?}");
        }
    }
    let (_files, pair) = sparse_pair(&qwen3_8b().0, &qwen3_8b().1);
    assert_eq!(count(&pair, BatchConfig::new(1, 16, 40960)), (259, Some((41, 6))));
    assert_eq!(count(&pair, BatchConfig::new(1, 1, 40960)), (224, Some((36, 6))));
}

/// An outline contains each node once, in order, except that repeated layers differ in their arguments.
#[test]
fn an_outline_expands_to_the_graph() {
    for (_files, pair) in &pairs() {
        for config in configs(pair) {
            let nodes = of_round(pair, config, false).unwrap();
            let sections = outline(&nodes);
            let names: Vec<&str> = sections.iter().map(|section| section.name).collect();
            match config.block {
                1 => assert_eq!(names, ["begin", "verify", "accept"]),
                _ => assert_eq!(names, ["begin", "inject", "draft", "verify", "accept"]),
            }
            let mut expanded = vec![];
            for section in &sections {
                let mut next = 0;
                for group in section.groups.iter().filter(|group| !group.layers.is_empty()) {
                    assert_eq!(group.layers.start, next);
                    next = group.layers.end;
                }
                let stack = match (section.name, pair.drafter()) {
                    ("draft", Some(drafter)) => Some(&drafter.config.stack),
                    ("verify", _) => Some(&pair.target.config.stack),
                    _ => None,
                };
                assert_eq!(next, stack.map_or(0, |stack| stack.attention.len()), "{}", section.name);
                for group in &section.groups {
                    (0..group.times).for_each(|_| expanded.extend(group.nodes));
                }
            }
            let shape = |node: &Node| match node {
                Node::Launch(launch) => (launch.kernel.name, launch.grid, launch.shared),
                other => panic!("{other:?}"),
            };
            let expanded: Vec<_> = expanded.into_iter().map(shape).collect();
            assert_eq!(expanded, nodes.iter().map(shape).collect::<Vec<_>>());
        }
    }
}

/// For each group of a section: the number of repetitions, the layers, and the number of nodes.
fn shape(pair: &Pair, name: &str, block: usize) -> Vec<(usize, std::ops::Range<usize>, usize)> {
    let nodes = of_round(pair, BatchConfig::new(1, block, 64), false).unwrap();
    let sections = outline(&nodes);
    let section = sections.iter().find(|section| section.name == name).unwrap();
    let layers = |group: &Group| if group.layers.is_empty() { 0..0 } else { group.layers.clone() };
    section.groups.iter().map(|group| (group.times, layers(group), group.nodes.len())).collect()
}

#[test]
fn equal_layers_are_listed_once() {
    let draft_groups = |sliding: Vec<bool>| {
        let (_files, pair) = small_pair(2, sliding);
        shape(&pair, "draft", 8)
    };
    let around = |layers: Vec<_>| [vec![(1, 0..0, 2)], layers, vec![(1, 0..0, 2)]].concat();
    assert_eq!(draft_groups(vec![false]), around(vec![(1, 0..1, 5)]));
    assert_eq!(draft_groups(vec![false; 4]), around(vec![(4, 0..4, 5)]));
    // Sliding layers are causal and use another kernel.
    assert_eq!(draft_groups(vec![true, true, true, false]), around(vec![(3, 0..3, 5), (1, 3..4, 5)]));
    assert_eq!(draft_groups(vec![true, false, true, false]), around(vec![(2, 0..4, 10)]));
    assert_eq!(draft_groups([true, true, true, false].repeat(2)), around(vec![(2, 0..8, 20)]));
    assert_eq!(draft_groups(vec![true, false, true]), around(vec![(1, 0..1, 5), (1, 1..2, 5), (1, 2..3, 5)]));
}

// ---- the command ----

#[test]
fn launch_listing_names_the_round_and_its_layers() {
    let ar = program::run(["--plan", "--launches", "--block", "1"]).done();
    assert!(ar.starts_with("a round of 1 sequence of 4096 positions in blocks of 1, greedy\n"), "{ar}");
    assert!(ar.ends_with("\na round is 44 launches: 6 for each of 6 layers, and 8\n"), "{ar}");
    let sampled = program::run(["--plan", "--launches", "--temperature", "0.5"]).done();
    assert!(sampled.contains("in blocks of 16, sampled\n"), "{sampled}");
    let (files, _) = small_pair(2, vec![true, false, true, false, true]);
    let text = program::run_pair(&files, &["--plan", "--launches"]).done();
    for line in [
        "  layers 0..3 of the drafter, 2 x:",
        "  layer 4 of the drafter:",
        "  layers 0..1 of the target, 2 x:",
    ] {
        assert!(text.lines().any(|l| l == line), "no {line:?} in:\n{text}");
    }
    assert!(text.contains("in blocks of 8, greedy") && text.contains("of 256 positions"), "{text}");
}

#[test]
fn launches_as_json_equal_the_text() {
    let list = program::run(["--plan", "--launches", "--json"]).json().remove(0);
    let text = program::run(["--plan", "--launches"]).done();
    assert_eq!(
        (&list["launches"], &list["layers"], &list["launches_per_layer"]),
        (&json!(67), &json!(9), &json!(6))
    );
    assert_eq!(list["room"], json!({"sequences": 1, "block": 16, "positions": 4096, "pages": 64}));
    let (mut launches, mut lines) = (0, text.lines().skip(2));
    for section in list["sections"].as_array().unwrap() {
        assert_eq!(lines.next().unwrap(), section["name"]);
        for group in section["groups"].as_array().unwrap() {
            if !group["layers"].is_null() {
                let model = group["layers"]["model"].as_str().unwrap();
                assert!(lines.next().unwrap().contains(&format!(" of the {model}, {} x:", group["times"])));
            }
            for launch in group["launches"].as_array().unwrap() {
                launches += group["times"].as_u64().unwrap();
                let grid: Vec<String> =
                    launch["grid"].as_array().unwrap().iter().map(Value::to_string).collect();
                let expected = format!(
                    "{} {} {} {}",
                    launch["kernel"].as_str().unwrap(),
                    grid.join(" x "),
                    launch["threads"],
                    launch["shared_bytes"]
                );
                let line: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
                assert_eq!(line.join(" "), expected);
            }
        }
    }
    assert_eq!(launches, 67);
}

#[test]
fn launches_need_plan_and_a_supported_model() {
    let run = program::run(["--launches"]);
    assert!(run.code == 2 && run.err.contains("--plan"), "{run:?}");
    // A head dimension of 24.
    let files = support::write_pair(&support::Target::default(), &support::Drafter::default());
    assert_eq!(program::run_pair(&files, &["--plan"]).code, 0);
    let run = program::run_pair(&files, &["--plan", "--launches"]);
    assert_eq!(run.code, 4, "{run:?}");
    assert_eq!((run.out.as_str(), run.err.lines().count()), ("", 1));
    assert!(run.err.contains("the kernels cannot run this model: "), "{run:?}");
}

#[test]
fn a_plan_for_a_device_includes_its_memory() {
    let args = ["--plan", "--device", "cuda", "--ctx", "1000", "--block", "8"];
    let plan = MemoryPlan::new(&demo(), BatchConfig::new(1, 8, 1000)).unwrap();
    let text = program::run(args).done();
    assert!(text.starts_with("target demo/target: ") && text.ends_with(&format!("\n{plan}\n")), "{text}");
    assert!(!program::run(["--plan", "--device", "cpu"]).done().contains("memory for"));
    let memory = program::run([&args[..], &["--json"]].concat()).json().remove(0)["memory"].take();
    assert_eq!(memory["room"], json!({"sequences": 1, "block": 8, "positions": 1000, "pages": 16}));
    let lines = memory["lines"].as_array().unwrap();
    let whats: Vec<&str> = lines.iter().map(|line| line["what"].as_str().unwrap()).collect();
    assert_eq!(whats, plan.lines.iter().map(|line| line.what).collect::<Vec<_>>());
    assert_eq!(lines.iter().map(|line| line["bytes"].as_u64().unwrap()).sum::<u64>(), memory["bytes"]);
    let rest = ["loading_bytes", "gpu_bytes", "pinned_bytes", "page_bytes"].map(|name| memory[name].clone());
    let expected = [plan.loading(), plan.needed(Overhead::GPU), plan.pinned, plan.page_bytes];
    assert_eq!(rest, expected.map(Value::from));
}

#[test]
fn a_context_that_does_not_fit_is_refused_with_the_table() {
    let target = support::Target {
        hidden: 64,
        intermediate: 32,
        layers: 12,
        heads: 8,
        kv_heads: 8,
        head_dim: 128,
        vocab: 300,
        max_positions: 1 << 20,
        ..Default::default()
    };
    let drafter =
        support::Drafter { intermediate: 32, heads: 1, kv_heads: 1, head_dim: 64, ..Default::default() };
    let files = support::write_pair(&target, &drafter);
    let pair = Pair::open(disk(&files.target), Some(disk(&files.drafter))).unwrap();
    let plan = MemoryPlan::new(&pair, BatchConfig::new(1, 8, 900_000)).unwrap();
    let args = ["--device", "cuda", "--ctx", "900000", "-n", "1", "a"];
    for more in [&[][..], &["--quiet"]] {
        let args = program::flags(&files)
            .into_iter()
            .chain([&args[..], more].concat().into_iter().map(String::from));
        let run = software_gpu::run_any(&[("SOFTGPU_MEMORY", &(16u64 << 30).to_string())], args);
        assert_eq!((run.code, run.out.as_str()), (5, ""), "{}", run.err);
        let (table, sentence) = run.err.trim_end().rsplit_once('\n').unwrap();
        assert_eq!(table, plan.to_string());
        let (before, largest) = sentence.rsplit_once("; the largest context that fits is ").expect(sentence);
        assert!(before.starts_with("dflash-gen: not enough memory on the device for 1 sequence of 900000 "));
        let largest: usize = largest.parse().unwrap();
        let needed = |positions| {
            MemoryPlan::new(&pair, BatchConfig::new(1, 8, positions)).unwrap().needed(Overhead::GPU)
        };
        assert!(needed(largest) <= 16 << 30 && needed(largest + PAGE) > 16 << 30, "{largest}");
    }
}

// ---- limits ----

#[test]
fn capacities_beyond_the_kernels_limits_are_refused_by_name() {
    let pair = demo();
    let refused = [
        (BatchConfig::new(0, 16, 64), "a batch of 0: expected 1 to 1024"),
        (BatchConfig::new(1025, 1, 64), "a batch of 1025: expected 1 to 1024"),
        (BatchConfig::new(usize::MAX, 16, usize::MAX), "a batch of 18446744073709551615: expected 1 to 1024"),
        (BatchConfig::new(1, 0, 64), "blocks of 0 rows: expected 1 to 64"),
        (BatchConfig::new(1, 65, 64), "blocks of 65 rows: expected 1 to 64"),
        (BatchConfig::new(1024, 64, 64), "a batch of 1024: expected at most 1023 with 64 rows per sequence"),
        (BatchConfig::new(1, 16, 0), "a context of 0: expected 1 to 901120 positions"),
        (BatchConfig::new(1, 16, MAX_SLOTS + 1), "a context of 901121: expected 1 to 901120 positions"),
    ];
    for (config, end) in refused {
        let expected = Error::Unsupported(format!("the kernels cannot run {end}"));
        assert_eq!(MemoryPlan::new(&pair, config), Err(expected.clone()));
        assert_eq!(of_round(&pair, config, true), Err(expected));
    }
    for config in
        [BatchConfig::new(1023, 64, 64), BatchConfig::new(1024, 63, 1), BatchConfig::new(1, 64, MAX_SLOTS)]
    {
        let plan = MemoryPlan::new(&pair, config).unwrap();
        assert!(plan.needed(Overhead::GPU) > plan.peak());
        let each = of_a_layer(config);
        assert_eq!(count(&pair, config), (9 * each + 13, Some((9, each))));
    }
}

/// Random sizes up to the limits of a config: each is planned, or refused with the reason.
#[test]
fn any_config_is_planned_or_refused_by_name() {
    let mut random = support::Random::new(5);
    let (mut planned, mut refused) = (0, 0);
    for _ in 0..60 {
        let mut one_of = |sizes: &[usize]| sizes[random.below(sizes.len())];
        let kv_heads = one_of(&[1, 3, 8, 128]);
        let hidden = one_of(&[64, 96, 4096, 16384, 65536]);
        let target = support::Target {
            hidden,
            intermediate: one_of(&[32, 96, 53248, 1 << 20]),
            // The file system limits a file to 16 TiB.
            layers: if hidden > 4096 { 2 } else { one_of(&[2, 3, 126]) },
            heads: kv_heads * one_of(&[1, 7, 8]),
            kv_heads,
            head_dim: one_of(&[64, 128, 128, 1024]),
            vocab: one_of(&[2, 301, 151_936, 1 << 24]),
            max_positions: one_of(&[1, 63, 64, 40960, 1 << 24]),
            tied: one_of(&[0, 1]) == 1,
            llama: one_of(&[0, 1]) == 1,
            ..Default::default()
        };
        let drafter = support::Drafter {
            intermediate: one_of(&[32, 1 << 20]),
            layers: one_of(&[1, 2, 5]),
            heads: one_of(&[8, 32]),
            kv_heads: one_of(&[4, 8]),
            head_dim: one_of(&[64, 128]),
            taps: vec![0],
            block: one_of(&[2, 16, 64, 1024]),
            max_positions: one_of(&[1, 4096, 1 << 24]),
            ..Default::default()
        };
        let (_files, pair) = sparse_pair(&target, &drafter);
        let max = target.max_positions.min(MAX_SLOTS);
        for config in
            [BatchConfig::new(1, drafter.block, max), BatchConfig::new(1000, drafter.block.min(16), 1)]
        {
            match MemoryPlan::new(&pair, config) {
                Ok(plan) => {
                    planned += 1;
                    assert!(plan.peak() < plan.needed(Overhead::GPU) && !plan.to_string().is_empty());
                    assert!(plan.check(&pair, usize::MAX, Overhead::GPU).is_ok());
                    let error = plan.check(&pair, 256 << 20, Overhead::GPU).unwrap_err();
                    assert!(matches!(error, Error::Memory(_)), "{error:?}");
                    assert_eq!(count(&pair, config).1.unwrap().1, of_a_layer(config));
                }
                Err(Error::Unsupported(sentence)) => {
                    refused += 1;
                    assert!(sentence.starts_with("the kernels cannot run "), "{sentence}");
                }
                Err(error) => panic!("{error:?}: {target:?} {drafter:?} {config:?}"),
            }
        }
    }
    assert!(planned > 20 && refused > 20, "{planned} planned, {refused} refused");
}
