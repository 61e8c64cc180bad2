//! The counters of kernels per block and unit of work, in `kernel_costs.txt`. `cargo bench --bench counters`
//! counts them on the software GPU, and a test compares them with fresh counts.

use super::work::QUANTITIES;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// What is counted, in the order of the file's columns.
pub const COUNTERS: [&str; 7] = ["instructions", "slow", "shared", "mma", "barriers", "fences", "bytes"];

/// `[quantity][counter]`: what one of a quantity adds to a launch's counters.
pub type Costs = [[f64; COUNTERS.len()]; QUANTITIES.len()];

/// Registers of a thread for compute_80 and compute_90, and static shared memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resources {
    /// Of the image for compute_80.
    pub registers_80: u32,
    /// Of the image for compute_90.
    pub registers_90: u32,
    /// Static shared memory of a block.
    pub shared: u32,
}

static COSTS: LazyLock<BTreeMap<String, Costs>> = LazyLock::new(|| parse(include_str!("kernel_costs.txt")));

static RESOURCES: LazyLock<BTreeMap<&str, Resources>> = LazyLock::new(|| {
    let lines = include_str!("../../../cuda/expected.txt").lines().filter(|line| !line.starts_with('#'));
    let resources = lines.filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (name, mut number) = (fields.next()?, || fields.next()?.parse().ok());
        Some((name, Resources { registers_80: number()?, registers_90: number()?, shared: number()? }))
    });
    resources.collect()
});

/// Reads a table of the form of `kernel_costs.txt`: a header, then lines of a kernel, a quantity and its costs.
/// Other lines are skipped.
pub fn parse(text: &str) -> BTreeMap<String, Costs> {
    let mut all: BTreeMap<String, Costs> = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [kernel, per, numbers @ ..] = &fields[..] else { continue };
        let numbers: Vec<f64> = numbers.iter().filter_map(|field| field.parse().ok()).collect();
        let (Some(quantity), Ok(numbers)) = (QUANTITIES.iter().position(|q| q == per), numbers.try_into())
        else {
            continue;
        };
        all.entry(kernel.to_string()).or_default()[quantity] = numbers;
    }
    all
}

/// The costs of a kernel.
///
/// # Errors
/// [`Error::Unsupported`] if the kernel was not counted.
pub fn costs(variant: &str) -> Result<&'static Costs> {
    let missing = || {
        Error::Unsupported(format!(
            "a prediction needs counts of every kernel: kernel_costs.txt has none of {variant}"
        ))
    };
    COSTS.get(variant).ok_or_else(missing)
}

/// Registers and shared memory of a kernel.
///
/// # Errors
/// [`Error::Internal`] if `cuda/expected.txt` does not have the kernel.
pub fn resources(kernel: &str) -> Result<Resources> {
    let found = RESOURCES.get(kernel).copied();
    found.ok_or_else(|| Error::Internal(format!("cuda/expected.txt has no registers of {kernel}")))
}

/// The sums of a launch's counters, from its [`QUANTITIES`].
pub fn counters(costs: &Costs, quantities: &[f64; QUANTITIES.len()]) -> [f64; COUNTERS.len()] {
    std::array::from_fn(|counter| (0..QUANTITIES.len()).map(|q| costs[q][counter] * quantities[q]).sum())
}
