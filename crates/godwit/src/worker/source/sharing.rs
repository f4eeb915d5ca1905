//! What guests that go to one target have in common: which of their pages it holds, in a file that the workers of all
//! their migrations share.
//!
//! ```text
//!   sender: learn ─► draft ─► ask ──► target
//!             ▲                 └──► Asked ──┐
//!             │                              ▼
//!       the file ◄── digest, slot ◄── hear ◄── the target's answers
//! ```
//!
//! Only what the target has answered for gets into the file: whoever finds a page there may name it at once. A worker
//! that dies leaves the pages that it had asked for unknown, and no more.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use godwit_content::{BLOCK_BYTES, ContentDigest, Draft, SharedIndex, Slot};
use godwit_migration::wire::{self, Kept};
use godwit_transport::session::{Lane, Message, Session};

use crate::{
    job::SharedPlace,
    worker::shared_file::{Generation, Shape, SharedFile},
};

/// A digest, a slot, and zeros up to a divisor of the file's page.
const RECORD_BYTES: usize = 64;
/// Records that are read at once.
const READ_RECORDS: usize = 1024;
/// Batches that wait for an answer; while so many do, nothing more is asked for.
const ASKED_MAX: usize = 4096;

/// The sender's part.
pub(super) struct Sharing {
    directory: SharedFile,
    /// Records that the index has.
    learned: u64,
    records_max: u64,
    asked: Arc<Asked>,
}

/// What the target was asked to keep and hasn't answered for, the oldest batch first.
#[derive(Default)]
struct Asked(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    batches: VecDeque<Vec<ContentDigest>>,
    /// The target keeps no more, or makes no sense.
    is_over: bool,
}

/// The part of whoever listens to the target.
pub(super) struct Answers {
    directory: SharedFile,
    asked: Arc<Asked>,
}

/// Where in its memory a migration begins. Those that are begun one after the other begin far apart: 0, 1/2, 1/4, 3/4,
/// 1/8, …
pub(super) fn first_page(turn: u32, pages: u64) -> u64 {
    ((u128::from(pages) * u128::from(turn.reverse_bits())) >> u32::BITS) as u64
}

impl Sharing {
    /// Both parts for the migration `id`; `name` is what the target calls its pages. Where the file can't be had, the
    /// migration does without.
    pub(super) fn open(place: &SharedPlace, id: &str, name: &str) -> Option<(Self, Answers)> {
        let path = &place.file;
        let generation: Generation = name.as_bytes().try_into().ok()?;
        let own: Generation = id.as_bytes().try_into().ok()?;
        let records_max = place.limit_bytes / BLOCK_BYTES as u64;
        let shape = Shape { record_bytes: RECORD_BYTES as u64, records_max };
        let open = || SharedFile::open(path, shape, own, Some(generation));
        let files = open().and_then(|one| Ok((one, open()?)));
        let files = files.inspect_err(|error| {
            tracing::warn!(%error, path = %path.display(), "no pages are shared");
        });
        let (directory, to_add) = files.ok()?;
        let asked = Arc::<Asked>::default();
        let answers = Answers { directory: to_add, asked: asked.clone() };
        Some((Self { directory, learned: 0, records_max, asked }, answers))
    }

    /// Tells the index what all migrations to this target have learned; to be done before each draft.
    pub(super) fn learn(&mut self, index: &mut SharedIndex) {
        index.set_growing(self.asked.has_room());
        if let Err(error) = self.read_news(index) {
            tracing::warn!(%error, "what other migrations have learned isn't known");
        }
    }

    /// Takes note of what a draft asks for; to be done before it leaves.
    pub(super) fn ask(&self, draft: &Draft) {
        let mut waiting = self.asked.lock();
        if !draft.kept().is_empty() && !waiting.is_over {
            waiting.batches.push_back(draft.kept().to_vec());
        }
    }

    fn read_news(&mut self, index: &mut SharedIndex) -> io::Result<()> {
        let end = self.directory.count()?.min(self.records_max);
        while self.learned < end {
            let count = (end - self.learned).min(READ_RECORDS as u64);
            let mut records = vec![[0; RECORD_BYTES]; count as usize];
            self.directory.read(self.learned, records.as_flattened_mut())?;
            records.iter().map(from_record).for_each(|(digest, slot)| index.insert(digest, slot));
            self.learned += count;
        }
        Ok(())
    }
}

impl Asked {
    fn has_room(&self) -> bool {
        let waiting = self.lock();
        !waiting.is_over && waiting.batches.len() < ASKED_MAX
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answers {
    /// Listens until the session ends.
    pub(super) async fn hear(mut self, session: Session) {
        // The end of the session is told by its urgent lane.
        while let Ok(Some(message)) = session.recv(Lane::Bulk).await {
            self.take(&message);
        }
    }

    /// Takes an answer; one that is the last of any use ends the asking, and those to what was asked before are dropped.
    fn take(&mut self, message: &Message) {
        if !self.asked.lock().is_over && !self.has_more_after(message) {
            let mut waiting = self.asked.lock();
            waiting.is_over = true;
            waiting.batches.clear();
        }
    }

    fn has_more_after(&mut self, message: &Message) -> bool {
        let asked = self.asked.lock().batches.pop_front().unwrap_or_default();
        let kept =
            Some(message).filter(|it| it.kind == wire::KEPT).and_then(|it| Kept::from_bytes(&it.payload));
        match kept {
            Some(Kept { first_slot, blocks }) if blocks as usize == asked.len() && blocks > 0 => {
                self.publish(first_slot, &asked)
            }
            Some(Kept { blocks: 0, .. }) => false,
            _ => {
                tracing::warn!(kind = message.kind, "the target's answer about shared pages makes no sense");
                false
            }
        }
    }

    /// Lets all migrations to this target know; whether there is room for more.
    fn publish(&mut self, first_slot: u64, digests: &[ContentDigest]) -> bool {
        let slots = (0..).map(|number| Slot(first_slot.saturating_add(number)));
        let records: Vec<_> =
            digests.iter().zip(slots).map(|(digest, slot)| to_record(*digest, slot)).collect();
        let published = self.directory.append(records.as_flattened());
        published.is_ok_and(|first| first.is_some())
    }
}

fn to_record(digest: ContentDigest, slot: Slot) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..ContentDigest::BYTES].copy_from_slice(&digest.to_bytes());
    record[ContentDigest::BYTES..][..8].copy_from_slice(&slot.0.to_le_bytes());
    record
}

fn from_record(record: &[u8; RECORD_BYTES]) -> (ContentDigest, Slot) {
    let (digest, rest) = record.split_first_chunk().expect("a record is longer than a digest");
    let slot = rest.first_chunk().expect("a record has a slot behind its digest");
    (ContentDigest::from_bytes(*digest), Slot(u64::from_le_bytes(*slot)))
}

#[cfg(test)]
mod tests {
    use godwit_content::{BlockId, BlockVersion, Encoder, EncoderLimits};

    use super::*;

    const NAME: &str = "0123456789abcdef";

    fn place(directory: &tempfile::TempDir, pages: u64) -> SharedPlace {
        let file = directory.path().join("to-hostb.digests");
        SharedPlace { file, limit_bytes: pages * BLOCK_BYTES as u64, turn: 0 }
    }

    /// Drafts a batch of one page and takes note of what it asks for.
    fn ask(sharing: &mut Sharing, encoder: &mut Encoder, fill: u8) -> usize {
        sharing.learn(encoder.shared_index());
        let version = BlockVersion { id: BlockId(fill.into()), hot: false };
        let draft = encoder.draft(&[version], vec![fill; BLOCK_BYTES]);
        sharing.ask(&draft);
        draft.kept().len()
    }

    fn encoder() -> Encoder {
        Encoder::new(EncoderLimits { base_bytes: 0, level: 1 })
    }

    fn answer(first_slot: u64, blocks: u32) -> Message {
        let payload = Kept { first_slot, blocks }.to_bytes().to_vec().into();
        Message { kind: wire::KEPT, payload }
    }

    #[test]
    fn what_the_target_answered_for_one_migration_all_others_know() {
        let directory = tempfile::tempdir().unwrap();
        let place = place(&directory, 100);
        let (mut one, mut answers) = Sharing::open(&place, "1111111111111111", NAME).unwrap();
        let (mut other, _) = Sharing::open(&place, "2222222222222222", NAME).unwrap();
        let (mut ours, mut theirs) = (encoder(), encoder());
        assert_eq!(ask(&mut one, &mut ours, 1), 1);
        assert_eq!(ask(&mut other, &mut theirs, 1), 1, "not known before the answer");
        assert!(answers.has_more_after(&answer(7, 1)));
        assert_eq!(ask(&mut other, &mut theirs, 1), 0);
        assert_eq!(theirs.shared_index().len(), 1);
    }

    #[test]
    fn nothing_more_is_asked_of_a_target_that_is_full_or_makes_no_sense() {
        let not_an_answer = Message { kind: wire::HELD, ..answer(0, 1) };
        let cut = Message { payload: answer(0, 1).payload.slice(..11), ..answer(0, 1) };
        for last in [answer(0, 0), answer(0, 2), answer(0, u32::MAX), not_an_answer, cut] {
            let directory = tempfile::tempdir().unwrap();
            let (mut sharing, mut answers) = Sharing::open(&place(&directory, 100), NAME, NAME).unwrap();
            let mut encoder = encoder();
            ask(&mut sharing, &mut encoder, 1);
            answers.take(&last);
            answers.take(&answer(0, 1));
            assert_eq!(ask(&mut sharing, &mut encoder, 2), 0, "{last:?}");
            assert!(encoder.shared_index().is_empty(), "{last:?}");
        }
    }

    #[test]
    fn no_more_is_listed_or_waited_for_than_the_bounds_say() {
        let directory = tempfile::tempdir().unwrap();
        let (mut sharing, mut answers) = Sharing::open(&place(&directory, 1), NAME, NAME).unwrap();
        let mut encoder = encoder();
        let asked =
            (0..=ASKED_MAX).filter(|fill| ask(&mut sharing, &mut encoder, (fill % 255 + 1) as u8) > 0);
        assert_eq!(asked.count(), ASKED_MAX);
        answers.take(&answer(0, 1));
        answers.take(&answer(1, 1));
        assert_eq!(ask(&mut sharing, &mut encoder, 9), 0);
        assert_eq!(encoder.shared_index().len(), 1);
    }

    #[test]
    fn migrations_that_begin_one_after_the_other_begin_far_apart() {
        let begins: Vec<_> = (0..8).map(|turn| first_page(turn, 1_000)).collect();
        assert_eq!(begins, [0, 500, 250, 750, 125, 625, 375, 875]);
        assert!(first_page(u32::MAX, u64::MAX) < u64::MAX);
    }
}
