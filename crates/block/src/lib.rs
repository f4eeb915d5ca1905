//! Disks of machines: what a host keeps of them, where the rest comes from, and how QEMU gets at them.
//!
//! A disk begins as an image in a repository, or as nothing. Its host keeps what was written, and what was fetched of
//! the image so far: the content in its place in one sparse file, and a journalled map of which block is where
//! ([`Store`]). `docs/disk-format.md` draws the files and says what survives what.

mod adopted;
mod base;
mod desk;
mod directory;
pub mod disk;
mod fetch;
mod geometry;
mod image_file;
mod map;
mod mapfile;
pub mod nbd;
mod record;
pub mod repository;
mod serve;
mod storage;
mod store;
mod whole;

pub use adopted::{AdoptError, Adopted, AdoptedFile};
pub use base::BaseOutline;
pub use desk::{Action, Control, Desk, FetchFailure, Reply, Request, RequestId, Work};
pub use directory::{Directory, HostFile};
pub use disk::{Disk, DiskBase, DiskError, Origin};
pub use fetch::ImageBase;
pub use geometry::{
    BLOCK_BYTES, Blocks, CHUNK_BLOCKS, CHUNK_BYTES, ChunkIndex, DISK_BYTES_MAX, Geometry, Piece,
    SECTOR_BYTES, SizeError,
};
pub use image_file::{ImageFile, ImageFileError, ImageFormat};
pub use map::{ChunkState, Map, Place, Tally};
pub use mapfile::{BaseId, DiskId, FORMAT_VERSION, Identity, MapError};
pub use record::Boot;
pub use serve::{Base, NoBase, Served};
pub use storage::{Storage, StorageFile};
pub use store::{
    CreateError, Ending, Extent, Extents, Fill, Flush, JournalSync, OpenError, Opening, Outcome, Source,
    Store, StoreError, look,
};
pub use whole::{Checked, WholeError};
