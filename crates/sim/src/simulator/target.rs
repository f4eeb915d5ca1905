//! The target's shell: what arrives, and what its QEMU does with it.

use godwit_content::{Decoder, DecoderLimits};
use godwit_migration::{
    handover::{Epoch, SourceEvent, Target, TargetEvent},
    wire::{self, Digest, Message, Token},
};
use xxhash_rust::xxh3::xxh3_128;

use super::{
    faults::Failing,
    qemu::Phase,
    sabotage::Sabotage,
    site::Site,
    worker::{Half, Worker},
    world::{Event, World},
};

pub(super) struct TargetData {
    decoder: Decoder,
    batches: u64,
    stream: Vec<u8>,
    token: Option<Token>,
    /// The attempt that it was started for.
    pub(super) epoch: Epoch,
}

impl std::fmt::Debug for TargetData {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TargetData").field("batches", &self.batches).finish_non_exhaustive()
    }
}

impl World {
    /// Starts a target's worker; returns its id.
    pub(super) fn start_target(&mut self, site: Site, epoch: Epoch) -> u64 {
        let id = self.next_number();
        let record = self.find(site).map(|found| found.record);
        let mut worker = Worker::new(id, Half::Target(Target::new(record, site.other().name())));
        worker.target = Some(TargetData {
            decoder: Decoder::new(DecoderLimits { block_count: self.plan.pages as u64 }),
            batches: 0,
            stream: Vec::new(),
            token: None,
            epoch,
        });
        self.host_mut(site).worker = Some(worker);
        id
    }

    /// A message of the session arrives.
    pub(super) fn receive(&mut self, site: Site, worker: u64, kind: u8, body: &[u8]) {
        match kind {
            wire::BATCH => return self.receive_batch(site, worker, body),
            wire::DEVICE_STATE => {
                if let Some(data) = self.worker_mut(site, worker).and_then(|alive| alive.target.as_mut()) {
                    data.stream.extend_from_slice(body);
                }
                return;
            }
            _ => {}
        }
        match wire::decode(kind, body).expect("a worker sends what a worker can read") {
            Message::Handover(message) => {
                let Some(alive) = self.worker_mut(site, worker) else { return };
                if alive.is_source() {
                    self.tell_source(site, worker, SourceEvent::PeerSays(message));
                } else {
                    self.tell_target(site, worker, TargetEvent::PeerSays(message));
                }
            }
            Message::Token(token) => self.receive_token(site, worker, token),
            other => self.history.violate(format!("{other:?} arrived")),
        }
    }

    fn receive_batch(&mut self, site: Site, worker: u64, body: &[u8]) {
        let host = self.host_mut(site);
        let alive = host.worker.as_mut().filter(|alive| alive.id == worker);
        let (Some(alive), Some(qemu)) = (alive, &mut host.qemu) else { return };
        let Some(data) = &mut alive.target else { return };
        if qemu.phase != Phase::Incoming {
            return self.history.violate("a batch arrived after the state was loaded".into());
        }
        match data.decoder.decode(body, &mut qemu.memory) {
            Ok(_) => data.batches += 1,
            Err(error) => {
                let broken = format!("batch {} can't be decoded: {error}", data.batches);
                self.history.violate(broken);
            }
        }
    }

    fn receive_token(&mut self, site: Site, worker: u64, token: Token) {
        let Some(data) = self.worker_mut(site, worker).and_then(|alive| alive.target.as_mut()) else {
            return;
        };
        let (epoch, run_state, leave_paused) = (token.epoch, token.run_state, token.leave_paused);
        data.token = Some(token);
        self.tell_target(site, worker, TargetEvent::TokenReceived { epoch, run_state, leave_paused });
    }

    /// Compares everything that arrived with what the token promises.
    pub(super) fn verify(&mut self, site: Site, worker: u64) {
        let fails = self.fails(Failing::Verify);
        if self.host(site).qemu.is_none() {
            return self.tell_target(site, worker, TargetEvent::QemuDied);
        }
        let Some(data) = self.worker_mut(site, worker).and_then(|alive| alive.target.as_ref()) else {
            return;
        };
        let Some(token) = &data.token else { return };
        let right = token.batches == data.batches
            && token.chain == Digest(data.decoder.chain().to_bytes())
            && token.stream_bytes == data.stream.len() as u64
            && token.stream_digest == Digest(xxh3_128(&data.stream).to_be_bytes());
        if !right {
            self.history.violate("the token arrived before what it promises".into());
        }
        let event = match fails {
            true => TargetEvent::VerifyFailed { reason: "the digests differ".into() },
            false => TargetEvent::Verified,
        };
        self.tell_target(site, worker, event);
    }

    pub(super) fn load(&mut self, site: Site, worker: u64) {
        if self.fails(Failing::Load) {
            let reason = "QEMU can't load the state".to_owned();
            return self.tell_target(site, worker, TargetEvent::LoadFailed { reason });
        }
        let Some(pid) = self.host(site).qemu.as_ref().map(|qemu| qemu.pid) else { return };
        self.soon(20_000, Event::QemuLoads { site, pid });
    }

    /// The target's QEMU has loaded everything.
    pub(super) fn qemu_loads(&mut self, site: Site, pid: u64) {
        let starts = self.sabotage == Some(Sabotage::TargetStartsByItself);
        let host = self.host_mut(site);
        let (Some(alive), Some(qemu)) = (&host.worker, &mut host.qemu) else { return };
        let Some(data) = alive.target.as_ref().filter(|_| qemu.pid == pid) else { return };
        qemu.phase = Phase::Loaded;
        qemu.device_state.clone_from(&data.stream);
        let worker = alive.id;
        self.note(Some(site), || "QEMU has loaded the machine".into());
        if starts {
            self.run_guest(site);
        }
        self.tell_target(site, worker, TargetEvent::Loaded);
    }

    /// Says `cont`, on either side.
    pub(super) fn continue_guest(&mut self, site: Site, worker: u64) {
        let is_target = self.worker_mut(site, worker).is_some_and(|alive| !alive.is_source());
        let phase = self.host(site).qemu.as_ref().map(|qemu| qemu.phase);
        let event = match phase {
            None => TargetEvent::QemuDied,
            Some(Phase::Running) => TargetEvent::GuestRunning { resumed_unix_us: None },
            Some(_) if is_target && self.fails(Failing::Continue) => {
                TargetEvent::ContFailed { reason: "QEMU can't take the disk's lock".into() }
            }
            Some(Phase::Incoming) => TargetEvent::ContFailed { reason: "QEMU isn't ready".into() },
            Some(_) => {
                self.run_guest(site);
                TargetEvent::GuestRunning { resumed_unix_us: Some(self.now_us) }
            }
        };
        // Source's events of this kind mean nothing to it.
        if is_target {
            let recovers = self.worker_mut(site, worker).is_some_and(|alive| !alive.has_data_path());
            let delay_us = if recovers { 0 } else { self.random.u64(..5_000) };
            if delay_us == 0 {
                return self.tell_target(site, worker, event);
            }
            self.after(delay_us, Event::Tell { site, worker, told: super::worker::Told::Target(event) });
        }
    }

    fn run_guest(&mut self, site: Site) {
        let Some(qemu) = &mut self.host_mut(site).qemu else { return };
        let was = std::mem::replace(&mut qemu.phase, Phase::Running);
        self.note(Some(site), || "the guest runs".into());
        self.guest_continued(site, was);
    }
}
