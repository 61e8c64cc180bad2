//! The epilogues of the linear kernels against f64. `linear_bits.rs` tests properties of all linear kernels:
//! bits, traffic and schedules.
//!
//! Bounds on `‖out − reference‖ / ‖reference‖`: [`f32_bound`] if the result is f32, 3e-3 if it is rounded to bf16,
//! which alone gives about 1.7e-3.

use crate::support::kernel;
use crate::support::layer;

use dflash::gpu::kernels::head::Head;
use dflash::gpu::kernels::inject::Inject;
use dflash::gpu::kernels::linear::{Shape, Workspace};
use dflash::gpu::kernels::qkv::Qkv;
use dflash::gpu::kernels::swiglu::Swiglu;
use kernel::*;
use layer::*;

const BF16_BOUND: f64 = 3e-3;

/// Rows of a launch. Together with the tests' N and K they leave tiles, chunks and slices partly filled.
const ROWS: [usize; 13] = [1, 2, 3, 8, 9, 16, 17, 31, 64, 100, 128, 130, 256];

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[track_caller]
fn close(what: &str, out: &[f32], reference: &[f64], bound: f64) {
    let error = relative_error(out, &narrow(reference));
    assert!(error <= bound, "{what}: error {error:.2e}, expected at most {bound:.0e}");
}

#[test]
fn slices_of_k_cover_it_and_depend_only_on_the_shape() {
    for n in [1, 64, 128, 1000, 4096, 12288, 24576, 151936] {
        for k in (32..=2048).step_by(32).chain([2560, 4096, 9728, 12288, 25600]) {
            let shape = Shape { n, k };
            let (slice, splits) = shape.slices();
            let groups = k / 32;
            assert!(
                slice * splits >= groups && slice * (splits - 1) < groups,
                "{shape:?}: {splits} of {slice}"
            );
            assert!(splits == 1 || slice >= 8, "{shape:?}: {splits} of {slice}");
            assert!(splits == 1 || (splits <= 8 && splits * shape.blocks() <= 264), "{shape:?}: {splits}");
        }
    }
    // Qwen3-8B: qkv, o, gate and up, down, head.
    let shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)];
    let slices = shapes.map(|(n, k)| Shape { n, k }.slices());
    assert_eq!(slices, [(32, 4), (22, 6), (128, 1), (64, 6), (128, 1)]);
}

/// Splits `bytes` into parts of these lengths.
fn parts<const N: usize>(bytes: &[u8], lengths: [usize; N]) -> [&[u8]; N] {
    let mut at = 0;
    let parts = lengths.map(|length| {
        at += length;
        &bytes[at - length..at]
    });
    assert_eq!(at, bytes.len());
    parts
}

#[test]
fn project_adds_the_residual_and_prepares_the_next_norm() {
    // 4384 = 137 groups of 32: eight slices of 18 groups, so a whole chunk of 512 and a partial one; the last
    // slice has 11 groups.
    let ks = [32, 64, 96, 256, 544, 1024, 1056, 2048, 4384];
    assert_eq!(Shape { n: 64, k: 4384 }.slices(), (18, 8));
    for (i, rows) in ROWS.into_iter().enumerate() {
        let shape = Shape { n: [64, 128, 192, 352][i % 4], k: ks[i % 9] };
        let Shape { n, .. } = shape;
        let data = Data::new(i as u64, rows, shape);
        let mut random = Random::new(100 + i as u64);
        let (x, gain) = (random.normals(rows * n, 2.0), random.normals(n, 1.0));
        let pitch = if i % 3 == 0 { 0 } else { 2 * n + 4 };
        let bytes = same_bits(|device| project(device, &data, &x, &gain, pitch));
        let part_count = n.div_ceil(128);
        let lengths = [rows * n * 4, rows * n * 2, rows * part_count * 4, rows * pitch * 2];
        let [out, y, sums, features] = parts(&bytes, lengths);
        let sum: Vec<f64> = data.product(false).iter().zip(&x).map(|(p, &x)| p + f64::from(x)).collect();
        let what = format!("{rows} rows, {shape:?}");
        close(&what, &from_bytes(out), &sum, f32_bound(2e-6));
        let scaled: Vec<f64> = sum.iter().enumerate().map(|(i, x)| x * f64::from(gain[i % n])).collect();
        close(&what, &from_bf16(&from_bytes(y)), &scaled, BF16_BOUND);
        let squares: Vec<f64> =
            sum.chunks(n).flat_map(|row| row.chunks(128).map(|p| p.iter().map(|x| x * x).sum())).collect();
        close(&what, &from_bytes(sums), &squares, f32_bound(2e-6));
        for (row, features) in from_bytes::<u16>(features).chunks(pitch.max(1)).enumerate() {
            let x: Vec<f32> = from_bytes(&out[row * n * 4..(row + 1) * n * 4]);
            assert_eq!(features[..n], to_bf16(&x), "{what}: features must be the rounded rows");
            assert!(features[n..].iter().all(|&f| f == POISON), "{what}: written between the rows");
        }
    }
}

#[test]
fn plain_results_are_scaled_products() {
    for (rows, k) in [(1, 64), (17, 1056), (130, 96)] {
        let shape = Shape { n: Kind::Plain.outputs(), k };
        let data = Data::new(rows as u64, rows, shape);
        let rows = Kind::Plain.run(gpu(), &data);
        let out: Vec<f32> = rows.iter().flat_map(|row| from_bytes::<f32>(&row[..shape.n * 4])).collect();
        close(&format!("{} rows, {shape:?}", rows.len()), &out, &data.product(true), f32_bound(2e-6));
    }
}

#[test]
fn swiglu_multiplies_silu_of_the_gate_with_up() {
    for (i, rows) in ROWS.into_iter().enumerate() {
        let inner = [32, 64, 96, 160][i % 4];
        let shape = Shape { n: inner * 2, k: [64, 288, 512, 1120, 4224][i % 5] };
        // The rows of W are all gates, then all ups.
        let data = Data::new(20 + i as u64, rows, shape);
        let packed_row =
            |r: usize| if r < inner { Swiglu::gate_up_rows(r).0 } else { Swiglu::gate_up_rows(r - inner).1 };
        let bytes = same_bits(|device| {
            let layer = data.upload(device, packed_row);
            let out = poisoned::<u16>(device, rows * inner);
            Swiglu { rows, inner, k: shape.k }.launch(device, &layer.input(true), &out).unwrap();
            bytes_of(device, &out)
        });
        let mut reference = Vec::new();
        for row in data.product(true).chunks(shape.n) {
            let (gate, up) = row.split_at(inner);
            reference.extend(gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u));
        }
        close(&format!("{rows} rows, {shape:?}"), &from_bf16(&from_bytes(&bytes)), &reference, BF16_BOUND);
    }
}

#[test]
fn swiglu_of_large_gates_is_zero_or_the_gate() {
    on_gpu(|device| {
        // One input is 1 and the others 0, so that the weights are the gates and ups.
        let inner = 32;
        let mut values = vec![0f32; 64 * 32];
        let gates = [0.0, -0.0, 1e4, -1e4, 88.0, -88.0, -104.0, 3e38, -3e38, 1e-30];
        for (i, gate) in gates.iter().enumerate() {
            (values[i * 32], values[(inner + i) * 32]) = (*gate, 0.5);
        }
        let mut x = vec![0f32; 32];
        x[0] = 1.0;
        let data = Data {
            shape: Shape { n: 64, k: 32 },
            w: to_bf16(&values),
            x: to_bf16(&x),
            sumsq: vec![0.0],
            num_active: 1,
            prefill_kernel: None,
        };
        let packed_row =
            |r: usize| if r < inner { Swiglu::gate_up_rows(r).0 } else { Swiglu::gate_up_rows(r - inner).1 };
        let layer = data.upload(device, packed_row);
        let out = poisoned::<u16>(device, inner);
        Swiglu { rows: 1, inner, k: 32 }.launch(device, &layer.input(false), &out).unwrap();
        let out = from_bf16(&download(device, &out));
        for (i, &gate) in from_bf16(&to_bf16(&gates)).iter().enumerate() {
            let expected = gate / (1.0 + (-f64::from(gate)).exp()) as f32 * 0.5;
            let (got, bound) = (out[i], expected.abs() * 0.004 + 1e-38);
            assert!((got - expected).abs() <= bound, "silu({gate}) / 2 is {got}, expected {expected}");
        }
    });
}

/// The best key of a block of logits whose first id is `first`.
fn rank(logits: &[f32], first: usize) -> u64 {
    let key = |(i, &l): (usize, &f32)| {
        let bits = (l + 0.0).to_bits();
        let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        if l.is_nan() || l == f32::INFINITY {
            u64::MAX
        } else {
            u64::from(ascending) << 32 | u64::from(!((first + i) as u32))
        }
    };
    logits.iter().enumerate().map(key).max().unwrap()
}

fn ranks(logits: &[f32], vocab: usize) -> Vec<u64> {
    let row = |row: &[f32]| row.chunks(128).enumerate().map(|(b, l)| rank(l, b * 128)).collect::<Vec<_>>();
    logits.chunks(vocab).flat_map(row).collect()
}

#[test]
fn head_gives_logits_and_the_best_key_of_every_block() {
    let cases =
        [(1, 96, None, 1.0), (9, 640, Some(3.0), 0.5), (16, 64, None, 2.0), (33, 256, Some(30.0), 1.0)];
    for (i, vocab) in [1, 17, 2048, 2049].into_iter().enumerate() {
        for (j, &(rows, k, softcap, multiplier)) in cases.iter().enumerate() {
            let data = Data::new((40 + i * 4 + j) as u64, rows, Shape { n: vocab, k });
            let kernel = Head { rows, vocab, k, multiplier, softcap, ids: vocab };
            let kept = same_bits(|device| {
                let (best, logits) = head(device, kernel, &data, true);
                [best, logits].concat()
            });
            let mut reference = data.product(true);
            for l in &mut reference {
                *l *= f64::from(multiplier);
                if let Some(cap) = softcap.map(f64::from) {
                    *l = cap * (*l / cap).tanh();
                }
            }
            let [best, logits] = parts(&kept, [rows * vocab.div_ceil(128) * 8, rows * vocab * 4]);
            let logits: Vec<f32> = from_bytes(logits);
            close(&format!("{kernel:?}"), &logits, &reference, f32_bound(2e-6));
            assert_eq!(from_bytes::<u64>(best), ranks(&logits, vocab), "{kernel:?}");
            on_gpu(|device| {
                let (alone, untouched) = head(device, kernel, &data, false);
                assert!(kept.starts_with(&alone), "{kernel:?}: best keys differ if logits are not stored");
                assert!(from_bytes::<u16>(&untouched).iter().all(|&w| w == POISON));
            });
        }
    }
}

#[test]
fn head_masks_ids_that_the_drafter_does_not_have() {
    for (vocab, ids) in [(300, 290), (300, 130), (257, 128), (300, 1)] {
        let (rows, k) = (9, 96);
        let data = Data::new(70, rows, Shape { n: vocab, k });
        on_gpu(|device| {
            let kernel = Head { rows, vocab, k, multiplier: 1.0, softcap: Some(30.0), ids: vocab };
            let mut expected: Vec<f32> = from_bytes(&head(device, kernel, &data, true).1);
            expected.chunks_mut(vocab).for_each(|row| row[ids..].fill(f32::NEG_INFINITY));
            let (best, logits) = head(device, Head { ids, ..kernel }, &data, true);
            assert_eq!(from_bytes::<f32>(&logits), expected, "{ids} of {vocab}");
            assert_eq!(from_bytes::<u64>(&best), ranks(&expected, vocab), "{ids} of {vocab}");
        });
    }
}

/// Logits go to the columns of their ids, other columns are not written, and best keys hold these ids.
#[test]
fn head_of_a_reduced_vocabulary_writes_logits_at_their_ids() {
    for (outputs, vocab) in [(200, 512), (129, 1001), (256, 256)] {
        let (rows, k) = (9, 96);
        let data = Data::new(71, rows, Shape { n: outputs, k });
        let ids: Vec<u32> = (0..outputs).map(|i| ((i * vocab + vocab - 1) / outputs) as u32).collect();
        let kernel = Head { rows, vocab: outputs, k, multiplier: 1.5, softcap: Some(30.0), ids: outputs };
        on_gpu(|device| {
            let own: Vec<f32> = from_bytes(&head(device, kernel, &data, true).1);
            let (best, logits) = reduced_head(device, kernel, &data, &ids, vocab);
            let (best, logits): (Vec<u64>, Vec<u32>) = (from_bytes(&best), from_bytes(&logits));
            let poison = (u32::from(POISON) << 16) | u32::from(POISON);
            let mut expected = vec![poison; rows * vocab];
            for (i, logit) in own.iter().enumerate() {
                expected[i / outputs * vocab + ids[i % outputs] as usize] = logit.to_bits();
            }
            assert!(logits == expected, "{outputs} of {vocab}");
            for (found, key) in best.iter().zip(ranks(&own, outputs)) {
                let id = ids[!(key as u32) as usize];
                assert_eq!(*found, (key >> 32 << 32) | u64::from(!id), "{outputs} of {vocab}");
            }
        });
    }
}

#[test]
fn best_key_is_the_lowest_of_equal_ids_and_marks_nan() {
    on_gpu(|device| {
        // The only input that is not 0 is the first, so the logits are a column of W.
        let (rows, vocab, k) = (8, 260, 32);
        let mut random = Random::new(60);
        let mut columns: Vec<Vec<f32>> = (0..rows).map(|_| random.normals(vocab, 1.0)).collect();
        columns[0].fill(1.0);
        columns[1].fill(f32::NEG_INFINITY);
        (columns[2][129], columns[2][259]) = (f32::NAN, f32::INFINITY);
        // The norm scales these to zeros of both signs.
        columns[3].fill(-1e-30);
        columns[3][140] = 1e-30;
        columns[4].fill(-7.0);
        (columns[4][100], columns[4][101]) = (-3.0, -3.0);
        (columns[5][5], columns[5][200]) = (f32::NEG_INFINITY, 50.0);
        let mut w = vec![0f32; vocab * k];
        let mut x = vec![0f32; rows * k];
        for row in 0..rows {
            // One row at a time: an infinity in one column times a zero input of another row would be NaN.
            for (v, &value) in columns[row].iter().enumerate() {
                w[v * k] = value;
            }
            x[row * k] = 1.0;
            let one = to_bf16(&x[row * k..(row + 1) * k]);
            let data = Data {
                shape: Shape { n: vocab, k },
                w: to_bf16(&w),
                x: one,
                sumsq: vec![if row == 3 { 1e34 } else { k as f32 }],
                num_active: 1,
                prefill_kernel: None,
            };
            let kernel = Head { rows: 1, vocab, k, multiplier: 1.0, softcap: None, ids: vocab };
            let (best, logits) = head(device, kernel, &data, true);
            let logits: Vec<f32> = from_bytes(&logits);
            let best: Vec<u64> = from_bytes(&best);
            assert_eq!(best, ranks(&logits, vocab), "row {row}");
            let winner = best.iter().copied().max().unwrap();
            match dflash::spec::sampling::argmax(&logits) {
                Some(id) => assert_eq!(!(winner as u32), id, "row {row}"),
                None if row == 1 => assert_eq!(winner >> 32, 0x007f_ffff, "-inf everywhere"),
                None => assert_eq!(winner, u64::MAX, "row {row}"),
            }
        }
    });
}

/// The expected queries, keys and values, `[rows][all heads][head_dim]`.
fn heads_of(data: &Data, cache: &Cache) -> Vec<f64> {
    let Qkv { heads, kv_heads, head_dim, positions, .. } = cache.qkv;
    let mut all = data.product(true);
    for (row, x) in all.chunks_mut(data.shape.n).enumerate() {
        let position = (cache.rows[row * 4 + 1] as usize).min(positions - 1);
        let table = &cache.rope[position * head_dim..(position + 1) * head_dim];
        for (h, x) in x.chunks_mut(head_dim).enumerate().take(heads + kv_heads) {
            if let Some(gains) = &cache.gains {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
                let scale = (mean + f64::from(EPS)).sqrt().recip();
                let gain = &gains[usize::from(h >= heads)];
                x.iter_mut().zip(gain).for_each(|(x, &g)| *x *= scale * f64::from(g));
            }
            for d in 0..head_dim / 2 {
                let (c, s) = (f64::from(table[d]), f64::from(table[head_dim / 2 + d]));
                let (a, b) = (x[d], x[d + head_dim / 2]);
                (x[d], x[d + head_dim / 2]) = (a * c - b * s, b * c + a * s);
            }
        }
    }
    all
}

/// Compares the result of [`qkv`] with [`heads_of`]: every row in its slot, nothing else written.
fn check_slots(what: &str, bytes: &[u8], data: &Data, cache: &Cache) {
    let Qkv { heads, kv_heads, head_dim, query_rows, pages, sequences, sequence_pages, keys_only, .. } =
        cache.qkv;
    let page_bytes = pages * kv_heads * 64 * head_dim * 2;
    let [queries, keys, values] = parts(bytes, [query_rows * heads * head_dim * 2, page_bytes, page_bytes]);
    let mut out: [Vec<u16>; 3] = [queries, keys, values].map(from_bytes);
    let reference = heads_of(data, cache);
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for (row, entry) in cache.rows.chunks(4).enumerate() {
        let [sequence, slot, query] = [entry[0], entry[2], entry[3]].map(|v| v as usize);
        if sequence >= sequences {
            continue;
        }
        for head in 0..heads + 2 * kv_heads {
            for d in 0..head_dim {
                let (buffer, at) = if head < heads {
                    if query >= query_rows || keys_only {
                        continue;
                    }
                    (0, (query * heads + head) * head_dim + d)
                } else {
                    let (buffer, kv_head) = ((head - heads) / kv_heads + 1, (head - heads) % kv_heads);
                    if slot / 64 >= sequence_pages {
                        continue;
                    }
                    let page = cache.table[sequence * sequence_pages + slot / 64] as usize;
                    if page >= pages {
                        continue;
                    }
                    let token = ((page * kv_heads + kv_head) * 64 + slot % 64) * head_dim;
                    (buffer, token + ((d / 8) ^ (slot % 8)) * 8 + d % 8)
                };
                got.push(out[buffer][at]);
                out[buffer][at] = POISON;
                expected.push(reference[row * data.shape.n + head * head_dim + d]);
            }
        }
    }
    close(what, &from_bf16(&got), &expected, BF16_BOUND);
    for (buffer, name) in out.iter().zip(["queries", "keys", "values"]) {
        assert!(buffer.iter().all(|&v| v == POISON), "{what}: {name} written outside the rows");
    }
}

#[test]
fn qkv_norms_rotates_and_stores_in_the_right_slots() {
    for (i, rows) in ROWS.into_iter().enumerate() {
        let (heads, kv_heads, head_dim) = HEADS[i % HEADS.len()];
        let mut cache = cache(70 + i as u64, rows, heads, kv_heads, head_dim, i % 4 != 3);
        cache.qkv.k = [64, 160, 512, 1024, 576][i % 5];
        let mut data = Data::new(80 + i as u64, rows, cache.qkv.shape());
        if i % 3 == 1 {
            // Heads with a mean square of about eps.
            data.sumsq.iter_mut().for_each(|s| *s *= 1e5);
        }
        let what = format!("{:?}", cache.qkv);
        check_slots(&what, &same_bits(|device| qkv(device, &data, &cache)), &data, &cache);
        cache.qkv.keys_only = true;
        cache.rows.chunks_mut(4).for_each(|row| row[3] = NONE);
        on_gpu(|device| check_slots(&what, &qkv(device, &data, &cache), &data, &cache));
    }
}

#[test]
fn invalid_rows_and_pages_are_not_written() {
    let mut random = Random::new(90);
    for (i, &(heads, kv_heads, head_dim)) in HEADS.iter().enumerate() {
        let rows = 16;
        let mut cache = cache(91 + i as u64, rows, heads, kv_heads, head_dim, true);
        cache.qkv.k = 64;
        let garbage = |random: &mut Random| match random.below(4) {
            0 => NONE,
            1 => random.next() as u32,
            2 => random.below(1 << 12) as u32,
            _ => 1 << random.below(32),
        };
        for row in cache.rows.chunks_mut(4) {
            row[random.below(4)] = garbage(&mut random);
            row[1] = garbage(&mut random);
        }
        // Callers never give two rows the same query row.
        cache.rows.chunks_mut(4).enumerate().for_each(|(r, row)| {
            if row[3] < 16 {
                row[3] = r as u32
            }
        });
        for number in cache.table.iter_mut().skip(1).step_by(2) {
            *number = cache.qkv.pages as u32 + garbage(&mut random) % 1000;
        }
        // The first sequence, slot, query row and page out of range.
        let Qkv { pages, sequences, sequence_pages, query_rows, .. } = cache.qkv;
        let [slots, queries] = [sequence_pages * 64, query_rows].map(|n| n as u32);
        let firsts = [[sequences as u32, 1, 0, 0], [1, 1, slots, 1], [2, 1, 3, queries], [0, 1, 64, 3]];
        cache.rows[..16].copy_from_slice(&firsts.concat());
        cache.table[1] = pages as u32;
        let mut slots_used = std::collections::BTreeSet::new();
        for row in cache.rows.chunks_mut(4) {
            if !slots_used.insert((row[0], row[2])) {
                row[2] = NONE;
            }
        }
        let data = Data::new(92, rows, cache.qkv.shape());
        let bytes = same_bits(|device| qkv(device, &data, &cache));
        check_slots(&format!("{:?}", cache.qkv), &bytes, &data, &cache);
    }
}

#[test]
fn injection_gathers_features_and_zeros_missing_ones() {
    let feature_rows = 21;
    for (i, rows) in ROWS.into_iter().enumerate() {
        let shape = Shape { n: [64, 160, 256][i % 3], k: [320, 1056, 96, 1536, 4384][i % 5] };
        let Shape { n, k } = shape;
        let data = Data::new(110 + i as u64, feature_rows, shape);
        let mut random = Random::new(120 + i as u64);
        let gain = random.normals(n, 1.0);
        let gather: Vec<u32> = (0..rows)
            .map(|row| match row % 5 {
                3 => [NONE, 21, 1 << 31, 4_000_000_000][row / 5 % 4],
                _ => random.below(feature_rows) as u32,
            })
            .collect();
        let bytes = same_bits(|device| {
            let mut layer = data.upload(device, |r| r);
            layer.workspace = Workspace::new(device, &[(shape, rows)]).unwrap();
            let y = poisoned::<u16>(device, rows * n);
            let sumsq = poisoned::<f32>(device, rows * n.div_ceil(128));
            let (gather, gain) = (upload(device, &gather), upload(device, &gain));
            let kernel = Inject { rows, n, k, feature_rows };
            kernel.launch(device, &layer.input(false), &gather, &y, &sumsq, &gain).unwrap();
            [bytes_of(device, &y), bytes_of(device, &sumsq)].concat()
        });
        let product = data.product(false);
        let row = |&from: &u32| match from as usize {
            from if from < feature_rows => product[from * n..(from + 1) * n].to_vec(),
            _ => vec![0.0; n],
        };
        let v: Vec<f64> = gather.iter().flat_map(row).collect();
        let scaled: Vec<f64> = v.iter().enumerate().map(|(i, v)| v * f64::from(gain[i % n])).collect();
        let squares: Vec<f64> =
            v.chunks(n).flat_map(|row| row.chunks(128).map(|p| p.iter().map(|x| x * x).sum())).collect();
        let [y, sums] = parts(&bytes, [rows * n * 2, rows * n.div_ceil(128) * 4]);
        let what = format!("{rows} rows, {shape:?}");
        close(&what, &from_bf16(&from_bytes(y)), &scaled, BF16_BOUND);
        close(&what, &from_bytes(sums), &squares, f32_bound(2e-6));
    }
}
