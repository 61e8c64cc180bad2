//! The C functions, by the object that they work on.

// The names are the driver's.
#![allow(non_snake_case)]

mod device;
mod memory;
mod module;
mod stream;
