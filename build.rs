//! Compiles the kernels in `cuda/` with nvcc to PTX that is embedded in the binary.
//!
//! The build script looks for nvcc at `NVCC`, in `CUDA_HOME`, on `PATH`, then in `.cuda/` (filled by
//! `tools/get-nvcc.sh`). Without nvcc the crate still builds, with an empty table of PTX modules. An output
//! is reused while its inputs, the compiler version and the command are unchanged.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The PTX targets of a source file, in the order of the GPUs that run them: Ampere and later, then Hopper
/// and later, which have dependent launch. Only Hopper has wgmma (H100, H200), so files with it are compiled
/// for it alone.
fn targets(source: &Path) -> &'static [&'static str] {
    if stem(source).ends_with("_wgmma") { &["compute_90a"] } else { &["compute_80", "compute_90"] }
}

/// The folders in `cuda/`.
const FOLDERS: [&str; 4] = ["common", "model", "perf", "spec"];

/// One compiler run: `command` turns `source` into `output`.
struct Job {
    source: PathBuf,
    output: PathBuf,
    command: Vec<String>,
}

fn main() {
    let sources = kernel_files("cu");
    let headers = kernel_files("cuh");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    for file in sources.iter().chain(&headers) {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(
        env::var("OUT_DIR").unwrap_or_else(|_| fail("OUT_DIR is not set: cargo must run this build script")),
    );
    name_commit();
    build_ptx(&sources, &headers, &out);
}

/// Sets `DFLASH_COMMIT` for the crate, unless the environment has it: the commit of the checkout, for bug reports and
/// records. Outside a checkout there is none.
fn name_commit() {
    println!("cargo:rerun-if-env-changed=DFLASH_COMMIT");
    // Changes with every commit, checkout and merge.
    let log = Path::new(".git/logs/HEAD");
    if env::var_os("DFLASH_COMMIT").is_some() || !log.exists() {
        return;
    }
    println!("cargo:rerun-if-changed={}", log.display());
    let git = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).stderr(Stdio::null()).output();
    let commit = git.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string());
    if let Ok(commit) = commit
        && !commit.is_empty()
    {
        println!("cargo:rustc-env=DFLASH_COMMIT={commit}");
    }
}

/// Writes `ptx.rs`, the table of modules: per source file its stem, and each of its [`targets`]
/// with the PTX.
fn build_ptx(sources: &[PathBuf], headers: &[PathBuf], out: &Path) {
    let mut table = String::from("&[\n");
    match find_nvcc() {
        None => println!(
            "cargo:warning=no nvcc at NVCC, in CUDA_HOME, on PATH or in .cuda/: built without CUDA kernels \
             (tools/get-nvcc.sh fetches a compiler)"
        ),
        Some(nvcc) => {
            let version = Command::new(&nvcc).arg("--version").output();
            let version =
                version.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            let mut jobs = Vec::new();
            for source in sources {
                table += &format!("    Module {{ file: {:?}, images: &[", stem(source));
                for target in targets(source) {
                    let output = out.join(format!("{}.{target}.ptx", stem(source)));
                    table += &format!("({target:?}, include_str!({output:?})), ");
                    let command = [
                        &nvcc,
                        "-ptx",
                        "-std=c++17",
                        "-O3",
                        "-lineinfo",
                        // Only what a kernel writes as fma is fused.
                        "-fmad=false",
                        "-Icuda",
                        &format!("-arch={target}"),
                    ];
                    jobs.push(Job {
                        source: source.clone(),
                        output,
                        command: command.iter().map(|s| s.to_string()).collect(),
                    });
                }
                table += "] },\n";
            }
            run(&jobs, headers, &version);
        }
    }
    table += "]\n";
    write(&out.join("ptx.rs"), &table);
}

fn find_nvcc() -> Option<String> {
    if let Ok(nvcc) = env::var("NVCC") {
        if !works(&nvcc) {
            fail(&format!("NVCC is {nvcc:?}, which does not run: expected the path of nvcc"));
        }
        return Some(nvcc);
    }
    let mut places = Vec::new();
    if let Ok(home) = env::var("CUDA_HOME") {
        places.push(format!("{home}/bin/nvcc"));
    }
    places.push("nvcc".to_string());
    places.push(".cuda/nvidia/cu13/bin/nvcc".to_string());
    places.into_iter().find(|nvcc| works(nvcc))
}

fn works(nvcc: &str) -> bool {
    let status = Command::new(nvcc).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}

/// Runs the jobs whose inputs changed, at most `NUM_JOBS` at once. A compiler error ends the build with the
/// compiler's message; warnings are passed on to cargo.
fn run(jobs: &[Job], headers: &[PathBuf], version: &str) {
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    let at_once =
        env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, jobs.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !compile(job, headers, version) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    if failed.into_inner() > 0 {
        exit(1);
    }
}

/// Runs a job unless its output is up to date. False if the compiler failed.
fn compile(job: &Job, headers: &[PathBuf], version: &str) -> bool {
    // Everything the output depends on, stored beside it.
    let mut key = format!("{version}\n{}\n", job.command.join(" "));
    for file in headers.iter().chain([&job.source]) {
        key += &fs::read_to_string(file).unwrap_or_else(|e| fail(&format!("{}: {e}", file.display())));
    }
    let key_file = PathBuf::from(format!("{}.key", job.output.display()));
    if job.output.exists() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
        return true;
    }
    let _ = fs::remove_file(&key_file);
    let run = Command::new(&job.command[0])
        .args(&job.command[1..])
        .arg(&job.source)
        .arg("-o")
        .arg(&job.output)
        .output();
    match run {
        Err(e) => {
            eprintln!("{}: cannot run {}: {e}", job.source.display(), job.command[0]);
            false
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            if !output.status.success() {
                eprintln!("{}\n{text}", job.command.join(" "));
                return false;
            }
            for line in text.lines().filter(|l| !l.trim().is_empty()) {
                println!("cargo:warning={line}");
            }
            // An output with warnings is not recorded as up to date, so that the next build shows them again.
            if text.trim().is_empty() {
                write(&key_file, &key);
            }
            true
        }
    }
}

/// The files in the folders of `cuda/` with this extension, sorted by folder and name.
fn kernel_files(extension: &str) -> Vec<PathBuf> {
    FOLDERS.iter().flat_map(|folder| files(&format!("cuda/{folder}"), extension)).collect()
}

/// The files of a folder with this extension, sorted by name.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| fail(&format!("{folder}: {e}")));
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|s| s.to_str()).unwrap_or_else(|| fail("a file name in cuda/ is not UTF-8"))
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    exit(1)
}
