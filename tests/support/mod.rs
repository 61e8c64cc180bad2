//! Helpers of the test programs. Each program uses some of them.

#![allow(dead_code, unused_imports)]

pub mod attention;
pub mod bench;
pub mod checkpoint;
pub mod counters;
pub mod dense;
pub mod distribution;
pub mod enumeration;
pub mod kernel;
pub mod layer;
pub mod library;
pub mod program;
pub mod random;
pub mod report;
pub mod requests;
pub mod sampled_trees;
pub mod text;

pub use checkpoint::*;
