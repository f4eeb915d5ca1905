//! A disk's NBD server: clients on a unix socket, one desk. All of it in one thread; what may take long, in others.
//!
//! ```text
//!   client ──socket──► input ──► Handshake, RequestHeader ──► Desk ──► actions
//!      ▲                                                               │
//!      └─────────────── output ◄──────────── replies ◄─────────────────┤
//!                                     other threads: sync, slow reads ◄┤
//!                                                      base: fetches ◄─┘
//! ```
//!
//! A client that breaks the protocol, or goes, leaves nothing but what it was told is done.

mod client;
mod outbox;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    rc::Rc,
};

use bytes::Bytes;
use tokio::{
    net::UnixListener,
    task::{spawn_blocking, spawn_local},
};

use self::{client::Client, outbox::Outbox};
use crate::{
    desk::{Action, Desk, FetchFailure, Reply, RequestId},
    directory::{Directory, HostFile},
    geometry::ChunkIndex,
    nbd::{Errno, Export},
    storage::StorageFile,
    store::{Extent, Source},
};

/// Where the chunks of a disk's base come from.
pub trait Base: 'static {
    /// Fetches a chunk and verifies it. Waits for a repository that is away; what comes back as a failure is final.
    fn fetch(&self, chunk: ChunkIndex) -> impl Future<Output = Result<Bytes, FetchFailure>>;

    /// Whether what is only read is read there each time ([`Base::read`]), since it is as near as the disk's own file;
    /// otherwise the disk keeps what it fetches.
    fn is_near(&self) -> bool {
        false
    }

    /// Reads a part of a base that is near.
    fn read(&self, _offset: u64, _length: usize) -> impl Future<Output = io::Result<Bytes>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}

/// The base of disks that began as nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoBase;

impl Base for NoBase {
    async fn fetch(&self, chunk: ChunkIndex) -> Result<Bytes, FetchFailure> {
        Err(FetchFailure(format!("chunk {} is to come from a base, and the disk has none", chunk.0)))
    }
}

/// A disk that is served.
#[derive(Debug)]
pub struct Served<B> {
    desk: RefCell<Desk<Directory>>,
    storage: Directory,
    data: HostFile,
    base: B,
    clients: RefCell<HashMap<u64, Rc<Client>>>,
    next_client: Cell<u64>,
}

impl<B: Base> Served<B> {
    /// A disk with its base. It is served in a [`tokio::task::LocalSet`].
    pub fn new(mut desk: Desk<Directory>, storage: Directory, base: B) -> Rc<Self> {
        desk.read_base_in_place(base.is_near());
        let data = desk.store().data().clone();
        Rc::new(Self {
            desk: RefCell::new(desk),
            storage,
            data,
            base,
            clients: RefCell::default(),
            next_client: Cell::new(0),
        })
    }

    /// Does something at the desk, and what follows from it.
    pub fn at_desk<T>(self: &Rc<Self>, work: impl FnOnce(&mut Desk<Directory>) -> T) -> T {
        let (done, actions) = {
            let mut desk = self.desk.borrow_mut();
            (work(&mut desk), desk.take_actions())
        };
        for action in actions {
            self.apply(action);
        }
        done
    }

    /// Serves every client that comes, for ever.
    ///
    /// # Errors
    /// If no more clients can be accepted.
    pub async fn serve(self: &Rc<Self>, listener: UnixListener, export: Export) -> io::Result<()> {
        loop {
            let (socket, _) = listener.accept().await?;
            let number = self.next_client.get();
            self.next_client.set(number + 1);
            let (served, export) = (Rc::clone(self), export.clone());
            spawn_local(async move {
                if let Err(error) = client::attend(&served, number, socket, export).await {
                    tracing::warn!(client = number, %error, "let go");
                }
                served.clients.borrow_mut().remove(&number);
                served.at_desk(|desk| desk.leave(number));
            });
        }
    }

    fn apply(self: &Rc<Self>, action: Action<HostFile>) {
        let served = Rc::clone(self);
        match action {
            Action::Reply(id, reply) => self.answer(id, reply),
            Action::Fetch(chunk) => {
                spawn_local(async move {
                    let content = served.base.fetch(chunk).await;
                    served.at_desk(|desk| desk.fetched(chunk, content));
                });
            }
            Action::Fill(fill) => {
                let written = fill.clone();
                spawn_local(async move {
                    let written = elsewhere(move || written.write()).await;
                    served.at_desk(|desk| desk.filled(fill, written));
                });
            }
            Action::Sync(flush) => {
                spawn_local(async move {
                    let result = elsewhere(move || flush.sync()).await;
                    served.at_desk(|desk| desk.data_synced(result));
                });
            }
            Action::SyncJournal(sync) => {
                let storage = self.storage.clone();
                spawn_local(async move {
                    let result = elsewhere(move || sync.run(&storage)).await;
                    served.at_desk(|desk| desk.journal_synced(result));
                });
            }
        }
    }

    fn answer(self: &Rc<Self>, id: RequestId, reply: Reply) {
        let Some(client) = self.clients.borrow().get(&id.client).cloned() else { return };
        match reply {
            Reply::Read(extents) => self.answer_read(&client, id.cookie, extents),
            Reply::Done => client.answer(|replies, out| replies.done(id.cookie, out)),
            Reply::Status(extents) => {
                client.answer(|replies, out| replies.allocation(id.cookie, &extents, out))
            }
            Reply::Failed(errno, why) => {
                client.answer(|replies, out| replies.error(id.cookie, errno, &why, out))
            }
        }
    }

    /// Reads at once what the host has in its memory, and the rest in another thread.
    fn answer_read(self: &Rc<Self>, client: &Rc<Client>, cookie: u64, extents: Vec<Extent>) {
        let offset = extents.first().map_or(0, |extent| extent.offset);
        let length: u64 = extents.iter().map(|extent| extent.length).sum();
        if extents.is_empty() {
            return client.answer(|replies, out| replies.done(cookie, out));
        }
        if extents.iter().all(|extent| extent.source == Source::Zero) {
            return client.answer(|replies, out| replies.zeros(cookie, offset, length as u32, out));
        }
        if extents.iter().any(|extent| matches!(extent.source, Source::Base(_))) {
            return self.answer_read_later(client, cookie, extents, length as usize);
        }
        let at_once = client.answer_with(cookie, offset, length as usize, |bytes| {
            read_extents(&extents, bytes, |at, part| self.data.read_at_once(at, part))
        });
        match at_once {
            Ok(true) => {}
            Ok(false) => self.answer_read_later(client, cookie, extents, length as usize),
            Err(error) => client.fail(cookie, Errno::Io, &error),
        }
    }

    /// Reads what is in a base that is near, or not in the host's memory.
    fn answer_read_later(
        self: &Rc<Self>,
        client: &Rc<Client>,
        cookie: u64,
        extents: Vec<Extent>,
        length: usize,
    ) {
        let (served, client) = (Rc::clone(self), Rc::clone(client));
        let offset = extents.first().map_or(0, |extent| extent.offset);
        spawn_local(async move {
            let mut bytes = Vec::with_capacity(length);
            for extent in extents {
                match served.read_extent(extent).await {
                    Ok(part) => bytes.extend_from_slice(&part),
                    Err(error) => return client.fail(cookie, Errno::Io, &error),
                }
            }
            client.answer(|replies, out| {
                replies.data_header(cookie, offset, length as u32, out);
                out.extend_from_slice(&bytes);
            });
        });
    }

    async fn read_extent(&self, extent: Extent) -> io::Result<Bytes> {
        let length = extent.length as usize;
        match extent.source {
            Source::Base(_) => self.base.read(extent.offset, length).await,
            Source::Zero => Ok(vec![0; length].into()),
            Source::File => {
                let data = self.data.clone();
                elsewhere(move || {
                    let mut bytes = vec![0; length];
                    data.read_at(extent.offset, &mut bytes)?;
                    Ok(bytes.into())
                })
                .await
            }
        }
    }
}

/// Fills `bytes` with the extents that make them up; whether all could be read.
fn read_extents(
    extents: &[Extent],
    mut bytes: &mut [u8],
    read: impl Fn(u64, &mut [u8]) -> io::Result<bool>,
) -> io::Result<bool> {
    for extent in extents {
        let (part, rest) = bytes.split_at_mut(extent.length as usize);
        bytes = rest;
        if extent.source == Source::Zero {
            part.fill(0);
        } else if !read(extent.offset, part)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Does something that may take long in another thread.
async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
}
