//! The guest's brake: the share of its speed that the stall's ruling gives it, set by control groups.

use std::time::{Duration, Instant};

use godwit_migration::throttle::CpuShare;
use godwit_qemu::qmp::CpuInfo;

use crate::{
    job::Job,
    throttle::{Throttle, ThrottleError},
};

/// Sets how fast the guest runs, and lets it go however this ends.
#[derive(Debug)]
pub(super) struct Brake<'a> {
    job: &'a Job,
    threads: Vec<i32>,
    throttle: Option<Throttle>,
    share: CpuShare,
    slowed_since: Option<Instant>,
    slowed: Duration,
}

impl<'a> Brake<'a> {
    /// A brake for these virtual CPUs; the guest isn't touched.
    pub(super) fn new(job: &'a Job, cpus: &[CpuInfo]) -> Self {
        let threads = cpus.iter().map(|cpu| cpu.thread_id).collect();
        Self {
            job,
            threads,
            throttle: None,
            share: CpuShare::FULL,
            slowed_since: None,
            slowed: Duration::ZERO,
        }
    }

    /// Lets the guest run at this share of its speed.
    ///
    /// # Errors
    /// What the system says; the guest then has its full speed.
    pub(super) fn set(&mut self, share: CpuShare) -> Result<(), ThrottleError> {
        if share == self.share {
            return Ok(());
        }
        if share == CpuShare::FULL {
            self.release();
            return Ok(());
        }
        let slowed = self.slow(share);
        if slowed.is_err() {
            self.release();
        }
        slowed
    }

    fn slow(&mut self, share: CpuShare) -> Result<(), ThrottleError> {
        let throttle = match self.throttle.take() {
            Some(throttle) => throttle,
            None => Throttle::begin(&self.job.machine_dir, self.job.pid, &self.threads)?,
        };
        let throttle = self.throttle.insert(throttle);
        throttle.set(share.percent())?;
        self.share = share;
        self.slowed_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// The guest has stopped: no virtual CPU is to be slow if it is the one that goes on. Moving its threads back takes
    /// longer and isn't done in the pause.
    pub(super) fn guest_stopped(&mut self) {
        if let Some(throttle) = &self.throttle
            && let Err(error) = throttle.set(CpuShare::FULL.percent())
        {
            tracing::warn!(%error, "the limit stays until the migration ends");
        }
        self.count();
    }

    /// Gives the guest its full speed back.
    pub(super) fn release(&mut self) {
        self.throttle = None;
        self.count();
    }

    fn count(&mut self) {
        self.share = CpuShare::FULL;
        self.slowed += self.slowed_since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// The share of its speed that the guest has, if it is slowed.
    pub(super) fn percent(&self) -> Option<u8> {
        (self.share != CpuShare::FULL).then(|| self.share.percent())
    }

    /// For how long the guest was slowed, up to the last time that it wasn't any more.
    pub(super) fn slowed_ms(&self) -> u64 {
        self.slowed.as_millis() as u64
    }
}
