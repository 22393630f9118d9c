//! What the programs that time single nodes share.

pub mod dtype;
pub mod fill;
pub mod session_host;
