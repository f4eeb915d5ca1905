//! Random histories, stopped at every operation of the storage beneath: what is there afterwards is what a disk may
//! have, and no part of it changes by itself.

use fastrand::Rng;

use super::{
    Flush, JournalSync, OpenError, Outcome, Store, StoreError,
    crash_storage::{CrashFile, CrashStorage, Fault},
    data_error,
    open::Ending,
};
use crate::{
    base::BaseOutline,
    geometry::{BLOCK_BYTES, CHUNK_BYTES, ChunkIndex, Geometry, SECTOR_BYTES},
    mapfile::{BaseId, DiskId, Identity},
    record::Boot,
    storage::StorageFile,
};

/// Two chunks with content in the base, one without, and a short one with an odd end.
const SIZE_BYTES: u64 = 3 * CHUNK_BYTES + 5 * BLOCK_BYTES + SECTOR_BYTES;
const SECTORS: usize = (SIZE_BYTES / SECTOR_BYTES) as usize;
const ZERO_CHUNK: ChunkIndex = ChunkIndex(2);

/// What a sector has: the same number all over, so that no mixture goes unnoticed.
type Token = u64;

fn identity() -> Identity {
    Identity {
        disk: DiskId([1; 16]),
        base: BaseId([2; 32]),
        geometry: Geometry::new(SIZE_BYTES).expect("a good size"),
    }
}

fn base_token(sector: usize) -> Token {
    let chunk = sector as u64 * SECTOR_BYTES / CHUNK_BYTES;
    if chunk == u64::from(ZERO_CHUNK.0) { 0 } else { (1 << 40) + sector as u64 }
}

fn base_content(chunk: ChunkIndex) -> Vec<u8> {
    let first = (chunk.offset() / SECTOR_BYTES) as usize;
    let count = u64::from(identity().geometry.chunk_bytes(chunk)) / SECTOR_BYTES;
    content((first..first + count as usize).map(base_token))
}

fn content(tokens: impl Iterator<Item = Token>) -> Vec<u8> {
    tokens.flat_map(|token| token.to_le_bytes().repeat(SECTOR_BYTES as usize / 8)).collect()
}

fn outline() -> BaseOutline {
    let geometry = identity().geometry;
    BaseOutline::new(geometry, geometry.chunks().filter(|&chunk| chunk != ZERO_CHUNK))
}

/// What a disk must and may have.
#[derive(Clone, Debug)]
struct Model {
    /// What was acknowledged last, sector by sector.
    now: Vec<Token>,
    /// What else each sector had since the last flush that was acknowledged, or may have had.
    before: Vec<Vec<Token>>,
    /// The request that isn't acknowledged.
    open: Option<(std::ops::Range<usize>, Token)>,
}

impl Model {
    fn new() -> Self {
        Self { now: (0..SECTORS).map(base_token).collect(), before: vec![Vec::new(); SECTORS], open: None }
    }

    fn begin(&mut self, sectors: std::ops::Range<usize>, token: Token) {
        self.open = Some((sectors, token));
    }

    fn acknowledge(&mut self) {
        let Some((sectors, token)) = self.open.take() else { return };
        for sector in sectors {
            let old = std::mem::replace(&mut self.now[sector], token);
            self.before[sector].push(old);
        }
    }

    /// A request failed: any part of it may have been done.
    fn give_up(&mut self, seen: &[Token]) {
        if let Some((sectors, _)) = self.open.take() {
            for sector in sectors {
                let old = std::mem::replace(&mut self.now[sector], seen[sector]);
                self.before[sector].push(old);
            }
        }
    }

    fn flushed(&mut self) {
        self.before.iter_mut().for_each(Vec::clear);
    }

    /// How many contents of each sector a flush that begins now will have made the past.
    fn begin_flush(&self) -> Vec<usize> {
        self.before.iter().map(Vec::len).collect()
    }

    fn end_flush(&mut self, begun: &[usize]) {
        for (before, &count) in self.before.iter_mut().zip(begun) {
            before.drain(..count);
        }
    }

    fn may_have(&self, sector: usize, token: Token, ending: Ending) -> bool {
        let open = self.open.as_ref().filter(|(sectors, _)| sectors.contains(&sector));
        self.now[sector] == token
            || open.is_some_and(|&(_, open)| open == token)
            || ending == Ending::HostCrashed && self.before[sector].contains(&token)
    }

    /// The disk was found like this: that is what it has.
    fn found(&mut self, seen: Vec<Token>, ending: Ending) {
        if ending == Ending::HostCrashed {
            self.flushed();
        } else {
            self.give_up(&seen);
        }
        (self.now, self.open) = (seen, None);
    }
}

type TestStore = Store<CrashStorage>;

fn create(storage: &CrashStorage) -> TestStore {
    Store::create(storage.clone(), identity(), outline(), Boot([0; 16])).expect("nothing fails yet")
}

/// Opens a disk, and takes back those copies of the base that are still true. Storage may fail, a crash harms no map.
fn open(storage: &CrashStorage, boot: u8) -> Result<(TestStore, Ending), StoreError> {
    let opened = Store::open(storage.clone(), Boot([boot; 16]), |_| Ok(outline()));
    let (mut store, opening) = opened.map_err(|error| match error {
        OpenError::Write { source, .. } | OpenError::Directory(source) => StoreError::Map(source),
        error => panic!("{error:?}"),
    })?;
    for chunk in opening.claimed {
        let mut found = vec![0; store.geometry().chunk_bytes(chunk) as usize];
        store.data().read_at(chunk.offset(), &mut found).expect("the file is as long as the disk");
        if found == base_content(chunk) {
            let _ = store.fill(chunk, &found)?;
        }
    }
    Ok((store, opening.ending))
}

/// Does what a request waits for, until it is done.
fn until_done(
    store: &mut TestStore,
    mut request: impl FnMut(&mut TestStore) -> Result<Outcome, StoreError>,
) -> Result<(), StoreError> {
    loop {
        match request(store)? {
            Outcome::Done => return Ok(()),
            Outcome::NeedsBase(chunk) => {
                let _ = store.fill(chunk, &base_content(chunk))?;
            }
            Outcome::NeedsFlush => store.flush()?,
        }
    }
}

/// Reads the whole disk and checks that no sector is a mixture, and that what isn't the disk's own is the base's.
fn read_all(store: &mut TestStore) -> Vec<Token> {
    let mut bytes = vec![0; SIZE_BYTES as usize];
    until_done(store, |store| store.read(0, &mut bytes)).expect("nothing fails now");
    let tokens: Vec<Token> = bytes
        .chunks(SECTOR_BYTES as usize)
        .map(|sector| {
            let words = sector.as_chunks::<8>().0;
            assert!(words.iter().all(|word| word == &words[0]), "a sector is torn");
            u64::from_le_bytes(words[0])
        })
        .collect();
    for (sector, &token) in tokens.iter().enumerate() {
        let at = sector as u64 * SECTOR_BYTES;
        let block = (at % CHUNK_BYTES / BLOCK_BYTES) as u32;
        let state = store.map().chunk(ChunkIndex((at / CHUNK_BYTES) as u32));
        if !state.own().contains(block) {
            assert_eq!(token, base_token(sector), "sector {sector} is said to be the base's, {state:?}");
        }
    }
    tokens
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Read(u64, u64),
    Flush,
    PartOfFlush,
    Reopen,
}

/// A flush between whose parts requests go on.
#[derive(Clone, Debug)]
enum FlushPart {
    Begun(Flush<CrashFile>),
    DataSynced(Flush<CrashFile>),
    Sealed(JournalSync<CrashFile>),
    JournalSynced(JournalSync<CrashFile>),
}

fn step(rng: &mut Rng) -> Step {
    let longest = [1, 8, 16, 200, 600][rng.usize(..5)];
    let first = rng.u64(..SECTORS as u64);
    let mut count = rng.u64(1..=longest).min(SECTORS as u64 - first);
    let mut start = first;
    if rng.bool() {
        start -= first % 8;
        count = (count.next_multiple_of(8)).min(SECTORS as u64 - start);
    }
    match rng.u8(..20) {
        0..8 => Step::Write(start, count),
        8..10 => Step::Zero(start, count),
        10 => Step::Discard(start, count),
        11..13 => Step::Read(start, count),
        13 => Step::Flush,
        14..19 => Step::PartOfFlush,
        _ => Step::Reopen,
    }
}

/// A disk with a history, and what it must have.
struct History {
    rng: Rng,
    storage: CrashStorage,
    store: Option<TestStore>,
    model: Model,
    /// A flush that is under way, and what it will have made the past.
    flush: Option<(FlushPart, Vec<usize>)>,
    boot: u8,
    next_token: Token,
}

impl History {
    fn new(seed: u64) -> Self {
        let storage = CrashStorage::new(seed);
        let store = Some(create(&storage));
        let rng = Rng::with_seed(seed);
        Self { rng, storage, store, model: Model::new(), flush: None, boot: 0, next_token: 1 }
    }

    /// Does some steps; stops at the first that fails.
    fn run(&mut self, steps: usize) -> Result<(), StoreError> {
        (0..steps).try_for_each(|_| {
            let step = step(&mut self.rng);
            self.take(step)
        })
    }

    fn take(&mut self, step: Step) -> Result<(), StoreError> {
        match step {
            Step::PartOfFlush => return self.flush_a_part(),
            // There is one flush at a time, and none when a disk is closed.
            Step::Flush | Step::Reopen => {
                while self.flush.is_some() {
                    self.flush_a_part()?;
                }
            }
            _ => {}
        }
        let store = self.store.as_mut().expect("a store is open between steps");
        match step {
            Step::Write(start, count) => {
                let token = self.next_token;
                self.next_token += 1;
                self.model.begin(start as usize..(start + count) as usize, token);
                let bytes = content((0..count).map(|_| token));
                until_done(store, |store| store.write(start * SECTOR_BYTES, &bytes))?;
            }
            Step::Zero(start, count) => {
                self.model.begin(start as usize..(start + count) as usize, 0);
                until_done(store, |store| store.zero(start * SECTOR_BYTES, count * SECTOR_BYTES))?;
            }
            Step::Discard(start, count) => {
                let end = start + count;
                let whole_end = if end == SECTORS as u64 { end } else { end / 8 * 8 };
                self.model.begin(start.next_multiple_of(8) as usize..whole_end as usize, 0);
                until_done(store, |store| store.discard(start * SECTOR_BYTES, count * SECTOR_BYTES))?;
            }
            Step::Read(start, count) => {
                let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
                until_done(store, |store| store.read(start * SECTOR_BYTES, &mut bytes))?;
                let expected = &self.model.now[start as usize..(start + count) as usize];
                assert_eq!(bytes, content(expected.iter().copied()));
            }
            Step::Flush => {
                store.flush()?;
                self.model.flushed();
            }
            Step::Reopen => {
                store.close()?;
                self.model.flushed();
                self.store = None;
                let (store, ending) = self.reopen()?;
                assert_eq!(ending, Ending::Closed);
                self.store = Some(store);
            }
            Step::PartOfFlush => {}
        }
        self.model.acknowledge();
        Ok(())
    }

    /// Begins a flush, or goes on with the one that is under way.
    fn flush_a_part(&mut self) -> Result<(), StoreError> {
        let store = self.store.as_mut().expect("a store is open between steps");
        let Some((part, begun)) = self.flush.take() else {
            self.flush = Some((FlushPart::Begun(store.begin_flush()), self.model.begin_flush()));
            return Ok(());
        };
        let next = match part {
            FlushPart::Begun(flush) => {
                flush.sync().map_err(data_error("sync"))?;
                FlushPart::DataSynced(flush)
            }
            FlushPart::DataSynced(flush) => FlushPart::Sealed(store.seal(&flush)?),
            FlushPart::Sealed(journal) => {
                journal.run(&self.storage).map_err(StoreError::Map)?;
                FlushPart::JournalSynced(journal)
            }
            FlushPart::JournalSynced(journal) => {
                store.sealed(journal);
                self.model.end_flush(&begun);
                return Ok(());
            }
        };
        self.flush = Some((next, begun));
        Ok(())
    }

    fn reopen(&mut self) -> Result<(TestStore, Ending), StoreError> {
        self.boot += self.rng.u8(..2);
        open(&self.storage, self.boot)
    }

    /// The process died, or the host. What is there now?
    fn come_back(&mut self, host: bool) {
        (self.store, self.flush) = (None, None);
        if host {
            self.storage.crash_host();
            self.boot += 1;
        } else {
            self.storage.restart();
        }
        let (mut store, ending) = open(&self.storage, self.boot).expect("nothing fails now");
        assert_eq!(ending == Ending::HostCrashed, host && ending != Ending::Closed);
        let seen = read_all(&mut store);
        for (sector, &token) in seen.iter().enumerate() {
            let model = &self.model;
            let crashed = if host { Ending::HostCrashed } else { ending };
            assert!(
                model.may_have(sector, token, crashed),
                "sector {sector} has {token}, now {}, before {:?}, open {:?}, {ending:?}",
                model.now[sector],
                model.before[sector],
                model.open
            );
        }
        self.model.found(seen, ending);
        self.store = Some(store);
    }

    /// Whatever comes later, nothing changes by itself.
    fn go_on(&mut self) {
        self.run(6).expect("nothing fails now");
        let seen = read_all(self.store.as_mut().expect("a store is open between steps"));
        assert_eq!(seen, self.model.now);
        self.come_back(false);
        assert_eq!(self.model.now, seen);
        self.take(Step::Flush).expect("nothing fails now");
        assert_eq!(self.storage.all_names().len(), 2, "{:?}", self.storage.all_names());
    }
}

/// Stops histories at operations and looks at what is left, both when the process dies and when the host does.
fn stop_everywhere(seeds: std::ops::Range<u64>, steps: usize, stride: u64) -> u64 {
    let mut states = 0;
    for seed in seeds {
        let mut whole = History::new(seed);
        let begun = whole.storage.operations();
        whole.run(steps).expect("nothing fails");
        let operations = whole.storage.operations();
        let mut at = begun + 1 + seed % stride;
        while at <= operations {
            for host in [false, true] {
                let mut history = History::new(seed);
                history.storage.fault_at(at, Fault::Dies);
                let ran = history.run(steps);
                // A new map that can't be begun is no failure: the old one goes on.
                assert!(ran.is_err() || history.storage.is_dead(), "operation {at} of {operations}");
                history.come_back(host);
                history.go_on();
                states += 1;
            }
            at += stride;
        }
    }
    states
}

#[test]
fn whatever_dies_at_any_operation_leaves_what_a_disk_may_have() {
    let states = stop_everywhere(0..50, 32, 2);
    assert!(states > 3_000, "{states} states");
}

#[test]
fn a_full_file_system_loses_nothing() {
    for seed in 0..200 {
        let mut history = History::new(seed);
        let at = history.storage.operations() + 1 + seed % 40;
        history.storage.fault_at(at, Fault::Full);
        let ran = history.run(20);
        history.storage.restart();
        if let Err(error) = ran {
            assert!(error.is_full(), "{error:?}");
            if history.store.is_none() {
                continue;
            }
            let seen = read_all(history.store.as_mut().expect("looked at above"));
            history.model.give_up(&seen);
            assert_eq!(seen, history.model.now);
        }
        history.go_on();
    }
}

#[test]
fn a_map_that_rots_is_named() {
    let mut found = 0;
    for seed in 0..40 {
        let mut history = History::new(seed);
        history.run(12).expect("nothing fails");
        history.store.take().expect("a store is open").close().expect("nothing fails");
        let names = history.storage.all_names();
        let map = names.iter().find(|name| name.starts_with("map.")).expect("a disk has a map");
        // The header, the checkpoint of four chunks, and the first records, which were synced long ago.
        let byte = match Rng::with_seed(seed).usize(..4096 + 64 + 32 * 4) {
            record @ 4160.. => record - 4160 + 8192,
            byte => byte,
        };
        history.storage.rot(map, byte);
        match Store::open(history.storage.clone(), Boot([9; 16]), |_| Ok(outline())) {
            Err(error) => {
                assert!(format!("{error}").contains(map.as_str()), "{error}");
                found += 1;
            }
            Ok((store, _)) => {
                let states: Vec<_> = store.map().iter().collect();
                panic!("byte {byte} of {map} changed, and nobody noticed: {states:?}");
            }
        }
    }
    assert_eq!(found, 40);
}

#[test]
fn a_copy_of_the_base_is_never_what_the_guest_wrote() {
    // A whole chunk is fetched and flushed, and then written over without a flush: after the host's crash the file may
    // have the new content while the map has lost the record of it.
    for seed in 0..200 {
        let mut history = History::new(seed);
        for step in [Step::Read(0, 8), Step::Flush, Step::Write(3, 1), Step::Write(16, 8)] {
            history.take(step).expect("nothing fails");
        }
        history.come_back(true);
        history.go_on();
    }
}

#[test]
fn records_that_came_while_the_journal_was_synced_may_be_lost() {
    for seed in 0..50 {
        let mut history = History::new(seed);
        history.store.as_mut().expect("a store is open").compact_at = 1000;
        let mut take = |steps: &mut dyn Iterator<Item = Step>| {
            steps.for_each(|step| history.take(step).expect("nothing fails"));
        };
        take(&mut std::iter::repeat_n(Step::PartOfFlush, 4));
        // More records than a sector of the map holds.
        take(&mut (0..40).map(|block| Step::Write(block * 8, 8)));
        // The flush ends, and another gets as far as its seal.
        take(&mut std::iter::repeat_n(Step::PartOfFlush, 4));
        history.come_back(true);
        history.go_on();
    }
}
