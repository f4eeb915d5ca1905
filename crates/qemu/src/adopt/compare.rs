//! What runs against what the command line says: whatever was plugged, unplugged, opened or closed since the start.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::{AdoptRefusal, BlockNode, LiveFacts, Process, absolute, refuse};
use crate::commandline::{Argument, properties::Properties, rules};

/// Names that `-device` takes for other types.
const ALIASES: [(&str, &str); 10] = [
    ("ahci", "ich9-ahci"),
    ("e1000-82540em", "e1000"),
    ("lsi", "lsi53c895a"),
    ("virtio-balloon", "virtio-balloon-pci"),
    ("virtio-blk", "virtio-blk-pci"),
    ("virtio-net", "virtio-net-pci"),
    ("virtio-rng", "virtio-rng-pci"),
    ("virtio-scsi", "virtio-scsi-pci"),
    ("virtio-serial", "virtio-serial-pci"),
    ("virtio-gpu", "virtio-gpu-pci"),
];

/// Objects that the machine makes itself.
const MACHINE_OBJECTS: [&str; 2] = ["pc.ram", "main-loop"];

/// Refuses a machine that isn't any more what its arguments describe.
pub(super) fn compare(
    arguments: &[Argument],
    process: &Process,
    live: &LiveFacts,
) -> Result<(), AdoptRefusal> {
    // First: what is said of it helps more than that its device was plugged in.
    live.memory_layout.check().map_err(|obstacle| AdoptRefusal(obstacle.to_string()))?;
    compare_devices(arguments, live)?;
    compare_anonymous_devices(arguments, live)?;
    compare_objects(arguments, live)?;
    compare_networks(arguments, live)?;
    compare_images(arguments, process, live)?;
    compare_processors(arguments, live)
}

fn lists<'a>(
    arguments: &'a [Argument],
    option: &'a str,
    implied: &'a str,
) -> impl Iterator<Item = Properties> + 'a {
    let values = arguments.iter().filter(move |argument| argument.option == option);
    values.filter_map(move |argument| Properties::parse(argument.value.as_deref()?, implied).ok())
}

fn canonical(driver: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == driver).map_or(driver, |(_, driver)| driver)
}

fn compare_devices(arguments: &[Argument], live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let mut said = BTreeMap::new();
    for list in lists(arguments, "device", "driver") {
        if let (Some(id), Some(driver)) = (list.get("id"), list.get("driver")) {
            said.insert(id.to_owned(), canonical(driver).to_owned());
        }
    }
    for device in &live.devices {
        match said.remove(&device.id) {
            Some(driver) if driver == device.driver => {}
            _ => {
                return refuse(format!(
                    "device {} ({}) was plugged in after the start",
                    device.id, device.driver
                ));
            }
        }
    }
    said.first_key_value()
        .map_or(Ok(()), |(id, driver)| refuse(format!("device {id} ({driver}) was unplugged")))
}

fn compare_anonymous_devices(arguments: &[Argument], live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    for list in lists(arguments, "device", "driver") {
        if let (None, Some(driver)) = (list.get("id"), list.get("driver")) {
            *counts.entry(canonical(driver).to_owned()).or_default() += 1;
        }
    }
    let virtio = lists(arguments, "drive", "").filter(|list| list.get("if") == Some("virtio")).count();
    *counts.entry("virtio-blk-pci".to_owned()).or_default() += i64::try_from(virtio).unwrap_or(i64::MAX);
    for driver in &live.anonymous_devices {
        *counts.entry(driver.clone()).or_default() -= 1;
    }
    match counts.iter().find(|(_, count)| **count != 0) {
        None => Ok(()),
        Some((driver, count)) if *count < 0 => refuse(format!("a {driver} was plugged in after the start")),
        Some((driver, _)) => refuse(format!("a {driver} was unplugged")),
    }
}

fn compare_objects(arguments: &[Argument], live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let said: BTreeSet<String> =
        lists(arguments, "object", "qom-type").filter_map(|list| list.get("id").map(str::to_owned)).collect();
    let known = |id: &&String| said.contains(*id) || MACHINE_OBJECTS.contains(&id.as_str());
    if let Some(id) = live.objects.iter().find(|id| !known(id)) {
        return refuse(format!("object {id} was made after the start"));
    }
    let gone = said.iter().find(|id| !live.objects.contains(id));
    gone.map_or(Ok(()), |id| refuse(format!("object {id} was deleted after the start")))
}

fn compare_networks(arguments: &[Argument], live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let named =
        |option| lists(arguments, option, "type").filter_map(|list| list.get("id").map(str::to_owned));
    let said: BTreeSet<String> = named("netdev").chain(named("nic")).collect();
    let unnamed = |id: &str| id.starts_with('#') || id.starts_with("hub");
    let added = live.netdevs.iter().find(|netdev| !unnamed(&netdev.id) && !said.contains(&netdev.id));
    if let Some(netdev) = added {
        return refuse(format!("network {} ({}) was added after the start", netdev.id, netdev.kind));
    }
    let gone = said.iter().find(|id| live.netdevs.iter().all(|netdev| netdev.id != **id));
    gone.map_or(Ok(()), |id| refuse(format!("network {id} was removed after the start")))
}

/// Every file that is open must be named, or lie below one that is; every file that is named must be open.
fn compare_images(arguments: &[Argument], process: &Process, live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let said = image_paths(arguments);
    let path = |node: &BlockNode| absolute(process, Path::new(&node.file));
    let backing = |node: &BlockNode| {
        let overlay = path(node);
        Some(overlay.parent().unwrap_or(Path::new("/")).join(node.backing_file.as_ref()?))
    };
    let below: BTreeSet<PathBuf> = live.block_nodes.iter().filter_map(backing).collect();
    let open: BTreeSet<PathBuf> =
        live.block_nodes.iter().filter(|node| is_file(&node.driver)).map(path).collect();
    if let Some(path) = open.iter().find(|path| !said.contains(*path) && !below.contains(*path)) {
        return refuse(format!("image {} was opened after the start", path.display()));
    }
    let closed = said.iter().find(|path| !open.contains(*path));
    closed.map_or(Ok(()), |path| refuse(format!("image {} was closed after the start", path.display())))
}

fn is_file(driver: &str) -> bool {
    matches!(driver, "file" | "host_device" | "host_cdrom")
}

fn image_paths(arguments: &[Argument]) -> BTreeSet<PathBuf> {
    let mut paths = BTreeSet::new();
    let blocks = arguments.iter().filter(|argument| matches!(argument.option.as_str(), "drive" | "blockdev"));
    for argument in blocks {
        let collected = rules::map_paths::<std::convert::Infallible>(argument, |_, path| {
            paths.insert(path.to_owned());
            Ok(path.to_owned())
        });
        let Ok(_) = collected;
    }
    paths
}

fn compare_processors(arguments: &[Argument], live: &LiveFacts) -> Result<(), AdoptRefusal> {
    let said = lists(arguments, "smp", "cpus").last().map_or(Some(1), |list| processors(&list));
    match said {
        None => refuse("the value of -smp isn't understood"),
        Some(said) if said == live.vcpus => Ok(()),
        Some(said) => refuse(format!("the machine has {} CPUs now and was started with {said}", live.vcpus)),
    }
}

/// How many CPUs `-smp` starts with: what it says, else all that fit.
fn processors(smp: &Properties) -> Option<u32> {
    if let Some(count) = smp.get("cpus").or_else(|| smp.get("maxcpus")) {
        return count.parse().ok();
    }
    ["sockets", "dies", "clusters", "modules", "cores", "threads"].iter().try_fold(1u32, |product, key| {
        let count: u32 = smp.get(key).map_or(Some(1), |count| count.parse().ok())?;
        product.checked_mul(count)
    })
}
