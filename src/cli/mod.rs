//! What both command-line programs share and a library user does not need: flags, terminal output, exit
//! codes, signals. Behind the feature `cli`, which is on by default. Modules outside `cli` never name it.

pub mod device;
pub mod hub;
pub mod interrupt;
pub mod models;
pub mod published;
pub mod sigbus;
pub mod spec_flags;
pub mod stop_flags;
pub mod terminal;
pub mod version;
