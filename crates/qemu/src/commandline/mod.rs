//! From a specification to QEMU's command line, and what a peer's specification may ask for.

mod arguments;
mod build;
mod policy;
pub(crate) mod properties;
pub(crate) mod rules;

pub use self::{
    arguments::{Argument, ArgumentError, parse},
    build::{BuildError, Launch, MachineDir, RESERVED_OPTIONS, SERVED_DISK, build},
    policy::{Policy, PolicyRefusal, files, localise},
};

#[cfg(test)]
mod hostile;
