//! The driver library through its C functions, as a program finds it under the launcher. Each test has a
//! process of its own, because a fault or a setting lasts as long as its process.

mod api;
mod arguments;
mod capture;
mod dependent;
mod launches;
mod setup;
mod streams;
