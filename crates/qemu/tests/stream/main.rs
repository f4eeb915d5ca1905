//! The splitter against generated streams, and against a real QEMU.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod generated;
mod machine;
mod reader;
mod real;
