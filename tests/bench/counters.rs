//! `benches/counters.txt` has the counters of every kernel for the demo pair. The file must be updated when
//! they change.

use crate::support::counters;

#[test]
fn kernel_counters_equal_the_file() {
    let (found, expected) = (counters::table().unwrap(), include_str!("../../benches/counters.txt"));
    let changed: Vec<String> = found
        .lines()
        .zip(expected.lines())
        .filter(|(found, expected)| found != expected)
        .map(|(found, expected)| format!("expected {expected}\nfound    {found}"))
        .collect();
    assert!(
        found == expected,
        "{}\nIf the change is intended: cargo bench --bench counters -- --write",
        changed.join("\n")
    );
}
