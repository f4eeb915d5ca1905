//! Storage that lives in memory and can crash: the process alone, or the whole host, at any operation.
//!
//! After a host's crash each sector has any of the contents that it had since its file was last synced, each name means
//! any of the files that it meant since the names were, and each file has any of the lengths that it had. That is more
//! than file systems do to their users.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    rc::Rc,
};

use fastrand::Rng;

use crate::storage::{Storage, StorageFile};

const SECTOR: usize = 512;

/// What stops at an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It and all that follow fail: whoever runs the store is dead. A write is done in part.
    Dies,
    /// It fails for want of space, and the next works again.
    Full,
}

#[derive(Debug, Default)]
struct Content {
    now: Vec<u8>,
    synced_length: usize,
    /// Sectors with what they had at the last sync and since, oldest first.
    since: BTreeMap<usize, Vec<Vec<u8>>>,
}

#[derive(Debug, Default)]
struct World {
    names: BTreeMap<String, usize>,
    /// Names with what they meant at the last sync and since.
    names_since: BTreeMap<String, Vec<Option<usize>>>,
    contents: Vec<Content>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    dead: bool,
    rng: Rng,
}

/// A directory in memory. Clones are the same directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct CrashStorage(Rc<RefCell<World>>);

/// A file in it.
#[derive(Clone, Debug)]
pub(crate) struct CrashFile {
    world: Rc<RefCell<World>>,
    id: usize,
}

impl CrashStorage {
    pub(crate) fn new(seed: u64) -> Self {
        let storage = Self::default();
        storage.0.borrow_mut().rng = Rng::with_seed(seed);
        storage
    }

    /// How many operations there were.
    pub(crate) fn operations(&self) -> u64 {
        self.0.borrow().operations
    }

    /// Has operation number `at` meet a fault.
    pub(crate) fn fault_at(&self, at: u64, fault: Fault) {
        self.0.borrow_mut().fault = Some((at, fault));
    }

    /// Whether the fault came and was a death.
    pub(crate) fn is_dead(&self) -> bool {
        self.0.borrow().dead
    }

    /// The process is dead, and another comes: everything is as it was left.
    pub(crate) fn restart(&self) {
        let mut world = self.0.borrow_mut();
        (world.dead, world.fault) = (false, None);
    }

    /// The host is dead, and comes back.
    pub(crate) fn crash_host(&self) {
        let world = &mut *self.0.borrow_mut();
        for content in &mut world.contents {
            content.crash(&mut world.rng);
        }
        for (name, meant) in std::mem::take(&mut world.names_since) {
            match meant[world.rng.usize(..meant.len())] {
                Some(id) => world.names.insert(name, id),
                None => world.names.remove(&name),
            };
        }
        (world.dead, world.fault) = (false, None);
    }

    /// Changes a bit of a file, for good.
    pub(crate) fn rot(&self, name: &str, byte: usize) {
        let mut world = self.0.borrow_mut();
        let id = world.names[name];
        world.contents[id].now[byte] ^= 1;
    }

    /// The names of its files.
    pub(crate) fn all_names(&self) -> BTreeSet<String> {
        self.0.borrow().names.keys().cloned().collect()
    }
}

impl Content {
    fn keep_version(&mut self, sector: usize) {
        let versions = self.since.entry(sector).or_default();
        let start = sector * SECTOR;
        let end = (start + SECTOR).min(self.now.len()).max(start.min(self.now.len()));
        let mut version = self.now[start.min(end)..end].to_vec();
        version.resize(SECTOR, 0);
        versions.push(version);
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        let sectors = offset / SECTOR..end.div_ceil(SECTOR);
        for sector in sectors.clone() {
            if !self.since.contains_key(&sector) {
                self.keep_version(sector);
            }
        }
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.now[offset..end].copy_from_slice(bytes);
        sectors.for_each(|sector| self.keep_version(sector));
    }

    fn crash(&mut self, rng: &mut Rng) {
        let length = if rng.bool() { self.synced_length } else { self.now.len() };
        let longest = self.now.len().max(self.synced_length);
        self.now.resize(longest, 0);
        for (sector, versions) in std::mem::take(&mut self.since) {
            let version = &versions[rng.usize(..versions.len())];
            let start = sector * SECTOR;
            let end = (start + SECTOR).min(longest);
            if start < end {
                self.now[start..end].copy_from_slice(&version[..end - start]);
            }
        }
        self.now.truncate(length);
        self.synced_length = length;
    }
}

impl World {
    /// Whether an operation may be done: wholly, or in part and then fail.
    fn operate(&mut self) -> io::Result<bool> {
        if self.dead {
            return Err(io::Error::other("the process is dead"));
        }
        self.operations += 1;
        match self.fault {
            Some((at, Fault::Dies)) if at == self.operations => {
                self.dead = true;
                Ok(false)
            }
            Some((at, Fault::Full)) if at == self.operations => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(true),
        }
    }

    fn operate_wholly(&mut self) -> io::Result<()> {
        if self.operate()? { Ok(()) } else { Err(io::Error::other("the process died")) }
    }

    fn rename(&mut self, name: &str, to: Option<usize>) {
        let before = self.names.get(name).copied();
        self.names_since.entry(name.to_owned()).or_insert_with(|| vec![before]).push(to);
        match to {
            Some(id) => self.names.insert(name.to_owned(), id),
            None => self.names.remove(name),
        };
    }
}

impl Storage for CrashStorage {
    type File = CrashFile;

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.0.borrow().names.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<CrashFile> {
        let id = self.0.borrow().names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(CrashFile { world: Rc::clone(&self.0), id })
    }

    fn create(&self, name: &str) -> io::Result<CrashFile> {
        let world = &mut *self.0.borrow_mut();
        world.operate_wholly()?;
        world.contents.push(Content::default());
        let id = world.contents.len() - 1;
        world.rename(name, Some(id));
        Ok(CrashFile { world: Rc::clone(&self.0), id })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let world = &mut *self.0.borrow_mut();
        world.operate_wholly()?;
        world.rename(name, None);
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let world = &mut *self.0.borrow_mut();
        world.operate_wholly()?;
        world.names_since.clear();
        Ok(())
    }
}

impl StorageFile for CrashFile {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let world = self.world.borrow();
        let offset = offset as usize;
        let content = world.contents[self.id].now.get(offset..offset + bytes.len());
        bytes.copy_from_slice(content.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        let whole = world.operate()?;
        let length = if whole { bytes.len() } else { world.rng.usize(..=bytes.len() / SECTOR) * SECTOR };
        world.contents[self.id].write(offset as usize, &bytes[..length]);
        if whole { Ok(()) } else { Err(io::Error::other("the process died")) }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        world.operate_wholly()?;
        world.contents[self.id].write(offset as usize, &vec![0; length as usize]);
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.world.borrow().contents[self.id].now.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        world.operate_wholly()?;
        world.contents[self.id].now.resize(length as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        world.operate_wholly()?;
        let content = &mut world.contents[self.id];
        content.since.clear();
        content.synced_length = content.now.len();
        Ok(())
    }
}
