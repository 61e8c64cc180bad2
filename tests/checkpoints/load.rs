//! Loading weights onto a device: contents, planned sizes, bounded host memory, and errors.

use crate::support;
use crate::support::kernel;
use crate::support::layer;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::Buffer;
use dflash::gpu::dry_run::DryRunDevice;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::loader::{Loader, PackedRows, READ_BUFFERS, READ_BYTES};
use dflash::gpu::memory::{MemoryPlan, Overhead};
use dflash::gpu::model::PAGE;
use kernel::*;
use layer::pack_rows;
use serde_json::{Map, Value, json};
use std::fs::{self, File, OpenOptions};
use std::path::Path;
use support::{Raw, disk};

fn target(dtype: Dtype, shards: usize, tied: bool) -> support::Target {
    support::Target { tied, dtype, shards, ..support::odd().0 }
}

fn drafter(dtype: Dtype) -> support::Drafter {
    support::Drafter { dtype, ..support::odd().1 }
}

fn write_and_open(target: &support::Target, drafter: &support::Drafter) -> (support::Pair, Pair) {
    let files = support::write_pair(target, drafter);
    let pair = Pair::open(disk(&files.target), Some(disk(&files.drafter))).unwrap();
    (files, pair)
}

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

/// A progress callback that does nothing.
fn no_progress(_: usize, _: usize) {}

/// The values of a tensor, rounded to the dtype of the file.
fn stored(tensor: &Raw, dtype: Dtype) -> Vec<f32> {
    let round = |&x: &f32| match dtype {
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::F32 => x,
    };
    tensor.values.iter().map(round).collect()
}

// ---- contents ----

#[test]
fn device_weights_equal_the_checkpoint_in_every_format() {
    let cases =
        [(Dtype::Bf16, 1, true), (Dtype::Bf16, 5, false), (Dtype::F16, 3, true), (Dtype::F32, 2, false)];
    for (dtype, shards, tied) in cases {
        let spec = target(dtype, shards, tied);
        let (_files, pair) = write_and_open(&spec, &drafter(dtype));
        let tensors = support::target_tensors(&spec);
        let values = |name: &str| stored(tensors.iter().find(|t| t.name == name).unwrap(), dtype);
        let rows = |names: &[&str]| to_bf16(&names.iter().flat_map(|name| values(name)).collect::<Vec<_>>());

        let device = TestGpu::new();
        let mut loader = Loader::new(&device, &pair.target.weights);
        let own = |name: &str| format!("model.layers.1.{name}.weight");
        let [q, k, v, gate, up, gain] = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "input_layernorm",
        ]
        .map(own);
        // The parts of a matrix are given in another order than in the file.
        let gates_shape = Shape { n: 320, k: 192 };
        let gates = [(up.clone(), 160, PackedRows::Ups), (gate.clone(), 160, PackedRows::Gates)];
        let gate_up = loader.packed(gates_shape, &gates).unwrap();
        let heads = [
            (q.clone(), 192, PackedRows::From(0)),
            (k.clone(), 64, PackedRows::From(192)),
            (v.clone(), 64, PackedRows::From(256)),
        ];
        let qkv_shape = Shape { n: 320, k: 192 };
        let qkv = loader.packed(qkv_shape, &heads).unwrap();
        let gain_buffer = loader.vector(&gain, 192).unwrap();
        let table = "model.embed_tokens.weight";
        let embedding = loader.table(table, 301, 192).unwrap();
        let head = if tied { table } else { "lm_head.weight" };
        let head_shape = Shape { n: 301, k: 192 };
        let packed = loader.packed(head_shape, &[(head.to_string(), 301, PackedRows::From(0))]).unwrap();
        loader.run(&mut no_progress).unwrap();

        let case = format!("{dtype:?}, {shards} shards, tied {tied}");
        let same = |what: &str, buffer: &Buffer, expected: Vec<u16>| {
            assert!(download::<u16>(&device, buffer) == expected, "{what}, {case}");
        };
        let packed_row = |r: usize| if r < 160 { r / 8 * 16 + r % 8 } else { (r - 160) / 8 * 16 + 8 + r % 8 };
        same("gate and up", &gate_up, pack_rows(&rows(&[&gate, &up]), gates_shape, packed_row));
        same("qkv", &qkv, pack_rows(&rows(&[&q, &k, &v]), qkv_shape, |r| r));
        same("embedding", &embedding, rows(&[table]));
        same("head", &packed, pack_rows(&rows(&[head]), head_shape, |r| r));
        assert_eq!(download::<f32>(&device, &gain_buffer), values(&gain), "{case}");
    }
}

/// Matrices that take several read buffers, whose borders fall on different columns, and a row that is longer
/// than a buffer. Each kind of packed matrix has one of the two types; exhaustive: both.
#[test]
fn matrices_larger_than_a_read_buffer_load_correctly() {
    let (k, long) = (2080, READ_BYTES / 2 + 96);
    let dir = tempfile::tempdir().unwrap();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        // Slightly more than a read buffer.
        let n = 10022 / dtype.size();
        let mut random = Random::new(n as u64);
        let mut tensor = |name: &str, rows: usize, columns: usize| Raw {
            name: name.into(),
            shape: vec![rows, columns],
            values: (0..rows * columns).map(|_| random.unit() - 0.5).collect(),
        };
        let tensors = [tensor("a", n, k), tensor("b", 2, long)];
        support::write_tensors(dir.path(), &tensors, dtype, 1);
        let file = Checkpoint::open(&disk(dir.path())).unwrap();
        let device = TestGpu::new();
        let mut loader = Loader::new(&device, &file);
        let shapes =
            [Shape { n: 2 * n.next_multiple_of(8), k }, Shape { n: n + 5, k }, Shape { n: 2, k: long }];
        let [bf16, f32] = [Dtype::Bf16, Dtype::F32].map(|of| of == dtype || support::exhaustive());
        let mut packed =
            |name: &str, rows, shape, to| loader.packed(shape, &[(name.into(), rows, to)]).unwrap();
        let gates = bf16.then(|| packed("a", n, shapes[0], PackedRows::Gates));
        let shifted = f32.then(|| packed("a", n, shapes[1], PackedRows::From(5)));
        let long_row = f32.then(|| packed("b", 2, shapes[2], PackedRows::From(0)));
        let table = loader.table("a", n, k).unwrap();
        let mut calls = 0;
        let before = device.allocated().bytes;
        let staging = loader.staging_bytes();
        loader.run(&mut |_, _| calls += 1).unwrap();
        assert!(calls > 4, "{calls} pieces");
        assert_eq!((device.allocated().bytes, device.allocated().peak), (before, before + staging));

        let a = to_bf16(&stored(&tensors[0], dtype));
        let same = |what: &str, buffer: &Option<Buffer>, expected: &dyn Fn() -> Vec<u16>| {
            let Some(buffer) = buffer else { return };
            let (out, expected) = (download::<u16>(&device, buffer), expected());
            let at = out.iter().zip(&expected).position(|(o, e)| o != e && *e != 0);
            assert!(out.len() == expected.len() && at.is_none(), "{what}, {dtype:?}: element {at:?}");
        };
        same("gates", &gates, &|| pack_rows(&a, shapes[0], |r| r / 8 * 16 + r % 8));
        same("shifted", &shifted, &|| pack_rows(&a, shapes[1], |r| r + 5));
        let b = || to_bf16(&stored(&tensors[1], dtype));
        same("a long row", &long_row, &|| pack_rows(&b(), shapes[2], |r| r));
        assert!(download::<u16>(&device, &table) == a, "table, {dtype:?}");
    }
}

#[test]
fn rotary_tables_match_the_reference() {
    let pair = demo();
    let device = TestGpu::new();
    let stack = &pair.target.config.stack;
    let mut loader = Loader::new(&device, &pair.target.weights);
    let buffer = loader.rope_table(&stack.rope, stack.head_dim, 100).unwrap();
    loader.run(&mut no_progress).unwrap();
    let (frequencies, magnitude) = stack.rope.frequencies();
    let half = stack.head_dim / 2;
    for (i, value) in download::<f32>(&device, &buffer).into_iter().enumerate() {
        let (position, d) = (i / stack.head_dim, i % stack.head_dim);
        let angle = f64::from(position as f32 * frequencies[d % half] as f32);
        let expected = if d < half { angle.cos() } else { angle.sin() } * magnitude;
        assert_eq!(value, expected as f32, "position {position}, dim {d}");
    }
}

#[test]
fn progress_is_monotonic_and_ends_at_all_bytes() {
    let (_files, pair) = write_and_open(&target(Dtype::F16, 3, false), &drafter(Dtype::F32));
    let plan = MemoryPlan::new(&pair, BatchConfig::new(1, 8, 100)).unwrap();
    let mut progress = vec![];
    Models::load_with(&TestGpu::new(), &pair, 100, &mut |done, total| progress.push((done, total))).unwrap();
    assert_eq!(
        (progress[0], progress[progress.len() - 1]),
        ((0, plan.file_bytes), (plan.file_bytes, plan.file_bytes))
    );
    assert!(progress.is_sorted() && progress.iter().all(|h| h.1 == plan.file_bytes));
    let expected = support::parameters(&pair.target.config.tensors()) * 2
        + support::parameters(&pair.drafter().unwrap().config.tensors()) * 4;
    assert_eq!(plan.file_bytes as u64, expected);
}

// ---- sizes ----

fn pairs() -> Vec<(&'static str, Option<support::Pair>, Pair)> {
    let (files, untied) = write_and_open(&target(Dtype::Bf16, 1, false), &drafter(Dtype::Bf16));
    let target_only = Pair::open(disk(&files.target), None).unwrap();
    let (tied_files, tied) = write_and_open(&target(Dtype::F32, 2, true), &drafter(Dtype::F16));
    vec![
        ("demo", None, demo()),
        ("without drafter", None, target_only),
        ("untied", Some(files), untied),
        ("tied", Some(tied_files), tied),
    ]
}

/// Every second config for each pair; exhaustive: all.
#[test]
fn the_memory_plan_equals_the_allocations() {
    for (i, (what, _files, pair)) in pairs().iter().enumerate() {
        let configs = [
            BatchConfig::new(1, 1, 64),
            BatchConfig::new(3, 7, 200),
            BatchConfig { pages: 5, ..BatchConfig::new(2, 16, 250) },
        ];
        let step = if support::exhaustive() { 1 } else { 2 };
        for config in configs.into_iter().skip((i + 1) % step).step_by(step) {
            let BatchConfig { block, pages, positions, .. } = config;
            let plan = MemoryPlan::new(pair, config).unwrap();
            let device = TestGpu::new();
            let models = Models::load(&device, pair, positions).unwrap();
            let weights: usize = plan
                .lines
                .iter()
                .filter(|l| l.what.ends_with("weights") || l.what == "vocabulary")
                .map(|l| l.bytes)
                .sum();
            assert_eq!(device.allocated().bytes, weights, "{what}, {plan:?}");
            assert_eq!(device.allocated().peak, weights + plan.staging, "{what}, {plan:?}");
            assert_eq!(device.allocated().peak, plan.loading(), "{what}, {plan:?}");
            let batch = Batch::new(&device, &models, config).unwrap();
            let used = device.allocated();
            assert_eq!(used.bytes, plan.total(), "{what}, {plan:?}");
            assert_eq!(used.peak, plan.total().max(weights + plan.staging), "{what}, {plan:?}");
            assert_eq!(plan.peak(), plan.total().max(weights + plan.staging), "{what}, {plan:?}");
            assert_eq!(
                plan.needed(Overhead::NONE),
                plan.loading().max(plan.total() + plan.pinned),
                "{what}, {plan:?}"
            );
            assert_eq!(plan.lines.iter().map(|l| l.bytes).sum::<usize>(), plan.total(), "{what}, {plan:?}");
            assert_eq!(used.buffers, plan.allocations(), "{what}, {plan:?}");
            let stacks = [Some(&pair.target.config.stack), pair.drafter().map(|d| &d.config.stack)];
            let stacks = stacks.into_iter().flatten().take(if block > 1 { 2 } else { 1 });
            let page: usize = stacks.map(|c| c.kv_bytes_per_token(2) * PAGE).sum();
            let keys = plan.lines.iter().find(|l| l.what == "keys and values").unwrap();
            assert_eq!((plan.page_bytes, keys.bytes), (page, pages * page), "{what}");
            drop(batch);
            drop(models);
            assert_eq!((device.allocated().buffers, device.allocated().bytes), (0, 0), "{what}");
        }
    }
}

/// The plan's lines for weights equal the size of all tensors, as bf16 with rows padded to 16 and vectors as
/// f32, plus the rotary tables.
#[test]
fn each_weight_is_stored_once() {
    for (what, _files, pair) in &pairs() {
        let config = BatchConfig::new(1, 4, 128);
        let plan = MemoryPlan::new(pair, config).unwrap();
        let line = |name: &str| plan.lines.iter().find(|l| l.what == name).map_or(0, |l| l.bytes);
        let bytes = |tensors: &[(String, Vec<usize>)]| -> usize {
            let size = |(name, shape): &(String, Vec<usize>)| match shape[..] {
                [n] => n * 4,
                [n, k] if name.contains("lm_head") || pair.target.config.tied => {
                    n.next_multiple_of(16) * k * 2
                }
                [n, k] => n * k * 2,
                _ => unreachable!(),
            };
            tensors.iter().map(size).sum()
        };
        let rotations = |head_dim: usize| config.positions * head_dim * 4;
        let t = &pair.target.config;
        assert_eq!(
            line("target weights") + line("vocabulary"),
            bytes(&t.tensors()) + rotations(t.stack.head_dim),
            "{what}"
        );
        if let Some(d) = pair.drafter() {
            let d = &d.config;
            assert_eq!(line("drafter weights"), bytes(&d.tensors()) + rotations(d.stack.head_dim), "{what}");
        }
    }
}

// ---- host memory ----

/// Writes a checkpoint of zeros as a sparse file, which takes no disk space.
fn sparse(dir: &Path, matrices: &[(&str, usize, usize)], dtype: &str, size: usize) {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, rows, columns) in matrices {
        let begin = end;
        end += rows * columns * size;
        let info = json!({ "dtype": dtype, "shape": [rows, columns], "data_offsets": [begin, end] });
        header.insert(name.to_string(), info);
    }
    let bytes = support::safetensors_raw(&Value::Object(header).to_string(), &[]);
    let path = dir.join("model.safetensors");
    fs::write(&path, &bytes).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();
}

/// The peak resident memory of this process, in bytes, since 5 was last written to `/proc/self/clear_refs`.
#[cfg(target_os = "linux")]
fn peak_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// The part of the test below that runs in its own process, so that no other test affects the measured
/// memory.
#[cfg(target_os = "linux")]
fn load_and_measure_memory() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, size) in [("BF16", 2), ("F16", 2), ("F32", 4)] {
        sparse(
            dir.path(),
            &[("a", 1 << 13, 1 << 14), ("b", 2, 50 << 20), ("c", 1 << 12, 1 << 13)],
            dtype,
            size,
        );
        let file = Checkpoint::open(&disk(dir.path())).unwrap();
        // The second time the file is in the page cache.
        for time in ["first", "second"] {
            let device = DryRunDevice::new();
            let mut loader = Loader::new(&device, &file);
            let layer = Shape { n: 1 << 14, k: 1 << 14 };
            loader.packed(layer, &[("a".into(), 1 << 13, PackedRows::Gates)]).unwrap();
            loader.packed(Shape { n: 2, k: 50 << 20 }, &[("b".into(), 2, PackedRows::From(0))]).unwrap();
            loader.table("c", 1 << 12, 1 << 13).unwrap();
            fs::write("/proc/self/clear_refs", "5").unwrap();
            let (before, bytes, start) = (peak_memory(), loader.file_bytes(), std::time::Instant::now());
            loader.run(&mut no_progress).unwrap();
            let (growth, seconds) = (peak_memory() - before, start.elapsed().as_secs_f64());
            let rate = bytes as f64 / seconds / 1e9;
            println!("{dtype} {time}: {} MiB at {rate:.1} GB/s, {} MiB more", bytes >> 20, growth >> 20);
            // The read buffers, one converted buffer, and the memory of threads and channels.
            // AddressSanitizer also has shadow memory and keeps freed memory for a while.
            let other = 8 << 20;
            assert!(growth <= (READ_BUFFERS + 1) * READ_BYTES + other, "{dtype}: {growth} bytes");
            assert!(peak_memory() < 512 << 20);
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn host_memory_is_bounded_by_the_read_buffers() {
    const IN_OWN_PROCESS: &str = "DFLASH_TEST_IN_OWN_PROCESS";
    if std::env::var_os(IN_OWN_PROCESS).is_some() {
        return load_and_measure_memory();
    }
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "load::host_memory_is_bounded_by_the_read_buffers", "--nocapture"])
        .env(IN_OWN_PROCESS, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

// ---- errors ----

#[test]
fn a_file_truncated_after_opening_is_named_with_the_tensor() {
    for shards in [1, 3] {
        let (files, pair) = write_and_open(&target(Dtype::Bf16, shards, false), &drafter(Dtype::Bf16));
        let name = if shards == 1 { "model.safetensors" } else { "model-00002-of-00003.safetensors" };
        let path = files.target.join(name);
        let length = fs::metadata(&path).unwrap().len();
        for left in [length - 1, length / 2, 9, 0] {
            OpenOptions::new().write(true).open(&path).unwrap().set_len(left).unwrap();
            let device = TestGpu::new();
            let error = Models::load(&device, &pair, 64).err().unwrap();
            let Error::Model(sentence) = &error else { panic!("{error:?}") };
            assert!(
                sentence.contains(name) && sentence.contains(": tensor ") && sentence.contains("shorter"),
                "{sentence}"
            );
            assert_eq!(device.allocated().buffers, 0);
        }
    }
}

#[test]
fn a_file_truncated_while_reading_is_named_with_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let rows = 1 << 12;
    sparse(dir.path(), &[("first", rows, 1 << 13), ("second", rows, 1 << 13)], "F32", 4);
    let file = Checkpoint::open(&disk(dir.path())).unwrap();
    let device = DryRunDevice::new();
    let mut loader = Loader::new(&device, &file);
    for name in ["second", "first"] {
        loader.packed(Shape { n: rows, k: 1 << 13 }, &[(name.into(), rows, PackedRows::From(0))]).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut truncate = |done: usize, total: usize| {
        if done > 0 {
            File::options().write(true).open(&path).unwrap().set_len(total as u64 / 2 + 1000).unwrap();
        }
    };
    let error = loader.run(&mut truncate).unwrap_err();
    let Error::Model(sentence) = &error else { panic!("{error:?}") };
    assert!(sentence.contains("model.safetensors: tensor second"), "{sentence}");
}

#[test]
fn a_replaced_file_is_still_read_from_the_opened_one() {
    let dir = tempfile::tempdir().unwrap();
    let write = |value: f32| {
        let tensor = Raw { name: "x".into(), shape: vec![40], values: vec![value; 40] };
        let (fresh, path) = (dir.path().join("fresh"), dir.path().join("model.safetensors"));
        fs::write(&fresh, support::safetensors_file(&[tensor], Dtype::F32)).unwrap();
        fs::rename(&fresh, &path).unwrap();
    };
    write(1.0);
    let file = Checkpoint::open(&disk(dir.path())).unwrap();
    write(2.0);
    let device = TestGpu::new();
    let mut loader = Loader::new(&device, &file);
    let x = loader.vector("x", 40).unwrap();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    loader.run(&mut no_progress).unwrap();
    assert_eq!(download::<f32>(&device, &x), vec![1.0; 40]);
}

/// Loads `values` as a packed matrix and as a table, both `[rows][columns]`, and as a vector.
fn load(values: &[f32], columns: usize, dtype: Dtype) -> [Result<Vec<f32>, Error>; 3] {
    let dir = tempfile::tempdir().unwrap();
    let rows = values.len() / columns;
    let matrix = Raw { name: "model.m.weight".into(), shape: vec![rows, columns], values: values.to_vec() };
    let vector = Raw { name: "model.v.weight".into(), shape: vec![values.len()], values: values.to_vec() };
    support::write_tensors(dir.path(), &[matrix, vector], dtype, 1);
    let file = Checkpoint::open(&disk(dir.path())).unwrap();
    [0, 1, 2].map(|kind| {
        let device = TestGpu::new();
        let result = {
            let mut loader = Loader::new(&device, &file);
            let shape = Shape { n: rows, k: columns };
            let buffer = match kind {
                0 => loader.packed(shape, &[("model.m.weight".into(), rows, PackedRows::From(0))]).unwrap(),
                1 => loader.table("model.m.weight", rows, columns).unwrap(),
                _ => loader.vector("model.v.weight", values.len()).unwrap(),
            };
            loader.run(&mut no_progress).map(|()| match kind {
                2 => download(&device, &buffer),
                _ => from_bf16(&download::<u16>(&device, &buffer)),
            })
        };
        assert_eq!(device.allocated().buffers, 0);
        result
    })
}

#[test]
fn non_finite_weights_are_named() {
    let (rows, columns) = (100, 96);
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for (value, kind) in [
            (f32::NAN, "NaN"),
            (-f32::NAN, "NaN"),
            (f32::INFINITY, "infinite"),
            (f32::NEG_INFINITY, "infinite"),
        ] {
            // The first element, the last, and both sides of a border between blocks of the conversion.
            for at in [0, 2047, 2048, rows * columns - 1] {
                let mut values = vec![0.25; rows * columns];
                values[at] = value;
                let index = format!("[{}, {}]", at / columns, at % columns);
                let names = [("m", &index), ("m", &index), ("v", &format!("[{at}]"))];
                for (result, (name, index)) in load(&values, columns, dtype).into_iter().zip(names) {
                    let Err(Error::Model(sentence)) = &result else {
                        panic!("{dtype:?} {value}: {result:?}")
                    };
                    let start =
                        format!("model.safetensors: tensor model.{name}.weight: element {index} is {kind}");
                    assert!(sentence.contains(&start), "{sentence}: {start}");
                }
            }
        }
    }
}

#[test]
fn values_beyond_bf16_are_named_and_the_largest_are_rounded() {
    let bits = |b: u32| f32::from_bits(b);
    for sign in [1.0, -1.0] {
        // 0x7f7f8000 is halfway between the largest bf16 and infinity; round-to-nearest-even gives infinity.
        for beyond in [f32::MAX, bits(0x7f7f_8000)] {
            let mut values = vec![1.0; 64];
            values[33] = sign * beyond;
            let [packed, table, vector] = load(&values, 32, Dtype::F32);
            for result in [packed, table] {
                let Err(Error::Model(sentence)) = &result else { panic!("{beyond}: {result:?}") };
                assert!(sentence.contains("tensor model.m.weight: element [1, 1] is"), "{sentence}");
                assert!(sentence.contains("beyond the range of BF16"), "{sentence}");
            }
            // Vectors stay f32.
            assert_eq!(vector.unwrap(), values);
        }
        let mut values: Vec<f32> = (0..64).map(|i| sign * bits(0x3f80_0000 + i * 0x1800)).collect();
        let tiny = [bits(1), bits(0x8000), bits(0x8001), bits(0x1_8000), f32::MIN_POSITIVE, 0.0, -0.0];
        values[..tiny.len()].copy_from_slice(&tiny);
        values[63] = sign * bits(0x7f7f_7fff);
        let [_, table, vector] = load(&values, 32, Dtype::F32);
        let expected: Vec<u32> = values.iter().map(|&x| half::bf16::from_f32(x).to_f32().to_bits()).collect();
        assert_eq!(table.unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
        assert_eq!(vector.unwrap(), values);
    }
}

/// No finite f16 value is beyond the range of bf16, and all are rounded as `half` rounds them.
#[test]
fn all_f16_values_are_rounded_to_bf16() {
    let finite = |i: &u16| i & 0x7c00 != 0x7c00;
    let mut values: Vec<f32> =
        (0..=u16::MAX).filter(finite).map(|i| half::f16::from_bits(i).to_f32()).collect();
    values.resize(values.len().next_multiple_of(32), 0.0);
    let [_, table, vector] = load(&values, 32, Dtype::F16);
    assert_eq!(to_bf16(&table.unwrap()), to_bf16(&values));
    assert_eq!(vector.unwrap(), values);
}

#[test]
fn a_nan_in_any_tensor_is_named_and_all_memory_is_freed() {
    let (spec, draft) = (target(Dtype::F32, 2, false), drafter(Dtype::F32));
    let files = support::write_pair(&spec, &draft);
    for of_target in [true, false] {
        let dir = if of_target { &files.target } else { &files.drafter };
        let valid =
            if of_target { support::target_tensors(&spec) } else { support::drafter_tensors(&spec, &draft) };
        let shards = if of_target { 2 } else { 1 };
        for corrupted in 0..valid.len() {
            let mut tensors = valid.clone();
            let last = tensors[corrupted].values.len() - 1;
            tensors[corrupted].values[last] = f32::NAN;
            support::write_tensors(dir, &tensors, Dtype::F32, shards);
            let pair = Pair::open(disk(&files.target), Some(disk(&files.drafter))).unwrap();
            let device = TestGpu::new();
            let error = Models::load(&device, &pair, 64).err().unwrap();
            let Error::Model(sentence) = &error else { panic!("{error:?}") };
            let name = format!(": tensor {}: element", tensors[corrupted].name);
            assert!(sentence.contains(&name) && sentence.contains("is NaN"), "{sentence}: {name}");
            assert_eq!(device.allocated().buffers, 0, "{sentence}");
        }
        support::write_tensors(dir, &valid, Dtype::F32, shards);
    }
}

#[test]
fn too_little_device_memory_is_refused_before_reading() {
    let (_files, pair) = write_and_open(&target(Dtype::Bf16, 1, false), &drafter(Dtype::Bf16));
    let config = BatchConfig::new(2, 4, 128);
    let plan = MemoryPlan::new(&pair, config).unwrap();
    let (whole, weights) = (plan.total(), plan.lines[..3].iter().map(|l| l.bytes).sum::<usize>());
    let load = |bytes: usize| {
        let device = TestGpu::with_memory(bytes as u64);
        let mut read = 0;
        let error = Models::load_with(&device, &pair, 128, &mut |done, _| read = done)
            .and_then(|models| Batch::new(&device, &models, config).map(drop))
            .err();
        assert_eq!(device.allocated().buffers, 0);
        (error, read)
    };
    assert_eq!(load(whole.max(plan.peak())), (None, plan.file_bytes));
    for i in 0..40 {
        let bytes = whole * i / 40;
        let (error, read) = load(bytes);
        let Some(Error::Memory(sentence)) = &error else { panic!("{error:?}") };
        assert!(sentence.contains(&format!("free of {bytes}")) && sentence.contains("needed"), "{sentence}");
        assert_eq!(read, if bytes < weights + plan.staging { 0 } else { plan.file_bytes }, "{sentence}");
    }
    // One byte too little for the weights and the staging memory.
    let (error, read) = load(weights + plan.staging - 1);
    let Some(Error::Memory(sentence)) = &error else { panic!("{error:?}") };
    assert!(sentence.contains("weights to pack") && read == 0, "{sentence}");
}
