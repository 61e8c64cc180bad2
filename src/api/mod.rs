//! The crate as a library: open a pair, generate text, read tokens one by one. Everything here is re-exported
//! at the crate root.
//!
//! The layers below are public too: [`crate::engine`] runs requests on any device, [`crate::cpu`] and
//! [`crate::gpu`] are the devices. This folder only connects them: it picks the device, turns prompts into
//! token ids and tokens into text. It prints nothing and reads no command line.

pub mod device;
mod engine;
mod generation;
mod params;

pub use device::{DeviceChoice, DeviceHandle, Placement};
pub use engine::{Engine, EngineOptions, Models, Session};
pub use generation::{Completion, Generation, Token};
pub use params::Params;
