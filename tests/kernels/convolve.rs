//! The convolutions of a DFlash2 drafter against f64: before a sublayer with the projection to the coefficients of
//! both, and after it on the output projection. Bounds as in `linear.rs`.

use crate::support::kernel;
use crate::support::layer::*;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::convolve::Convolve;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::project::{Project, ProjectBuffers};
use kernel::*;

const BF16_BOUND: f64 = 3e-3;

/// Sequences, rows of a block, hidden size, taps, group. More than 128 rows are several launches, of whole blocks. The
/// third has three CUDA blocks of outputs, the fourth one with fewer than 16 rows of weights.
const CASES: [[usize; 5]; 8] = [
    [1, 8, 64, 2, 16],
    [3, 5, 96, 2, 4],
    [2, 16, 1056, 2, 16],
    [1, 1, 32, 1, 32],
    [9, 16, 160, 4, 32],
    [30, 5, 64, 8, 8],
    [1, 7, 2048, 2, 16],
    [2, 64, 288, 1, 12],
];

struct Block {
    convolve: Convolve,
    data: Data,
    base: Vec<f32>, // [taps][hidden]
}

fn block(seed: usize, [sequences, block, hidden, taps, group]: [usize; 5]) -> Block {
    let convolve = Convolve { rows: sequences * block, hidden, taps, group, block };
    let data = Data::new(300 + seed as u64, convolve.rows, convolve.shape());
    Block { convolve, data, base: Random::new(seed as u64).normals(taps * hidden, 0.7) }
}

impl Block {
    fn groups(&self) -> usize {
        self.convolve.hidden / self.convolve.group
    }

    /// Bytes of the output rows, and of the coefficients of the second convolution.
    fn run(&self, device: &dyn Device) -> [Vec<u8>; 2] {
        let (Convolve { rows, hidden, taps, .. }, groups) = (self.convolve, self.groups());
        let layer = self.data.upload(device, |row| Convolve::packed_row(taps, groups, row));
        let (out, dynamic) =
            (poisoned::<u16>(device, rows * hidden), poisoned::<f32>(device, rows * taps * groups));
        let base = constant(device, &self.base);
        self.convolve.launch(device, &layer.input(true), &out, &dynamic, &base).unwrap();
        [bytes_of(device, &out), bytes_of(device, &dynamic)]
    }

    /// The same for a sequence's rows alone.
    fn of_sequence(&self, sequence: usize) -> Block {
        let Convolve { hidden, block, .. } = self.convolve;
        let (first, parts) = (sequence * block, hidden.div_ceil(128));
        let data = Data {
            x: self.data.x[first * hidden..][..block * hidden].to_vec(),
            sumsq: self.data.sumsq[first * parts..][..block * parts].to_vec(),
            ..self.data.clone()
        };
        Block { convolve: Convolve { rows: block, ..self.convolve }, data, base: self.base.clone() }
    }
}

/// Rows of a convolution: `coefficient(row, tap, channel)` times the rows of `x`.
fn convolved(c: Convolve, x: &[f64], coefficient: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    let at = |i: usize| {
        let (row, channel) = (i / c.hidden, i % c.hidden);
        let taps = 0..c.taps.min(row % c.block + 1);
        taps.map(|o| coefficient(row, o, channel) * x[i - o * c.hidden]).sum()
    };
    (0..c.rows * c.hidden).map(at).collect()
}

#[test]
fn convolve_projects_coefficients_and_convolves_the_normed_rows() {
    for (seed, case) in CASES.into_iter().enumerate() {
        let own = block(seed, case);
        let (Convolve { rows, hidden, taps, group, .. }, groups) = (own.convolve, own.groups());
        let bytes = same_bits(|device| own.run(device).concat());
        let (out, dynamic) = bytes.split_at(rows * hidden * 2);
        // The rows of the projection are [side][tap][group].
        let (product, n) = (own.data.product(true), own.data.shape.n);
        let coefficient = |row: usize, side: usize, o: usize, group: usize| {
            product[row * n + (side * taps + o) * groups + group]
        };
        let parts = hidden.div_ceil(128);
        let scale = |row: usize| {
            let sum: f64 = own.data.sumsq[row * parts..][..parts].iter().map(|s| f64::from(*s)).sum();
            1.0 / (sum / hidden as f64 + f64::from(EPS)).sqrt()
        };
        let normed: Vec<f64> = (from_bf16(&own.data.x).iter().enumerate())
            .map(|(i, x)| f64::from(*x) * scale(i / hidden))
            .collect();
        let expected = convolved(own.convolve, &normed, |row, o, channel| {
            f64::from(own.base[o * hidden + channel]) + coefficient(row, 0, o, channel / group)
        });
        // The next layer divides by the root mean square.
        let expected: Vec<f32> =
            expected.iter().enumerate().map(|(i, y)| (y / scale(i / hidden)) as f32).collect();
        let out = from_bf16(&from_bytes(out));
        for (row, (out, expected)) in out.chunks(hidden).zip(expected.chunks(hidden)).enumerate() {
            let error = relative_error(out, expected);
            assert!(error < 1.5 * BF16_BOUND, "{case:?}: row {row}: {error:.1e}");
        }
        let error = relative_error(&out, &expected);
        assert!(error < BF16_BOUND, "{case:?}: {error:.1e}");
        let second = (0..rows * taps * groups).map(|i| {
            let (row, o) = (i / groups / taps, i / groups % taps);
            coefficient(row, 1, o, i % groups) as f32
        });
        let error = relative_error(&from_bytes::<f32>(dynamic), &second.collect::<Vec<_>>());
        assert!(error < f32_bound(2e-6), "{case:?}: coefficients: {error:.1e}");
    }
}

/// In a batch, the rows of a block have the bits that they have alone.
#[test]
fn convolved_blocks_do_not_depend_on_other_blocks() {
    on_gpu(|device| {
        for (seed, case) in [[3, 5, 96, 2, 4], [9, 16, 160, 4, 32], [30, 5, 64, 8, 8]].into_iter().enumerate()
        {
            let own = block(seed, case);
            let all = own.run(device);
            for sequence in [0, case[0] / 2, case[0] - 1] {
                for (all, alone) in all.iter().zip(own.of_sequence(sequence).run(device)) {
                    assert!(all[sequence * alone.len()..][..alone.len()] == alone, "{case:?}: {sequence}");
                }
            }
        }
    });
}

/// The projection of a convolved sublayer, as `project` of `linear.rs`.
#[test]
fn project_convolves_its_results_before_it_adds_them() {
    let ks = [96, 1056, 32, 544, 256, 2048, 64, 1024];
    for (seed, (case, k)) in CASES.into_iter().zip(ks).enumerate() {
        let own = block(seed, case);
        let (Convolve { rows, hidden: n, taps, group, .. }, groups) = (own.convolve, own.groups());
        let data = Data::new(400 + seed as u64, rows, Shape { n, k });
        let mut random = Random::new(500 + seed as u64);
        let (x, gain) = (random.normals(rows * n, 2.0), random.normals(n, 1.0));
        let coefficients = random.normals(rows * taps * groups, 0.8);
        let bytes = same_bits(|device| {
            let layer = data.upload(device, |row| row);
            let (x, y) = (upload(device, &x), poisoned::<u16>(device, rows * n));
            let (sumsq, gain) = (poisoned::<f32>(device, rows * n.div_ceil(128)), upload(device, &gain));
            let buffers = ProjectBuffers { x: &x, y: &y, sumsq: &sumsq, gain: &gain, features: None };
            let (dynamic, base) = (upload(device, &coefficients), constant(device, &own.base));
            let (project, input) = (Project { rows, n, k }, layer.input(false));
            project.launch_convolved(device, &input, &buffers, own.convolve, &dynamic, &base).unwrap();
            [x, y, sumsq].iter().flat_map(|buffer| bytes_of(device, buffer)).collect()
        });
        let (out, rest) = bytes.split_at(rows * n * 4);
        let (y, sums) = rest.split_at(rows * n * 2);
        let added = convolved(own.convolve, &data.product(false), |row, o, channel| {
            let dynamic = coefficients[(row * taps + o) * groups + channel / group];
            f64::from(own.base[o * n + channel]) + f64::from(dynamic)
        });
        let sum: Vec<f64> = added.iter().zip(&x).map(|(a, &x)| a + f64::from(x)).collect();
        let narrow = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let out: Vec<f32> = from_bytes(out);
        for (row, (out, sum)) in out.chunks(n).zip(sum.chunks(n)).enumerate() {
            let error = relative_error(out, &narrow(sum));
            assert!(error < f32_bound(4e-6), "{case:?}: row {row}: {error:.1e}");
        }
        let scaled: Vec<f64> = sum.iter().enumerate().map(|(i, x)| x * f64::from(gain[i % n])).collect();
        let error = relative_error(&from_bf16(&from_bytes(y)), &narrow(&scaled));
        assert!(error < BF16_BOUND, "{case:?}: {error:.1e}");
        let squares: Vec<f64> =
            sum.chunks(n).flat_map(|row| row.chunks(128).map(|p| p.iter().map(|x| x * x).sum())).collect();
        let error = relative_error(&from_bytes::<f32>(sums), &narrow(&squares));
        assert!(error < f32_bound(4e-6), "{case:?}: sums of squares: {error:.1e}");
    }
}

#[test]
fn convolutions_read_their_weights_once_and_refuse_other_sizes() {
    let Some(device) = TestGpu::counting() else { return };
    let own = block(0, [2, 16, 1056, 2, 16]);
    own.run(&device);
    let counts = device.counts()["convolve_32"];
    assert_eq!(counts.streamed, own.data.shape.weight_bytes() as u64);
    // Beside what it must move, each of the three blocks of outputs reads the activations of its slice of K and the
    // sums, the results of the slices go through memory, and each row reads its base and the row before.
    let (least, partial) = (own.convolve.bytes(), own.data.shape.workspace(32).0 as u64 * 2);
    let moved = counts.streamed + counts.read + counts.written;
    let rows = 32 * 1056 * (2 * 2 + 2 + 2 * 4) + 32 * 3 * 9 * 4 * own.data.shape.slices().1 as u64;
    assert!((least..least + partial + rows).contains(&moved), "{moved}, at least {least}");

    let small = device.allocate(64, "too little").unwrap();
    let layer = own.data.upload(&device, |row| row);
    let refused = |convolve: Convolve, part: &str| {
        let error = convolve.launch(&device, &layer.input(true), &small, &small, &small).unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    refused(Convolve { taps: 3, ..own.convolve }, "3 taps");
    refused(Convolve { group: 6, ..own.convolve }, "6 of 1056 channels");
    refused(Convolve { rows: 33, ..own.convolve }, "33 rows in blocks of 16");
    refused(own.convolve, "dynamic has 64 bytes");
}
