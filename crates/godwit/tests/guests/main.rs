//! Real guests, moved by `godwit migrate` between two agents in the lab, and looked at from outside.
//!
//! | module | what is tried |
//! |---|---|
//! | [`moves`] | there and back, with both memories compared through QEMU while both are paused |
//! | [`adopted`] | machines that somebody started by hand: memories of every kind, other users, things plugged in |
//! | [`options`] | every option and machine type that changes how a machine travels |
//! | [`states`] | a machine that its operator paused |
//! | [`stalling`] | a guest that outruns its link |
//! | [`cancelling`] | giving up, in every phase |
//! | [`refusals`] | targets that aren't like the source |
//! | [`older`] | QEMU 7.2, which stops guests by itself |
//! | [`failures`] | a worker that dies |
//! | [`sharing`] | several guests that have pages in common |
//! | [`disks`] | disks that godwit serves, and what happens to their servers |
//! | [`foresight`] | what a migration will take, said before it begins |
//!
//! What judges shares no code with the product: the guest's own account of its working set, read over a TCP connection
//! that is held through all moves ([`guest`]), and memories that QEMU itself saved ([`memory`]). It needs root and what
//! `cargo xtask setup` fetches.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adopted;
mod cancelling;
mod disks;
mod failures;
mod foresight;
mod guest;
mod hosts;
mod memory;
mod moves;
mod older;
mod options;
mod refusals;
mod sharing;
mod stalling;
mod states;
