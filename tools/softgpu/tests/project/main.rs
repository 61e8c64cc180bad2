//! Test kernels that use the CUDA headers of the repository that this crate lives in: a product of wgmma, and planted bugs,
//! which are found.

#[path = "../support/mod.rs"]
mod support;

use softgpu::machine::{Fault, Launch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use support::{Arg, Gpu, Random};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn nvcc() -> PathBuf {
    let own = root().join(".cuda/nvidia/cu13/bin/nvcc");
    let places = [std::env::var("NVCC").unwrap_or_default().into(), own, PathBuf::from("nvcc")];
    let works =
        |path: &&PathBuf| Command::new(path).arg("--version").output().is_ok_and(|o| o.status.success());
    places.iter().find(works).cloned().expect("this test needs nvcc: run tools/get-nvcc.sh")
}

/// The PTX of the test kernels.
static TEST_KERNELS: LazyLock<String> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/project/kernels.cu");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels.ptx");
    let run = Command::new(nvcc())
        .args(["-ptx", "-std=c++17", "-O3", "-lineinfo", "-arch=compute_90a", "-I"])
        .arg(root().join("cuda"))
        .arg(source)
        .arg("-o")
        .arg(&output)
        .output()
        .expect("nvcc runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    std::fs::read_to_string(output).expect("nvcc has written it")
});

/// out = c + a b^T of the wgmma kernel, staged with or without a swizzle.
#[test]
fn wgmma_equals_the_host_for_each_layout() {
    let text = &*TEST_KERNELS;
    let mut random = Random(3);
    for (k, swizzle, leading, stride) in
        [(16, 0, 128, 256), (64, 0, 128, 1024), (64, 1, 0, 1024), (32, 0, 4096, 128)]
    {
        let gpu = Gpu::new(text);
        let mut draw = |count: usize| -> Vec<u16> {
            (0..count)
                .map(|_| ((random.bits() % 512) as f32 / 64.0 - 4.0).to_bits())
                .map(|b| (b >> 16) as u16)
                .collect()
        };
        let (a, b) = (draw(64 * k), draw(256 * k));
        let wide = |x: u16| f32::from_bits(u32::from(x) << 16);
        let c: Vec<f32> = (0..64 * 256).map(|i| (i % 7) as f32).collect();
        let (from_a, from_b, from_c) = (gpu.upload("a", &a), gpu.upload("b", &b), gpu.upload("c", &c));
        let out = gpu.fresh("out", 64 * 256 * 4);
        let settings = [k as u32, swizzle, leading, stride].map(Arg::U32);
        let addresses = [out, from_a, from_b, from_c].map(Arg::U64);
        let launch = gpu.launch("toy_wgmma", 1, 128, &[addresses, settings].concat());
        let launch = Launch { shared: 200 * 1024, ..launch };
        gpu.run(&[launch], 0).unwrap_or_else(|fault| panic!("k {k}, swizzle {swizzle}: {fault}"));
        let got = gpu.download::<f32>(out, 64 * 256);
        for row in 0..64 {
            for column in 0..256 {
                let start = c[row * 256 + column];
                let sum = (0..k).fold(start, |sum, i| sum + wide(a[row * k + i]) * wide(b[column * k + i]));
                assert_eq!(
                    got[row * 256 + column],
                    sum,
                    "k {k}, swizzle {swizzle}, row {row}, column {column}"
                );
            }
        }
    }
}

/// Runs a kernel with bugs.
fn broken(text: &str, name: &str, threads: u32, blocks: u32, bug: u32, schedule: u64) -> Result<(), Fault> {
    let gpu = Gpu::new(text);
    let input = gpu.upload("in", &[0u32; 16384]);
    let output = gpu.fresh("out", 65536);
    let (out, from, bug_arg) = (Arg::U64(output), Arg::U64(input), Arg::U32(bug));
    let args: Vec<Arg> = match name {
        "broken_bounds" => vec![out, Arg::U32(40), bug_arg],
        "broken_mma" | "broken_barrier" | "broken_trap" => vec![out, bug_arg],
        "broken_wgmma" => vec![out, from, Arg::U64(input + 4096), bug_arg],
        _ => vec![out, from, bug_arg],
    };
    let launch = gpu.launch(name, blocks, threads, &args);
    let shared = if name == "broken_wgmma" { 2 * 320 * 32 } else { 160 };
    gpu.run(&[Launch { shared, ..launch }], schedule).map(|_| ())
}

#[test]
fn the_bugs_of_the_test_kernels_are_found() {
    let text = &*TEST_KERNELS;
    let kernels: [(&str, u32, &[u32]); 9] = [
        ("broken_staging", 128, &[1]),
        ("broken_reuse", 128, &[1]),
        ("broken_warp", 32, &[1]),
        ("broken_bounds", 32, &[1, 2, 3]),
        ("broken_mma", 32, &[1, 2]),
        ("broken_barrier", 64, &[1, 2]),
        ("broken_copy", 32, &[1, 2]),
        ("broken_trap", 32, &[1]),
        ("broken_wgmma", 128, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
    ];
    for (name, threads, bugs) in kernels {
        for schedule in 0..4 {
            let legal: &[u32] = if name == "broken_wgmma" { &[0, 16] } else { &[0] };
            for bug in legal {
                broken(text, name, threads, 1, *bug, schedule)
                    .unwrap_or_else(|f| panic!("{name} {bug}: {f}"));
            }
            for bug in bugs {
                let result = broken(text, name, threads, 1, *bug, schedule);
                assert!(result.is_err(), "{name}: bug {bug} was not found by schedule {schedule}");
            }
        }
    }
}
