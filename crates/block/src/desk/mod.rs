//! Where the requests for a disk come together: each is answered, once what it waits for is there. No I/O but the
//! store's.
//!
//! ```text
//!   submit ──► attempt ──► replied
//!                │  ▲
//!                │  └── filled ◄── Fill ◄── fetched ◄── Fetch      a chunk of the base isn't here
//!                ├──► joins a flush ──► replied           it is to survive the host
//!                └──► stalled until a flush               too much would be lost with the host
//!
//!   flush:  idle ──Sync──► data ──data_synced──SyncJournal──► journal ──journal_synced──► idle, or the next
//! ```
//!
//! Whatever waits for a flush while one is under way goes into the next, together. A disk of which a sync failed is
//! broken: nobody knows what survives, so everything that could make it worse is refused until it is opened anew.

mod ahead;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry};

use bytes::Bytes;

use self::ahead::ReadAhead;
use crate::{
    geometry::{CHUNK_BYTES, ChunkIndex},
    nbd::{Allocation, Errno},
    storage::Storage,
    store::{Extent, Fill, Flush, JournalSync, Outcome, Source, Store, StoreError},
};

/// Extents that are told of at a time: more are asked for again.
const STATUS_EXTENTS_MAX: usize = 1024;
/// Chunks that are fetched at a time though nobody waits for them.
const BACKGROUND_FETCHES_MAX: usize = 4;

/// Tells a request from all others that are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// Whose it is.
    pub client: u64,
    /// The client's own mark.
    pub cookie: u64,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which it is.
    pub id: RequestId,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
    /// What is to be done.
    pub work: Work,
}

/// What a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// To read.
    Read,
    /// To write these bytes.
    Write {
        /// The bytes: as many as the request's length says.
        bytes: Bytes,
        /// Whether they are to survive the host before the reply.
        durable: bool,
    },
    /// To make it zero.
    Zero {
        /// Whether that is to survive the host before the reply.
        durable: bool,
    },
    /// To let go of it.
    Discard {
        /// Whether that is to survive the host before the reply.
        durable: bool,
    },
    /// Everything that was replied is to survive the host.
    Flush,
    /// To have it here.
    Cache,
    /// To be told where there is content.
    Status {
        /// One extent will do.
        one: bool,
    },
}

/// What a request is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done.
    Done,
    /// It can be read: from the data file, or it is zero; or from a base that is read in its place.
    Read(Vec<Extent>),
    /// Where there is content: lengths, in order.
    Status(Vec<(u32, Allocation)>),
    /// It failed, for this reason.
    Failed(Errno, String),
}

/// What is to be done by whoever has the desk.
#[derive(Debug)]
pub enum Action<F> {
    /// Answer a request.
    Reply(RequestId, Reply),
    /// Fetch a chunk of the base, then call [`Desk::fetched`].
    Fetch(ChunkIndex),
    /// Run [`Fill::write`], then call [`Desk::filled`].
    Fill(Fill<F>),
    /// Run [`Flush::sync`], then call [`Desk::data_synced`].
    Sync(Flush<F>),
    /// Run [`JournalSync::run`], then call [`Desk::journal_synced`].
    SyncJournal(JournalSync<F>),
}

/// Who may write to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Control {
    /// The machine of this host.
    #[default]
    Here,
    /// Nobody for now: it is being handed over.
    HandingOver,
    /// The machine of another host.
    There,
}

/// A chunk that can't be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchFailure(pub String);

/// The requests of a disk.
#[derive(Debug)]
pub struct Desk<S: Storage> {
    store: Store<S>,
    control: Control,
    /// Whether the base is read in its place by whoever has the desk.
    reads_base: bool,
    /// Chunks that are being fetched, and who waits for them.
    fetches: BTreeMap<ChunkIndex, Vec<Request>>,
    /// Those of them that came and are being written: nothing else may change them.
    filling: BTreeSet<ChunkIndex>,
    ahead: ReadAhead,
    /// Chunks to fetch when nothing is urgent, in this order.
    prefetch: VecDeque<ChunkIndex>,
    flush: FlushState<S::File>,
    /// Who waits for a flush that begins after now.
    joining: Vec<RequestId>,
    /// Requests that can go on only after a flush.
    stalled: VecDeque<Request>,
    /// Chunks that came and can be kept only after a flush.
    unkept: Vec<Fill<S::File>>,
    /// Why nothing can be written any more.
    broken: Option<String>,
    actions: Vec<Action<S::File>>,
}

#[derive(Debug)]
enum FlushState<F> {
    Idle,
    Data(Flush<F>, Vec<RequestId>),
    Journal(JournalSync<F>, Vec<RequestId>),
}

impl<S: Storage> Desk<S> {
    /// The desk of an open disk, which is controlled from here.
    pub fn new(store: Store<S>) -> Self {
        Self {
            store,
            control: Control::Here,
            reads_base: false,
            fetches: BTreeMap::new(),
            filling: BTreeSet::new(),
            ahead: ReadAhead::default(),
            prefetch: VecDeque::new(),
            flush: FlushState::Idle,
            joining: Vec::new(),
            stalled: VecDeque::new(),
            unkept: Vec::new(),
            broken: None,
            actions: Vec::new(),
        }
    }

    /// The disk.
    pub fn store(&self) -> &Store<S> {
        &self.store
    }

    /// Closes the disk, once it is drained. No requests may follow.
    ///
    /// # Errors
    /// As for [`Store::close`].
    pub fn close(&mut self) -> Result<(), StoreError> {
        self.store.close()
    }

    /// What is to be done now, in this order.
    pub fn take_actions(&mut self) -> Vec<Action<S::File>> {
        std::mem::take(&mut self.actions)
    }

    /// Says whether what is only read of the base is read in its place: then [`Reply::Read`] has [`Source::Base`] too.
    pub fn read_base_in_place(&mut self, reads_base: bool) {
        self.reads_base = reads_base;
    }

    /// Takes a request. Its answer will be among the actions, now or later.
    pub fn submit(&mut self, request: Request) {
        if let Some((errno, why)) = self.refusal(&request) {
            return self.fail(request.id, errno, why);
        }
        match request.work {
            Work::Flush => self.join_flush(request.id),
            Work::Status { one } => {
                let extents = self.allocation(&request, one);
                self.reply(request.id, Reply::Status(extents));
            }
            _ => self.attempt(request),
        }
    }

    /// A chunk of the base came, verified; or it can't be had.
    pub fn fetched(&mut self, chunk: ChunkIndex, content: Result<Bytes, FetchFailure>) {
        match content {
            Ok(content) => {
                self.filling.insert(chunk);
                self.actions.push(Action::Fill(self.store.begin_fill(chunk, content)));
            }
            Err(FetchFailure(why)) => self.fail_waiting(chunk, Errno::Io, &why),
        }
        self.fetch_in_background();
    }

    /// A chunk was written, or couldn't be.
    pub fn filled(&mut self, fill: Fill<S::File>, written: std::io::Result<()>) {
        match written {
            Ok(()) => self.end_fill(fill),
            Err(source) => {
                let error = StoreError::Data { action: "write a chunk of the base", source };
                self.fail_waiting(fill.chunk(), errno(&error), &describe(&error));
            }
        }
        self.fetch_in_background();
    }

    fn end_fill(&mut self, fill: Fill<S::File>) {
        let chunk = fill.chunk();
        match (self.store.end_fill(&fill), self.broken.clone()) {
            (Ok(Outcome::Done), _) => self.retry(chunk),
            (Ok(_later), Some(why)) => self.fail_waiting(chunk, Errno::Io, &why),
            (Ok(_later), None) => {
                self.unkept.push(fill);
                self.begin_flush();
            }
            (Err(error), _) => self.fail_waiting(chunk, errno(&error), &describe(&error)),
        }
    }

    /// The data was synced, or wasn't.
    pub fn data_synced(&mut self, result: std::io::Result<()>) {
        let FlushState::Data(flush, ids) = std::mem::replace(&mut self.flush, FlushState::Idle) else {
            return;
        };
        if let Err(error) = result {
            return self.break_off(format!("can't sync the disk's data: {error}"), ids);
        }
        match self.store.seal(&flush) {
            Ok(journal) => {
                self.actions.push(Action::SyncJournal(journal.clone()));
                self.flush = FlushState::Journal(journal, ids);
            }
            Err(error) if error.is_full() => self.fail_for_want_of_space(ids, &describe(&error)),
            Err(error) => self.break_off(describe(&error), ids),
        }
    }

    /// The journal was synced, or wasn't.
    pub fn journal_synced(&mut self, result: std::io::Result<()>) {
        let FlushState::Journal(journal, ids) = std::mem::replace(&mut self.flush, FlushState::Idle) else {
            return;
        };
        if let Err(error) = result {
            return self.break_off(format!("can't sync the disk's map: {error}"), ids);
        }
        self.store.sealed(journal);
        for id in ids {
            self.reply(id, Reply::Done);
        }
        for fill in std::mem::take(&mut self.unkept) {
            self.end_fill(fill);
        }
        self.fetch_in_background();
        for request in std::mem::take(&mut self.stalled) {
            self.submit(request);
        }
        if !self.joining.is_empty() {
            self.begin_flush();
        }
    }

    /// Chunks of the base that will be wanted, in the order of their importance: they are fetched when nothing is urgent.
    pub fn prefetch(&mut self, chunks: impl IntoIterator<Item = ChunkIndex>) {
        self.prefetch.extend(chunks);
        self.fetch_in_background();
    }

    /// Says who controls the disk. While nobody here does, requests are refused in a way that stops the machine without
    /// the guest seeing an error; flushes are answered.
    pub fn set_control(&mut self, control: Control) {
        self.control = control;
        if control == Control::Here {
            return;
        }
        let waiting = std::mem::take(&mut self.stalled);
        let waiting: Vec<_> =
            waiting.into_iter().chain(self.fetches.values_mut().flat_map(std::mem::take)).collect();
        waiting.into_iter().for_each(|request| self.submit(request));
    }

    /// A client has gone: what it asked for and wasn't done needn't be. If it comes back, it asks again.
    pub fn leave(&mut self, client: u64) {
        self.stalled.retain(|request| request.id.client != client);
        for waiting in self.fetches.values_mut() {
            waiting.retain(|request| request.id.client != client);
        }
    }

    /// Whether every request was answered.
    pub fn is_drained(&self) -> bool {
        let waiting = self.fetches.values().any(|waiting| !waiting.is_empty());
        !waiting
            && self.stalled.is_empty()
            && self.joining.is_empty()
            && matches!(self.flush, FlushState::Idle)
    }

    /// Why a request isn't even tried.
    fn refusal(&self, request: &Request) -> Option<(Errno, String)> {
        if request.work == Work::Flush {
            return self.broken.clone().map(|why| (Errno::Io, why));
        }
        if self.control != Control::Here {
            return Some((Errno::Shutdown, "the disk's control is elsewhere".into()));
        }
        if !self.store.geometry().holds(request.offset, request.length) {
            return Some((beyond_the_end(&request.work), "beyond the disk's end".into()));
        }
        let writes = !matches!(request.work, Work::Read | Work::Cache | Work::Status { .. });
        self.broken.clone().filter(|_| writes).map(|why| (Errno::Io, why))
    }

    fn attempt(&mut self, request: Request) {
        match &request.work {
            Work::Read => return self.read(request),
            Work::Cache => return self.cache(&request),
            _ => {}
        }
        if let Some(chunk) = self.being_filled(&request) {
            return self.wait_for(chunk, request);
        }
        let outcome = match &request.work {
            Work::Write { bytes, .. } => self.store.write(request.offset, bytes),
            Work::Zero { .. } => self.store.zero(request.offset, request.length),
            Work::Discard { .. } => self.store.discard(request.offset, request.length),
            Work::Read | Work::Cache | Work::Flush | Work::Status { .. } => return,
        };
        match outcome {
            Ok(Outcome::Done) => self.written(&request),
            Ok(Outcome::NeedsBase(chunk)) => self.wait_for(chunk, request),
            Ok(Outcome::NeedsFlush) => {
                self.stalled.push_back(request);
                self.begin_flush();
            }
            Err(error) => self.fail(request.id, errno(&error), describe(&error)),
        }
    }

    /// A chunk that a request would change while it is written.
    fn being_filled(&self, request: &Request) -> Option<ChunkIndex> {
        let end = request.offset + request.length;
        let touches =
            |chunk: &ChunkIndex| chunk.offset() < end && request.offset < chunk.offset() + CHUNK_BYTES;
        self.filling.iter().copied().find(touches)
    }

    fn written(&mut self, request: &Request) {
        let durable = match request.work {
            Work::Write { durable, .. } | Work::Zero { durable } | Work::Discard { durable } => durable,
            _ => false,
        };
        if durable {
            self.join_flush(request.id);
        } else {
            self.reply(request.id, Reply::Done);
        }
        if self.store.is_flush_due() {
            self.begin_flush();
        }
    }

    fn read(&mut self, request: Request) {
        let extents: Vec<Extent> = self.store.extents(request.offset, request.length).collect();
        let missing: Vec<ChunkIndex> = missing(&extents).collect();
        let Some(&first) = missing.first().filter(|_| !self.reads_base) else {
            return self.reply(request.id, Reply::Read(extents));
        };
        for &chunk in &missing {
            self.fetch(chunk);
        }
        let last = missing.last().copied().unwrap_or(first);
        for chunk in self.ahead.after(first, last, self.store.geometry()) {
            self.fetch_if_missing(chunk);
        }
        self.wait_for(first, request);
    }

    /// Nobody waits for what is to be had here: it is replied to at once.
    fn cache(&mut self, request: &Request) {
        let extents: Vec<Extent> = self.store.extents(request.offset, request.length).collect();
        if self.reads_base {
            return self.reply(request.id, Reply::Done);
        }
        self.prefetch(missing(&extents).collect::<Vec<_>>());
        self.reply(request.id, Reply::Done);
    }

    fn allocation(&self, request: &Request, one: bool) -> Vec<(u32, Allocation)> {
        let mut told: Vec<(u32, Allocation)> = Vec::new();
        for extent in self.store.extents(request.offset, request.length) {
            let allocation = match extent.source {
                Source::Zero => Allocation::Hole,
                Source::File | Source::Base(_) => Allocation::Data,
            };
            // A request's length fits in 32 bits, and so does each part of it.
            let length = extent.length as u32;
            let enough = one || told.len() == STATUS_EXTENTS_MAX;
            match told.last_mut() {
                Some((before, same)) if *same == allocation => *before += length,
                Some(_) if enough => break,
                _ => told.push((length, allocation)),
            }
        }
        told
    }

    fn wait_for(&mut self, chunk: ChunkIndex, request: Request) {
        self.fetch(chunk);
        self.fetches.entry(chunk).or_default().push(request);
    }

    fn fetch_if_missing(&mut self, chunk: ChunkIndex) {
        let geometry = self.store.geometry();
        let length = u64::from(geometry.chunk_bytes(chunk));
        if self.store.extents(chunk.offset(), length).any(|extent| matches!(extent.source, Source::Base(_))) {
            self.fetch(chunk);
        }
    }

    fn fetch(&mut self, chunk: ChunkIndex) {
        if let Entry::Vacant(entry) = self.fetches.entry(chunk) {
            entry.insert(Vec::new());
            self.actions.push(Action::Fetch(chunk));
        }
    }

    fn fetch_in_background(&mut self) {
        while self.fetches.len() < BACKGROUND_FETCHES_MAX {
            let Some(chunk) = self.prefetch.pop_front() else { return };
            if chunk.0 < self.store.geometry().chunk_count() {
                self.fetch_if_missing(chunk);
            }
        }
    }

    fn retry(&mut self, chunk: ChunkIndex) {
        self.filling.remove(&chunk);
        for request in self.fetches.remove(&chunk).unwrap_or_default() {
            self.submit(request);
        }
    }

    fn fail_waiting(&mut self, chunk: ChunkIndex, errno: Errno, why: &str) {
        self.filling.remove(&chunk);
        for request in self.fetches.remove(&chunk).unwrap_or_default() {
            self.fail(request.id, errno, why.to_owned());
        }
    }

    fn join_flush(&mut self, id: RequestId) {
        self.joining.push(id);
        self.begin_flush();
    }

    fn begin_flush(&mut self) {
        if matches!(self.flush, FlushState::Idle) && self.broken.is_none() {
            let flush = self.store.begin_flush();
            self.actions.push(Action::Sync(flush.clone()));
            self.flush = FlushState::Data(flush, std::mem::take(&mut self.joining));
        }
    }

    fn break_off(&mut self, why: String, ids: Vec<RequestId>) {
        let joining = std::mem::take(&mut self.joining);
        for id in ids.into_iter().chain(joining) {
            self.fail(id, Errno::Io, why.clone());
        }
        for fill in std::mem::take(&mut self.unkept) {
            self.fail_waiting(fill.chunk(), Errno::Io, &why);
        }
        self.broken = Some(why);
        for request in std::mem::take(&mut self.stalled) {
            self.submit(request);
        }
    }

    /// A flush that found no space for its record: whoever waits for it may ask again when there is some.
    fn fail_for_want_of_space(&mut self, ids: Vec<RequestId>, why: &str) {
        let joining = std::mem::take(&mut self.joining);
        let stalled = std::mem::take(&mut self.stalled).into_iter().map(|request| request.id);
        for id in ids.into_iter().chain(joining).chain(stalled) {
            self.fail(id, Errno::NoSpace, why.to_owned());
        }
        for fill in std::mem::take(&mut self.unkept) {
            self.fail_waiting(fill.chunk(), Errno::NoSpace, why);
        }
    }

    fn reply(&mut self, id: RequestId, reply: Reply) {
        self.actions.push(Action::Reply(id, reply));
    }

    fn fail(&mut self, id: RequestId, errno: Errno, why: String) {
        self.reply(id, Reply::Failed(errno, why));
    }
}

/// The chunks that must be fetched, in order.
fn missing(extents: &[Extent]) -> impl Iterator<Item = ChunkIndex> {
    extents.iter().filter_map(|extent| match extent.source {
        Source::Base(chunk) => Some(chunk),
        Source::File | Source::Zero => None,
    })
}

/// The protocol tells writes beyond the end from other nonsense ("Error values").
fn beyond_the_end(work: &Work) -> Errno {
    if matches!(work, Work::Write { .. } | Work::Zero { .. }) { Errno::NoSpace } else { Errno::Invalid }
}

fn errno(error: &StoreError) -> Errno {
    match error {
        StoreError::Range { .. } => Errno::Invalid,
        _ if error.is_full() => Errno::NoSpace,
        _ => Errno::Io,
    }
}

/// An error with its causes, on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}
