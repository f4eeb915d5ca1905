//! A file of records of one size to which the workers of several migrations add, each a process of its own.
//!
//! ```text
//!    0      8  "godwit/p"
//!    8     16  generation: the id of the migration whose worker made the file
//!   24      8  bytes in a record
//!   32  4,064  zero
//! 4096         records, numbered from 0, never changed
//! ```
//!
//! Nobody takes a lock, so that a worker that was stopped or killed holds nobody up: a file appears whole, by a link to
//! one that was written beside it; records are added by single writes in append mode, which the kernel puts one after
//! the other. A record's size divides a page, so that a writer killed in the middle leaves whole records, which nobody
//! was told of. Whoever removes the file takes nothing from those who have it open; the next to open makes a new one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::sys::statvfs::fstatvfs;

/// What the file begins with.
const MAGIC: [u8; 8] = *b"godwit/p";
/// Records begin here.
const HEADER_BYTES: u64 = 4096;
/// Nothing is added while the file system has less room than this: tokens and logs lie there too.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// How often a file that isn't the wanted one is replaced; another worker may replace it at the same time.
const TRIES_MAX: usize = 4;

/// Names a file's life.
pub(super) type Generation = [u8; 16];

/// What may be done with a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// A divisor of 4,096.
    pub(super) record_bytes: u64,
    /// Nothing is added beyond this many.
    pub(super) records_max: u64,
}

/// A file that several workers have open.
#[derive(Debug)]
pub(super) struct SharedFile {
    file: File,
    path: PathBuf,
    generation: Generation,
    shape: Shape,
}

impl SharedFile {
    /// Opens the file at `path`, or makes it: `own` is this migration's id. Where another generation than `wanted` lies
    /// there, or something else, it is replaced.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn open(
        path: &Path,
        shape: Shape,
        own: Generation,
        wanted: Option<Generation>,
    ) -> io::Result<Self> {
        for _ in 0..TRIES_MAX {
            make(path, shape, own, wanted.unwrap_or(own))?;
            let file = match OpenOptions::new().read(true).append(true).open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            match read_header(&file, shape) {
                Ok(generation) if wanted.is_none_or(|wanted| wanted == generation) => {
                    // Its age says how long nobody has begun to use it.
                    file.set_modified(SystemTime::now())?;
                    return Ok(Self { file, path: path.to_owned(), generation, shape });
                }
                _ => remove(path)?,
            }
        }
        Err(io::Error::other("it is replaced again and again"))
    }

    /// Which life of the file this is.
    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    /// Adds whole records; the number of the first, or `None` where there is no room.
    ///
    /// # Errors
    /// What the file system says; nothing was added that anybody knows of.
    pub(super) fn append(&mut self, records: &[u8]) -> io::Result<Option<u64>> {
        let Shape { record_bytes, records_max } = self.shape;
        let added = records.len() as u64 / record_bytes;
        if self.count()? + added > records_max || self.free_bytes()? < FREE_BYTES_MIN {
            return Ok(None);
        }
        // Another write may have come in between: where this one went is known only afterwards.
        if self.file.write(records)? < records.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let end = self.file.stream_position()?;
        let first = end.checked_sub(HEADER_BYTES + records.len() as u64);
        match first.filter(|first| first.is_multiple_of(record_bytes)) {
            Some(first) => Ok(Some(first / record_bytes)),
            None => Err(io::Error::other("a record was cut")),
        }
    }

    /// Fills `records` from the record `first` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where there aren't so many, and what the file system says.
    pub(super) fn read(&self, first: u64, records: &mut [u8]) -> io::Result<()> {
        let offset = first.checked_mul(self.shape.record_bytes).and_then(|it| it.checked_add(HEADER_BYTES));
        self.file.read_exact_at(records, offset.ok_or(io::ErrorKind::UnexpectedEof)?)
    }

    /// How many records there are.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn count(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().saturating_sub(HEADER_BYTES) / self.shape.record_bytes)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let room = fstatvfs(&self.file)?;
        Ok(room.blocks_available() * room.fragment_size())
    }

    /// Leaves nothing at its path, so that whoever comes next begins with an empty one.
    pub(super) fn give_up(&self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "not removed");
        }
    }
}

/// Makes an empty file of this generation, unless there is some file already.
fn make(path: &Path, shape: Shape, own: Generation, generation: Generation) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&MAGIC);
    header[8..24].copy_from_slice(&generation);
    header[24..32].copy_from_slice(&shape.record_bytes.to_le_bytes());
    // The migration's own name: no other worker writes there.
    let scratch = path.with_extension(String::from_utf8_lossy(&own).as_ref());
    let mut options = OpenOptions::new();
    let written = options
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&scratch)
        .and_then(|mut file| file.write_all(&header))
        .and_then(|()| fs::hard_link(&scratch, path));
    let _ = fs::remove_file(&scratch);
    match written {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn read_header(file: &File, shape: Shape) -> io::Result<Generation> {
    let mut header = [0; 32];
    file.read_exact_at(&mut header, 0)?;
    let (magic, rest) = header.split_at(8);
    let (generation, record_bytes) = rest.split_at(16);
    if magic != MAGIC || record_bytes != shape.record_bytes.to_le_bytes() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(generation.try_into().expect("16 bytes were split off"))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, thread};

    use super::*;

    const SHAPE: Shape = Shape { record_bytes: 64, records_max: 1 << 20 };
    const ONE: Generation = *b"1111111111111111";
    const OTHER: Generation = *b"2222222222222222";

    fn open(path: &Path, own: Generation, wanted: Option<Generation>) -> SharedFile {
        SharedFile::open(path, SHAPE, own, wanted).unwrap()
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("from-hosta.pages");
        (directory, path)
    }

    #[test]
    fn who_comes_second_finds_what_the_first_has_added() {
        let (directory, path) = scratch();
        let mut first = open(&path, ONE, None);
        assert_eq!(first.append(&[[7; 64], [8; 64]].concat()).unwrap(), Some(0));
        let mut second = open(&path, OTHER, None);
        assert_eq!(second.generation(), ONE);
        assert_eq!(second.append(&[9; 64]).unwrap(), Some(2));
        let mut records = [0; 128];
        first.read(1, &mut records).unwrap();
        assert_eq!(records, [[8; 64], [9; 64]].concat()[..]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing lies beside it");
    }

    #[test]
    fn another_generation_or_rubbish_is_replaced_and_taken_from_nobody() {
        let (_directory, path) = scratch();
        let mut old = open(&path, ONE, None);
        old.append(&[7; 64]).unwrap();
        let new = open(&path, OTHER, Some(OTHER));
        assert_eq!((new.generation(), new.count().unwrap()), (OTHER, 0));
        old.read(0, &mut [0; 64]).unwrap();
        fs::write(&path, "godwit/p").unwrap();
        assert_eq!(open(&path, ONE, Some(OTHER)).generation(), OTHER);
    }

    #[test]
    fn what_is_given_up_is_not_found_again() {
        let (_directory, path) = scratch();
        let mut given_up = open(&path, ONE, None);
        given_up.append(&[7; 64]).unwrap();
        given_up.give_up();
        assert_eq!(open(&path, OTHER, None).count().unwrap(), 0);
    }

    #[test]
    fn there_is_room_for_so_many_and_nothing_past_the_end() {
        let (_directory, path) = scratch();
        let mut file = SharedFile::open(&path, Shape { records_max: 2, ..SHAPE }, ONE, None).unwrap();
        assert_eq!(file.append(&[0; 192]).unwrap(), None);
        assert_eq!(file.append(&[0; 128]).unwrap(), Some(0));
        assert_eq!(file.append(&[0; 64]).unwrap(), None);
        for beyond in [2, u64::MAX / 64, u64::MAX] {
            let error = file.read(beyond, &mut [0; 64]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{beyond}");
        }
    }

    #[test]
    fn many_who_add_at_once_get_numbers_of_their_own() {
        let (_directory, path) = scratch();
        let add = |worker: u8| {
            let mut file = open(&path, [b'a' + worker; 16], None);
            let mut numbers = Vec::new();
            for round in 0..5_000_u64 {
                let content = [[worker; 64], [round as u8; 64]].concat();
                let first = file.append(&content).unwrap().unwrap();
                let mut found = [0; 128];
                file.read(first, &mut found).unwrap();
                assert_eq!(found, content[..]);
                numbers.push(first);
            }
            numbers
        };
        let numbers: Vec<u64> = thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|worker| scope.spawn(move || add(worker))).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(numbers.iter().collect::<BTreeSet<_>>().len(), 20_000);
    }
}
