//! To be written.
mod job;
mod worker;
fn main() {}
