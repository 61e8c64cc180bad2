//! What hardware allows, and statistics of what was measured.

pub mod roofline;
pub mod statistics;
