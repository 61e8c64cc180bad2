//! The library interface: open a pair, generate text, read tokens one by one. The crate root re-exports the
//! types that most programs need.
//!
//! The lower layers are public too: [`crate::engine`] runs requests on any device, [`crate::cpu`] and
//! [`crate::gpu`] are the devices. This folder only connects them: it picks the device and converts prompts
//! to token ids and token ids to text. It prints nothing and reads no command line.

pub mod device;
mod engine;
mod generation;
mod params;

pub use device::{DeviceChoice, DeviceHandle, Placement};
pub use engine::{Engine, EngineOptions, Models, Session};
pub use generation::{Completion, Generation, Token};
pub use params::Params;
