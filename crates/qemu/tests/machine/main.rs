//! Command lines, the monitor and adoption against a real QEMU under TCG, without a guest system.
//!
//! They need `qemu-system-x86_64` 10 in `PATH`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adoption;
mod described;
mod monitor;
mod processor;
mod qemu;
