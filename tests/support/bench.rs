//! Runs `dflash-bench` as a child process and checks its records against `benches/schema.json`.

use crate::support::program::{Run, finish};
use crate::support::software_gpu;
use serde_json::Value;
use std::process::Command;

/// Runs `dflash-bench` with these arguments. `--device cuda` is the software GPU, with 16 GiB.
pub fn bench<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    finish(command(args))
}

/// The command of [`bench`].
pub fn command<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dflash-bench"));
    command.args(args);
    if command.get_args().any(|arg| arg == "cuda") {
        software_gpu::install(&mut command);
        command.env("SOFTGPU_MEMORY", (16u64 << 30).to_string());
    }
    command
}

/// Checks a refusal: this exit code, nothing on stdout, and on stderr one line that contains `part`.
#[track_caller]
pub fn refused(run: Run, code: i32, part: &str) {
    let lines = run.err.lines().count();
    assert!(
        run.code == code && run.out.is_empty() && lines == 1 && run.err.contains(part),
        "{part:?}: {run:?}"
    );
}

/// The first violation of `benches/schema.json` in a record, if there is one.
pub fn schema_violation(record: &Value) -> Option<String> {
    let schema: Value = serde_json::from_str(include_str!("../../benches/schema.json")).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    schema.validate(record).err().map(|e| format!("{}: {e}", e.instance_path()))
}

/// Runs the arguments with `--json` and returns the record. Checks the exit code, the schema, and that no two
/// rows have the same name and parameters.
#[track_caller]
pub fn record(code: i32, args: &[&str]) -> Value {
    let run = bench(args.iter().copied().chain(["--json"]));
    assert_eq!((run.code, run.out.lines().count()), (code, 1), "{run:?}");
    let record: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(schema_violation(&record), None);
    let rows = record["rows"].as_array().unwrap();
    let names: std::collections::HashSet<_> =
        rows.iter().map(|row| format!("{} {}", row["name"], row["parameters"])).collect();
    assert_eq!(names.len(), rows.len(), "two rows have the same name and parameters");
    record
}

/// The row with this name and these parameters.
#[track_caller]
pub fn row<'a>(record: &'a Value, name: &str, parameters: Value) -> &'a Value {
    let rows = record["rows"].as_array().unwrap();
    let found = rows.iter().find(|row| row["name"] == name && row["parameters"] == parameters);
    found.unwrap_or_else(|| panic!("no row {name} {parameters} in {record}"))
}
