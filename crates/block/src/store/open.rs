//! How a disk is created, and opened after whatever happened to it.

use std::{collections::HashMap, io};

use thiserror::Error;

use super::{DATA_FILE, Store, StoreError, Unsealed, unsealed::content_told};
use crate::{
    base::BaseOutline,
    geometry::{Blocks, ChunkIndex, Geometry},
    map::{ChunkState, Map, Place},
    mapfile::{Identity, MapError, MapFile},
    record::{Boot, Event, Record},
    storage::{Storage, StorageFile},
};

/// Records that a journal may have at least before a new file is begun: 8 MiB. Tests have short histories.
const COMPACT_AT_MIN: u64 = if cfg!(test) { 20 } else { 1 << 18 };

/// When a journal is long enough: when it is larger than what begins a new one.
pub(super) fn compact_at(geometry: Geometry) -> u64 {
    COMPACT_AT_MIN.max(u64::from(geometry.chunk_count()) / 2)
}

/// A disk that can't be created.
#[derive(Debug, Error)]
pub enum CreateError {
    /// There is one.
    #[error("there is a disk already: file {0:?}")]
    Exists(String),
    /// The file system can't.
    #[error("file {name:?} can't be created")]
    Create {
        /// The file.
        name: String,
        /// What the file system says.
        source: io::Error,
    },
}

/// A disk that can't be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No map is there.
    #[error("no disk: there is no file \"map.<number>\"")]
    NoMap,
    /// The directory can't be read or written.
    #[error("the disk's directory")]
    Directory(#[source] io::Error),
    /// The map can't be relied on.
    #[error("file {name:?}")]
    Map {
        /// The file.
        name: String,
        /// What is wrong with it.
        source: MapError,
    },
    /// The map can't be written.
    #[error("file {name:?} can't be written")]
    Write {
        /// The file.
        name: String,
        /// What the file system says.
        source: io::Error,
    },
    /// The file with the content can't be used.
    #[error("file {DATA_FILE:?}")]
    Data(#[source] io::Error),
    /// The file with the content has another size than the disk.
    #[error("file {DATA_FILE:?} has {found} bytes, and the disk has {expected}")]
    Size {
        /// The file's.
        found: u64,
        /// The disk's.
        expected: u64,
    },
    /// The content can't be compared with the map.
    #[error("what the crash of the host left")]
    Recover(#[source] StoreError),
    /// Nothing is known of the disk's base.
    #[error("the disk's base")]
    Base(#[source] io::Error),
}

/// How a disk was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Closed, with everything synced.
    Closed,
    /// Its process died. All is there.
    Killed,
    /// Its host died. What wasn't flushed may be lost.
    HostCrashed,
}

/// What was found on opening a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// How it was left.
    pub ending: Ending,
    /// Blocks of which a write or zero was lost with the host.
    pub blocks_lost: u64,
    /// Chunks of which the file may have a copy of the base: compare their digest before fetching them.
    pub claimed: Vec<ChunkIndex>,
}

impl<S: Storage> Store<S> {
    /// Creates a disk in an empty directory. It survives the host when this returns.
    ///
    /// # Errors
    /// [`CreateError`] says why it can't be; then files may be left that are no disk.
    pub fn create(
        storage: S,
        identity: Identity,
        base: BaseOutline,
        boot: Boot,
    ) -> Result<Self, CreateError> {
        let name = MapFile::<S::File>::name(0);
        let failed = |name: &str| {
            let name = name.to_owned();
            move |source| CreateError::Create { name, source }
        };
        let names = storage.names().map_err(failed(&name))?;
        if let Some(map) = names.into_iter().find(|name| MapFile::<S::File>::number_in(name).is_some()) {
            return Err(CreateError::Exists(map));
        }
        let data = storage.create(DATA_FILE).map_err(failed(DATA_FILE))?;
        data.set_length(identity.geometry.size_bytes()).map_err(failed(DATA_FILE))?;
        data.sync().map_err(failed(DATA_FILE))?;
        let map = Map::new(identity.geometry);
        let opened = std::iter::once(Record::Opened(boot));
        let file = storage.create(&name).map_err(failed(&name))?;
        let journal = MapFile::write(file, 0, &identity, map.iter(), opened).map_err(failed(&name))?;
        journal.file().sync().and_then(|()| storage.sync_names()).map_err(failed(&name))?;
        Ok(Self::assemble(storage, identity, base, boot, data, map, journal))
    }

    /// Opens a disk, in this run of the host's kernel. `base` tells what is known of the disk's base.
    ///
    /// Whatever was acknowledged is there if the process died; whatever was flushed is there if the host did, and of
    /// each block that was written and not flushed either the old content or the new.
    ///
    /// # Errors
    /// [`OpenError`] says which file is damaged, and how. Nothing is changed then.
    pub fn open(
        storage: S,
        boot: Boot,
        base: impl FnOnce(&Identity) -> io::Result<BaseOutline>,
    ) -> Result<(Self, Opening), OpenError> {
        let (mut journal, identity, checkpoint, older) = newest_map(&storage)?;
        let name = MapFile::<S::File>::name(journal.number());
        let data = open_data(&storage, identity.geometry)?;
        let records = journal
            .records(identity.geometry)
            .map_err(|source| OpenError::Map { name: name.clone(), source })?;
        let base = base(&identity).map_err(OpenError::Base)?;
        let mut store = Self::assemble(storage, identity, base, boot, data, checkpoint, journal);
        store.retired = older;
        let opening = match ending(&records, boot) {
            Ending::HostCrashed => store.recover(&records)?,
            ending => store.resume(&records, ending),
        };
        store.begin(opening.ending)?;
        Ok((store, opening))
    }

    fn assemble(
        storage: S,
        identity: Identity,
        base: BaseOutline,
        boot: Boot,
        data: S::File,
        map: Map,
        journal: MapFile<S::File>,
    ) -> Self {
        let durable = journal.next();
        let compact_at = compact_at(identity.geometry);
        let (unsealed, retired) = (Unsealed::default(), Vec::new());
        Self { storage, identity, base, boot, data, map, journal, unsealed, durable, retired, compact_at }
    }

    /// Everything in the files counts.
    fn resume(&mut self, records: &[Record], ending: Ending) -> Opening {
        let sealed = sealed_through(records);
        for (number, &record) in (0..).zip(records) {
            if let Record::Change { chunk, blocks, event } = record {
                let state = self.map.chunk_mut(chunk);
                if number >= sealed {
                    self.unsealed.push(number, record, *state);
                }
                state.put(blocks, event.place());
            }
        }
        self.durable = 0;
        Opening { ending, blocks_lost: 0, claimed: Vec::new() }
    }

    /// What was sealed counts, and of the rest what the data bears out.
    fn recover(&mut self, records: &[Record]) -> Result<Opening, OpenError> {
        let (sealed, rest) = records.split_at((sealed_through(records) as usize).min(records.len()));
        for &record in sealed {
            if let Record::Change { chunk, blocks, event } = record {
                self.map.chunk_mut(chunk).put(blocks, event.place());
            }
        }
        let mut claimed = self.map.clone();
        let mut lost = 0;
        for (chunk, changes) in by_chunk(rest) {
            let (state, claims, lost_here) = self.judge(chunk, &changes).map_err(OpenError::Recover)?;
            *self.map.chunk_mut(chunk) = state;
            *claimed.chunk_mut(chunk) = claims;
            lost += u64::from(lost_here.count());
            self.punch(chunk, state.at(Place::Zero) & touched(&changes)).map_err(OpenError::Recover)?;
        }
        Ok(Opening { ending: Ending::HostCrashed, blocks_lost: lost, claimed: self.disown(&claimed) })
    }

    /// The state of a chunk after the changes that the data bears out, the state that the changes claim, and the
    /// blocks that the crash took back. Newer changes count before older ones.
    fn judge(
        &self,
        chunk: ChunkIndex,
        changes: &[(Blocks, Event)],
    ) -> Result<(ChunkState, ChunkState, Blocks), StoreError> {
        let sealed = self.map.chunk(chunk);
        let (mut state, mut claims) = (sealed, sealed);
        let (mut decided, mut lost) = (Blocks::NONE, Blocks::NONE);
        for &(blocks, event) in changes.iter().rev() {
            let blocks_now = blocks.without(decided);
            decided = decided | blocks;
            claims.put(blocks_now, event.place());
            let borne_out = match content_told(event) {
                Some(content) => self.digest_data(chunk, blocks)? == content,
                None => true,
            };
            if borne_out {
                state.put(blocks_now, event.place());
            } else {
                lost = lost | blocks_now;
            }
        }
        Ok((state, claims, lost))
    }

    /// Counts on no copy of the base any more, and says of which chunks there may be one.
    fn disown(&mut self, claimed: &Map) -> Vec<ChunkIndex> {
        let geometry = self.geometry();
        let mut chunks = Vec::new();
        for (chunk, claims) in geometry.chunks().zip(claimed.iter()) {
            let state = self.map.chunk_mut(chunk);
            state.put(state.at(Place::Fetched), Place::Base);
            let all = geometry.blocks(chunk);
            if claims.at(Place::Fetched) & all == all && state.own().is_empty() {
                chunks.push(chunk);
            }
        }
        chunks
    }

    /// Makes the disk ready for requests: from now on the newest map says that it is open, and that survives the host.
    fn begin(&mut self, ending: Ending) -> Result<(), OpenError> {
        let name = MapFile::<S::File>::name(self.journal.number());
        match ending {
            Ending::Killed => return Ok(()),
            Ending::Closed => {
                let opened = self.journal.append(Record::Opened(self.boot)).map(|_number| ());
                let synced = opened.and_then(|()| self.journal.file().sync());
                synced.map_err(|source| OpenError::Write { name, source })?;
                self.durable = self.journal.next();
            }
            Ending::HostCrashed => self.begin_anew()?,
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> Result<(), OpenError> {
        self.data.sync().map_err(OpenError::Data)?;
        let number = self.journal.number() + 1;
        let name = MapFile::<S::File>::name(number);
        let opened = std::iter::once(Record::Opened(self.boot));
        let write = || {
            let file = self.storage.create(&name)?;
            let journal = MapFile::write(file, number, &self.identity, self.map.iter(), opened)?;
            journal.file().sync()?;
            self.storage.sync_names()?;
            Ok(journal)
        };
        let journal = write().map_err(|source| OpenError::Write { name: name.clone(), source })?;
        self.retired.push(MapFile::<S::File>::name(self.journal.number()));
        self.durable = journal.next();
        self.journal = journal;
        for name in std::mem::take(&mut self.retired) {
            self.storage.remove(&name).map_err(OpenError::Directory)?;
        }
        self.storage.sync_names().map_err(OpenError::Directory)
    }
}

/// What a disk has, whether or not someone has it open: as of the newest record that is whole.
///
/// # Errors
/// [`OpenError`] says which file is damaged, and how.
pub fn look<S: Storage>(storage: &S) -> Result<(Identity, Map), OpenError> {
    let (mut journal, identity, mut map, _older) = newest_map(storage)?;
    let name = MapFile::<S::File>::name(journal.number());
    let records = journal.records(identity.geometry).map_err(|source| OpenError::Map { name, source })?;
    for record in records {
        if let Record::Change { chunk, blocks, event } = record {
            map.chunk_mut(chunk).put(blocks, event.place());
        }
    }
    Ok((identity, map))
}

/// The newest map that is whole, and the names of older ones. A newer one that isn't whole was never relied on, since
/// the one before it goes only once it is synced; the next map takes its place.
#[expect(clippy::type_complexity, reason = "four things that are taken apart at once")]
fn newest_map<S: Storage>(storage: &S) -> Result<(MapFile<S::File>, Identity, Map, Vec<String>), OpenError> {
    let names = storage.names().map_err(OpenError::Directory)?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| MapFile::<S::File>::number_in(name)).collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut first_error = None;
    for &number in &numbers {
        let name = MapFile::<S::File>::name(number);
        let read = storage.open(&name).map_err(MapError::Read).and_then(|file| MapFile::read(file, number));
        match read {
            Ok((file, identity, map)) => {
                let older = numbers.iter().filter(|&&other| other < number);
                return Ok((
                    file,
                    identity,
                    map,
                    older.map(|&older| MapFile::<S::File>::name(older)).collect(),
                ));
            }
            Err(source @ MapError::Newer(_)) => return Err(OpenError::Map { name, source }),
            Err(source) => first_error = first_error.or(Some(OpenError::Map { name, source })),
        }
    }
    Err(first_error.unwrap_or(OpenError::NoMap))
}

fn open_data<S: Storage>(storage: &S, geometry: Geometry) -> Result<S::File, OpenError> {
    let data = storage.open(DATA_FILE).map_err(OpenError::Data)?;
    let found = data.length().map_err(OpenError::Data)?;
    let expected = geometry.size_bytes();
    if found == expected { Ok(data) } else { Err(OpenError::Size { found, expected }) }
}

fn ending(records: &[Record], boot: Boot) -> Ending {
    if records.last() == Some(&Record::Closed) {
        return Ending::Closed;
    }
    let opened = records.iter().rev().find_map(|record| match record {
        Record::Opened(boot) => Some(*boot),
        _ => None,
    });
    if opened == Some(boot) { Ending::Killed } else { Ending::HostCrashed }
}

/// The number of the first record of whose data nothing is promised.
fn sealed_through(records: &[Record]) -> u64 {
    let sealed = records.iter().filter_map(|record| match record {
        Record::Sealed { through, .. } => Some(*through),
        _ => None,
    });
    sealed.max().unwrap_or(0)
}

/// The changes of each chunk, oldest first.
fn by_chunk(records: &[Record]) -> HashMap<ChunkIndex, Vec<(Blocks, Event)>> {
    let mut changes: HashMap<_, Vec<_>> = HashMap::new();
    for record in records {
        if let Record::Change { chunk, blocks, event } = *record {
            changes.entry(chunk).or_default().push((blocks, event));
        }
    }
    changes
}

fn touched(changes: &[(Blocks, Event)]) -> Blocks {
    changes.iter().fold(Blocks::NONE, |all, &(blocks, _)| all | blocks)
}
