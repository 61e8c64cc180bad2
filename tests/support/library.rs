//! Shared libraries that replace a vendor's library in a test, compiled from C when the test runs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles C source to the shared library `folder/name`, with more compiler flags. No other test may write
/// to the folder.
pub fn library(folder: &Path, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let (source_file, library) = (folder.join(format!("{name}.c")), folder.join(name));
    std::fs::write(&source_file, source).unwrap();
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]).args(flags);
    command.arg(&source_file).arg("-o").arg(&library);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}
