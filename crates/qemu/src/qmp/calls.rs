//! Typed calls for the commands that godwit needs.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{Client, QmpError};

/// What a guest does, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names are QEMU's")]
pub enum RunState {
    Running,
    Paused,
    Suspended,
    IoError,
    GuestPanicked,
    InternalError,
    Inmigrate,
    Postmigrate,
    Prelaunch,
    FinishMigrate,
    RestoreVm,
    SaveVm,
    Shutdown,
    Watchdog,
    Debug,
    Colo,
    /// One that QEMU learned later.
    #[serde(other)]
    Unknown,
}

/// `query-status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether virtual CPUs execute.
    pub running: bool,
    /// Why they don't, otherwise.
    #[serde(rename = "status")]
    pub state: RunState,
}

/// The state of a migration, in QEMU's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names are QEMU's")]
pub enum MigrationState {
    /// There was none yet.
    #[default]
    None,
    Setup,
    Active,
    PreSwitchover,
    Device,
    PostcopyActive,
    PostcopyPaused,
    WaitUnplug,
    Completed,
    Failed,
    Cancelling,
    Cancelled,
    /// One that QEMU learned later.
    #[serde(other)]
    Unknown,
}

impl MigrationState {
    /// Whether nothing follows: another migration may begin.
    pub fn is_final(self) -> bool {
        matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationStatus {
    /// How far it is.
    pub status: MigrationState,
    /// What happened to the guest's memory; absent before it began.
    pub ram: Option<RamStatistics>,
    /// Why it failed.
    #[serde(rename = "error-desc")]
    pub error: Option<String>,
    /// Why it can't even begin.
    pub blocked_reasons: Vec<String>,
    /// From the beginning.
    #[serde(rename = "total-time")]
    pub total_ms: Option<u64>,
    /// The guest's pause as the source counts it.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
}

/// What a migration did with the guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStatistics {
    /// Bytes put into the stream.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// Bytes known to be dirty.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// The guest's memory.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// Pages all of one byte.
    #[serde(rename = "duplicate")]
    pub duplicate_pages: u64,
    /// Pages sent whole.
    #[serde(rename = "normal")]
    pub normal_pages: u64,
    /// How often the dirty log was read: the passes.
    pub dirty_sync_count: u64,
    /// Pages dirtied a second, in the last second or pass.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_per_second: u64,
    /// Throughput as QEMU measures it, megabits a second.
    #[serde(rename = "mbps")]
    pub megabits_per_second: f64,
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// One of `query-machines`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// `pc-q35-10.0`.
    pub name: String,
    /// `q35`.
    #[serde(default)]
    pub alias: Option<String>,
}

/// One of `query-cpus-fast`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfo {
    /// From 0.
    pub cpu_index: u64,
    /// The host's thread that executes it.
    pub thread_id: i32,
    /// Where it is in QEMU's object tree.
    pub qom_path: String,
}

/// `query-memory-size-summary`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// Present at the start.
    #[serde(rename = "base-memory")]
    pub base_bytes: u64,
    /// Plugged in at run time.
    #[serde(rename = "plugged-memory", default)]
    pub plugged_bytes: u64,
}

/// One of `qom-list`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct QomEntry {
    /// The property's name.
    pub name: String,
    /// Its type; `child<virtio-net-pci>` for an object.
    #[serde(rename = "type")]
    pub kind: String,
}

impl QomEntry {
    /// The object's type if this is one.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// The migration capabilities and parameters of a QEMU, to be put back later.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationSettings {
    /// Name and whether it is on.
    pub capabilities: BTreeMap<String, bool>,
    /// As `query-migrate-parameters` gives them.
    pub parameters: Map<String, Value>,
}

/// Whether the guest runs, and its power.
impl Client {
    /// What the guest does.
    pub async fn query_status(&self) -> Result<Status, QmpError> {
        self.query("query-status", Value::Null).await
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Ends QEMU. The answer may be lost with the connection, which counts as success.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.order("quit", Value::Null).await {
            Err(QmpError::Closed { .. }) => Ok(()),
            other => other,
        }
    }

    /// Presses the guest's power button.
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null).await
    }
}

/// What is running.
impl Client {
    /// QEMU's version.
    pub async fn query_version(&self) -> Result<Version, QmpError> {
        #[derive(Deserialize)]
        struct Answer {
            qemu: Version,
        }
        self.query("query-version", Value::Null).await.map(|answer: Answer| answer.qemu)
    }

    /// The name given with `-name`.
    pub async fn query_name(&self) -> Result<Option<String>, QmpError> {
        #[derive(Deserialize)]
        struct Answer {
            name: Option<String>,
        }
        self.query("query-name", Value::Null).await.map(|answer: Answer| answer.name)
    }

    /// The machine types that this QEMU can start.
    pub async fn query_machines(&self) -> Result<Vec<MachineInfo>, QmpError> {
        self.query("query-machines", Value::Null).await
    }

    /// The type of the running machine, versioned: `pc-q35-10.0`, whatever alias it was started by.
    pub async fn machine_type(&self) -> Result<String, QmpError> {
        let kind: String = self.qom_get("/machine", "type").await?;
        Ok(kind.strip_suffix("-machine").unwrap_or(&kind).to_owned())
    }

    /// Whether KVM executes the guest.
    pub async fn query_kvm(&self) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct Answer {
            enabled: bool,
        }
        self.query("query-kvm", Value::Null).await.map(|answer: Answer| answer.enabled)
    }

    /// The virtual CPUs.
    pub async fn query_cpus_fast(&self) -> Result<Vec<CpuInfo>, QmpError> {
        self.query("query-cpus-fast", Value::Null).await
    }

    /// Where the first virtual CPU is in the object tree.
    pub async fn first_cpu_path(&self) -> Result<String, QmpError> {
        let first = self.query_cpus_fast().await?.into_iter().next();
        first.map(|cpu| cpu.qom_path).ok_or_else(|| QmpError::Unexpected {
            command: "query-cpus-fast".to_owned(),
            source: serde::de::Error::custom("the machine has no processor"),
        })
    }

    /// The names of all features of processors that this QEMU knows: what the model without any is described by.
    pub async fn cpu_feature_names(&self) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Answer {
            model: Model,
        }
        #[derive(Deserialize)]
        struct Model {
            props: Map<String, Value>,
        }
        let arguments = json!({ "type": "static", "model": { "name": "base" } });
        let answer: Answer = self.query("query-cpu-model-expansion", arguments).await?;
        // Beside them are a few numbers and the names of model and vendor.
        let features = answer.model.props.into_iter().filter(|(_, value)| value.is_boolean());
        Ok(features.map(|(name, _)| name).collect())
    }

    /// The guest's memory.
    pub async fn query_memory_size(&self) -> Result<MemorySize, QmpError> {
        self.query("query-memory-size-summary", Value::Null).await
    }

    /// What is at `path` in QEMU's object tree.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<QomEntry>, QmpError> {
        self.query("qom-list", json!({ "path": path })).await
    }

    /// A property of an object.
    pub async fn qom_get<T: DeserializeOwned>(&self, path: &str, property: &str) -> Result<T, QmpError> {
        self.query("qom-get", json!({ "path": path, "property": property })).await
    }

    /// Executes a line of the human monitor and gives what it prints.
    pub async fn hmp(&self, line: &str) -> Result<String, QmpError> {
        self.query("human-monitor-command", json!({ "command-line": line })).await
    }

    /// Asks the guest to shrink or grow to so many bytes.
    pub async fn balloon(&self, target_bytes: u64) -> Result<(), QmpError> {
        self.order("balloon", json!({ "value": target_bytes })).await
    }

    /// Makes the guest's cards announce themselves (RARP): `rounds` times, the first at once, then after `initial`,
    /// then `step` more each time up to `maximum`.
    pub async fn announce_self(
        &self,
        initial: Duration,
        maximum: Duration,
        rounds: u32,
        step: Duration,
    ) -> Result<(), QmpError> {
        let arguments = json!({
            "initial": milliseconds(initial),
            "max": milliseconds(maximum),
            "rounds": rounds,
            "step": milliseconds(step),
        });
        self.order("announce-self", arguments).await
    }
}

/// Migration.
impl Client {
    /// How far a migration is.
    pub async fn query_migrate(&self) -> Result<MigrationStatus, QmpError> {
        self.query("query-migrate", Value::Null).await
    }

    /// Begins a migration to `uri`, such as `unix:/path`.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": uri })).await
    }

    /// Goes on from the state `pre-switchover`.
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        self.order("migrate-continue", json!({ "state": "pre-switchover" })).await
    }

    /// Gives a migration up.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// Waits at `uri` for a migration; once in the life of a QEMU that was started with `-incoming defer`.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate-incoming", json!({ "uri": uri })).await
    }

    /// The capabilities that this QEMU has, and which are on.
    pub async fn migrate_capabilities(&self) -> Result<BTreeMap<String, bool>, QmpError> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let list: Vec<Capability> = self.query("query-migrate-capabilities", Value::Null).await?;
        Ok(list.into_iter().map(|entry| (entry.capability, entry.state)).collect())
    }

    /// Switches capabilities on and off, all or none.
    pub async fn set_migrate_capabilities(&self, wanted: &BTreeMap<String, bool>) -> Result<(), QmpError> {
        let entry = |(name, state): (&String, &bool)| json!({ "capability": name, "state": state });
        let capabilities: Vec<Value> = wanted.iter().map(entry).collect();
        self.order("migrate-set-capabilities", json!({ "capabilities": capabilities })).await
    }

    /// The parameters of migrations.
    pub async fn migrate_parameters(&self) -> Result<Map<String, Value>, QmpError> {
        self.query("query-migrate-parameters", Value::Null).await
    }

    /// Sets those that are given, all or none.
    pub async fn set_migrate_parameters(&self, wanted: &Map<String, Value>) -> Result<(), QmpError> {
        self.order("migrate-set-parameters", Value::Object(wanted.clone())).await
    }

    /// Everything that a migration may change, to be put back by [`Self::restore_migration_settings`].
    pub async fn migration_settings(&self) -> Result<MigrationSettings, QmpError> {
        let capabilities = self.migrate_capabilities().await?;
        Ok(MigrationSettings { capabilities, parameters: self.migrate_parameters().await? })
    }

    /// Puts back what differs from `saved`; QEMU refuses this while a migration is under way.
    pub async fn restore_migration_settings(&self, saved: &MigrationSettings) -> Result<(), QmpError> {
        let now = self.migration_settings().await?;
        let parameters: Map<_, _> = differing(&saved.parameters, |name| now.parameters.get(name));
        let capabilities: BTreeMap<_, _> = differing(&saved.capabilities, |name| now.capabilities.get(name));
        if !capabilities.is_empty() {
            self.set_migrate_capabilities(&capabilities).await?;
        }
        if !parameters.is_empty() {
            self.set_migrate_parameters(&parameters).await?;
        }
        Ok(())
    }

    pub(crate) async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute(command, arguments).await?;
        let unexpected = |source| QmpError::Unexpected { command: command.to_owned(), source };
        serde_json::from_value(value).map_err(unexpected)
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments).await.map(drop)
    }
}

fn differing<'a, T: PartialEq + Clone + 'a, M: FromIterator<(String, T)>>(
    saved: impl IntoIterator<Item = (&'a String, &'a T)>,
    now: impl Fn(&str) -> Option<&'a T>,
) -> M {
    let changed = saved.into_iter().filter(|(name, value)| now(name) != Some(value));
    changed.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
