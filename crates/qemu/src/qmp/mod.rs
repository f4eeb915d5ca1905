//! QEMU's machine protocol: JSON messages, one a line, over a unix socket.
//!
//! [`codec`] turns bytes into messages without I/O; [`Client`] is the tokio shell around it, with typed calls for what
//! godwit needs. Fields that we don't know are ignored, so that any QEMU from 7.2 on can be spoken to.
//!
//! A monitor serves one client at a time: a second connection is accepted by the kernel but gets no greeting until the
//! first one ends. [`QmpError::Silent`] says so.

mod calls;
mod client;
pub mod codec;

pub use self::{
    calls::{
        CpuInfo, MachineInfo, MemorySize, MigrationSettings, MigrationState, MigrationStatus, QomEntry,
        RamStatistics, RunState, Status, Version,
    },
    client::{Client, QmpError},
    codec::{Event, Timestamp},
};
