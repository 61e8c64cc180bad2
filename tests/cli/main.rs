//! dflash-gen and the scripts in tools/ as a user runs them.

#[path = "../support/mod.rs"]
mod support;

mod chat;
mod cli;
mod docs;
mod outside;
mod plan;
mod profile;
mod profiling_tools;
mod tools;
