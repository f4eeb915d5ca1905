//! The agent: one process a host, which starts machines and migrations and answers for them.
//!
//! It owns nothing that a machine or a migration needs to go on: QEMU and workers are processes of their own, and all
//! that is known of them lies in the state directory and in `/proc`. An agent that is killed and started again goes on
//! where it was.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`] | `agent.toml` |
//! | [`state`] | the state directory |
//! | [`api`] | HTTP on the unix socket, for this host's operator |
//! | [`listener`] | TCP, for other hosts: their agents, and the workers of migrations |
//! | [`admission`], [`reach`] | which requests of peers are looked at, and where their files really lead |
//! | [`credentials`], [`supervisor`] | the certificate, renewed while the agent runs; the service manager |
//! | [`machines`], [`launch`], [`adoption`] | machines: what is asked about them, how they start |
//! | [`metrics`] | what is counted and measured, for Prometheus |
//! | [`check`] | whether a migration would be refused |
//! | [`forecast`], [`sampling`], [`probe`], [`history`] | what a migration will take, and what earlier ones took |
//! | [`sharing`] | what guests that move between two hosts have in common |
//! | [`recovery`] | finishing or rolling back what a dead worker or host left |
//! | [`migrations`], [`outgoing`], [`incoming`] | migrations: following them, and how each side begins one |

mod accelerator;
mod admission;
mod adoption;
mod api;
mod check;
pub(crate) mod config;
mod credentials;
mod detached;
mod disks;
mod error;
mod forecast;
mod history;
mod incoming;
mod launch;
mod listener;
mod machines;
mod metrics;
mod migrations;
mod outgoing;
mod ownership;
mod peers;
mod probe;
pub(crate) mod process;
mod rate;
mod reach;
mod recovery;
mod sampling;
mod sharing;
mod state;
mod supervisor;
mod taps;
mod workers;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU32},
    time::SystemTime,
};

use godwit_qemu::machine::Accel;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::OnceCell,
};

use self::{
    admission::Admission,
    config::{Config, ConfigError},
    credentials::Credentials,
    history::History,
    machines::Busy,
    metrics::Metrics,
    migrations::Migrations,
    state::StateDir,
};
pub(crate) use self::{api::openapi, credentials::CredentialsError, state::StateError};

/// Threads that serve, at least: a file that has to reach the disk keeps one of them, and the others go on.
const THREADS_MIN: usize = 4;

/// Why the agent doesn't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its identity.
    #[error("{} holds no identity that can be used; see `godwit join --help`", directory.display())]
    Identity {
        /// Where it should be.
        directory: PathBuf,
        /// Why.
        source: CredentialsError,
    },
    /// No QEMU.
    #[error("there is no {} that can be executed; install QEMU or set `emulator`", .0.display())]
    Emulator(PathBuf),
    /// Its state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// An address is taken or not permitted.
    #[error("can't listen on {address}")]
    Listen {
        /// The socket or the TCP address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The runtime failed.
    #[error("the agent stopped")]
    Io(#[from] std::io::Error),
}

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Agent {
    config: Config,
    state: StateDir,
    credentials: Credentials,
    emulator: PathBuf,
    accelerator: OnceCell<Accel>,
    busy: Busy,
    migrations: Migrations,
    /// From this host.
    migrations_begun: AtomicU32,
    metrics: Metrics,
    admission: Admission,
    history: History,
    servers: disks::Servers,
}

/// Runs the agent until SIGTERM or SIGINT, or only checks that it could.
///
/// # Errors
/// [`StartError`], one line.
pub(crate) fn main(config: &Path, check: bool) -> Result<(), StartError> {
    let config = Config::load(config)?;
    let credentials = open_identity(&config)?;
    let emulator = find_emulator(&config.emulator)?;
    if check {
        return Ok(());
    }
    process::lay_privilege_aside();
    let state = StateDir::open(&config.state_dir)?;
    state::make_private_dir(&config.shared_dir())?;
    let history = History::new(state.history());
    let agent = Arc::new(Agent {
        config,
        state,
        credentials,
        emulator,
        accelerator: OnceCell::new(),
        busy: Busy::default(),
        migrations: Migrations::default(),
        migrations_begun: AtomicU32::new(0),
        metrics: Metrics::default(),
        admission: Admission::default(),
        history,
        servers: disks::Servers::default(),
    });
    let threads =
        std::thread::available_parallelism().map_or(THREADS_MIN, |cores| cores.get().max(THREADS_MIN));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(agent.serve())
}

impl Agent {
    async fn serve(self: Arc<Self>) -> Result<(), StartError> {
        let unix = self.bind_socket()?;
        let tcp = bind(self.config.listen).await?;
        let metrics = match self.config.metrics_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        self.resume_migrations();
        self.undo_unfinished_starts().await;
        self.obey_orders().await;
        tokio::spawn(self.clone().keep_settling());
        tokio::spawn(self.clone().reap_machines());
        tokio::spawn(self.clone().keep_disks_served());
        tokio::spawn(self.clone().keep_shared_pages());
        let (kept, reload) = (self.clone(), signal(SignalKind::hangup())?);
        tokio::spawn(async move { kept.credentials.keep(reload).await });
        tokio::spawn(listener::serve(self.clone(), tcp));
        if let Some(metrics) = metrics {
            tokio::spawn(metrics::serve(self.clone(), metrics));
        }
        tokio::spawn(supervisor::keep_alive(self.clone()));
        let name = self.config.name.as_str();
        tracing::info!(name, socket = %self.config.socket.display(), listen = %self.config.listen, "ready");
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        supervisor::ready();
        tokio::select! {
            result = axum::serve(unix, api::router(self.clone())) => result?,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        supervisor::stopping();
        let _ = std::fs::remove_file(&self.config.socket);
        tracing::info!("stopped; machines and migrations go on");
        Ok(())
    }

    /// The state directory's lock proves that a socket which is there belongs to nobody.
    fn bind_socket(&self) -> Result<UnixListener, StartError> {
        let path = &self.config.socket;
        if let Some(parent) = path.parent() {
            state::make_private_dir(parent)?;
        }
        let _ = std::fs::remove_file(path);
        let listen = |source| StartError::Listen { address: path.display().to_string(), source };
        let listener = UnixListener::bind(path).map_err(listen)?;
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path, owner_only).map_err(listen)?;
        Ok(listener)
    }

    /// What `auto` means here; found out once.
    async fn accelerator(&self) -> Accel {
        let detect = || accelerator::detect(&self.emulator, self.state.root());
        *self.accelerator.get_or_init(detect).await
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listening = TcpListener::bind(address).await;
    listening.map_err(|source| StartError::Listen { address: address.to_string(), source })
}

fn open_identity(config: &Config) -> Result<Credentials, StartError> {
    Credentials::open(&config.identity_dir, &config.name, SystemTime::now())
        .map_err(|source| StartError::Identity { directory: config.identity_dir.clone(), source })
}

/// The emulator's absolute path; a bare name is looked up in PATH.
fn find_emulator(emulator: &Path) -> Result<PathBuf, StartError> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let candidates: Vec<PathBuf> = if emulator.components().count() > 1 {
        vec![emulator.to_owned()]
    } else {
        std::env::split_paths(&search).map(|directory| directory.join(emulator)).collect()
    };
    let executable =
        |path: &PathBuf| path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok();
    candidates
        .into_iter()
        .find(executable)
        .and_then(|path| path.canonicalize().ok())
        .ok_or_else(|| StartError::Emulator(emulator.to_owned()))
}
