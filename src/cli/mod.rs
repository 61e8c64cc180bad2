//! What both binaries share and a library user does not need: devices by name, terminal output, exit codes.

pub mod device;
pub mod sigbus;
pub mod spec_flags;
pub mod terminal;
