//! `dflash-gen`, the scripts in tools/, and the commands in the documents, run as child processes.

#[path = "../support/mod.rs"]
mod support;

mod chat;
mod cli;
mod docs;
mod external_events;
mod memory;
mod models;
mod plan;
mod profile;
mod profiling_tools;
mod prompts;
mod published;
mod stops;
mod tools;
