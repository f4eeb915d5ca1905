//! The only place that knows QEMU: codecs of its migration stream and monitor without I/O, a QMP client, the memory of
//! its process, and the command line that starts it.
//!
//! May not: decide anything about a migration, or depend on another crate of godwit.

pub mod adopt;
pub mod commandline;
pub mod machine;
pub mod memory;
pub mod memory_layout;
pub mod processor;
pub mod qmp;
pub mod ramblock;
pub mod return_path;
pub mod stream;
