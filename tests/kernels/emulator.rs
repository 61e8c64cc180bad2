//! The emulator: its operations against scalar arithmetic, and its reports on kernels with deliberate bugs.

use crate::support::kernel;

use dflash::gpu::device::{Arg, Buffer, Device, Kernel, Node};
use dflash::gpu::emulator::{Emulator, Schedule};
use dflash::gpu::kernels::embedding::Embedding;
use dflash::{Error, Result};
use kernel::*;

const fn toy(name: &'static str, threads: u32) -> Kernel {
    Kernel { file: "toys", name, threads, max_shared: 16384 }
}

const fn broken(name: &'static str, threads: u32) -> Kernel {
    Kernel { file: "broken", ..toy(name, threads) }
}

static MMA: Kernel = toy("toy_mma", 64);
static WARP: Kernel = toy("toy_warp", 32);
static BANKS: Kernel = toy("toy_banks", 32);
static GRID: Kernel = toy("toy_grid", 64);
static ATOMICS: Kernel = toy("toy_atomics", 64);
static LDMATRIX: Kernel = toy("toy_ldmatrix", 32);
static STAGING: Kernel = broken("broken_staging", 128);
static REUSE: Kernel = broken("broken_reuse", 128);
static WITHIN_WARP: Kernel = broken("broken_warp", 32);
static BOUNDS: Kernel = broken("broken_bounds", 32);
static SKIPPED: Kernel = broken("broken_mma", 32);
static BARRIER: Kernel = broken("broken_barrier", 64);
static OUTPUT: Kernel = broken("broken_output", 64);
static COPY: Kernel = broken("broken_copy", 32);
static ORDER: Kernel = broken("broken_order", 32);
static RULES: Kernel = broken("broken_rules", 32);
static LAST: Kernel = broken("broken_last", 32);
#[cfg(not(feature = "sanitize"))]
static STACK: Kernel = broken("broken_stack", 64);
static TRAP: Kernel = broken("broken_trap", 32);

/// The results of `test` under each schedule.
fn outcomes<T>(test: impl Fn(&Emulator) -> Result<T>) -> Vec<Result<T>> {
    let on = |schedule| {
        let device = Emulator::new();
        device.set_schedule(schedule);
        test(&device)
    };
    Schedule::ALL.into_iter().map(on).collect()
}

/// Runs one block of a kernel with arguments (out, in, bug) on the input 0, 1, 2, ...
fn run(device: &Emulator, kernel: &'static Kernel, count: usize, bug: u32) -> Result<Vec<u32>> {
    let input: Vec<u32> = (0..count as u32).collect();
    let out = poisoned::<u32>(device, count);
    device.launch(kernel, [1, 1, 1], 0, &[(&out).into(), (&upload(device, &input)).into(), bug.into()])?;
    Ok(download(device, &out))
}

/// Asserts that `test` fails under every schedule with an error that contains `parts`.
fn reported<T>(test: impl Fn(&Emulator) -> Result<T>, parts: &[&str]) {
    for (schedule, outcome) in Schedule::ALL.iter().zip(outcomes(test)) {
        let message = outcome.err().map(|e| e.to_string()).unwrap_or_default();
        for part in parts {
            assert!(message.contains(part), "{schedule:?}: {message:?} does not contain {part:?}");
        }
    }
}

#[test]
fn embedding_gathers_rows_and_zeros_unknown_tokens() {
    let (hidden, vocab) = (72, 11);
    let table = Random::new(1).bf16(vocab * hidden, 1.0);
    let tokens = [3u32, 0, 10, 11, u32::MAX, 3];
    let bytes = five_schedules(|device| {
        let out = poisoned::<f32>(device, tokens.len() * hidden);
        let (table, tokens) = (constant(device, &table), upload(device, &tokens));
        let embedding = Embedding { rows: 6, hidden, vocab, packed: false, scale: 1.0 };
        embedding.launch(device, &out, &table, &tokens).unwrap();
        bytes_of(device, &out)
    });
    let out: Vec<f32> = from_bytes(&bytes);
    for (row, &token) in tokens.iter().enumerate() {
        let expected = match token as usize {
            t if t < vocab => from_bf16(&table[t * hidden..(t + 1) * hidden]),
            _ => vec![0.0; hidden],
        };
        assert_eq!(out[row * hidden..(row + 1) * hidden], expected, "row {row}");
    }
}

#[test]
fn mma_multiplies_matrices() {
    let mut random = Random::new(2);
    let (a, b) = (random.bf16(256, 1.0), random.bf16(128, 1.0));
    let bytes = five_schedules(|device| {
        let out = poisoned::<f32>(device, 256);
        let args = [(&out).into(), (&upload(device, &a)).into(), (&upload(device, &b)).into(), Arg::U32(1)];
        device.launch(&MMA, [1, 1, 1], 0, &args).unwrap();
        assert_eq!(device.counts()["toy_mma"].mma, 2);
        bytes_of(device, &out)
    });
    let (a, b, out) = (from_bf16(&a), from_bf16(&b), from_bytes::<f32>(&bytes));
    let product: Vec<f32> = (0..256)
        .map(|i| {
            (0..16).map(|k| f64::from(a[i / 8 % 16 * 16 + k]) * f64::from(b[k * 8 + i % 8])).sum::<f64>()
                as f32
        })
        .collect();
    assert!(relative_error(&out, &product) < 1e-6);
}

#[test]
fn ldmatrix_distributes_rows_and_counts_conflicts() {
    let rows: Vec<u16> = (0..256).collect();
    for transposed in [false, true] {
        // A pitch of 80 bytes uses every bank once; 128 bytes put all eight rows of a matrix on the same four
        // banks.
        for (pitch, conflicts) in [(80, 0), (16, 0), (128, 7), (64, 3)] {
            let bytes = five_schedules(|device| {
                let out = poisoned::<u32>(device, 32 * 4);
                let input = upload(device, &rows);
                let args = [(&out).into(), (&input).into(), Arg::U32(pitch), Arg::U32(transposed.into())];
                device.launch(&LDMATRIX, [1, 1, 1], 32 * pitch, &args).unwrap();
                let counts = device.counts()["toy_ldmatrix"];
                assert_eq!((counts.shared, counts.conflicts), (1, conflicts * 4), "pitch {pitch}");
                bytes_of(device, &out)
            });
            for (i, pair) in from_bytes::<u32>(&bytes).into_iter().enumerate() {
                let (lane, matrix) = (i / 4, i % 4);
                let (g, t) = (lane / 4, lane % 4 * 2);
                let at = |row: usize, column: usize| u32::from(rows[(matrix * 8 + row) * 8 + column]);
                let expected =
                    if transposed { at(t, g) | at(t + 1, g) << 16 } else { at(g, t) | at(g, t + 1) << 16 };
                assert_eq!(pair, expected, "transposed {transposed}, lane {lane}, matrix {matrix}");
            }
        }
    }
}

#[test]
fn warp_operations_exchange_values() {
    let input: Vec<u32> = (0..32).map(|i| i * i + 1).collect();
    let bytes = five_schedules(|device| {
        let out = poisoned::<u32>(device, 12 * 32);
        device.launch(&WARP, [1, 1, 1], 0, &[(&out).into(), (&upload(device, &input)).into()]).unwrap();
        bytes_of(device, &out)
    });
    let out: Vec<u32> = from_bytes(&bytes);
    let ballot = (0..32).filter(|&l| input[l].is_multiple_of(3)).fold(0, |bits, l| bits | 1 << l);
    for (l, &own) in input.iter().enumerate() {
        let expected = [
            input[5],
            input[l / 8 * 8 + (l + 1) % 8],
            input[l ^ 9],
            if l < 3 { own } else { input[l - 3] },
            if l + 3 > 31 { own } else { input[l + 3] },
            if l % 16 + 3 > 15 { own } else { input[l + 3] },
            ballot,
            3,
            input[l ^ 1],
            input.iter().sum(),
            input[31],
            input[0],
        ];
        let got: Vec<u32> = (0..12).map(|row| out[row * 32 + l]).collect();
        assert_eq!(got, expected, "lane {l}");
    }
}

#[test]
fn atomics_do_not_depend_on_order_or_threads() {
    let mut input = Random::new(3);
    let values: Vec<u32> = (0..8 * 64).map(|_| input.next() as u32 >> 8).collect();
    let test = |device: &Emulator| {
        let (out, wide) = (upload(device, &[0u32; 3]), upload(device, &[0u64; 2]));
        let args = [(&out).into(), (&wide).into(), (&upload(device, &values)).into()];
        device.launch(&ATOMICS, [8, 1, 1], 0, &args).unwrap();
        [bytes_of(device, &out), bytes_of(device, &wide)].concat()
    };
    let bytes = five_schedules(test);
    let parallel = Emulator::new();
    parallel.set_threads(2);
    assert_eq!(test(&parallel), bytes);
    let sum: u64 = values.iter().map(|&v| u64::from(v)).sum();
    let (index, max) = values.iter().enumerate().max_by_key(|&(i, v)| (v, i)).unwrap();
    let or = values.iter().fold(0, |a, b| a | b);
    assert_eq!(from_bytes::<u32>(&bytes[..12]), [sum as u32, *max, or]);
    assert_eq!(from_bytes::<u64>(&bytes[12..]), [sum << 20, (u64::from(*max) << 32) | (index as u64 / 64)]);
}

#[test]
fn ended_threads_leave_barriers_and_blocks_have_3_indices() {
    for threads in [1, 2] {
        let bytes = five_schedules(|device| {
            device.set_threads(threads);
            let out = poisoned::<u32>(device, 24);
            device.launch(&GRID, [2, 3, 4], 0, &[(&out).into()]).unwrap();
            assert_eq!(device.counts()["toy_grid"].blocks, 24);
            bytes_of(device, &out)
        });
        let expected: Vec<u32> = (0..24).map(|i| 497 + i / 6 * 32 + i / 2 % 3 * 10000).collect();
        assert_eq!(from_bytes::<u32>(&bytes), expected);
    }
}

#[test]
fn bank_conflicts_of_lane_accesses_are_counted_on_request() {
    // Width, stride, extra passes of the load: 32 banks of 4 bytes, 128 bytes per pass.
    let cases = [
        (4, 4, 0),
        (4, 8, 1),
        (4, 128, 31),
        (4, 0, 0),
        (8, 8, 0),
        (8, 16, 2),
        (16, 16, 0),
        (16, 80, 0),
        (16, 128, 28),
    ];
    for (width, stride, extra) in cases {
        let device = Emulator::new();
        device.count_conflicts(true);
        let out = poisoned::<u32>(&device, 32);
        device.launch(&BANKS, [1, 1, 1], 8192, &[(&out).into(), Arg::U32(width), Arg::U32(stride)]).unwrap();
        let counts = device.counts()["toy_banks"];
        assert_eq!((counts.shared, counts.conflicts), (17, extra), "width {width}, stride {stride}");
    }
}

#[test]
fn a_missing_barrier_after_staging_is_caught() {
    let right: Vec<u32> = (0..128).map(|i| i ^ 32).collect();
    assert!(outcomes(|d| run(d, &STAGING, 128, 0)).iter().all(|r| r.as_ref() == Ok(&right)));
    let broken = outcomes(|d| run(d, &STAGING, 128, 1));
    assert!(broken.iter().any(|r| r.as_ref() != Ok(&right)));
    assert!(broken.iter().any(|r| r != &broken[0]), "five schedules must not agree on wrong bits");
}

#[test]
fn greedy_schedules_catch_a_missing_barrier_before_reuse() {
    let right: Vec<u32> = (0..512).map(|i| i ^ 32).collect();
    assert!(outcomes(|d| run(d, &REUSE, 512, 0)).iter().all(|r| r.as_ref() == Ok(&right)));
    let broken = outcomes(|d| run(d, &REUSE, 512, 1));
    assert!(broken[3..].iter().any(|r| r.as_ref() != Ok(&right)), "greedy schedules run one warp ahead");
    assert!(broken.iter().any(|r| r != &broken[0]));
}

#[test]
fn a_missing_syncwarp_is_caught() {
    let right: Vec<u32> = (0..32).map(|i| i ^ 1).collect();
    assert!(outcomes(|d| run(d, &WITHIN_WARP, 32, 0)).iter().all(|r| r.as_ref() == Ok(&right)));
    let broken = outcomes(|d| run(d, &WITHIN_WARP, 32, 1));
    assert!(broken.iter().any(|r| r != &broken[0]));
}

fn bounds(device: &Emulator, bug: u32) -> Result<()> {
    let out = poisoned::<u32>(device, 32);
    device.launch(&BOUNDS, [1, 1, 1], 100 * 4, &[(&out).into(), Arg::U32(100), bug.into()])
}

fn output(device: &Emulator, bug: u32) -> Result<Vec<u8>> {
    let out = poisoned::<u32>(device, 100);
    device.launch(&OUTPUT, [1, 1, 1], 0, &[(&out).into(), Arg::U32(100), bug.into()])?;
    Ok(bytes_of(device, &out))
}

#[cfg(not(feature = "sanitize"))]
#[test]
fn writes_outside_shared_and_global_memory_are_reported() {
    assert!(outcomes(|d| bounds(d, 0)).iter().all(Result::is_ok));
    reported(|d| bounds(d, 1), &["kernel broken_bounds", "400 bytes of dynamic shared memory"]);
    reported(|d| bounds(d, 2), &["kernel broken_bounds", "400 bytes of dynamic shared memory"]);
    reported(|d| bounds(d, 3), &["kernel broken_bounds", "static shared array of 128 bytes"]);
    assert!(outcomes(|d| output(d, 0)).iter().all(Result::is_ok));
    reported(|d| output(d, 2), &["kernel broken_output", "outside a buffer of 400 bytes"]);
}

/// The sanitizer ends the process in which it finds an error, so this test runs itself once per bug and
/// passes the bug in the environment.
#[cfg(feature = "sanitize")]
#[test]
fn the_sanitizer_reports_bad_accesses_with_their_line() {
    const BUG: &str = "DFLASH_TEST_BUG";
    let device = Emulator::new();
    match std::env::var(BUG).as_deref() {
        Ok("output") => return drop(output(&device, 2)),
        Ok(bug) => return drop(bounds(&device, bug.parse().unwrap())),
        Err(_) => {}
    }
    bounds(&device, 0).unwrap();
    output(&device, 0).unwrap();
    for bug in ["1", "2", "3", "output"] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "emulator::the_sanitizer_reports_bad_accesses_with_their_line", "--nocapture"])
            .env(BUG, bug)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stderr);
        assert!(!child.status.success(), "bug {bug} was not reported");
        assert!(text.contains("broken.cu:"), "bug {bug}: {text}");
    }
}

#[test]
fn an_unwritten_element_stays_poison() {
    assert_written(&five_schedules(|d| output(d, 0).unwrap()), "out");
    let missing = five_schedules(|d| output(d, 1).unwrap());
    assert!(std::panic::catch_unwind(|| assert_written(&missing, "out")).is_err());
    assert!(from_bytes::<f32>(&missing)[99].is_nan());
}

#[test]
fn a_lane_that_skips_a_warp_operation_is_named() {
    let skip = |bug: u32| {
        move |device: &Emulator| {
            let out = poisoned::<f32>(device, 32);
            device.launch(&SKIPPED, [1, 1, 1], 0, &[(&out).into(), bug.into()])
        }
    };
    assert!(outcomes(skip(0)).iter().all(Result::is_ok));
    // Lane 5 reaches the shuffle while the others are at the product, or the other way round.
    reported(
        skip(1),
        &["kernel broken_mma, block (0,0,0)", "broken.cu:", "different operations", "mma", "__shfl_xor_sync"],
    );
    reported(skip(2), &["stuck: warp 0 lanes 0-4, 6-31 at mma (broken.cu:", "warp 0 lanes 5 ended"]);
}

#[test]
fn threads_that_miss_a_barrier_are_named() {
    let barrier = |bug: u32| {
        move |device: &Emulator| {
            let out = poisoned::<u32>(device, 64);
            device.launch(&BARRIER, [1, 1, 1], 0, &[(&out).into(), bug.into()])
        }
    };
    assert!(outcomes(barrier(0)).iter().all(Result::is_ok));
    reported(
        barrier(1),
        &[
            "kernel broken_barrier",
            "stuck: warp 0 all lanes at __syncthreads (broken.cu:",
            "warp 1 lanes 0-7, 9-31 at __syncthreads",
            "warp 1 lanes 8 at __syncwarp (broken.cu:",
        ],
    );
    reported(barrier(2), &["__syncthreads() while other threads wait at the one of broken.cu:"]);
}

#[test]
fn a_copy_without_its_wait_leaves_poison() {
    let input: Vec<u32> = (0..256).collect();
    let copy = |device: &Emulator, bug: u32| -> Vec<u32> {
        let out = poisoned::<u32>(device, 256);
        device
            .launch(&COPY, [1, 1, 1], 0, &[(&out).into(), (&upload(device, &input)).into(), bug.into()])
            .unwrap();
        download(device, &out)
    };
    let device = Emulator::new();
    let right: Vec<u32> = input.iter().map(|&i| if i < 128 + 64 { i } else { 0 }).collect();
    assert_eq!(copy(&device, 0), right);
    let poison = u32::from(POISON) << 16 | u32::from(POISON);
    assert_eq!(copy(&device, 1), [poison; 256]);
    let half = copy(&device, 2);
    assert_eq!((&half[..128], &half[128..]), (&right[..128], &[poison; 128][..]));
}

#[test]
fn a_sum_whose_order_depends_on_the_rows_is_caught() {
    let data = Random::new(5).normals(4 * 256, 1.0);
    let sums = |device: &Emulator, rows: usize, bug: u32| -> Vec<u8> {
        let out = poisoned::<f32>(device, rows);
        let args = [(&out).into(), (&upload(device, &data)).into(), Arg::U32(rows as u32), bug.into()];
        device.launch(&ORDER, [rows as u32, 1, 1], 0, &args).unwrap();
        bytes_of(device, &out)
    };
    let row = |bug, rows| five_schedules(|d| sums(d, rows, bug))[..4].to_vec();
    assert_eq!(row(0, 1), row(0, 4));
    assert_ne!(row(1, 1), row(1, 4), "schedules agree; only the number of rows changes the bits");
}

#[test]
fn broken_memory_rules_are_reported() {
    let input = vec![0u8; 64];
    let rules = |bug: u32, sealed: bool| {
        let input = input.clone();
        move |device: &Emulator| {
            let (out, from) = (poisoned::<u32>(device, 128), upload(device, &input));
            if sealed {
                device.seal(&from);
            }
            device.launch(&RULES, [1, 1, 1], 0, &[(&out).into(), (&from).into(), bug.into()])
        }
    };
    assert!(outcomes(rules(0, false)).iter().all(Result::is_ok));
    assert!(
        outcomes(rules(3, true)).iter().all(Result::is_ok),
        "a streaming load from sealed memory may precede grid_wait"
    );
    reported(rules(1, false), &["broken.cu:", "16-byte load at address", "not a multiple of 16"]);
    reported(rules(2, true), &["16-byte load before grid_wait()"]);
    reported(rules(3, false), &["16-byte streaming load before grid_wait()"]);
    reported(rules(4, false), &["ended without grid_wait()"]);
    reported(rules(5, false), &["mask 0000ffff"]);
    assert!(
        outcomes(rules(6, true)).iter().all(Result::is_ok),
        "a prefetch of sealed memory may precede it, too"
    );
    reported(rules(6, false), &["L2 prefetch before grid_wait()"]);
    reported(rules(7, true), &["L2 prefetch before grid_wait()"]);
    let trap = |device: &Emulator| {
        let out = poisoned::<u32>(device, 32);
        device.launch(&TRAP, [1, 1, 1], 0, &[(&out).into(), Arg::U32(1)])
    };
    reported(trap, &["kernel broken_trap, block (0,0,0), thread (3,0,0)", "called __trap()"]);
}

#[cfg(not(feature = "sanitize"))] // the sanitizer gives every thread a larger stack
#[test]
fn a_stack_that_is_too_small_is_reported() {
    let deep = |bug: u32| {
        move |device: &Emulator| {
            let out = poisoned::<u32>(device, 64);
            device.launch(&STACK, [1, 1, 1], 0, &[(&out).into(), bug.into()])
        }
    };
    assert!(outcomes(deep(0)).iter().all(Result::is_ok));
    reported(deep(1), &["kernel broken_stack", "more than its 65536 bytes of stack"]);
}

#[test]
fn the_last_block_sums_in_block_order_or_is_caught() {
    let data = Random::new(6).normals(16 * 32, 1.0);
    let last = |device: &Emulator, bug: u32| -> Result<Vec<u8>> {
        let (out, partial) = (poisoned::<f32>(device, 1), poisoned::<f32>(device, 16));
        let counter = upload(device, &[0u32; 2]);
        let args = [
            (&out).into(),
            (&partial).into(),
            (&counter).into(),
            (&upload(device, &data)).into(),
            bug.into(),
        ];
        device.launch(&LAST, [16, 1, 1], 0, &args)?;
        Ok(bytes_of(device, &out))
    };
    let right = five_schedules(|d| last(d, 0).unwrap());
    let parallel = Emulator::new();
    parallel.set_threads(2);
    assert_eq!(last(&parallel, 0).unwrap(), right);
    let broken: Vec<_> = outcomes(|d| last(d, 1));
    assert!(broken.iter().any(|r| r.as_ref() != Ok(&right)));
    // Not in every schedule: thread 0 may be the first.
    let mut early = outcomes(|d| last(d, 2)).into_iter().filter_map(Result::err);
    assert!(early.any(|e| e.to_string().contains("release before a barrier: thread 1")));
}

#[test]
fn launches_that_do_not_fit_the_kernel_are_refused() {
    let device = Emulator::new();
    let (out, input) = (poisoned::<u32>(&device, 384), upload(&device, &[0u32; 32]));
    let good: [Arg; 2] = [(&out).into(), (&input).into()];
    static WRONG_SIZE: Kernel = toy("toy_warp", 64);
    static UNKNOWN: Kernel = toy("toy_nothing", 32);
    let refused = |kernel, grid, shared, args: &[Arg], part: &str| {
        let error = device.launch(kernel, grid, shared, args).unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    static WRONG_FILE: Kernel = broken("toy_warp", 32);
    static TOO_MUCH: Kernel = Kernel { max_shared: (227 << 10) + 1, ..toy("toy_warp", 32) };
    refused(&WRONG_FILE, [1, 1, 1], 0, &good, "in toys.cu, but declared in broken.cu");
    refused(&TOO_MUCH, [1, 1, 1], 0, &good, "a block has at most 232448");
    refused(&UNKNOWN, [1, 1, 1], 0, &good, "toy_nothing: not in the host build");
    refused(&WRONG_SIZE, [1, 1, 1], 0, &good, "32 threads per block");
    refused(&WARP, [1, 0, 1], 0, &good, "grid");
    refused(&WARP, [1, 1, 70000], 0, &good, "grid");
    refused(&WARP, [1, 1, 1], 16385, &good, "16385 bytes of dynamic shared memory");
    refused(&WARP, [1, 1, 1], 0, &good[..1], "arguments \"p\", expected \"pp\"");
    refused(&WARP, [1, 1, 1], 0, &[good[0].clone(), 1u64.into()], "arguments \"pU\", expected \"pp\"");
    device.launch(&WARP, [1, 1, 1], 0, &good).unwrap();
}

#[test]
fn a_graph_repeats_its_launches_and_can_be_read() {
    let device = Emulator::new();
    let input: Vec<u32> = (1..33).collect();
    let (out, input) = (poisoned::<u32>(&device, 32), upload(&device, &input));
    let args: [Arg; 3] = [(&out).into(), (&input).into(), 0u32.into()];
    let graph = device
        .capture(&mut || {
            device.fill(&out, 0)?;
            device.launch(&WITHIN_WARP, [1, 1, 1], 0, &args)?;
            device.copy(&input, &out)
        })
        .unwrap();
    assert_unwritten(&device, &out);
    let Node::Launch(launch) = &graph.nodes[1] else { panic!("{:?}", graph.nodes[1]) };
    assert_eq!((launch.kernel.name, launch.grid, &launch.args[..]), ("broken_warp", [1, 1, 1], &args[..]));
    device.replay(&graph).unwrap();
    assert_eq!(download::<u32>(&device, &input)[..4], [2, 1, 4, 3]);
    device.replay(&graph).unwrap();
    assert_eq!(download::<u32>(&device, &input)[..4], [1, 2, 3, 4]);
    assert_eq!(device.counts()["broken_warp"].launches, 2);
    let failed = device.capture(&mut || device.allocate(16, "a buffer").map(drop));
    assert!(matches!(failed, Err(Error::Internal(text)) if text.contains("while a graph is captured")));
    device.allocate(16, "a buffer").unwrap();
}

fn assert_unwritten(device: &Emulator, buffer: &Buffer) {
    assert!(download::<u16>(device, buffer).iter().all(|&word| word == POISON));
}

#[test]
fn counters_count_bytes_blocks_and_launches() {
    let device = Emulator::new();
    let (hidden, vocab, rows) = (64, 5, 3);
    let table = constant(&device, &vec![0u16; vocab * hidden]);
    let out = poisoned::<f32>(&device, rows * hidden);
    let tokens = upload(&device, &[1u32, 4, 0]);
    let embedding = Embedding { rows, hidden, vocab, packed: false, scale: 1.0 };
    embedding.launch(&device, &out, &table, &tokens).unwrap();
    let counts = device.counts()["embedding"];
    assert_eq!((counts.launches, counts.blocks), (1, 3));
    assert_eq!((counts.streamed, counts.written), ((rows * hidden * 2) as u64, (rows * hidden * 4) as u64));
    // Every thread reads its block's token.
    assert_eq!(counts.read, (rows * 256 * 4) as u64);
    device.reset_counts();
    assert!(device.counts().is_empty());
}

#[test]
fn a_machine_without_a_gpu_gets_one_sentence() {
    match dflash::gpu::cuda::Cuda::open(0) {
        Ok(device) => assert!(device.properties().capability >= (8, 0)),
        Err(Error::Unsupported(text)) => {
            assert!(text.starts_with("device cuda: ") && !text.contains('\n'), "{text}");
        }
        Err(other) => panic!("{other:?}"),
    }
}
