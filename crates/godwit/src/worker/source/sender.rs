//! From the stage to the link: one thread takes batches and drafts them, a few compress, one sends in order.
//!
//! ```text
//!   stage ──► draft (one thread: it owns the cache) ──► seal (a few threads) ──► send (one thread, in draft order)
//! ```
//!
//! Whatever else goes to the target in order with the batches goes through the same [`Outbox`]. There is little [`Room`]
//! to wait in: what waits here when the guest stops lengthens the pause.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI32, AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use godwit_content::{Batch as SealedBatch, Chain, Compressor, Draft, Encoder, Tally, Tried, seal_bytes};
use godwit_migration::mover::Taken;
use xxhash_rust::xxh3::Xxh3Default;

use super::{
    room::{PARCELS_MAX, Room},
    sharing::Sharing,
    stage::{Batch, SharedStage, StageError},
};
use crate::worker::{STREAM_PIECE_BYTES_MAX, start_thread};

/// One batch of so many is sealed at the next higher level too, to see whether that pays.
const TRIED_EVERY: u64 = 16;
/// Level of zstd for QEMU's sections: they are small, and the guest waits for them.
const STREAM_LEVEL: i32 = 3;
/// Batches remembered for whoever learns from them; he looks many times a second.
const NEWS_MAX: usize = 65_536;

/// Something for the target, in its place in the order.
enum Parcel {
    Sealing { batch: Receiver<SealedBatch>, taken: Taken, weight_bytes: u64 },
    Ready { kind: u8, payload: Bytes },
}

/// How a frame leaves this process.
pub(super) trait Link: Send + 'static {
    /// Hands over a frame; blocks while the link takes no more. An error ends the migration; the link itself says why.
    fn send(&mut self, kind: u8, payload: Bytes) -> Result<(), LinkClosed>;
}

/// The link takes nothing any more.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the session with the target is closed")]
pub(super) struct LinkClosed;

/// What was sent so far, for reports and predictions.
#[derive(Debug, Default)]
pub(super) struct Account {
    left: Mutex<Left>,
    room: Room,
    stream_bytes: AtomicU64,
    compressing_us: AtomicU64,
    waiting_for_link_us: AtomicU64,
    level: AtomicI32,
}

/// What sending has cost so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Efforts {
    /// Time spent compressing, over all threads.
    pub(super) compressing: Duration,
    /// Time spent waiting for the link.
    pub(super) waiting_for_link: Duration,
    /// Batches that were sealed at two levels.
    pub(super) tried: Tried,
}

#[derive(Debug, Default)]
struct Left {
    tally: Tally,
    tried: Tried,
    /// Since somebody last asked.
    news: Vec<(Taken, u64)>,
}

impl Account {
    /// Sums over all batches that have left.
    pub(super) fn tally(&self) -> Tally {
        self.left().tally
    }

    /// Bytes that wait here to leave, as far as they can be known before they are compressed.
    pub(super) fn waiting_bytes(&self) -> u64 {
        let tally = self.tally();
        let weighed = tally.literal_bytes + tally.delta_bytes;
        let waiting = u128::from(self.room.waiting_bytes());
        let encoded = waiting * u128::from(tally.encoded_bytes) / u128::from(weighed.max(1));
        u64::try_from(encoded.min(waiting)).unwrap_or(u64::MAX)
    }

    /// The batches that left since the last call, and their encoded bytes.
    pub(super) fn news(&self) -> Vec<(Taken, u64)> {
        std::mem::take(&mut self.left().news)
    }

    /// What sending has cost so far.
    pub(super) fn efforts(&self) -> Efforts {
        let time = |us: &AtomicU64| Duration::from_micros(us.load(Ordering::Acquire));
        Efforts {
            compressing: time(&self.compressing_us),
            waiting_for_link: time(&self.waiting_for_link_us),
            tried: self.left().tried,
        }
    }

    /// Sets the level at which later batches are compressed.
    pub(super) fn set_level(&self, level: i32) {
        self.level.store(level, Ordering::Release);
    }

    /// Bytes of QEMU's own sections, sealed.
    pub(super) fn stream_bytes(&self) -> u64 {
        self.stream_bytes.load(Ordering::Acquire)
    }

    fn stream_leaves(&self, sealed_bytes: usize) {
        self.stream_bytes.fetch_add(sealed_bytes as u64, Ordering::AcqRel);
    }

    fn batch_leaves(&self, batch: &SealedBatch, taken: Taken) {
        let mut left = self.left();
        left.tally += batch.tally;
        if left.news.len() < NEWS_MAX {
            left.news.push((taken, batch.tally.encoded_bytes));
        }
    }

    fn tried(&self, tried: Tried) {
        let sum = &mut self.left().tried;
        sum.bytes += tried.bytes;
        sum.bytes_above += tried.bytes_above;
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The ordered way to the target.
#[derive(Clone)]
pub(super) struct Outbox {
    drafts: SyncSender<(Draft, SyncSender<SealedBatch>)>,
    parcels: SyncSender<Parcel>,
    account: Arc<Account>,
}

impl Outbox {
    /// Starts `compressors` threads and the one that sends over `link`; batches get the frame kind `batch_kind`. They
    /// end when the last clone of the outbox is gone, or the link is closed.
    pub(super) fn start(link: impl Link, batch_kind: u8, compressors: usize, account: Arc<Account>) -> Self {
        let (drafts, drafted) = mpsc::sync_channel(PARCELS_MAX);
        let (parcels, queued) = mpsc::sync_channel(PARCELS_MAX);
        let drafted = Arc::new(Mutex::new(drafted));
        for _ in 0..compressors.max(1) {
            let (drafted, account) = (drafted.clone(), account.clone());
            start_thread("seal", move || compress(&drafted, &account));
        }
        let sending = account.clone();
        start_thread("send", move || {
            deliver(link, batch_kind, &queued, &sending);
            sending.room.close();
        });
        Self { drafts, parcels, account }
    }

    /// Puts a frame in its place behind everything before it.
    pub(super) fn put(&self, kind: u8, payload: Bytes) -> Result<(), LinkClosed> {
        self.account.room.enter(payload.len() as u64)?;
        self.parcels.send(Parcel::Ready { kind, payload }).map_err(|_| LinkClosed)
    }

    fn put_draft(&self, draft: Draft, taken: Taken) -> Result<(), LinkClosed> {
        let weight_bytes = draft.weight_bytes();
        self.account.room.enter(weight_bytes)?;
        let (sealed, sealing) = mpsc::sync_channel(1);
        self.drafts.send((draft, sealed)).map_err(|_| LinkClosed)?;
        self.parcels.send(Parcel::Sealing { batch: sealing, taken, weight_bytes }).map_err(|_| LinkClosed)
    }
}

type Drafts = Receiver<(Draft, SyncSender<SealedBatch>)>;

fn compress(drafts: &Mutex<Drafts>, account: &Account) {
    let mut compressor = Compressor::new();
    for number in 1u64.. {
        let next = drafts.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recv();
        let Ok((draft, sealed)) = next else { return };
        let batch = timed(&account.compressing_us, || draft.seal(&mut compressor));
        let bytes = batch.tally.encoded_bytes;
        // Nobody waits for it once the link is closed.
        let _ = sealed.send(batch);
        if number.is_multiple_of(TRIED_EVERY)
            && let Some(bytes_above) = timed(&account.compressing_us, || draft.bytes_above(&mut compressor))
        {
            account.tried(Tried { bytes, bytes_above });
        }
    }
}

fn deliver(mut link: impl Link, batch_kind: u8, parcels: &Receiver<Parcel>, account: &Account) {
    while let Ok(parcel) = parcels.recv() {
        let (sent, weight_bytes) = match parcel {
            Parcel::Ready { kind, payload } => {
                let bytes = payload.len() as u64;
                (timed(&account.waiting_for_link_us, || link.send(kind, payload)), bytes)
            }
            Parcel::Sealing { batch, taken, weight_bytes } => {
                let Ok(batch) = batch.recv() else { return };
                account.batch_leaves(&batch, taken);
                let sent = timed(&account.waiting_for_link_us, || link.send(batch_kind, batch.bytes.into()));
                (sent, weight_bytes)
            }
        };
        account.room.leave(weight_bytes);
        if sent.is_err() {
            return;
        }
    }
}

/// Does `work` and adds the microseconds that it took.
fn timed<T>(total_us: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    total_us.fetch_add(began.elapsed().as_micros() as u64, Ordering::AcqRel);
    result
}

/// Why the sender stopped before everything was sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// The stage has no contents for what it owes.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The session is over; its own error says why.
    #[error(transparent)]
    Link(#[from] LinkClosed),
    /// The worker gave up.
    #[error("the migration was given up")]
    Closed,
}

/// What the sender leaves when everything owed has been put into the outbox.
#[derive(Debug)]
pub(super) struct Sent {
    /// Digest over everything that was sent, in order.
    pub(super) chain: Chain,
    /// Batches that were drafted.
    pub(super) batches: u64,
}

/// Sends what the stage owes until the guest's last page has gone; the body of its thread.
///
/// The encoder is the caller's to drop: giving back its memory takes longer than the rest of the pause.
pub(super) fn send_all(
    stage: &SharedStage,
    encoder: &mut Encoder,
    mut sharing: Option<&mut Sharing>,
    outbox: &Outbox,
) -> Result<Sent, SendError> {
    let mut batches = 0;
    while let Some(batch) = next_batch(stage, outbox)? {
        encoder.set_level(outbox.account.level.load(Ordering::Acquire));
        #[cfg(feature = "sabotage")]
        let batch = {
            let (blocks, contents) = crate::sabotage::all_but_one(batch.blocks, batch.contents);
            Batch { blocks, contents, ..batch }
        };
        if let Some(sharing) = &mut sharing {
            sharing.learn(encoder.shared_index());
        }
        let draft = encoder.draft(&batch.blocks, batch.contents);
        if let Some(sharing) = &sharing {
            sharing.ask(&draft);
        }
        outbox.put_draft(draft, batch.taken)?;
        batches += 1;
    }
    Ok(Sent { chain: encoder.chain(), batches })
}

/// The next batch; `None` when everything has been taken and nothing more will be named.
///
/// While the link has enough, pages that were zero go before their turn: looking through them takes as long as others take to
/// send, and a long run of them would leave the link idle.
fn next_batch(stage: &SharedStage, outbox: &Outbox) -> Result<Option<Batch>, SendError> {
    let mut held = stage.lock();
    while !held.is_closed() {
        let zeros = if outbox.account.room.is_full() { held.take_zeros()? } else { None };
        let batch = if zeros.is_some() { zeros } else { held.take()? };
        if let Some(batch) = batch {
            stage.wake();
            return Ok(Some(batch));
        }
        if held.is_drained() {
            return Ok(None);
        }
        held = stage.wait(held);
    }
    Err(SendError::Closed)
}

/// Puts pieces of QEMU's stream into the outbox and keeps the digest of all of them.
pub(super) struct StreamCourier {
    outbox: Outbox,
    compressor: Compressor,
    digest: Xxh3Default,
    bytes: u64,
}

/// What was sent of QEMU's stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct StreamSum {
    pub(super) bytes: u64,
    pub(super) digest: [u8; 16],
}

impl StreamCourier {
    /// A courier that has sent nothing.
    pub(super) fn new(outbox: Outbox) -> Self {
        Self { outbox, compressor: Compressor::new(), digest: Xxh3Default::new(), bytes: 0 }
    }

    /// Sends `stream` in frames of `kind`, sealed.
    pub(super) fn put(&mut self, kind: u8, stream: &[u8]) -> Result<(), LinkClosed> {
        for piece in stream.chunks(STREAM_PIECE_BYTES_MAX) {
            self.digest.update(piece);
            self.bytes += piece.len() as u64;
            let sealed = seal_bytes(&mut self.compressor, STREAM_LEVEL, piece);
            tracing::debug!(kind, bytes = piece.len(), sealed = sealed.len(), "QEMU's stream");
            self.outbox.account.stream_leaves(sealed.len());
            self.outbox.put(kind, sealed.into())?;
        }
        Ok(())
    }

    /// The sum of what was sent so far.
    pub(super) fn sum(&self) -> StreamSum {
        StreamSum { bytes: self.bytes, digest: self.digest.digest128().to_le_bytes() }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use godwit_content::{BLOCK_BYTES, BlockId, BlockVersion, EncoderLimits};

    use super::*;

    const BATCH: u8 = 7;
    const HANGS_AFTER: Duration = Duration::from_secs(30);

    /// A link that takes a frame when it is asked for.
    struct Slow(SyncSender<(u8, Bytes)>);

    impl Link for Slow {
        fn send(&mut self, kind: u8, payload: Bytes) -> Result<(), LinkClosed> {
            self.0.send((kind, payload)).map_err(|_| LinkClosed)
        }
    }

    fn outbox() -> (Outbox, Receiver<(u8, Bytes)>, Arc<Account>) {
        let (link, frames) = mpsc::sync_channel(0);
        let account = Arc::new(Account::default());
        (Outbox::start(Slow(link), BATCH, 1, account.clone()), frames, account)
    }

    /// A page that half compresses.
    fn page(number: u64) -> [u8; BLOCK_BYTES] {
        let mut random = number;
        std::array::from_fn(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            b'a' + (random >> 60) as u8
        })
    }

    fn encoder() -> Encoder {
        Encoder::new(EncoderLimits { base_bytes: 0, level: 3 })
    }

    fn draft(encoder: &mut Encoder, number: u64) -> Draft {
        let version = BlockVersion { id: BlockId(number), hot: false };
        encoder.draft(&[version], page(number).to_vec())
    }

    #[test]
    fn one_batch_of_so_many_is_tried_and_all_leave_in_order() {
        let (outbox, frames, account) = outbox();
        let (mut drafts, mut sealed) = (encoder(), encoder());
        let mut compressor = Compressor::new();
        for number in 0..=TRIED_EVERY {
            outbox.put_draft(draft(&mut drafts, number), Taken::default()).unwrap();
            let expected = draft(&mut sealed, number).seal(&mut compressor).bytes;
            assert_eq!(frames.recv().unwrap(), (BATCH, expected.into()));
        }
        // The last was compressed after the one before it had been tried.
        let Tried { bytes, bytes_above } = account.efforts().tried;
        assert!(bytes > 0 && bytes_above > 0, "{bytes} {bytes_above}");
        assert!(bytes < BLOCK_BYTES as u64, "more than one was tried: {bytes} bytes");
    }

    #[test]
    fn what_waits_is_expected_to_shrink_like_what_left() {
        let (outbox, frames, account) = outbox();
        let mut encoder = encoder();
        outbox.put_draft(draft(&mut encoder, 0), Taken::default()).unwrap();
        frames.recv().unwrap();
        let tally = account.tally();
        assert!(tally.encoded_bytes < BLOCK_BYTES as u64 * 3 / 4);
        while account.room.waiting_bytes() > 0 {
            thread::yield_now();
        }
        account.room.enter(10 * BLOCK_BYTES as u64).unwrap();
        assert_eq!(account.waiting_bytes(), 10 * tally.encoded_bytes);
    }

    #[test]
    fn a_link_that_closes_ends_whoever_waits_for_room() {
        let (outbox, frames, _account) = outbox();
        let fills_the_room = Bytes::from(vec![0; 1 << 20]);
        outbox.put(BATCH, fills_the_room.clone()).unwrap();
        let (tell, told) = mpsc::channel();
        for _ in 0..2 {
            let (outbox, payload, tell) = (outbox.clone(), fills_the_room.clone(), tell.clone());
            thread::spawn(move || tell.send(outbox.put(BATCH, payload)));
        }
        drop(frames);
        for _ in 0..2 {
            assert!(told.recv_timeout(HANGS_AFTER).unwrap().is_err());
        }
    }
}
