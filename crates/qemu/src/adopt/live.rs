//! What a running QEMU says about itself.

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::json;

use crate::{
    memory_layout::MemoryLayout,
    qmp::{Client, QmpError, QomEntry, Version},
};

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
    /// What its memory consists of.
    pub memory_layout: MemoryLayout,
    /// Devices that were made with an id.
    pub devices: Vec<LiveDevice>,
    /// Types of devices that were made without one.
    pub anonymous_devices: Vec<String>,
    /// Ids of the objects that `-object`, `object-add` or the machine made.
    pub objects: Vec<String>,
    /// Open images.
    pub block_nodes: Vec<BlockNode>,
    /// Network back-ends.
    pub netdevs: Vec<LiveNetdev>,
    /// Why QEMU wouldn't migrate the machine.
    pub blocked_reasons: Vec<String>,
}

/// A device that was made with an id.
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
    /// Its id; `#net` and a number if it was made without one.
    pub id: String,
    /// `tap`, `user`, ...
    pub kind: String,
    /// Of a TAP device: its name.
    pub interface: Option<String>,
    /// The bridge that the TAP device is in.
    pub bridge: Option<String>,
}

/// Asks a running QEMU everything that [`super::classify`] wants to know, and the kernel for the bridges of its TAP
/// devices. Nothing is changed.
///
/// # Errors
/// Of the first question that isn't answered.
pub async fn inspect(client: &Client) -> Result<LiveFacts, QmpError> {
    let devices = children(client, "/machine/peripheral").await?;
    let anonymous = children(client, "/machine/peripheral-anon").await?;
    let objects = children(client, "/objects").await?;
    Ok(LiveFacts {
        version: client.query_version().await?,
        name: client.query_name().await?,
        machine_type: client.machine_type().await?,
        kvm: client.query_kvm().await?,
        vcpus: u32::try_from(client.query_cpus_fast().await?.len()).unwrap_or(u32::MAX),
        memory_bytes: client.query_memory_size().await?.base_bytes,
        memory_layout: MemoryLayout::of(client).await?,
        devices: devices.into_iter().map(|(id, driver)| LiveDevice { id, driver }).collect(),
        anonymous_devices: anonymous.into_iter().map(|(_, driver)| driver).collect(),
        objects: objects.into_iter().map(|(id, _)| id).collect(),
        block_nodes: client.query("query-named-block-nodes", json!({ "flat": true })).await?,
        netdevs: with_bridges(parse_networks(&client.hmp("info network").await?)),
        blocked_reasons: client.query_migrate().await?.blocked_reasons,
    })
}

async fn children(client: &Client, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let entries = client.qom_list(path).await?;
    let child = |entry: QomEntry| Some((entry.name.clone(), entry.child_type()?.to_owned()));
    Ok(entries.into_iter().filter_map(child).collect())
}

/// Reads what `info network` prints; QMP has no such query. A back-end's line is ` \ ID: index=0,type=tap,ifname=...`,
/// repeated for each queue; cards (`type=nic`) are left out.
fn parse_networks(text: &str) -> Vec<LiveNetdev> {
    let mut netdevs: Vec<LiveNetdev> = Vec::new();
    for line in text.lines() {
        let line = line.trim_start().trim_start_matches('\\').trim_start();
        // Behind a hub the port comes first: `hub0port1: #net195: index=0,...`.
        let Some((names, properties)) = line.rsplit_once(": ") else { continue };
        let id = names.rsplit(": ").next().unwrap_or(names);
        let value = |key: &str| {
            let mut pairs = properties.split(',').filter_map(|pair| pair.split_once('='));
            pairs.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned())
        };
        let Some(kind) = value("type").filter(|kind| kind != "nic") else { continue };
        if netdevs.iter().all(|netdev| netdev.id != id) {
            let (interface, bridge) = (value("ifname"), value("br"));
            netdevs.push(LiveNetdev { id: id.to_owned(), kind, interface, bridge });
        }
    }
    netdevs
}

fn with_bridges(mut netdevs: Vec<LiveNetdev>) -> Vec<LiveNetdev> {
    for netdev in &mut netdevs {
        let found = netdev.interface.as_deref().and_then(bridge_of);
        netdev.bridge = netdev.bridge.take().or(found);
    }
    netdevs
}

/// The bridge that a network interface of this host is in.
fn bridge_of(interface: &str) -> Option<String> {
    if interface.contains('/') {
        return None;
    }
    let master = fs::read_link(Path::new("/sys/class/net").join(interface).join("master")).ok()?;
    master.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netdev(id: &str, kind: &str, interface: Option<&str>) -> LiveNetdev {
        LiveNetdev { id: id.into(), kind: kind.into(), interface: interface.map(Into::into), bridge: None }
    }

    #[test]
    fn networks_as_qemu_prints_them() {
        let text = "hub 0\r\n \\ hub0port1: #net195: index=0,type=user,net=10.0.2.0,restrict=off\r\n \\ hub0port0: \
                    e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\nc0: index=0,type=nic,\
                    model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \\ n0: index=0,type=tap,ifname=tap0,script=no,\
                    downscript=no\r\n \\ n0: index=1,type=tap,ifname=tap0,script=no,downscript=no\r\n";
        let expected = [netdev("#net195", "user", None), netdev("n0", "tap", Some("tap0"))];
        assert_eq!(parse_networks(text), expected);
        assert_eq!(parse_networks("nonsense\n: \n\\: type"), []);
    }
}
