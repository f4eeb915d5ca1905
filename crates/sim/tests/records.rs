//! The records' store on a disk that forgets what wasn't synced, and a test of that test: every sync that is left out
//! must be missed.

use std::{collections::BTreeSet, error::Error, io};

use fastrand::Rng;
use godwit_migration::handover::{
    Epoch, Record, RecordState,
    store::{BootId, Durability, RecordStore, Storage, StoreError},
};
use godwit_sim::simulator::disk::{Disk, Stop};

/// A sync that somebody forgot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Forgotten {
    File,
    Directory,
    Parent,
    /// The one that makes good for a record that was only written.
    Behind,
}

/// A disk whose user leaves out one kind of sync.
#[derive(Debug, Clone)]
struct Careless {
    disk: Disk,
    forgotten: Option<Forgotten>,
}

impl Storage for Careless {
    fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        self.disk.read(name, limit)
    }
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.disk.write(name, content)
    }
    fn sync_file(&self, name: &str) -> io::Result<()> {
        if self.forgotten == Some(Forgotten::File) { Ok(()) } else { self.disk.sync_file(name) }
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
    fn sync_directory(&self) -> io::Result<()> {
        if self.forgotten == Some(Forgotten::Directory) { Ok(()) } else { self.disk.sync_directory() }
    }
    fn sync_parent(&self) -> io::Result<()> {
        if self.forgotten == Some(Forgotten::Parent) { Ok(()) } else { self.disk.sync_parent() }
    }
}

/// Records are told apart by their epochs; 0 is none.
struct Check {
    random: Rng,
    disk: Careless,
    store: RecordStore<Careless>,
    boot: u32,
    newest: u64,
    /// What a process must find.
    visible: u64,
    /// What a host may find after a crash.
    survivors: BTreeSet<u64>,
    log: Vec<String>,
}

impl Check {
    fn new(seed: u64, forgotten: Option<Forgotten>) -> Self {
        let mut random = Rng::with_seed(seed);
        let disk = Careless { disk: Disk::new(random.fork()), forgotten };
        let store = RecordStore::new(disk.clone(), Some(BootId("0".into())));
        let survivors = [0].into();
        Self { random, disk, store, boot: 0, newest: 0, visible: 0, survivors, log: Vec::new() }
    }

    fn run(mut self) -> Result<(), String> {
        for _ in 0..20 {
            let step = self.random.u8(..10);
            let held = match step {
                0..4 => self.save(),
                4..6 => self.sync(),
                6 => self.fill_up(),
                7 => self.kill(),
                _ => self.crash(),
            };
            held.map_err(|violation| format!("{violation}; {}", self.log.join(", ")))?;
        }
        Ok(())
    }

    fn next_record(&mut self) -> Record {
        self.newest += 1;
        record(self.newest)
    }

    fn durability(&mut self) -> Durability {
        // No hand-over begins with a record that isn't synced.
        let may_wait = self.visible > 0 && self.random.bool();
        if may_wait { Durability::Written } else { Durability::Synced }
    }

    fn save(&mut self) -> Result<(), String> {
        let (record, durability) = (self.next_record(), self.durability());
        self.log.push(format!("save {} {durability:?}", self.newest));
        self.store.save(&record, durability).map_err(|error| error.to_string())?;
        self.saved(self.newest, durability)
    }

    fn saved(&mut self, epoch: u64, durability: Durability) -> Result<(), String> {
        self.visible = epoch;
        match durability {
            Durability::Written => drop(self.survivors.insert(epoch)),
            Durability::Synced => self.survivors = [epoch].into(),
        }
        self.process_finds_the_newest()
    }

    fn sync(&mut self) -> Result<(), String> {
        self.log.push("sync".into());
        if self.visible > 0 && self.disk.forgotten != Some(Forgotten::Behind) {
            self.store.sync().map_err(|error| error.to_string())?;
        }
        if self.visible > 0 {
            self.survivors = [self.visible].into();
        }
        self.process_finds_the_newest()
    }

    /// A save that finds no room changes nothing and says why.
    fn fill_up(&mut self) -> Result<(), String> {
        let (record, durability) = (self.next_record(), self.durability());
        let operations = self.random.u32(..6);
        self.log.push(format!("save {} {durability:?}, full after {operations}", self.newest));
        self.disk.disk.stop_after(operations, Stop::Full);
        let saved = self.store.save(&record, durability);
        self.disk.disk.go_on();
        match saved {
            Ok(()) => self.saved(self.newest, durability),
            Err(error @ StoreError::Storage { .. }) => {
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                let clear = error.to_string().contains("token") && cause.contains("storage");
                if !clear {
                    return Err(format!("{error}: {cause} says nothing"));
                }
                self.process_finds_the_newest()
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// The process dies in the middle of a save; the next one goes on from what it finds, as every process has to.
    fn kill(&mut self) -> Result<(), String> {
        let (record, durability) = (self.next_record(), self.durability());
        let operations = self.random.u32(..9);
        self.log.push(format!("save {} {durability:?}, killed after {operations}", self.newest));
        self.disk.disk.stop_after(operations, Stop::Dead);
        let saved = self.store.save(&record, durability);
        self.disk.disk.go_on();
        if saved.is_ok() {
            return self.saved(self.newest, durability);
        }
        self.survivors.insert(self.newest);
        let found = self.find(false)?;
        if found != self.visible && found != self.newest {
            return Err(format!("a killed process left {found}"));
        }
        self.visible = found;
        self.sync()
    }

    /// The host dies, perhaps in the middle of a save.
    fn crash(&mut self) -> Result<(), String> {
        if self.random.bool() {
            let (record, durability) = (self.next_record(), self.durability());
            let operations = self.random.u32(..9);
            self.log.push(format!("save {} {durability:?} until after {operations}", self.newest));
            self.disk.disk.stop_after(operations, Stop::Dead);
            match self.store.save(&record, durability) {
                Ok(()) => self.saved(self.newest, durability)?,
                Err(_) => drop(self.survivors.insert(self.newest)),
            }
        }
        self.log.push("crash".into());
        self.disk.disk.crash();
        self.boot += 1;
        self.store = RecordStore::new(self.disk.clone(), Some(BootId(self.boot.to_string())));
        let found = self.find(true)?;
        if !self.survivors.contains(&found) {
            return Err(format!("after a crash {found} was found, not one of {:?}", self.survivors));
        }
        self.visible = found;
        self.survivors = [found].into();
        self.sync()
    }

    fn process_finds_the_newest(&self) -> Result<(), String> {
        let found = self.store.find().map_err(|error| error.to_string())?;
        let found = found.map_or(0, |found| found.record.epoch.0);
        if found == self.visible { Ok(()) } else { Err(format!("found {found} instead of {}", self.visible)) }
    }

    fn find(&self, rebooted: bool) -> Result<u64, String> {
        let found = self.store.find().map_err(|error| error.to_string())?;
        match found {
            Some(found) if rebooted && !found.rebooted => Err("the boot went unnoticed".into()),
            found => Ok(found.map_or(0, |found| found.record.epoch.0)),
        }
    }
}

fn record(epoch: u64) -> Record {
    Record { epoch: Epoch(epoch), state: RecordState::Awaited { peer: "hosta".into() } }
}

#[test]
fn what_was_synced_survives_every_crash() {
    for seed in 0..20_000 {
        if let Err(violation) = Check::new(seed, None).run() {
            panic!("seed {seed}: {violation}");
        }
    }
}

#[test]
fn every_sync_that_is_left_out_is_missed() {
    for forgotten in [Forgotten::File, Forgotten::Directory, Forgotten::Parent, Forgotten::Behind] {
        let missed =
            (0..20_000).find_map(|seed| Some((seed, Check::new(seed, Some(forgotten)).run().err()?)));
        let (seed, violation) = missed.unwrap_or_else(|| panic!("nobody misses {forgotten:?}"));
        println!("{forgotten:?}: seed {seed}: {violation}");
    }
}
