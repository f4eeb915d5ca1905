//! What guests that move between two hosts have in common: two files beside the agent's socket (`Config::shared_dir`), which
//! belong to the workers (see `worker::shared_file`) and are removed here when nobody uses them.
//!
//! | file | host | holds |
//! |---|---|---|
//! | `from-<peer>.pages` | target | pages |
//! | `to-<peer>.digests` | source | their digests, and where the target has them |
//!
//! A worker keeps its file open, so that removing one takes nothing from a migration under way: only those that begin
//! later don't find what it found. So nothing of an earlier agent is kept.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::time::{MissedTickBehavior, interval};

use super::Agent;
use crate::job::{Role, SharedPlace};

/// How long a file stays that no migration begins to use, and none that is under way uses.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(60);

impl Agent {
    /// Where a migration that is about to begin finds what guests have in common; `None` if nothing is shared.
    pub(super) fn shared_place(&self, peer: &str, role: Role) -> Option<SharedPlace> {
        let limit_bytes = self.config.shared_pages.bytes();
        let name = file_name(peer, role);
        let turn = match role {
            Role::Source => self.migrations_begun.fetch_add(1, Ordering::Relaxed),
            Role::Target => 0,
        };
        (limit_bytes > 0).then(|| SharedPlace {
            file: self.config.shared_dir().join(name),
            limit_bytes,
            turn,
        })
    }

    /// Removes what the last agent left, and for as long as this one lives what isn't used any more.
    pub(super) async fn keep_shared_pages(self: Arc<Self>) {
        let mut idle_max = Duration::ZERO;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let jobs = self.migrations.jobs();
            let in_use: Vec<_> = jobs.iter().map(|job| file_name(&job.peer, job.role)).collect();
            let removed = remove_idle(&self.config.shared_dir(), &in_use, idle_max, SystemTime::now());
            if let Err(error) = removed {
                tracing::warn!(%error, "pages that guests shared aren't removed");
            }
            idle_max = IDLE_MAX;
        }
    }
}

fn file_name(peer: &str, role: Role) -> String {
    match role {
        Role::Target => format!("from-{peer}.pages"),
        Role::Source => format!("to-{peer}.digests"),
    }
}

/// Removes the files that nobody has begun to use for so long, but for those `in_use`.
fn remove_idle(directory: &Path, in_use: &[String], idle_max: Duration, now: SystemTime) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let idle = now.duration_since(entry.metadata()?.modified()?).unwrap_or_default();
        let is_used = in_use.iter().any(|name| entry.file_name() == name.as_str());
        if !is_used && idle >= idle_max {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_uses_is_removed_and_only_when_it_has_been_so_for_long() {
        let directory = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(directory.path()).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let used = file_name("hosta", Role::Target);
        for name in [used.as_str(), "to-hostb.digests"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let (now, used) = (SystemTime::now(), [used]);
        remove_idle(directory.path(), &used, IDLE_MAX, now).unwrap();
        assert_eq!(names(), ["from-hosta.pages", "to-hostb.digests"]);
        remove_idle(directory.path(), &used, IDLE_MAX, now + IDLE_MAX * 2).unwrap();
        assert_eq!(names(), ["from-hosta.pages"]);
        remove_idle(directory.path(), &[], Duration::ZERO, now).unwrap();
        assert_eq!(names(), Vec::<String>::new());
    }
}
