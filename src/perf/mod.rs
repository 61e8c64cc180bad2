//! Limits of the hardware by the roofline model, and statistics of measurements.

pub mod roofline;
pub mod statistics;
