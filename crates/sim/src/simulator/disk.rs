//! A machine's directory on a disk that forgets what wasn't synced.
//!
//! A process sees what was written last. A crash of the host keeps of each file what was synced, or tears it: empty, a
//! part, zeros, or after all what was written; and of the names any that they had since the directory was last synced,
//! each name for itself or all up to one moment, as a journal does. A directory that its parent doesn't know durably
//! may be gone.

use std::{cell::RefCell, collections::BTreeMap, io, rc::Rc};

use fastrand::Rng;
use godwit_migration::handover::store::Storage;

/// What stops the operations on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Whoever does them is dead; nothing of them happens.
    Dead,
    /// There is no room: what takes some fails, a file that is being written after a part of it.
    Full,
}

/// The directory. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Disk(Rc<RefCell<State>>);

#[derive(Debug)]
struct State {
    files: Vec<File>,
    names: Names,
    synced_names: Names,
    /// What the names have been since the directory was last synced, oldest first.
    history: Vec<Names>,
    parent_is_synced: bool,
    /// Operations until something stops them.
    stop: Option<(u32, Stop)>,
    changes: u64,
    random: Rng,
}

type Names = BTreeMap<String, usize>;

#[derive(Debug, Clone, Default)]
struct File {
    content: Vec<u8>,
    synced: Vec<u8>,
}

impl Disk {
    /// A new and empty directory, of which its parent knows nothing durably.
    pub fn new(random: Rng) -> Self {
        Self(Rc::new(RefCell::new(State {
            files: Vec::new(),
            names: Names::new(),
            synced_names: Names::new(),
            history: Vec::new(),
            parent_is_synced: false,
            stop: None,
            changes: 0,
            random,
        })))
    }

    /// Lets so many operations happen, and then stops them.
    pub fn stop_after(&self, operations: u32, stop: Stop) {
        self.0.borrow_mut().stop = Some((operations, stop));
    }

    /// Whether operations are being stopped.
    pub fn is_stopped(&self) -> bool {
        matches!(self.0.borrow().stop, Some((0, _)))
    }

    /// Nothing stops them any more.
    pub fn go_on(&self) {
        self.0.borrow_mut().stop = None;
    }

    /// Counts everything that has changed what a process sees.
    pub fn changes(&self) -> u64 {
        self.0.borrow().changes
    }

    /// The host dies: what wasn't synced may be lost.
    pub fn crash(&self) {
        let state = &mut *self.0.borrow_mut();
        state.stop = None;
        state.changes += 1;
        state.names = state.surviving_names();
        let State { files, names, random, .. } = state;
        for inode in names.values() {
            let file = &mut files[*inode];
            file.content = torn(file, random);
            file.synced.clone_from(&file.content);
        }
        state.synced_names.clone_from(&state.names);
        state.history.clear();
    }
}

impl State {
    fn surviving_names(&mut self) -> Names {
        if !self.parent_is_synced && self.random.bool() {
            return Names::new();
        }
        let moments: Vec<&Names> = std::iter::once(&self.synced_names).chain(&self.history).collect();
        if self.random.bool() {
            return moments[self.random.usize(..moments.len())].clone();
        }
        let mut all: Vec<&String> = moments.iter().flat_map(|names| names.keys()).collect();
        all.sort();
        all.dedup();
        let mut survivors = Names::new();
        for name in all {
            if let Some(inode) = moments[self.random.usize(..moments.len())].get(name) {
                survivors.insert(name.clone(), *inode);
            }
        }
        survivors
    }

    /// Counts an operation; fails if it is stopped. A full disk lets those pass that take no room.
    fn operate(&mut self, takes_room: bool) -> io::Result<()> {
        match &mut self.stop {
            Some((0, Stop::Full)) if !takes_room => Ok(()),
            Some((0, Stop::Full)) => Err(io::ErrorKind::StorageFull.into()),
            Some((0, Stop::Dead)) => Err(io::Error::other("whoever did this is dead")),
            Some((operations, _)) => {
                *operations -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn change_names(&mut self, change: impl FnOnce(&mut Names)) {
        change(&mut self.names);
        self.history.push(self.names.clone());
        self.changes += 1;
    }

    fn inode(&self, name: &str) -> io::Result<usize> {
        self.names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// What a crash makes of a file.
fn torn(file: &File, random: &mut Rng) -> Vec<u8> {
    if file.content == file.synced {
        return file.synced.clone();
    }
    match random.u8(..5) {
        0 => file.synced.clone(),
        1 => Vec::new(),
        2 => file.content[..random.usize(..file.content.len().max(1))].to_vec(),
        3 => vec![0; file.content.len()],
        _ => file.content.clone(),
    }
}

impl Storage for Disk {
    fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let state = self.0.borrow();
        let content = state.names.get(name).map(|inode| &state.files[*inode].content);
        Ok(content.map(|content| content[..content.len().min(limit)].to_vec()))
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        let begun = state.operate(true);
        if matches!(state.stop, Some((0, Stop::Dead))) && begun.is_err() {
            return begun;
        }
        let inode = state.names.get(name).copied().unwrap_or(state.files.len());
        if inode == state.files.len() {
            state.files.push(File::default());
            state.change_names(|names| {
                names.insert(name.to_owned(), inode);
            });
        }
        let part = if begun.is_ok() { content.len() } else { state.random.usize(..content.len().max(1)) };
        state.files[inode].content = content[..part].to_vec();
        state.changes += 1;
        begun
    }

    fn sync_file(&self, name: &str) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.operate(true)?;
        let inode = state.inode(name)?;
        let file = &mut state.files[inode];
        file.synced.clone_from(&file.content);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.operate(true)?;
        let inode = state.inode(from)?;
        state.change_names(|names| {
            names.remove(from);
            names.insert(to.to_owned(), inode);
        });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.operate(false)?;
        state.change_names(|names| {
            names.remove(name);
        });
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.operate(false)?;
        state.synced_names.clone_from(&state.names);
        state.history.clear();
        Ok(())
    }

    fn sync_parent(&self) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        state.operate(false)?;
        state.parent_is_synced = true;
        Ok(())
    }
}
