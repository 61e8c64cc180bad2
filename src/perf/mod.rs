//! What the hardware allows at most, and statistics of what was measured.

pub mod roofline;
pub mod statistics;
