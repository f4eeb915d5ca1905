//! The target: rebuilds blocks from batches.
//!
//! ```text
//!   parse ──► check ids ──► read what is referenced ──► rebuild ──► compare digests ──► write ──► give out what is kept
//!     └───────────┴────────────────────┴─────────────────┴───────────────┘                │
//!              an error here leaves memory and decoder as they were       an error here leaves memory
//!                                                                         unknown, the decoder as it was
//! ```

use crate::batch::{CONTENT_LIMIT_BYTES, CONTROL_LIMIT_BYTES, Columns, Form, Header, ShapeError};
use crate::compress::{Decompressor, OpenError};
use crate::digest::{Chain, Link, digests};
use crate::rebuild::{Rebuild, Sources};
use crate::shared::{NoSharedPages, SharedPageError, SharedPages};
use crate::{BLOCK_BYTES, Block, BlockId, Memory, MemoryError};

/// The bounds of a [`Decoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Blocks have ids below this.
    pub block_count: u64,
}

/// What a batch did to the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// The blocks of the batch, in order.
    pub ids: Vec<BlockId>,
    /// How many of them are zero.
    pub zero_blocks: usize,
    /// How many were written: all but zero blocks that were zero already and versions that the batch itself replaced.
    pub written_blocks: usize,
    /// The contents that the source asks to keep for other guests, in order, [`BLOCK_BYTES`] each.
    pub kept: Vec<u8>,
}

/// Why a batch was not decoded. Nothing was written, unless [`Write`](DecodeError::Write) says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Its parts don't fit each other.
    #[error("batch is malformed")]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A section can't be opened.
    #[error("cannot open the batch's {section}")]
    Open {
        /// Which section.
        section: &'static str,
        /// Why.
        source: OpenError,
    },
    /// It names a block that doesn't exist.
    #[error("batch names block {id}, but there are {block_count}")]
    OutOfRange {
        /// The block.
        id: BlockId,
        /// How many there are.
        block_count: u64,
    },
    /// What it is made from can't be read.
    #[error("cannot read the blocks that the batch refers to")]
    Read(#[source] MemoryError),
    /// What it takes of other guests can't be read.
    #[error("cannot read a page that guests share")]
    Shared(#[from] SharedPageError),
    /// What it decodes to isn't what the source had, or a batch is missing.
    #[error("digest after the batch is {actual}, the source says {expected}")]
    DigestDiffers {
        /// The source's.
        expected: Chain,
        /// Ours.
        actual: Chain,
    },
    /// The same of a batch that takes blocks of other guests, one of which may not be what it was.
    #[error("{blocks} pages that guests share aren't all what they were")]
    SharedDiffers {
        /// How many the batch takes.
        blocks: usize,
        /// The digests.
        source: Box<DecodeError>,
    },
    /// The decoded blocks can't be written; some of them may have been.
    #[error("cannot write the decoded blocks")]
    Write(#[source] MemoryError),
}

/// The target's half of the engine: decodes batches in the order in which they were drafted.
///
/// It relies on no content between batches: references and deltas read the target's memory. Its buffers stay under
/// 7 MiB: a batch, the blocks that it refers to (at most five for each of its own), and its sections.
pub struct Decoder {
    block_count: u64,
    chain: Chain,
    link: Link,
    decompressor: Decompressor,
    control: Vec<u8>,
    columns: Columns,
    sources: Sources,
    rebuilt: Vec<Block>,
    /// Which rebuilt blocks memory may not hold yet.
    changed: Vec<bool>,
}

impl Decoder {
    /// A decoder for a target that has decoded nothing yet.
    pub fn new(limits: DecoderLimits) -> Self {
        Self {
            block_count: limits.block_count,
            chain: Chain::default(),
            link: Link::default(),
            decompressor: Decompressor::default(),
            control: Vec::new(),
            columns: Columns::default(),
            sources: Sources::default(),
            rebuilt: Vec::new(),
            changed: Vec::new(),
        }
    }

    /// The running digest of everything decoded.
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// Decodes a batch into `memory`: one read at most, then, if the digest is right, one write at most.
    pub fn decode(&mut self, bytes: &[u8], memory: &mut impl Memory) -> Result<Decoded, DecodeError> {
        self.decode_sharing(bytes, memory, &mut NoSharedPages)
    }

    /// Decodes a batch that may take blocks of other guests.
    pub fn decode_sharing(
        &mut self,
        bytes: &[u8],
        memory: &mut impl Memory,
        shared: &mut impl SharedPages,
    ) -> Result<Decoded, DecodeError> {
        let expected = self.open(bytes)?;
        self.check_ids()?;
        self.sources.gather(&self.columns, memory).map_err(DecodeError::Read)?;
        self.sources.gather_shared(&self.columns, shared)?;
        self.rebuild()?;
        let actual = self.digest();
        if actual != expected {
            return Err(self.differs(expected, actual));
        }
        let kept = self.kept();
        let decoded = self.write(memory)?;
        self.chain = actual;
        Ok(Decoded { kept, ..decoded })
    }

    fn differs(&self, expected: Chain, actual: Chain) -> DecodeError {
        let differs = DecodeError::DigestDiffers { expected, actual };
        match self.columns.slots.len() {
            0 => differs,
            blocks => DecodeError::SharedDiffers { blocks, source: Box::new(differs) },
        }
    }

    fn kept(&self) -> Vec<u8> {
        let marked = self.rebuilt.iter().zip(&self.columns.kept).filter(|(_, kept)| **kept);
        let contents: Vec<_> = marked.map(|(content, _)| content.as_slice()).collect();
        contents.concat()
    }

    /// Parses a batch into columns and returns the digest that it promises.
    fn open(&mut self, mut bytes: &[u8]) -> Result<Chain, DecodeError> {
        let header = Header::take(&mut bytes)?;
        let mut open = |section, limit, out: &mut Vec<u8>| {
            let opened = self.decompressor.take_section(&mut bytes, limit, out);
            opened.map_err(|source| DecodeError::Open { section, source })
        };
        open("control data", CONTROL_LIMIT_BYTES, &mut self.control)?;
        self.columns.take_control(&self.control, header.block_count)?;
        open("deltas", CONTENT_LIMIT_BYTES, &mut self.columns.deltas.xor)?;
        open("literals", CONTENT_LIMIT_BYTES, &mut self.columns.literals)?;
        open("dense literals", CONTENT_LIMIT_BYTES, &mut self.columns.dense)?;
        if bytes.is_empty() { Ok(header.chain) } else { Err(ShapeError::Excess.into()) }
    }

    fn check_ids(&self) -> Result<(), DecodeError> {
        let block_count = self.block_count;
        let references = self.columns.references.iter().map(|reference| reference.id);
        match self.columns.ids.iter().copied().chain(references).find(|id| id.0 >= block_count) {
            Some(id) => Err(DecodeError::OutOfRange { id, block_count }),
            None => Ok(()),
        }
    }

    fn rebuild(&mut self) -> Result<(), ShapeError> {
        self.rebuilt.clear();
        self.rebuilt.resize(self.columns.ids.len(), [0; BLOCK_BYTES]);
        self.changed.clear();
        let mut rebuild = Rebuild::new(&self.columns, &self.sources);
        for (position, (_, form, sub_forms)) in self.columns.blocks().enumerate() {
            let (earlier, rest) = self.rebuilt.split_at_mut(position);
            self.changed.push(rebuild.block(form, sub_forms, earlier, &mut rest[0])?);
        }
        rebuild.finish()
    }

    fn digest(&mut self) -> Chain {
        self.link.start(self.chain);
        for (id, content) in self.columns.ids.iter().zip(&self.rebuilt) {
            self.link.push(*id, &digests(content));
        }
        self.link.finish()
    }

    /// Writes the last version of each block, unless it is zero and was zero before.
    fn write(&mut self, memory: &mut impl Memory) -> Result<Decoded, DecodeError> {
        let mut written = Vec::with_capacity(self.columns.ids.len());
        for (position, (id, changed)) in self.columns.ids.iter().zip(&self.changed).enumerate() {
            if *changed && self.sources.is_last(*id, position) {
                self.rebuilt.copy_within(position..=position, written.len());
                written.push(*id);
            }
        }
        if !written.is_empty() {
            let contents = self.rebuilt[..written.len()].as_flattened();
            memory.write(&written, contents).map_err(DecodeError::Write)?;
        }
        Ok(Decoded {
            zero_blocks: self.columns.forms.iter().filter(|form| **form == Form::Zero).count(),
            written_blocks: written.len(),
            ids: self.columns.ids.clone(),
            kept: Vec::new(),
        })
    }
}

impl From<ShapeError> for DecodeError {
    fn from(source: ShapeError) -> Self {
        Self::Malformed(Box::new(source))
    }
}
