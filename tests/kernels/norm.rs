//! The norm kernels against f64. Relative bounds: 2^-8 for y, which is rounded to bf16, 1e-6 for sums of
//! squares.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::norm::Norm;
use kernel::*;

const EPS: f32 = 1e-6;

/// Bound of `‖out − ref‖ / ‖ref‖` for an exact vector rounded to bf16.
const BF16: f64 = 1.0 / 256.0;

struct Data {
    norm: Norm,
    x: Vec<f32>,
    add: Vec<f32>,
    gain: Vec<f32>,
}

fn data(rows: usize, hidden: usize) -> Data {
    let mut random = Random::new((rows * 1000 + hidden) as u64);
    let mut of = |count, scale| random.normals(count, scale);
    Data {
        norm: Norm { rows, hidden },
        x: of(rows * hidden, 3.0),
        add: of(rows * hidden, 1.0),
        gain: of(hidden, 1.0),
    }
}

/// y of `full_norm`.
fn full(device: &dyn Device, data: &Data) -> Vec<u16> {
    let Norm { rows, hidden } = data.norm;
    let y = poisoned::<u16>(device, rows * hidden);
    data.norm.full(device, &y, &upload(device, &data.x), &upload(device, &data.gain), EPS).unwrap();
    download(device, &y)
}

/// x after the addition, y and the sums of squares of `residual_norm`.
fn residual(device: &dyn Device, data: &Data, add: bool) -> (Vec<f32>, Vec<u16>, Vec<f32>) {
    let Norm { rows, hidden } = data.norm;
    let (x, gain) = (upload(device, &data.x), upload(device, &data.gain));
    let added = add.then(|| upload(device, &data.add));
    let (y, sums) =
        (poisoned::<u16>(device, rows * hidden), poisoned::<f32>(device, rows * data.norm.parts()));
    data.norm.launch(device, &y, &sums, &x, added.as_ref(), &gain).unwrap();
    (download(device, &x), download(device, &y), download(device, &sums))
}

#[test]
fn residual_norm_adds_scales_and_sums_parts() {
    for (rows, hidden) in [(1, 32), (3, 128), (5, 192), (2, 1056), (2, 2560), (1, 4096)] {
        for add in [false, true] {
            let data = data(rows, hidden);
            let parts = data.norm.parts();
            if let Some(device) = TestGpu::counting() {
                residual(&device, &data, add);
                let counts = device.counts()["residual_norm"];
                // `bytes` counts the gain once; the kernel reads it once per row.
                let traffic = data.norm.bytes(add) as usize + (rows - 1) * hidden * 4;
                assert_eq!(counts.read + counts.written, traffic as u64);
            }
            let sum = |i: usize| if add { data.x[i] + data.add[i] } else { data.x[i] };
            let bytes = same_bits(|device| {
                let (x, y, sums) = residual(device, &data, add);
                [to_bytes(&x), to_bytes(&y), to_bytes(&sums)].concat()
            });
            let (x, rest) = bytes.split_at(rows * hidden * 4);
            let (y, sums) = rest.split_at(rows * hidden * 2);
            assert_written(sums, "sums of squares");
            let (x, y, sums) = (from_bytes::<f32>(x), from_bytes::<u16>(y), from_bytes::<f32>(sums));
            assert!((0..rows * hidden).all(|i| x[i] == sum(i)), "the residual stream, {rows} x {hidden}");
            let scaled: Vec<f32> = (0..rows * hidden).map(|i| x[i] * data.gain[i % hidden]).collect();
            assert_eq!(y, to_bf16(&scaled), "bf16(gain x), {rows} x {hidden}");
            for (r, row) in x.chunks(hidden).enumerate() {
                for (p, part) in row.chunks(128).enumerate() {
                    let exact: f64 = part.iter().map(|&v| f64::from(v).powi(2)).sum();
                    let got = f64::from(sums[r * parts + p]);
                    assert!((got / exact - 1.0).abs() < 1e-6, "row {r}, part {p}: {got}, exactly {exact}");
                }
            }
        }
    }
}

#[test]
fn full_norm_equals_rms_norm() {
    for (rows, hidden) in [(1, 32), (3, 160), (2, 2560), (1, 8256)] {
        let mut data = data(rows, hidden);
        if rows == 3 {
            // Makes x so small that eps matters.
            data.x.iter_mut().for_each(|x| *x *= 1e-3);
        }
        let bytes = same_bits(|device| to_bytes(&full(device, &data)));
        let mut expected = Vec::new();
        for row in data.x.chunks(hidden) {
            let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / hidden as f64;
            let rstd = 1.0 / (mean + f64::from(EPS)).sqrt();
            expected.extend(
                row.iter().zip(&data.gain).map(|(&v, &g)| (f64::from(v) * rstd * f64::from(g)) as f32),
            );
        }
        let error = relative_error(&from_bf16(&from_bytes(&bytes)), &expected);
        assert!(error < BF16, "{rows} x {hidden}: {error}");
    }
}

#[test]
fn residual_norm_times_rstd_equals_full_norm() {
    on_gpu(|device| {
        let data = data(4, 1088);
        let hidden = 1088;
        let (_, y, sums) = residual(device, &data, false);
        let parts = data.norm.parts();
        let mut finished = from_bf16(&y);
        for (row, sums) in finished.chunks_mut(hidden).zip(sums.chunks(parts)) {
            let rstd = 1.0 / (sums.iter().sum::<f32>() / hidden as f32 + EPS).sqrt();
            row.iter_mut().for_each(|v| *v *= rstd);
        }
        let error = relative_error(&finished, &from_bf16(&full(device, &data)));
        assert!(error < 2.0 * BF16, "{error}");
    });
}

#[test]
fn row_bits_do_not_depend_on_other_rows() {
    on_gpu(|device| {
        let hidden = 320;
        let mut data = data(1, hidden);
        let (row, add) = (data.x.clone(), data.add.clone());
        let alone = residual(device, &data, true);
        let alone_full = full(device, &data);
        for rows in [2, 8, 17, 128] {
            // The other rows are NaN and infinity.
            let index = rows * 2 / 3;
            data.norm.rows = rows;
            data.x = (0..rows * hidden).map(|i| if i % 3 == 0 { f32::NAN } else { f32::INFINITY }).collect();
            data.add = data.x.clone();
            data.x[index * hidden..][..hidden].copy_from_slice(&row);
            data.add[index * hidden..][..hidden].copy_from_slice(&add);
            let (x, y, sums) = residual(device, &data, true);
            let parts = data.norm.parts();
            assert_eq!(x[index * hidden..][..hidden], alone.0);
            assert_eq!(y[index * hidden..][..hidden], alone.1);
            assert_eq!(sums[index * parts..][..parts], alone.2);
            assert_eq!(full(device, &data)[index * hidden..][..hidden], alone_full);
        }
    });
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let buffer = upload(&device, &[0f32; 128]);
    for (rows, hidden, part) in
        [(1, 80, "80 columns"), (0, 64, "0 rows"), (70000, 64, "70000"), (1, 256, "needs 1024")]
    {
        let error =
            Norm { rows, hidden }.launch(&device, &buffer, &buffer, &buffer, None, &buffer).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    let odd = buffer.slice(8, 256).unwrap();
    let error =
        Norm { rows: 1, hidden: 64 }.launch(&device, &buffer, &buffer, &odd, None, &buffer).unwrap_err();
    assert!(error.to_string().contains("not a multiple of 16"), "{error}");
}
