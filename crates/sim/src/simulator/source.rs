//! The source's shell: which pages are owed, what is sent of them, and what QEMU does at the stop.

use godwit_content::{BATCH_BLOCKS, BLOCK_BYTES, Compressor, Encoder, EncoderLimits};
use godwit_migration::{
    BlockVersion,
    handover::{
        Epoch, Record, RecordState, RunState, Source, SourceEvent, SourceSettings, store::Durability,
    },
    mover::{Mode, Mover, Settings},
    wire::{self, Digest, Message, Token},
};
use godwit_transport::session::frame::Lane;
use xxhash_rust::xxh3::xxh3_128;

use super::{
    qemu::Phase,
    sabotage::Sabotage,
    site::Site,
    worker::{Half, Worker},
    world::{Event, World},
};

const TICK_US: u64 = 10_000;
/// A source that sees no sign of life for so long has run out of patience.
const PATIENCE_US: u64 = 10_000_000;
/// Without a data path it asks this often.
const ASK_AGAIN_US: u64 = 1_000_000;
const BASE_BYTES: usize = 1 << 19;
const LEVEL: i32 = 1;

pub(super) struct SourceData {
    mover: Mover,
    encoder: Encoder,
    compressor: Compressor,
    batches: u64,
    passes: u32,
    next_pass_us: u64,
    acked_bytes: u64,
    is_stopped: bool,
    is_completed: bool,
    stream: Option<Vec<u8>>,
    is_flushed: bool,
}

impl std::fmt::Debug for SourceData {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SourceData").field("passes", &self.passes).finish_non_exhaustive()
    }
}

impl SourceData {
    /// Whether the guest was stopped for the switch-over.
    pub(super) fn has_stopped(&self) -> bool {
        self.is_stopped
    }
}

impl World {
    /// The number of a new attempt, which is on disk before anybody hears of it; `None` if the disk doesn't take it.
    pub(super) fn number_attempt(&mut self, site: Site) -> Option<Epoch> {
        let epoch = self.find(site)?.record.epoch.next();
        let state = RecordState::Owner { peer: Some(site.other().name().to_owned()) };
        let saved = self.store(site).save(&Record { epoch, state }, Durability::Synced);
        if saved.is_err() {
            self.dies_in_save(site);
        }
        saved.ok().map(|()| epoch)
    }

    /// Starts a source's worker; returns its id.
    pub(super) fn start_source(&mut self, site: Site, epoch: Epoch) -> u64 {
        let id = self.next_number();
        let settings = SourceSettings {
            leave_paused: self.plan.leave_paused,
            ..SourceSettings::new(site.other().name())
        };
        let pages = self.plan.pages as u64;
        let mut worker = Worker::new(id, Half::Source(Source::new(epoch, settings)));
        worker.last_sign_us = self.now_us;
        worker.source = Some(SourceData {
            mover: Mover::new(pages, Settings::default()),
            encoder: Encoder::new(EncoderLimits { base_bytes: BASE_BYTES, level: LEVEL }),
            compressor: Compressor::new(),
            batches: 0,
            passes: 0,
            next_pass_us: self.now_us,
            acked_bytes: 0,
            is_stopped: false,
            is_completed: false,
            stream: None,
            is_flushed: false,
        });
        if let Some(qemu) = &mut self.host_mut(site).qemu {
            qemu.dirty.fill(true);
        }
        self.host_mut(site).worker = Some(worker);
        self.after(TICK_US, Event::Tick { site, worker: id });
        id
    }

    /// The source looks: at the clock, at the guest's writes, and whether now is the time.
    pub(super) fn tick(&mut self, site: Site, worker: u64) {
        let (now_us, acked_bytes) = (self.now_us, self.acked_bytes(worker));
        let Some(alive) = self.worker_mut(site, worker) else { return };
        let patience_us = if alive.source.is_some() { PATIENCE_US } else { ASK_AGAIN_US };
        if let Some(data) = alive.source.as_mut().filter(|data| data.acked_bytes != acked_bytes) {
            data.acked_bytes = acked_bytes;
            alive.last_sign_us = now_us;
        }
        if now_us > alive.last_sign_us + patience_us {
            self.tell_source(site, worker, SourceEvent::Timeout);
        }
        self.pass(site, worker);
        self.feed(site, worker);
        self.heed(site, worker);
        let pause_us = if patience_us == PATIENCE_US { TICK_US } else { ASK_AGAIN_US };
        self.after(pause_us, Event::Tick { site, worker });
    }

    /// QEMU names what the guest has written.
    fn pass(&mut self, site: Site, worker: u64) {
        let (now_us, pass_us) = (self.now_us, self.plan.pass_us);
        let host = self.host_mut(site);
        let alive = host.worker.as_mut().filter(|alive| alive.id == worker);
        let (Some(alive), Some(qemu)) = (alive, &mut host.qemu) else { return };
        let Some(data) = &mut alive.source else { return };
        if data.is_stopped || now_us < data.next_pass_us {
            return;
        }
        data.next_pass_us = now_us + pass_us;
        data.passes += 1;
        data.mover.owe_many(qemu.name_dirty()).expect("QEMU names pages that there are");
        data.mover.next_pass();
    }

    /// Sends what is owed, as far as the session takes it; the contents are read now.
    pub(super) fn feed(&mut self, site: Site, worker: u64) {
        while self.is_writable(worker) {
            let drops = self.sabotage == Some(Sabotage::PageDropped) && self.random.u8(..8) == 0;
            let most = self.random.usize(1..=BATCH_BLOCKS);
            let host = self.host_mut(site);
            let alive = host.worker.as_mut().filter(|alive| alive.id == worker);
            let (Some(alive), Some(qemu)) = (alive, &host.qemu) else { return };
            let Some(data) = &mut alive.source else { return };
            let mut versions: Vec<BlockVersion> = Vec::new();
            if data.mover.take(most, &mut versions).blocks() == 0 {
                break;
            }
            if drops && data.is_stopped {
                versions.pop();
            }
            let mut contents = Vec::with_capacity(versions.len() * BLOCK_BYTES);
            versions.iter().for_each(|version| contents.extend_from_slice(qemu.memory.block(version.id)));
            let batch = data.encoder.draft(&versions, contents).seal(&mut data.compressor);
            data.batches += 1;
            self.submit(worker, Lane::Bulk, wire::BATCH, batch.bytes.into());
        }
        self.flush(site, worker);
    }

    /// Whether everything but the token has been sent.
    fn flush(&mut self, site: Site, worker: u64) {
        let Some(data) = self.worker_mut(site, worker).and_then(|alive| alive.source.as_mut()) else {
            return;
        };
        let all = data.is_stopped && data.is_completed && data.mover.owed_blocks() == 0;
        if all && !std::mem::replace(&mut data.is_flushed, true) {
            let stream = data.stream.clone().unwrap_or_default();
            self.submit(worker, Lane::Bulk, wire::DEVICE_STATE, stream.into());
            self.tell_source(site, worker, SourceEvent::StateFlushed);
        }
    }

    /// Opens the hand-over when the stop may be near, and decides when little is owed.
    fn heed(&mut self, site: Site, worker: u64) {
        let (few, passes_max) = (self.plan.stop_at_pages, self.plan.passes_max);
        let Some(Worker { half: Half::Source(source), source: Some(data), .. }) =
            self.worker_mut(site, worker)
        else {
            return;
        };
        let is_near = data.passes > 0 && data.mover.never_sent_blocks() == 0;
        if data.is_stopped || !is_near {
            return;
        }
        let is_time = data.mover.owed_blocks() <= few || data.passes > passes_max;
        let event = match source.is_ready() {
            true if is_time => SourceEvent::Decided,
            true => return,
            false => SourceEvent::TargetReady,
        };
        // Neither is a sign of life.
        let last_sign_us = self.worker_mut(site, worker).map(|alive| alive.last_sign_us);
        if self
            .worker_mut(site, worker)
            .is_some_and(|alive| alive.inbox.is_empty() && alive.pending.is_empty())
        {
            self.tell_source(site, worker, event);
        }
        if let (Some(alive), Some(last_sign_us)) = (self.worker_mut(site, worker), last_sign_us) {
            alive.last_sign_us = last_sign_us;
        }
    }

    pub(super) fn open_gate(&mut self, site: Site) {
        let Some(qemu) = &mut self.host_mut(site).qemu else { return };
        if matches!(qemu.phase, Phase::Running | Phase::Paused) {
            qemu.gate_open = true;
            let pid = qemu.pid;
            self.soon(40_000, Event::QemuStops { site, pid });
        }
    }

    /// The guest stops; QEMU names its last writes.
    pub(super) fn qemu_stops(&mut self, site: Site, pid: u64) {
        let Some(qemu) = self.qemu_mut(site, pid).filter(|qemu| qemu.gate_open) else { return };
        qemu.gate_open = false;
        let run_state = if qemu.runs() { RunState::Running } else { RunState::Paused };
        qemu.phase = Phase::Stopped { shut: false, ran: run_state };
        let named = qemu.name_dirty();
        let memory = qemu.memory.clone();
        self.history.guest_stopped(memory);
        self.note(Some(site), || format!("QEMU stops the guest; {} pages are dirty", named.len()));
        let Some(alive) = &mut self.host_mut(site).worker else { return };
        let worker = alive.id;
        if let Some(data) = &mut alive.source {
            data.mover.owe_many(named).expect("QEMU names pages that there are");
            data.mover.set_mode(Mode::Final);
            data.is_stopped = true;
        }
        self.tell_source(site, worker, SourceEvent::Stopped { run_state });
        self.feed(site, worker);
    }

    pub(super) fn answer_shut(&mut self, site: Site) {
        let Some(qemu) = &mut self.host_mut(site).qemu else { return };
        if let Phase::Stopped { shut, .. } = &mut qemu.phase {
            *shut = true;
            let pid = qemu.pid;
            self.soon(20_000, Event::QemuCompletes { site, pid });
        }
    }

    /// QEMU has written its last byte.
    pub(super) fn qemu_completes(&mut self, site: Site, pid: u64) {
        let mut device_state = vec![0; self.random.usize(1_000..20_000)];
        self.random.fill(&mut device_state);
        let Some(qemu) = self.qemu_mut(site, pid) else { return };
        if !matches!(qemu.phase, Phase::Stopped { shut: true, .. }) {
            return;
        }
        qemu.phase = Phase::PostMigrate;
        qemu.device_state.clone_from(&device_state);
        self.history.device_state.clone_from(&device_state);
        self.note(Some(site), || "QEMU's migration is completed".into());
        let Some(alive) = &mut self.host_mut(site).worker else { return };
        let worker = alive.id;
        if let Some(data) = &mut alive.source {
            data.is_completed = true;
            data.stream = Some(device_state);
        }
        self.feed(site, worker);
    }

    pub(super) fn send_token(
        &mut self,
        site: Site,
        worker: u64,
        epoch: Epoch,
        run_state: RunState,
        leave_paused: bool,
    ) {
        let Some(data) = self.worker_mut(site, worker).and_then(|alive| alive.source.as_ref()) else {
            return;
        };
        let stream = data.stream.as_deref().unwrap_or_default();
        let token = Token {
            epoch,
            run_state,
            leave_paused,
            batches: data.batches,
            chain: Digest(data.encoder.chain().to_bytes()),
            stream_bytes: stream.len() as u64,
            stream_digest: Digest(xxh3_128(stream).to_be_bytes()),
            stopped_unix_us: 0,
        };
        let (kind, body) = wire::encode(&Message::Token(token)).expect("a token is short");
        self.submit(worker, Lane::Bulk, kind, body);
    }
}
