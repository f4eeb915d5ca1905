//! The decisions of a migration, and nothing else: what the target still lacks, what goes next, when to stop the
//! guest, and who has the right to run it.
//!
//! | module | question it answers |
//! |---|---|
//! | [`mover`] | which blocks are owed, and which of them go next? |
//! | [`forecast`] | what will it all take, said before the first byte? |
//! | [`predict`] | how long would the pause be if the guest were stopped now? |
//! | [`stop`] | is now the time to stop it? |
//! | [`stall`] | and if there never is a good one? |
//! | [`throttle`] | how slow has the guest to be then? |
//! | [`handover`] | which host may run the machine, whatever crashes? |
//! | [`wire`] | how do the two sides say all this to each other? |
//!
//! The crate may depend on block types and on serialisation. It may not open a socket or a file, read a clock, draw a
//! random number or know that QEMU exists beyond the words of the hand-over: whoever drives it passes events, times
//! and byte counts in and carries out the actions that come back. So the same code runs in a worker process, under the
//! model checker (`tests/handover_model.rs`) and in virtual time.

pub mod forecast;
pub mod handover;
pub mod mover;
pub mod predict;
pub mod stall;
pub mod stop;
pub mod throttle;
pub mod wire;

pub use godwit_content::{BlockId, BlockVersion};
