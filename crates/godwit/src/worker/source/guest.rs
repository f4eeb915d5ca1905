//! The user's QEMU at the source: what we change of it, and how it gets back what it had.

use std::{
    collections::BTreeMap,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use godwit_qemu::{
    adopt::UNBLOCK,
    qmp::{Client, Event, MigrationSettings, MigrationState, QmpError, RunState, Version},
};
use serde_json::{Map, json};
use tokio::sync::broadcast;

use crate::borrowed;

/// What is switched on; everything else that is on is switched off for the migration.
const CAPABILITIES: [&str; 3] = ["events", "return-path", GATE];
/// Lets the worker say when the guest stops; QEMU before 8.1 lacks it.
pub(crate) const GATE: &str = "switchover-ack";
/// Before this, QEMU's emulator goes on writing unnoticed to pages that were looked at once (docs/qemu-notes.md, "QEMU
/// 7.2"). A guest that doesn't run loses nothing.
const EMULATOR_NOTICES_SINCE: Version = Version { major: 9, minor: 0, micro: 0 };
/// `downtime-limit` and `avail-switchover-bandwidth` while the stop is far: what QEMU thinks it could send in a pause is
/// less than a page, so that it looks for dirty pages only when it has named all that it knew of. Under TCG, QEMU loses
/// pages for good where it looks before that (docs/qemu-notes.md, "Dirty pages that QEMU loses").
const STOP_IS_FAR: (u64, u64) = (1, 1_000_000);
/// The same once the gate is open: the most that QEMU takes.
const STOP_IS_NOW: (u64, u64) = (2_000_000, 1 << 40);
/// The name that QEMU knows its end of the stream by.
const STREAM_NAME: &str = "godwit-stream";
/// How long QEMU may take to settle after a cancel.
const SETTLE: Duration = Duration::from_secs(10);

/// Why the guest's QEMU can't be used, or couldn't be left as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// The monitor failed or refused.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// Too old.
    #[error("this QEMU lacks the capability `{0}`; godwit needs QEMU 7.2 or later")]
    Lacks(&'static str),
    /// A device can't migrate.
    #[error("QEMU can't migrate this machine: {0}; {UNBLOCK}")]
    Blocked(String),
    /// Its memory wouldn't arrive as it is.
    #[error(
        "the emulator (TCG) of QEMU {0} loses what a running guest writes; pause the machine first (`stop`), or run it \
         under KVM or QEMU {EMULATOR_NOTICES_SINCE}"
    )]
    Loses(Version),
    /// Another migration is under way.
    #[error("QEMU is already migrating this machine (state {0:?})")]
    Busy(MigrationState),
    /// The machine is in a state in which nothing can be moved.
    #[error("the machine is {0:?}; it can be moved while it is running or paused")]
    NotMovable(RunState),
    /// What QEMU had set can't be written down.
    #[error("can't write down what QEMU had set")]
    NoNote(#[source] std::io::Error),
    /// There is no socket for QEMU's stream.
    #[error("can't make a socket for QEMU's migration stream")]
    NoStream(#[source] std::io::Error),
    /// QEMU neither finished nor gave up.
    #[error("QEMU's migration stays {0:?}")]
    Unsettled(MigrationState),
}

/// A machine's QEMU while it is being moved.
pub(super) struct Guest {
    pub(super) monitor: Client,
    machine_dir: PathBuf,
    saved: MigrationSettings,
    /// Whether QEMU waits with the stop until it is let; otherwise it stops the guest when it finds next to nothing dirty.
    pub(super) is_gated: bool,
    /// Whether QEMU would lose what the guest writes if it ran.
    pub(super) loses_writes: bool,
    /// What it did when the migration began.
    pub(super) run_state: RunState,
    /// What QEMU said since then.
    pub(super) events: broadcast::Receiver<Event>,
}

impl Guest {
    /// Looks at the machine; changes nothing.
    pub(super) async fn inspect(monitor: Client, machine_dir: &Path) -> Result<Self, GuestError> {
        // First, so that no change of the run state falls between the two.
        let events = monitor.events();
        let (run_state, saved) = look(&monitor).await?;
        let machine_dir = machine_dir.to_owned();
        let is_gated = saved.capabilities.contains_key(GATE);
        let loses_writes = loses_writes(&monitor).await?;
        Ok(Self { monitor, machine_dir, saved, is_gated, loses_writes, run_state, events })
    }

    /// Lets QEMU migrate into a socket and gives the other end of it. QEMU is handed its end, because it may be
    /// another user's, who can't open files of ours.
    pub(super) async fn open_stream(&self) -> Result<UnixStream, GuestError> {
        let (ours, theirs) = UnixStream::pair().map_err(GuestError::NoStream)?;
        borrowed::note(&self.machine_dir, &self.saved).map_err(GuestError::NoNote)?;
        self.monitor.set_migrate_capabilities(&self.wanted_capabilities()).await?;
        self.set_parameters(STOP_IS_FAR).await?;
        self.monitor.get_fd(STREAM_NAME, theirs.into()).await?;
        self.monitor.migrate(&format!("fd:{STREAM_NAME}")).await?;
        Ok(ours)
    }

    fn wanted_capabilities(&self) -> BTreeMap<String, bool> {
        let wanted = |name: &str| CAPABILITIES.contains(&name);
        let changed = self.saved.capabilities.iter().filter(|(name, on)| **on != wanted(name));
        changed.map(|(name, on)| (name.clone(), !on)).collect()
    }

    /// Lets QEMU stop the guest whatever it thinks is still owed; it does so within 100 ms. Only after it has had the
    /// switch-over acknowledgement: see [`STOP_IS_FAR`].
    pub(super) async fn allow_stop(&self) -> Result<(), GuestError> {
        self.set_parameters(STOP_IS_NOW).await
    }

    async fn set_parameters(&self, (limit_ms, bytes_per_second): (u64, u64)) -> Result<(), GuestError> {
        let wanted = [
            ("max-bandwidth", json!(0)),
            ("downtime-limit", json!(limit_ms)),
            ("avail-switchover-bandwidth", json!(bytes_per_second)),
        ];
        let known = wanted.into_iter().filter(|(name, _)| self.saved.parameters.contains_key(*name));
        let known: Map<_, _> = known.map(|(name, value)| (name.to_owned(), value)).collect();
        Ok(self.monitor.set_migrate_parameters(&known).await?)
    }

    /// Ends QEMU's migration, whatever state it is in. The guest is left to QEMU: it goes on by itself where QEMU had
    /// stopped it and the migration wasn't complete.
    pub(super) async fn give_up(&self) -> Result<(), GuestError> {
        if !self.monitor.query_migrate().await?.status.is_final() {
            self.monitor.migrate_cancel().await?;
        }
        self.settled().await
    }

    /// Lets the guest run, if it doesn't.
    pub(super) async fn resume(&self) -> Result<(), GuestError> {
        if !self.monitor.query_status().await?.running {
            self.monitor.cont().await?;
        }
        Ok(())
    }

    /// Puts back what was changed of QEMU's settings, if QEMU is still there.
    pub(super) async fn put_back(&self) -> Result<(), GuestError> {
        Ok(borrowed::give_back(&self.machine_dir, &self.monitor).await?)
    }

    async fn settled(&self) -> Result<(), GuestError> {
        let give_up_at = Instant::now() + SETTLE;
        loop {
            let state = self.monitor.query_migrate().await?.status;
            if state.is_final() {
                return Ok(());
            }
            if Instant::now() > give_up_at {
                return Err(GuestError::Unsettled(state));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// What the machine does, and what is set of its QEMU's migration. Changes nothing.
///
/// # Errors
/// Why it can't be moved now.
pub(crate) async fn look(monitor: &Client) -> Result<(RunState, MigrationSettings), GuestError> {
    let state = monitor.query_status().await?.state;
    let movable = matches!(
        state,
        RunState::Running
            | RunState::Paused
            | RunState::Suspended
            | RunState::IoError
            | RunState::GuestPanicked
            | RunState::Prelaunch
            | RunState::Postmigrate
    );
    if !movable {
        return Err(GuestError::NotMovable(state));
    }
    if state == RunState::Running && loses_writes(monitor).await? {
        return Err(GuestError::Loses(monitor.query_version().await?));
    }
    let migration = monitor.query_migrate().await?;
    if !migration.status.is_final() {
        return Err(GuestError::Busy(migration.status));
    }
    if !migration.blocked_reasons.is_empty() {
        return Err(GuestError::Blocked(migration.blocked_reasons.join("; ")));
    }
    let settings = monitor.migration_settings().await?;
    let mut needed = CAPABILITIES.into_iter().filter(|name| *name != GATE);
    match needed.find(|name| !settings.capabilities.contains_key(*name)) {
        Some(lacking) => Err(GuestError::Lacks(lacking)),
        None => Ok((state, settings)),
    }
}

async fn loses_writes(monitor: &Client) -> Result<bool, QmpError> {
    Ok(!monitor.query_kvm().await? && monitor.query_version().await? < EMULATOR_NOTICES_SINCE)
}
