//! The CUDA sources of the repository that this crate lives in: every kernel is understood for all images,
//! and the test kernels, which have planted bugs, run as their comments say.

#[path = "../support/mod.rs"]
mod support;

use softgpu::card::Card;
use softgpu::machine::{Fault, Launch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
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

/// The PTX of a source for `target`. Kept from run to run while the sources are the same.
fn compile(source: &Path, target: &str) -> String {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let stem = source.file_stem().and_then(|s| s.to_str()).expect("a name");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (output, key_file) =
        (folder.join(format!("{stem}.{target}.ptx")), folder.join(format!("{stem}.{target}.key")));
    let mut key = std::fs::read_to_string(source).expect("the source");
    for header in sources("cuh") {
        key += &std::fs::read_to_string(header).expect("a header");
    }
    if std::fs::read_to_string(&key_file).is_ok_and(|old| old == key)
        && let Ok(text) = std::fs::read_to_string(&output)
    {
        return text;
    }
    let run = Command::new(nvcc())
        .args(["-ptx", "-std=c++17", "-O3", "-lineinfo", "-I"])
        .arg(root().join("cuda"))
        .arg(format!("-arch={target}"))
        .arg(source)
        .arg("-o")
        .arg(&output)
        .output()
        .expect("nvcc runs");
    assert!(run.status.success(), "{}: {}", source.display(), String::from_utf8_lossy(&run.stderr));
    std::fs::write(key_file, key).expect("the folder is writable");
    std::fs::read_to_string(output).expect("nvcc has written it")
}

/// The kernels' sources with this extension.
fn sources(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in ["common", "model", "perf", "spec"] {
        for entry in std::fs::read_dir(root().join("cuda").join(folder)).expect("the folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The targets of a source, as in the project's build.rs, each with a card that runs it.
fn targets(source: &Path) -> &'static [(&'static str, &'static str)] {
    let wgmma = source.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_wgmma"));
    if wgmma { &[("h200", "compute_90a")] } else { &[("a100", "compute_80"), ("rtx5090", "compute_90")] }
}

#[test]
fn every_kernel_is_understood_for_all_images() {
    let listed = std::fs::read_to_string(root().join("cuda/expected.txt")).expect("the list of kernels");
    let mut names: Vec<(String, &str)> = Vec::new();
    for source in sources("cu") {
        for (card, target) in targets(&source) {
            let text = compile(&source, target);
            let module = softgpu::ptx::load(&text, Card::find(card).expect("the card exists"))
                .unwrap_or_else(|e| panic!("{} {target}: {e}", source.display()));
            names.extend(module.kernels().map(|k| (k.name.clone(), &target[..10])));
        }
    }
    for line in listed.lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { continue };
        for (target, registers) in ["compute_80", "compute_90"].into_iter().zip(words) {
            let there = names.contains(&(name.to_string(), target));
            assert_eq!(there, registers != "-", "{name} for {target}");
        }
    }
}

fn test_kernels() -> String {
    compile(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/project/kernels.cu"), "compute_90a")
}

/// out = c + a b^T of the wgmma kernel, staged with or without a swizzle.
#[test]
fn wgmma_equals_the_host_for_each_layout() {
    let text = test_kernels();
    let mut random = Random(3);
    for (k, swizzle, leading, stride) in
        [(16, 0, 128, 256), (64, 0, 128, 1024), (64, 1, 0, 1024), (32, 0, 4096, 128)]
    {
        let gpu = Gpu::new(&text);
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
    let text = test_kernels();
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
                broken(&text, name, threads, 1, *bug, schedule)
                    .unwrap_or_else(|f| panic!("{name} {bug}: {f}"));
            }
            for bug in bugs {
                let result = broken(&text, name, threads, 1, *bug, schedule);
                assert!(result.is_err(), "{name}: bug {bug} was not found by schedule {schedule}");
            }
        }
    }
}
