//! Shared libraries that stand in for a vendor's: C from a test, compiled where it runs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `folder/name` from C source, with a compiler's further flags. Its folder is the test's own.
pub fn library(folder: &Path, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let (from, to) = (folder.join(format!("{name}.c")), folder.join(name));
    std::fs::write(&from, source).unwrap();
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]).args(flags).arg(&from).arg("-o").arg(&to);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    to
}
