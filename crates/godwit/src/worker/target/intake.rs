//! What arrives in order: batches into the guest's memory, QEMU's own sections into QEMU or, from the device state on,
//! into a buffer until everything has been verified.
//!
//! The intake lives on a thread of its own; decoding and writing memory block.

use std::{io::Write, os::unix::net::UnixStream, sync::Arc};

use godwit_content::{
    BlockId, DecodeError, Decoder, DecoderLimits, Memory, MemoryError, OpenError, open_bytes,
};
use godwit_migration::wire::{self, Digest, Kept, Token};
use godwit_qemu::memory::{PageIndex, ProcessMemory, ProcessMemoryError};
use xxhash_rust::xxh3::Xxh3Default;

use super::slots::Slots;
use crate::worker::{
    STREAM_PIECE_BYTES_MAX,
    verify::{self, VerifyError},
};

/// Largest device state that is kept until the token has come.
const DEVICE_STATE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Why what arrived can't be used. The machine can't start here.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
    /// A batch is damaged, or isn't what the source had.
    #[error("a batch of memory can't be decoded")]
    Batch(#[from] DecodeError),
    /// Pages of other guests are damaged, or were never here.
    #[error(
        "the pages that guests share on this host are damaged and given up; the next migration does without"
    )]
    Shared(#[source] DecodeError),
    /// A piece of QEMU's stream is damaged.
    #[error("a piece of QEMU's stream can't be opened")]
    Piece(#[from] OpenError),
    /// A control message is damaged.
    #[error("a message of the source isn't understood")]
    Message(#[from] wire::DecodeError),
    /// A frame that has no place here.
    #[error("the source sent a frame of kind {0}, which isn't expected here")]
    Unexpected(u8),
    /// This host's QEMU doesn't take its stream.
    #[error("this host's QEMU doesn't take its stream")]
    Qemu(#[source] std::io::Error),
    /// More than any machine has.
    #[error("the source sends more than {DEVICE_STATE_BYTES_MAX} bytes of device state")]
    DeviceStateTooLarge,
    /// Something promised didn't come, or came otherwise.
    #[error("{what} isn't what the source promised")]
    Promise {
        /// What differs.
        what: &'static str,
    },
    /// Memory differs although every batch was right.
    #[error(transparent)]
    Verify(#[from] VerifyError),
}

/// Something that the hand-over must know.
#[derive(Debug)]
pub(super) enum Arrived {
    /// The token came, and with it, by the session's order, everything that was sent before it.
    Token(Token),
    /// Blocks of a batch that other guests may use too have got their slots; the source is to hear of it.
    Kept(Kept),
    /// Both memories were read again and compared.
    Verified {
        /// Pages that were equal: all.
        pages: u64,
    },
}

/// Takes frames in their order.
pub(super) struct Intake {
    decoder: Decoder,
    memory: GuestMemory,
    slots: Option<Slots>,
    qemu: UnixStream,
    batches: u64,
    stream_bytes: u64,
    stream_digest: Xxh3Default,
    device_state: Vec<u8>,
}

impl Intake {
    /// An intake into the guest behind `memory`, whose QEMU reads its stream from `qemu`; `slots` has pages of other
    /// guests.
    pub(super) fn new(memory: Arc<ProcessMemory>, qemu: UnixStream, slots: Option<Slots>) -> Self {
        Self {
            decoder: Decoder::new(DecoderLimits { block_count: memory.pages() }),
            memory: GuestMemory(memory),
            slots,
            qemu,
            batches: 0,
            stream_bytes: 0,
            stream_digest: Xxh3Default::new(),
            device_state: Vec::new(),
        }
    }

    /// Takes the next frame.
    pub(super) fn take(&mut self, frame_kind: u8, payload: &[u8]) -> Result<Option<Arrived>, IntakeError> {
        match frame_kind {
            wire::BATCH => return self.take_batch(payload),
            wire::STREAM => {
                let piece = self.open(payload)?;
                self.qemu.write_all(&piece).map_err(IntakeError::Qemu)?;
            }
            wire::DEVICE_STATE => {
                let piece = self.open(payload)?;
                if self.device_state.len() + piece.len() > DEVICE_STATE_BYTES_MAX {
                    return Err(IntakeError::DeviceStateTooLarge);
                }
                self.device_state.extend_from_slice(&piece);
            }
            wire::VERIFY => {
                let pages = verify::compare(&self.memory.0, payload)?;
                return Ok(Some(Arrived::Verified { pages }));
            }
            other => match wire::decode(other, payload)? {
                wire::Message::Token(token) => return Ok(Some(Arrived::Token(token))),
                _ => return Err(IntakeError::Unexpected(other)),
            },
        }
        Ok(None)
    }

    fn take_batch(&mut self, payload: &[u8]) -> Result<Option<Arrived>, IntakeError> {
        let Some(slots) = &mut self.slots else {
            self.decoder.decode(payload, &mut self.memory)?;
            self.batches += 1;
            return Ok(None);
        };
        let decoded = self.decoder.decode_sharing(payload, &mut self.memory, slots).map_err(|error| {
            if !matches!(error, DecodeError::Shared(_) | DecodeError::SharedDiffers { .. }) {
                return IntakeError::Batch(error);
            }
            slots.give_up();
            IntakeError::Shared(error)
        })?;
        self.batches += 1;
        Ok((!decoded.kept.is_empty()).then(|| Arrived::Kept(slots.keep(&decoded.kept))))
    }

    /// Gives QEMU the device state; it loads it and is then ready to run.
    pub(super) fn load(&mut self) -> Result<(), IntakeError> {
        let device_state = std::mem::take(&mut self.device_state);
        self.qemu.write_all(&device_state).map_err(IntakeError::Qemu)
    }

    fn open(&mut self, payload: &[u8]) -> Result<Vec<u8>, IntakeError> {
        let piece = open_bytes(payload, STREAM_PIECE_BYTES_MAX)?;
        self.stream_digest.update(&piece);
        self.stream_bytes += piece.len() as u64;
        Ok(piece)
    }

    /// Whether everything that the token promises is here and right.
    pub(super) fn check(&self, token: &Token) -> Result<(), IntakeError> {
        let promise = |kept: bool, what| if kept { Ok(()) } else { Err(IntakeError::Promise { what }) };
        promise(token.batches == self.batches, "the number of batches")?;
        promise(token.chain == Digest(self.decoder.chain().to_bytes()), "the guest's memory")?;
        promise(token.stream_bytes == self.stream_bytes, "the length of QEMU's stream")?;
        promise(token.stream_digest == Digest(self.stream_digest.digest128().to_le_bytes()), "QEMU's stream")
    }
}

/// The paused guest's memory as the decoder sees it.
struct GuestMemory(Arc<ProcessMemory>);

impl Memory for GuestMemory {
    fn read(&mut self, ids: &[BlockId], contents: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read(pages(ids), contents).map_err(access)
    }

    fn write(&mut self, ids: &[BlockId], contents: &[u8]) -> Result<(), MemoryError> {
        self.0.write(pages(ids), contents).map_err(access)
    }
}

fn pages(ids: &[BlockId]) -> impl ExactSizeIterator<Item = PageIndex> {
    ids.iter().map(|id| PageIndex(id.0))
}

fn access(error: ProcessMemoryError) -> MemoryError {
    MemoryError::Access(Box::new(error))
}
