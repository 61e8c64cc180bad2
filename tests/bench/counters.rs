//! `benches/counters.txt`: what each kernel does for the demo pair. A change that moves a number is to be seen.

use crate::support::counters;

#[test]
fn kernels_do_what_the_file_says() {
    let (found, expected) = (counters::table().unwrap(), include_str!("../../benches/counters.txt"));
    let moved: Vec<String> = found
        .lines()
        .zip(expected.lines())
        .filter(|(found, expected)| found != expected)
        .map(|(found, expected)| format!("expected {expected}\nfound    {found}"))
        .collect();
    assert!(
        found == expected,
        "{}\nIf that is meant: cargo bench --bench counters -- --write",
        moved.join("\n")
    );
}
