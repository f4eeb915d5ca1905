//! A process that was started in a lab.

use std::{
    io,
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

/// How often a process that should end is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A child at one place of a lab; killed by its id when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    pub(super) fn new(child: Child) -> Process {
        Process { child }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has ended; `None`: it hasn't after `limit`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait_for(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if started.elapsed() >= limit {
                return Ok(None);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Kills it (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// The kernel's; a process that has ended already is none.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(|_| ())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
