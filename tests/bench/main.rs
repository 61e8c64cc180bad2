//! `dflash-bench`: arithmetic, records, tables and pages.

#[path = "../support/mod.rs"]
mod support;

mod cli;
mod counters;
mod generate;
mod kernels;
mod numbers;
mod pair;
mod predict;
mod report;
mod round;
