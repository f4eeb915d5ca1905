//! How a machine's memory is made up, as far as that decides whether it can be moved.
//!
//! A twin is started with the memory that the machine was started with, so what was plugged in later would be missing
//! there. And QEMU's emulator loses dirty pages of every block but the first (docs/qemu-notes.md, "Dirty pages that QEMU
//! loses under TCG"): such a machine would arrive with stale pages, unnoticed.

use serde::Deserialize;
use serde_json::Value;

use crate::qmp::{Client, QmpError};

/// What a machine's memory consists of beside its main block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryLayout {
    /// Ids of DIMMs and the like, plugged in at any time.
    pub devices: Vec<String>,
    /// Objects that are memory: at most one where all of it is one block.
    pub backends: usize,
    /// Whether QEMU emulates the processors.
    pub emulated: bool,
}

/// Why a machine can't be moved because of its memory; one line with the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryObstacle {
    /// DIMMs and the like.
    #[error(
        "the machine has memory devices ({}), which can't be moved: unplug them (`device_del`), or start it with all \
         of its memory in `-m`", .0.join(", ")
    )]
    Devices(Vec<String>),
    /// NUMA nodes with memory of their own, under TCG.
    #[error(
        "the machine has {0} memory back-ends, and QEMU's emulator (TCG) loses what is written to all but one: start it \
         with one, or under KVM"
    )]
    Backends(usize),
}

impl MemoryLayout {
    /// Asks a running QEMU; changes nothing.
    ///
    /// # Errors
    /// Of the first question that isn't answered.
    pub async fn of(client: &Client) -> Result<Self, QmpError> {
        #[derive(Deserialize)]
        struct Device {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            id: Option<String>,
        }
        let devices: Vec<Device> = client.query("query-memory-devices", Value::Null).await?;
        let name = |device: Device| device.data.id.unwrap_or_else(|| "without an id".to_owned());
        let objects = client.qom_list("/objects").await?;
        let is_memory = |kind: &str| kind.starts_with("memory-backend-");
        Ok(Self {
            devices: devices.into_iter().map(name).collect(),
            backends: objects.iter().filter(|entry| entry.child_type().is_some_and(is_memory)).count(),
            emulated: !client.query_kvm().await?,
        })
    }

    /// Whether all of it arrives as it was.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn check(&self) -> Result<(), MemoryObstacle> {
        if !self.devices.is_empty() {
            return Err(MemoryObstacle::Devices(self.devices.clone()));
        }
        if self.emulated && self.backends > 1 {
            return Err(MemoryObstacle::Backends(self.backends));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_several_pieces_is_refused_in_one_line() {
        let kvm = MemoryLayout { devices: Vec::new(), backends: 2, emulated: false };
        kvm.check().unwrap();
        MemoryLayout { backends: 1, emulated: true, ..kvm.clone() }.check().unwrap();
        let emulated = MemoryLayout { emulated: true, ..kvm.clone() }.check().unwrap_err().to_string();
        assert!(emulated.starts_with("the machine has 2 memory back-ends"), "{emulated}");
        let plugged = MemoryLayout { devices: vec!["dimm1".into(), "dimm2".into()], ..kvm };
        let plugged = plugged.check().unwrap_err().to_string();
        assert!(plugged.contains("(dimm1, dimm2)") && plugged.lines().count() == 1, "{plugged}");
    }
}
