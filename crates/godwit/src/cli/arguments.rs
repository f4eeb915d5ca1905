//! What can be said on the command line. The help texts are the manual; each verb shows how it is used.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use godwit_block::repository::{ImageName, RepositoryError};
use godwit_transport::identity::HostName;

use super::exit;
use crate::{
    agent::config::{DEFAULT_CONFIG, DEFAULT_IDENTITY, DEFAULT_REPOSITORY, DEFAULT_SOCKET},
    job::{OnStall, Options, RECONNECT_TIMEOUT_MS, StopPolicyName, Technique, Verify},
    quantity::{RateLimit, parse_rate, parse_rate_limit, parse_size, parse_time},
};

const EXAMPLES: &str = "\
Examples:
  godwit vm run web1.toml                     start a machine on this host
  godwit migrate web1 --to hostb              move it, running, to another
  godwit migrate web1 --to hostb --bandwidth 80Mbit --downtime-target 50ms
  godwit status --watch                       watch what is under way
  godwit vm ls --json | jq .                  every verb speaks JSON";

/// Moves running QEMU/KVM machines from host to host without a stop that anyone notices.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{}", exit::TABLE))]
#[command(propagate_version = true, arg_required_else_help = true)]
pub(super) struct Arguments {
    /// Print JSON: what the agent answered, or an error as {code, message}
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// The agent's unix socket
    #[arg(long, global = true, value_name = "PATH", env = "GODWIT_SOCKET", default_value = DEFAULT_SOCKET)]
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) socket: PathBuf,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Run the certificate authority that hosts trust
    #[command(subcommand)]
    Ca(CaVerb),
    /// Give this host its identity
    Join(Join),
    /// Run this host's agent
    Agent(Start),
    /// Start, list and end machines
    #[command(subcommand)]
    Vm(VmVerb),
    /// List, draw and remove the disks that this host serves
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Bring in, list and remove the images that disks begin as
    Image(Images),
    /// Move a running machine to another host
    Migrate(Box<Migrate>),
    /// Say whether a migration would be refused, and what it would take; moves nothing
    #[command(
        after_help = "Examples:\n  godwit check web1 --to hostb\n  godwit check web1 --to hostb --json | jq .forecast"
    )]
    Check(Box<Migrate>),
    /// Show migrations: all of them, or one
    Status(Status),
    /// Give a migration up; the guest goes on where it was
    #[command(after_help = "Examples:\n  godwit cancel web1\n  godwit cancel 5f2c9e01a7b3d846")]
    Cancel {
        /// A migration's id, or a machine's name
        #[arg(value_name = "ID|VM")]
        migration: String,
    },
    /// Finish or roll back what a crash or a lost host left open; says what was found and done
    Recover(Recover),
    /// Change the bandwidth limit of a migration under way
    #[command(after_help = "Examples:\n  godwit set-bandwidth web1 40Mbit\n  godwit set-bandwidth web1 none")]
    SetBandwidth {
        /// A migration's id, or a machine's name
        #[arg(value_name = "ID|VM")]
        migration: String,
        /// Like 80Mbit or 10MB/s; `none` lifts the limit
        #[arg(value_parser = parse_rate_limit)]
        rate: RateLimit,
    },
    /// Change what a migration under way does when the downtime target can't be met
    #[command(after_help = "Examples:\n  godwit set-on-stall web1 switch\n  godwit set-on-stall web1 wait")]
    SetOnStall {
        /// A migration's id, or a machine's name
        #[arg(value_name = "ID|VM")]
        migration: String,
        /// The new choice
        #[arg(value_name = "CHOICE")]
        on_stall: OnStall,
    },
    /// Show what migrations were thought to take, and what they took
    #[command(after_help = "Examples:\n  godwit history\n  godwit history --json | jq .score")]
    History,
    /// Show what each technique would save on a memory image or a captured migration stream
    Analyze(Analyze),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  godwit completions bash > /etc/bash_completion.d/godwit")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// The directory
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
    /// Print the description of the agent's HTTP API (OpenAPI 3.1, JSON)
    Openapi,
    /// Carry one migration (started by the agent)
    #[command(hide = true)]
    Worker {
        /// The migration's directory
        directory: PathBuf,
    },
    /// Look at a guest's memory (started by the agent)
    #[command(hide = true)]
    Sample,
    /// Serve a disk to QEMU (started by the agent)
    #[command(hide = true)]
    DiskServer(DiskServer),
}

/// What is done with disks.
#[derive(Debug, Subcommand)]
pub(super) enum DiskVerb {
    /// List the disks that are served here, or were
    Ls,
    /// Draw what of a disk was written, fetched, made zero, and is missing
    #[command(after_help = "Example:\n  godwit disk show web1.0")]
    Show {
        /// The disk: its machine's name, a dot, and its number
        #[arg(value_name = "DISK")]
        name: String,
    },
    /// Compare what a disk has of its image with the image's digests; its machine must be stopped
    ///
    /// What the machine wrote has no digests: the file system that it is on vouches for that.
    #[command(after_help = "Example:\n  godwit disk check web1.0 --repair")]
    Check {
        /// The disk
        #[arg(value_name = "DISK")]
        name: String,
        /// Fetch anew what is damaged
        #[arg(long)]
        repair: bool,
    },
    /// Write all that a disk has to a raw file; its machine must be stopped
    #[command(
        after_help = "Example:\n  godwit disk export web1.0 --to web1.raw && qemu-img convert -O qcow2 web1.raw web1.qcow2"
    )]
    Export {
        /// The disk
        #[arg(value_name = "DISK")]
        name: String,
        /// The file, which must not be there yet
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        to: PathBuf,
    },
    /// Remove a disk that no machine uses, with all that it has
    Rm {
        /// The disk
        #[arg(value_name = "DISK")]
        name: String,
    },
}

/// What `godwit image` takes.
#[derive(Debug, Args)]
pub(super) struct Images {
    /// Where images are kept: a directory, or s3://bucket/prefix with AWS_ACCESS_KEY_ID and the like in the environment
    #[arg(long, global = true, value_name = "LOCATION", env = "GODWIT_REPOSITORY", default_value = DEFAULT_REPOSITORY)]
    pub(super) repository: String,
    #[command(subcommand)]
    pub(super) verb: ImageVerb,
}

/// What is done with images.
#[derive(Debug, Subcommand)]
pub(super) enum ImageVerb {
    /// Bring an image in; cut off, it goes on where it was when it is called again
    #[command(
        after_help = "Examples:\n  godwit image import debian.qcow2 --name debian\n  godwit image import disk.raw --name web --repository s3://images/prod"
    )]
    Import {
        /// The image: raw or qcow2
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// What it will be called
        #[arg(long, value_name = "NAME", value_parser = image_name)]
        name: ImageName,
        /// How to read it [default: as it looks, unless it is a qcow2 above other files]
        #[arg(long)]
        format: Option<Format>,
    },
    /// List images
    Ls,
    /// Remove an image, and what no other has
    Rm {
        /// Its name
        #[arg(value_parser = image_name)]
        name: ImageName,
    },
    /// Read an image whole, and say what of it is missing or damaged; all images without a name
    Verify {
        /// Its name
        #[arg(value_parser = image_name)]
        name: Option<ImageName>,
    },
}

/// How an image is read.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum Format {
    /// The disk's bytes
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
}

fn image_name(name: &str) -> Result<ImageName, RepositoryError> {
    name.to_owned().try_into()
}

/// What `godwit disk-server` takes.
#[derive(Debug, Args)]
pub(super) struct DiskServer {
    /// The disk's directory
    pub(super) directory: PathBuf,
    /// The unix socket for QEMU
    #[arg(long)]
    pub(super) listen: PathBuf,
    /// Where the disk's image is
    #[arg(long)]
    pub(super) repository: Option<String>,
    /// QEMU may not write
    #[arg(long)]
    pub(super) read_only: bool,
    /// Make a disk of this size first
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) create: Option<u64>,
    /// Make a disk of this image first
    #[arg(long, value_name = "NAME", value_parser = image_name)]
    pub(super) image: Option<ImageName>,
}

/// What `godwit recover` takes.
#[derive(Debug, Args)]
#[command(after_help = "\
The agents do this by themselves, at once after a start and then again and again; the verb does it now. It may be
repeated: what is settled stays settled. Exit code 6 says that something is still open.

Examples:
  godwit recover                              everything on this host
  godwit recover web1 --json
  godwit recover web1 --assume-lost hostb     take web1 here although hostb has it, and doesn't come back")]
pub(super) struct Recover {
    /// The machine; by default all
    #[arg(value_name = "VM")]
    pub(super) machine: Option<String>,
    /// Declare the host lost that has the machine, or may have it, and take the machine here. If that host still runs
    /// it, two copies will write to the same disks: cut its power first
    #[arg(long, value_name = "HOST", requires = "machine")]
    pub(super) assume_lost: Option<String>,
    /// The lost host's name once more, as your word that it runs nothing; not asked if it has a `fence_command`
    #[arg(long, value_name = "HOST", requires = "assume_lost")]
    pub(super) confirm: Option<String>,
}

/// The certificate authority.
#[derive(Debug, Subcommand)]
pub(super) enum CaVerb {
    /// Make a new authority; keep its directory safe, off the hosts
    #[command(after_help = "Example:\n  godwit ca init ./ca")]
    Init {
        /// The authority's directory
        #[arg(value_hint = ValueHint::DirPath)]
        ca: PathBuf,
    },
    /// Sign the request that `godwit join` wrote on a host
    #[command(after_help = "Example:\n  godwit ca sign ./ca hosta host.csr --out hosta.bundle")]
    Sign {
        /// The authority's directory
        #[arg(value_hint = ValueHint::DirPath)]
        ca: PathBuf,
        /// The host that you know the request to come from
        name: HostName,
        /// The request
        #[arg(value_hint = ValueHint::FilePath)]
        request: PathBuf,
        #[command(flatten)]
        bundle: Bundle,
    },
    /// Make key and certificate for a host in one step; the bundle is a secret
    #[command(after_help = "Example:\n  godwit ca issue ./ca hosta --out hosta.bundle")]
    Issue {
        /// The authority's directory
        #[arg(value_hint = ValueHint::DirPath)]
        ca: PathBuf,
        /// The host
        name: HostName,
        #[command(flatten)]
        bundle: Bundle,
    },
}

/// What an authority gives to a host.
#[derive(Debug, Args)]
pub(super) struct Bundle {
    /// Where to write what `godwit join --bundle` takes
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) out: PathBuf,
    /// Days until the certificate expires
    #[arg(long, value_name = "N", default_value_t = 825)]
    pub(super) days: u32,
}

/// Gives this host its identity.
///
/// Without --bundle: makes a key, which never leaves this host, and a request to be signed.
/// With it: takes the authority's answer on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  godwit join hosta                                     writes host.csr into the identity's directory
  godwit ca sign ./ca hosta host.csr --out hosta.bundle (where the authority is)
  godwit join --bundle hosta.bundle")]
pub(super) struct Join {
    /// This host's name
    #[arg(required_unless_present = "bundle")]
    pub(super) name: Option<HostName>,
    /// The identity's directory
    #[arg(long, value_name = "DIR", default_value = DEFAULT_IDENTITY, value_hint = ValueHint::DirPath)]
    pub(super) identity: PathBuf,
    /// What `godwit ca sign` or `godwit ca issue` wrote
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) bundle: Option<PathBuf>,
}

/// The agent.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  godwit agent --check                 says what is wrong with the configuration
  godwit agent --config ./agent.toml
Set GODWIT_LOG=debug for more to read.")]
pub(super) struct Start {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG, value_hint = ValueHint::FilePath)]
    pub(super) config: PathBuf,
    /// Only check the configuration, the identity and the emulator
    #[arg(long)]
    pub(super) check: bool,
}

/// Machines.
#[derive(Debug, Subcommand)]
pub(super) enum VmVerb {
    /// Start a machine
    #[command(after_help = "Example:\n  godwit vm run web1.toml")]
    Run {
        /// Its specification (TOML)
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Take on a machine that somebody else started
    #[command(after_help = "Example:\n  godwit vm adopt --qmp /run/web1.qmp --name web1")]
    Adopt {
        /// Its QMP socket
        #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
        qmp: PathBuf,
        /// What to call it [default: its own -name]
        #[arg(long)]
        name: Option<String>,
    },
    /// List the machines that this host knows
    Ls,
    /// Show one machine
    Show {
        /// The machine
        name: String,
    },
    /// Ask a guest to power off, and wait until it has
    Stop {
        /// The machine
        name: String,
        /// How long to wait
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        timeout: Duration,
    },
    /// Let a guest go on that stopped because a disk of it couldn't be read or written, as on a host without space
    #[command(
        after_help = "Example:\n  godwit vm show web1     # its state is io-error\n  godwit vm resume web1"
    )]
    Resume {
        /// The machine
        name: String,
    },
    /// End a machine at once, as by pulling the plug
    Kill {
        /// The machine
        name: String,
    },
    /// Forget a machine that is off (or adopted), and what is known of who may run it
    Rm {
        /// The machine
        name: String,
    },
    /// Connect to a machine's serial console (Ctrl-] leaves)
    Console {
        /// The machine
        name: String,
    },
}

/// Moves a running machine to another host.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  godwit migrate web1 --to hostb
  godwit migrate web1 --to hostb --bandwidth 80Mbit --downtime-target 50ms
  godwit migrate web1 --to hostb --detach; godwit status --watch
Ctrl-C while watching only stops watching; `godwit cancel web1` gives the migration up.")]
pub(super) struct Migrate {
    /// The machine
    #[arg(value_name = "VM")]
    pub(super) machine: String,
    /// The host that is to get it (a name under `[peers]` in agent.toml)
    #[arg(long, value_name = "HOST")]
    pub(super) to: String,
    /// Send no faster than this [default: what the link gives]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<u64>,
    /// The pause to aim at
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_time)]
    downtime_target: Duration,
    /// When to stop the guest
    #[arg(long, value_name = "POLICY", default_value = "gate")]
    stop_policy: StopPolicyName,
    /// What to do when the downtime target can't be met
    #[arg(long, value_name = "CHOICE", default_value = "switch")]
    on_stall: OnStall,
    /// Memory for bases of deltas at this host [default: a quarter of the guest's memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    base_limit: Option<u64>,
    /// Leave the machine paused at the target
    #[arg(long)]
    leave_paused: bool,
    /// How memory is verified before the machine may run at the target (full lengthens the pause)
    #[arg(long, value_name = "HOW", default_value = "digest")]
    verify: Verify,
    /// Bulk TCP connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    connections: u8,
    /// Announce the guest's addresses at the target right after the stop, before it runs there
    #[arg(long)]
    early_announce: bool,
    /// Take pages from QEMU's stream even where its memory can be read
    #[arg(long)]
    inline: bool,
    /// Longest outage of the link that the migration survives, 1s to 3600s
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_reconnect_timeout)]
    reconnect_timeout: Duration,
    /// If the link is lost for good, let the target keep what it has, so that the next try sends only what changed
    #[arg(long)]
    keep_partial: bool,
    /// Don't make pages smaller in these ways; for measuring what each is worth
    #[arg(long, value_name = "TECHNIQUES", value_delimiter = ',')]
    without: Vec<Technique>,
    /// Don't watch: print the id and return
    #[arg(long)]
    pub(super) detach: bool,
}

impl Migrate {
    /// The options as the API has them.
    pub(super) fn options(&self) -> Options {
        Options {
            bandwidth_bytes_per_second: self.bandwidth,
            downtime_target_ms: u64::try_from(self.downtime_target.as_millis()).unwrap_or(u64::MAX),
            stop_policy: self.stop_policy,
            on_stall: self.on_stall,
            base_limit_bytes: self.base_limit,
            leave_paused: self.leave_paused,
            verify: self.verify,
            connections: self.connections,
            early_announce: self.early_announce,
            inline: self.inline,
            keep_partial: self.keep_partial,
            without: self.without.clone(),
            reconnect_timeout_ms: u64::try_from(self.reconnect_timeout.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

fn parse_reconnect_timeout(text: &str) -> Result<Duration, String> {
    let time = parse_time(text).map_err(|error| error.to_string())?;
    let allowed = u64::try_from(time.as_millis()).is_ok_and(|ms| RECONNECT_TIMEOUT_MS.contains(&ms));
    allowed.then_some(time).ok_or_else(|| format!("`{text}` is not between 1s and 3600s"))
}

/// Migrations.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  godwit status                 all migrations, the newest first
  godwit status --watch         a live table of those under way
  godwit status web1 --watch    follow one to its end
  godwit --json status ID       its report")]
pub(super) struct Status {
    /// A migration's id, or a machine's name (its newest migration)
    #[arg(value_name = "ID|VM")]
    pub(super) migration: Option<String>,
    /// Follow it to its end, or all that are under way to theirs; with --json one event, or one migration that changed, a
    /// line
    #[arg(long)]
    pub(super) watch: bool,
}

/// What each technique would save.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  godwit analyze memory.img      a raw image of a guest's memory (QMP pmemsave, or a memory file)
  godwit analyze stream.bin      a captured migration stream (QMP migrate to a file: URI)")]
pub(super) struct Analyze {
    /// The file; a stream is told by its first bytes, QEVM
    #[arg(value_hint = ValueHint::FilePath)]
    pub(super) file: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn migrate(arguments: &[&str]) -> Result<Options, String> {
        let all = ["godwit", "migrate", "web1", "--to", "b"].iter().chain(arguments);
        match Arguments::try_parse_from(all) {
            Ok(Arguments { verb: Verb::Migrate(migrate), .. }) => Ok(migrate.options()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_command_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        assert_eq!(migrate(&[]), Ok(Options::default()));
    }

    #[test]
    fn options_reach_the_api() {
        let options = migrate(&[
            "--bandwidth",
            "80Mbit",
            "--downtime-target",
            "30ms",
            "--stop-policy",
            "smart-stop",
            "--on-stall",
            "cancel",
            "--base-limit",
            "256M",
            "--leave-paused",
            "--verify",
            "full",
            "--connections",
            "4",
            "--early-announce",
            "--inline",
            "--reconnect-timeout",
            "5s",
            "--keep-partial",
            "--without",
            "sub-block,compress",
        ]);
        let expected = Options {
            bandwidth_bytes_per_second: Some(10_000_000),
            downtime_target_ms: 30,
            stop_policy: StopPolicyName::SmartStop,
            on_stall: OnStall::Cancel,
            base_limit_bytes: Some(256 << 20),
            leave_paused: true,
            verify: Verify::Full,
            connections: 4,
            early_announce: true,
            inline: true,
            reconnect_timeout_ms: 5_000,
            keep_partial: true,
            without: vec![Technique::SubBlock, Technique::Compress],
        };
        assert_eq!(options, Ok(expected));
    }

    #[test]
    fn a_wrong_quantity_is_explained() {
        let error = migrate(&["--bandwidth", "80"]).unwrap_err();
        assert!(error.contains("`80` is not a rate; write it like 80Mbit or 10MB/s"), "{error}");
        assert!(migrate(&["--connections", "9"]).is_err());
        assert!(migrate(&["--reconnect-timeout", "999ms"]).is_err());
        assert!(migrate(&["--reconnect-timeout", "3601s"]).is_err());
    }

    #[test]
    fn every_verb_explains_itself_and_none_hides_its_json() {
        for verb in Arguments::command().get_subcommands() {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
        for verb in [&["vm", "ls"][..], &["status"], &["cancel", "x"], &["ca", "init", "d"]] {
            let arguments = ["godwit"].iter().chain(verb).chain(&["--json"]);
            assert!(Arguments::try_parse_from(arguments).unwrap().json);
        }
    }
}
