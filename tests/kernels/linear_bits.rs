//! Properties of every linear kernel: the bits of a row do not depend on the other rows, launches are
//! repeatable, weights are read once per pass, other traffic is small, shared memory has no bank conflicts,
//! launches refuse wrong sizes.

use crate::support::kernel;
use crate::support::layer;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::{Buffer, Counts, Device};
use dflash::gpu::kernels::head::Head;
use dflash::gpu::kernels::inject::Inject;
use dflash::gpu::kernels::linear::{Input, Shape, Workspace};
use dflash::gpu::kernels::project::{Project, ProjectBuffers};
use dflash::gpu::kernels::qkv::{Qkv, QkvBuffers};
use dflash::gpu::kernels::swiglu::Swiglu;
use kernel::*;
use layer::*;

#[test]
fn row_bits_do_not_depend_on_other_rows() {
    on_gpu(|device| {
        for kind in KINDS {
            // One slice of K; four slices, the last one shorter; eight slices.
            for (k, splits) in [(96, 1), (1056, 4), (2048, 8)] {
                let shape = Shape { n: kind.outputs(), k };
                assert_eq!(shape.slices().1, splits);
                let parts = k.div_ceil(128);
                let single = Data::new(1, 1, shape);
                let alone = kind.run(device, &single).remove(0);
                let mut random = Random::new(2);
                for (turn, rows) in [1, 2, 8, 16, 32, 64, 128, 131].into_iter().enumerate() {
                    let places = [(0, true), (rows - 1, false), (random.below(rows), true)];
                    for (n, (index, poisoned)) in places.into_iter().enumerate() {
                        // Each place with one of the three K; exhaustive: with all.
                        if n != (turn + splits / 3) % 3 && !exhaustive() {
                            continue;
                        }
                        let mut data =
                            Data { w: single.w.clone(), ..Data::new(3 + rows as u64, rows, shape) };
                        if poisoned {
                            data.x.fill(0x7fc1);
                            data.sumsq.fill(f32::NAN);
                        }
                        data.x[index * k..(index + 1) * k].copy_from_slice(&single.x);
                        data.sumsq[index * parts..(index + 1) * parts].copy_from_slice(&single.sumsq);
                        let bits = kind.run(device, &data).remove(index);
                        assert!(
                            bits == alone,
                            "{kind:?}, K {k}: row {index} of {rows}, NaN neighbours: {poisoned}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn schedules_give_the_same_bits() {
    let rows = 20;
    for kind in KINDS {
        let data = Data::new(5, rows, Shape { n: kind.outputs(), k: 1056 });
        assert_written(&same_bits(|device| kind.run(device, &data).concat()), &format!("{kind:?}"));
    }
}

/// The inputs and outputs of an LM head that tests launch several times.
struct Logits {
    kernel: Head,
    layer: Layer,
    best: Buffer,
    logits: Buffer,
}

impl Logits {
    fn new(device: &dyn Device, rows: usize, vocab: usize, k: usize) -> Logits {
        Logits {
            kernel: Head { rows, vocab, k, multiplier: 1.0, softcap: None, ids: vocab },
            layer: Data::new(6, rows, Shape { n: vocab, k }).upload(device, |r| r),
            best: poisoned::<u64>(device, rows * vocab.div_ceil(128)),
            logits: poisoned::<f32>(device, rows * vocab),
        }
    }

    fn launch(&self, device: &dyn Device, workspace: &Workspace) -> dflash::Result<()> {
        let input = Input { workspace, ..self.layer.input(true) };
        self.kernel.launch(device, &input, &self.best, Some(&self.logits), None)
    }

    /// Returns the logits and overwrites them with 0xff bytes.
    fn take(&self, device: &dyn Device) -> Vec<u8> {
        let bytes = bytes_of(device, &self.logits);
        device.fill(&self.logits, 0xff).unwrap();
        bytes
    }
}

#[test]
fn a_graph_that_shares_a_workspace_repeats_its_bits() {
    on_gpu(|device| {
        let shapes = [(3, 200, 640), (150, 64, 512), (17, 700, 1056)];
        let layers = shapes.map(|(rows, vocab, k)| Logits::new(device, rows, vocab, k));
        let launches: Vec<_> = layers.iter().map(|l| (l.kernel.shape(), l.kernel.rows)).collect();
        assert!(launches.iter().all(|l| l.0.slices().1 > 1));
        let shared = Workspace::new(device, &launches).unwrap();
        let right = layers.each_ref().map(|l| {
            l.launch(device, &l.layer.workspace).unwrap();
            l.take(device)
        });
        let graph =
            device.capture(&mut || layers.iter().try_for_each(|l| l.launch(device, &shared))).unwrap();
        for _ in 0..3 {
            device.replay(&graph).unwrap();
            for (layer, right) in layers.iter().zip(&right) {
                assert!(layer.take(device) == *right, "{:?}", layer.kernel);
            }
        }
    });
}

/// Eight blocks each compute a slice of one tile, and two run at the same time. The block that adds the slices
/// must find the sums of all warps of the other blocks.
#[test]
fn slices_are_added_after_all_warps_stored_theirs() {
    let device = TestGpu::new();
    let logits = Logits::new(&device, 3, 128, 2048);
    let run = || {
        let fresh = Workspace::new(&device, &[(logits.kernel.shape(), 3)]).unwrap();
        logits.launch(&device, &fresh).unwrap();
        logits.take(&device)
    };
    let expected = run();
    for schedule in 0..if exhaustive() { 200 } else { 40 } {
        set_schedule(schedule);
        assert!(run() == expected, "schedule {schedule}");
    }
}

#[test]
fn an_inactive_launch_writes_nothing() {
    for kind in KINDS {
        let Some(device) = TestGpu::counting() else { return };
        let shape = Shape { n: kind.outputs(), k: 1056 };
        kind.run(&device, &Data { num_active: 0, ..Data::new(7, 4, shape) });
        let counts = counted(&device);
        assert_eq!((counts.written, counts.mma), (0, 0), "{kind:?}");
        // Four groups per tile are loaded in each of the four slices before the kernel reads the flag.
        assert_eq!(counts.streamed, (shape.packed_rows() / 16 * 4 * 4 * 1024) as u64, "{kind:?}");
    }
    on_gpu(|device| {
        let inactive = Logits::new(device, 5, 300, 1056);
        device.upload(&inactive.layer.num_active, &[0; 4]).unwrap();
        inactive.launch(device, &inactive.layer.workspace).unwrap();
        for buffer in [&inactive.best, &inactive.logits] {
            assert!(download::<u16>(device, buffer).iter().all(|&w| w == POISON));
        }
        // Any other number means active. The counters must still be zero.
        device.upload(&inactive.layer.num_active, &[0, 0, 0, 0x80]).unwrap();
        inactive.launch(device, &inactive.layer.workspace).unwrap();
        assert_written(&bytes_of(device, &inactive.logits), "logits");
    });
}

/// The sum of the counters of all kernels.
fn counted(device: &TestGpu) -> Counts {
    let mut sum = Counts::default();
    device.counts().into_values().for_each(|c| sum += c);
    sum
}

#[test]
fn weights_are_read_once_per_pass_without_bank_conflicts() {
    for kind in KINDS {
        for rows in [1, 16, 32, 64, 128, 256] {
            for k in [96, 1056] {
                let shape = Shape { n: kind.outputs(), k };
                let Some(device) = TestGpu::counting() else { return };
                kind.run(&device, &Data::new(8, rows, shape));
                let counts = counted(&device);
                let (passes, what) = (rows.div_ceil(128), format!("{kind:?}, {rows} rows, K {k}"));
                assert_eq!(counts.streamed, (shape.weight_bytes() * passes) as u64, "{what}");
                // Two products per tile of weights, group of 32 inputs and 8 rows, rounded up to a power of two. With
                // more than 32 rows a warp has the tile eight further on too, or zeros in its place.
                let row_tiles = (rows.min(128).div_ceil(8).next_power_of_two() * passes) as u64;
                let weight_tiles = match shape.packed_rows() / 16 {
                    tiles if rows > 32 => tiles / 16 * 16 + (tiles % 16).min(8) * 2,
                    tiles => tiles,
                };
                assert_eq!(counts.mma, (weight_tiles * k / 32) as u64 * 2 * row_tiles, "{what}");
                assert!(counts.shared > 0, "{what}");
                assert_eq!(counts.conflicts, 0, "{what}");
            }
        }
    }
}

/// Activations are staged in chunks of K. A partial last chunk must read only its own groups: each block of
/// outputs reads every activation once.
#[test]
fn a_partial_last_chunk_reads_each_activation_once() {
    if TestGpu::counting().is_none() {
        return;
    }
    let n = Kind::Project.outputs();
    let [whole, partial] = [4096, 4384].map(|k| Shape { n, k });
    // Eight slices of 16 groups: one chunk of 16, two of 8 or four of 4. Seven slices of 18 groups and one of 11: a
    // partial chunk.
    assert_eq!([whole.slices(), partial.slices()], [(16, 8), (18, 8)]);
    for rows in [3, 16, 40, 100] {
        let read = |shape: Shape| {
            let device = TestGpu::new();
            Kind::Project.run(&device, &Data::new(13, rows, shape));
            counted(&device).read as usize
        };
        let blocks = if rows > 32 { whole.blocks().div_ceil(2) } else { whole.blocks() };
        let more = rows * (partial.k - whole.k) * 2 * blocks;
        assert_eq!(read(partial), read(whole) + more, "{rows} rows");
    }
}

#[test]
fn keys_only_reads_only_key_and_value_weights() {
    // 2 query heads, 1 KV head of 64: the first block holds only queries.
    let (rows, k) = (3, 544);
    let mut cache = cache(12, rows, 2, 1, 64, true);
    (cache.qkv.k, cache.qkv.keys_only) = (k, true);
    let Some(device) = TestGpu::counting() else { return };
    qkv(&device, &Data::new(11, rows, cache.qkv.shape()), &cache);
    assert_eq!(counted(&device).streamed, 2 * 64 * k as u64 * 2);
}

/// One layer of Qwen3-8B on 16 rows: hidden size 4096, 32 query heads and 8 KV heads of 128, 12288 neurons.
#[test]
fn a_layer_of_qwen3_8b_moves_its_weights_and_little_else() {
    if TestGpu::counting().is_none() {
        return;
    }
    let rows = 16;
    let (hidden, inner) = (4096, 12288);
    let counts_of = |kind: Kind, shape: Shape| {
        let device = TestGpu::new();
        let weights = device.allocate(shape.weight_bytes(), "weights").unwrap();
        device.fill(&weights, 0x3c).unwrap();
        device.seal(&weights);
        let x = upload(&device, &vec![0x3c00u16; rows * shape.k]);
        let sumsq = upload(&device, &vec![1f32; rows * hidden / 128]);
        let workspace = Workspace::new(&device, &[(shape, rows)]).unwrap();
        let input = Input {
            weights: &weights,
            x: &x,
            sumsq: Some(&sumsq),
            eps: EPS,
            prefill_kernel: None,
            num_active: None,
            workspace: &workspace,
        };
        let y = poisoned::<u16>(&device, rows * shape.n);
        match kind {
            Kind::Swiglu => Swiglu { rows, inner, k: hidden }.launch(&device, &input, &y).unwrap(),
            Kind::Qkv => {
                let mut cache = cache(9, rows, 32, 8, 128, true);
                cache.qkv.k = hidden;
                let pages = poisoned::<u16>(&device, cache.qkv.pages * 8 * 64 * 128);
                let gains = cache.gains.unwrap().map(|g| upload(&device, &g));
                let buffers = QkvBuffers {
                    rows: &upload(&device, &cache.rows),
                    queries: &y,
                    keys: &pages,
                    values: &poisoned::<u16>(&device, pages.bytes() / 2),
                    table: &upload(&device, &cache.table),
                    q_gain: Some(&gains[0]),
                    k_gain: Some(&gains[1]),
                    rope: &upload(&device, &cache.rope),
                };
                cache.qkv.launch(&device, &input, &buffers).unwrap();
            }
            _ => {
                let residual = upload(&device, &vec![0f32; rows * hidden]);
                let gain = upload(&device, &vec![1f32; hidden]);
                let out = ProjectBuffers { x: &residual, y: &y, sumsq: &sumsq, gain: &gain, features: None };
                let input = Input { sumsq: None, ..input };
                Project { rows, n: shape.n, k: shape.k }.launch(&device, &input, &out).unwrap();
            }
        }
        let counts = counted(&device);
        assert_eq!(counts.streamed, shape.weight_bytes() as u64, "{kind:?}");
        counts
    };
    let layer = [
        (Kind::Qkv, Shape { n: 6144, k: hidden }),
        (Kind::Project, Shape { n: hidden, k: hidden }),
        (Kind::Swiglu, Shape { n: inner * 2, k: hidden }),
        (Kind::Project, Shape { n: hidden, k: inner }),
    ];
    let (mut weights, mut others, mut per_mille) = (0, 0, Vec::new());
    for (kind, shape) in layer {
        let counts = counts_of(kind, shape);
        let other = counts.read + counts.written;
        weights += counts.streamed;
        others += other;
        per_mille.push((other * 1000).div_ceil(counts.streamed));
    }
    assert_eq!(weights, 385_875_968);
    // In thousandths of the weights, rounded up: qkv, o, gate and up, down.
    assert_eq!((others, &per_mille[..]), (61_508_288, &[217, 243, 129, 165][..]));
    assert!(others * 4 <= weights);
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let small = device.allocate(64, "too little").unwrap();
    let at = Logits::new(&device, 9, 300, 96);
    let refused = |what: dflash::Result<()>, part: &str| {
        let error = what.unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    let good = at.layer.input(true);
    let launch =
        |input: Input, kernel: Head| kernel.launch(&device, &input, &at.best, Some(&at.logits), None);
    launch(good, at.kernel).unwrap();
    refused(launch(Input { weights: &small, ..good }, at.kernel), "weights has 64 bytes, needs 58368");
    refused(launch(Input { x: &small, ..good }, at.kernel), "x has 64 bytes, needs 1728");
    refused(launch(Input { sumsq: Some(&small), ..good }, Head { rows: 17, ..at.kernel }), "needs");
    refused(launch(good, Head { k: 80, ..at.kernel }), "80 inputs");
    refused(launch(good, Head { rows: 0, ..at.kernel }), "0 rows");
    refused(launch(good, Head { vocab: 0, ..at.kernel }), "0 outputs");
    let odd = at.layer.x.slice(8, 1720).unwrap();
    refused(launch(Input { x: &odd, ..good }, Head { rows: 1, ..at.kernel }), "not a multiple of 16");
    // 640 inputs need partial sums, for which this workspace is too small.
    let more = Logits::new(&device, 9, 300, 640);
    refused(more.launch(&device, &at.layer.workspace), "partial sums has 16 bytes, needs");

    let out = ProjectBuffers { x: &small, y: &small, sumsq: &small, gain: &small, features: None };
    let unnormed = at.layer.input(false);
    refused(Project { rows: 1, n: 80, k: 96 }.launch(&device, &unnormed, &out), "80 outputs");
    refused(Project { rows: 1, n: 64, k: 96 }.launch(&device, &good, &out), "sums of squares");
    let out = ProjectBuffers {
        features: Some((&small, 66)),
        x: &at.logits,
        y: &at.logits,
        gain: &at.logits,
        ..out
    };
    refused(Project { rows: 1, n: 64, k: 96 }.launch(&device, &unnormed, &out), "a pitch of 66 features");
    refused(Swiglu { rows: 1, inner: 48, k: 96 }.launch(&device, &good, &small), "48 neurons");
    let inject = Inject { rows: 1, n: 64, k: 96, feature_rows: 0 };
    refused(inject.launch(&device, &unnormed, &small, &small, &small, &small), "0 rows of features");
    let cache = cache(10, 1, 3, 1, 64, false);
    let buffers = QkvBuffers {
        rows: &small,
        queries: &small,
        keys: &small,
        values: &small,
        table: &small,
        q_gain: None,
        k_gain: None,
        rope: &small,
    };
    let bad = |qkv: Qkv, part: &str| refused(qkv.launch(&device, &good, &buffers), part);
    bad(Qkv { head_dim: 96, ..cache.qkv }, "head dimension of 96");
    bad(Qkv { heads: 3, kv_heads: 2, ..cache.qkv }, "3 query heads and 2 key heads");
    bad(Qkv { positions: 0, ..cache.qkv }, "at least one position");
    bad(cache.qkv, "queries has 64 bytes, needs 384");
}
