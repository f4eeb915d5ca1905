//! What a peer's specification may ask for at this host.
//!
//! A specification that came from a peer is data. It is refused unless everything in it that reaches into the host
//! (files, bridges, TAP devices, QEMU's own arguments) is named in the host's configuration. Only text is judged here;
//! that a path inside a permitted directory isn't a symbolic link out of it, and that a qcow2 image names no backing
//! file elsewhere, is for whoever may touch the file system.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Argument, parse, properties::Properties, rules};
use crate::machine::{Adopted, Net, Spec, SpecError, check_interface, check_path};

/// What a host accepts from its peers; the table `[accept]` of the agent's configuration. The default accepts machines
/// without files, networks or extra arguments.
///
/// ```toml
/// [accept]
/// paths = { "/srv/vm" = "/mnt/vm" }
/// bridges = { br0 = "br-lan" }
/// extra = ["-rtc base=utc", "-cpu *"]
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Directories of peers and what they are here; the longest that fits counts.
    pub paths: BTreeMap<PathBuf, PathBuf>,
    /// Bridges of peers and what they are here.
    pub bridges: BTreeMap<String, String>,
    /// TAP devices of peers and what they are here.
    pub taps: BTreeMap<String, String>,
    /// Arguments of QEMU that a machine may bring along, each with its value. A `*` stands for any characters but
    /// comma and slash, so that nothing can be appended that the pattern doesn't show.
    pub extra: Vec<String>,
    /// Whether adopted machines may have QEMU's user-mode network, which reaches this host's own loopback interface.
    pub user_networks: bool,
}

/// Why a peer's machine isn't accepted; one line that names the key that would allow it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyRefusal {
    /// No policy could allow it.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Another policy could.
    #[error("{what} isn't accepted here; accept.{key} in this host's configuration would allow it")]
    NotAccepted {
        /// The part of the specification and its value.
        what: String,
        /// The key in the table `[accept]`.
        key: &'static str,
    },
    /// The policy itself substitutes something impossible.
    #[error("accept.{key} of this host's configuration: {problem}")]
    Policy {
        /// The key in the table `[accept]`.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
}

impl PolicyRefusal {
    fn not_accepted(what: impl std::fmt::Display, key: &'static str) -> Self {
        Self::NotAccepted { what: what.to_string(), key }
    }
}

/// The peer's specification as this host would run it: paths, bridges and TAP devices substituted.
///
/// # Errors
/// Anything that the policy doesn't allow.
pub fn localise(spec: &Spec, policy: &Policy) -> Result<Spec, PolicyRefusal> {
    spec.validate()?;
    let mut local = spec.clone();
    for (index, net) in local.net.iter_mut().enumerate() {
        policy.substitute_network(&format!("net[{index}]"), net)?;
    }
    for (index, disk) in local.disk.iter_mut().enumerate() {
        let key = format!("disk[{index}]");
        let Some(path) = &disk.path else {
            return Err(SpecError::new(key, "is served by its host; such a disk can't be moved yet").into());
        };
        disk.path = Some(policy.local_path(&format!("{key}.path"), path)?);
    }
    if let Some(boot) = &mut local.boot {
        boot.kernel = policy.local_path("boot.kernel", &boot.kernel)?;
        let initrd = boot.initrd.take().map(|path| policy.local_path("boot.initrd", &path));
        boot.initrd = initrd.transpose()?;
    }
    let firmware = local.firmware.take().map(|path| policy.local_path("firmware", &path));
    local.firmware = firmware.transpose()?;
    policy.check_extra(&local.extra)?;
    check_memory(spec)?;
    let adopted = local.adopted.take().map(|adopted| policy.substitute_adopted(&adopted, local.net.len()));
    local.adopted = adopted.transpose()?;
    local.validate().map_err(|error| PolicyRefusal::Policy { key: "paths", problem: error.to_string() })?;
    Ok(local)
}

/// Every file of this host that a specification names, once it has been localised: where they really lead is for whoever
/// may touch the file system to find out.
#[must_use]
pub fn files(spec: &Spec) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = spec.disk.iter().filter_map(|disk| disk.path.clone()).collect();
    files.extend(
        spec.boot.iter().flat_map(|boot| [Some(&boot.kernel), boot.initrd.as_ref()]).flatten().cloned(),
    );
    files.extend(spec.firmware.clone());
    files.extend(spec.adopted.iter().flat_map(|adopted| &adopted.arguments).flat_map(rules::paths));
    files
}

/// An adopted machine's arguments may ask for no more memory than the specification says: by that, room is judged.
fn check_memory(spec: &Spec) -> Result<(), SpecError> {
    let Some(adopted) = &spec.adopted else { return Ok(()) };
    let (mut main, mut backends) = (0_u64, 0_u64);
    for argument in &adopted.arguments {
        let unreadable = || SpecError::new("adopted", format!("{argument}: its size can't be read"));
        let bytes = rules::memory_bytes(argument).ok_or_else(unreadable)?;
        let sum = if argument.option == "m" { &mut main } else { &mut backends };
        *sum = sum.saturating_add(bytes);
    }
    // Memory is either `-m`'s own, or that of back-ends which together are as large.
    let (asked, said) = (main.max(backends), spec.memory.bytes());
    if asked > said {
        return Err(SpecError::new(
            "adopted",
            format!("its arguments ask for {asked} bytes of memory, not {said}"),
        ));
    }
    Ok(())
}

impl Policy {
    fn substitute_network(&self, key: &str, net: &mut Net) -> Result<(), PolicyRefusal> {
        for (name, known, kind) in
            [(&mut net.bridge, &self.bridges, "bridges"), (&mut net.tap, &self.taps, "taps")]
        {
            let Some(theirs) = name.as_mut() else { continue };
            let what = || format!("{key}: {} {theirs}", kind.trim_end_matches('s'));
            let ours = known.get(theirs).ok_or_else(|| PolicyRefusal::not_accepted(what(), kind))?;
            let wrong = |error: SpecError| PolicyRefusal::Policy { key: kind, problem: error.to_string() };
            check_interface(theirs, ours).map_err(wrong)?;
            theirs.clone_from(ours);
        }
        Ok(())
    }

    fn local_path(&self, key: &str, path: &Path) -> Result<PathBuf, PolicyRefusal> {
        check_path(key, path)?;
        let below = |(theirs, ours): (&PathBuf, &PathBuf)| {
            let rest = path.strip_prefix(theirs).ok().filter(|rest| !rest.as_os_str().is_empty())?;
            Some((theirs.components().count(), ours.join(rest)))
        };
        let found = self.paths.iter().filter_map(below).max_by_key(|(length, _)| *length);
        let refusal = || PolicyRefusal::not_accepted(format!("{key}: {}", path.display()), "paths");
        found.map(|(_, local)| local).ok_or_else(refusal)
    }

    fn check_extra(&self, extra: &[String]) -> Result<(), PolicyRefusal> {
        let unreadable = |error: super::ArgumentError| SpecError::new("extra", error.to_string());
        for argument in parse(extra).map_err(unreadable)? {
            let text = match &argument.value {
                Some(value) => format!("-{} {value}", argument.option),
                None => format!("-{}", argument.option),
            };
            if !self.extra.iter().any(|pattern| matches(pattern, &text)) {
                return Err(PolicyRefusal::not_accepted(format!("extra: {argument}"), "extra"));
            }
        }
        Ok(())
    }

    fn substitute_adopted(&self, adopted: &Adopted, nets: usize) -> Result<Adopted, PolicyRefusal> {
        let mut local = Adopted { arguments: Vec::new(), left_behind: adopted.left_behind.clone() };
        for argument in &adopted.arguments {
            let key = format!("-{}", argument.option);
            rules::check(argument).map_err(|problem| SpecError::new("adopted", problem))?;
            let mapped = rules::map_paths(argument, |name, path| {
                self.local_path(format!("{key} {name}").trim_end(), path)
            })?;
            if rules::guesses_format(argument) {
                let problem = format!("{argument}: has no format, and what the guest wrote would choose it");
                return Err(SpecError::new("adopted", problem).into());
            }
            if is_user_network(argument) && !self.user_networks {
                return Err(PolicyRefusal::not_accepted(argument, "user_networks"));
            }
            local.arguments.push(mapped);
        }
        let networks = |option: &str| matches!(option, "net" | "nic" | "netdev" | "nodefaults");
        if !local.arguments.iter().any(|argument| networks(&argument.option)) && !self.user_networks {
            return Err(PolicyRefusal::not_accepted("QEMU's default network", "user_networks"));
        }
        let taps = local.arguments.iter().filter(|argument| is_tap(argument)).count();
        if taps != nets {
            let problem = format!("has {taps} TAP networks in its arguments but {nets} in net");
            return Err(SpecError::new("adopted", problem).into());
        }
        Ok(local)
    }
}

fn is_tap(argument: &Argument) -> bool {
    network_type(argument).is_some_and(|kind| kind == "tap")
}

fn is_user_network(argument: &Argument) -> bool {
    network_type(argument).is_some_and(|kind| kind == "user")
}

fn network_type(argument: &Argument) -> Option<String> {
    if !matches!(argument.option.as_str(), "net" | "nic" | "netdev") {
        return None;
    }
    let list = Properties::parse(argument.value.as_deref()?, "type").ok()?;
    list.get("type").map(str::to_owned)
}

/// Whether `text` is what `pattern` shows, `*` standing for any characters but comma and slash.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((literal, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(tail) = text.strip_prefix(literal) else { return false };
    let reach = tail.find([',', '/']).unwrap_or(tail.len());
    let mut ends = tail.char_indices().map(|(at, _)| at).chain([tail.len()]).take_while(|at| *at <= reach);
    ends.any(|at| matches(rest, &tail[at..]))
}
