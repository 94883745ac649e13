//! The conductor: two pure state machines, the drivers that run them, and what they leave on disk.

pub mod destination;
pub mod driver;
pub mod journal;
pub mod mode;
pub mod rounds;
#[cfg(test)]
mod sim;
pub mod source;
pub mod status;
