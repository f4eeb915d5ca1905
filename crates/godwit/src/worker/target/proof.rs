//! Proof that what is written at an address reaches the guest: a word written into QEMU's process from outside has to
//! come back from QEMU, which reads it by its guest address.

use godwit_content::BLOCK_BYTES;
use godwit_qemu::{
    memory::{MemoryRange, PageIndex, ProcessMemory, ProcessMemoryError},
    qmp::{Client, QmpError},
    ramblock::parse_address,
};

/// Bytes that are written and read back.
const WORD_BYTES: usize = 16;

/// Why the addresses can't be relied on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProofError {
    /// QEMU doesn't say.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// Its memory can't be reached.
    #[error(transparent)]
    Memory(#[from] ProcessMemoryError),
    /// An answer isn't understood.
    #[error("QEMU's answer to `{command}` isn't understood: {answer}")]
    Answer {
        /// What it was asked.
        command: &'static str,
        /// What it said.
        answer: String,
    },
    /// The word isn't where it should be.
    #[error("what is written at an address of QEMU's list of RAM blocks doesn't reach the guest")]
    Elsewhere,
}

/// Writes `word` at the guest's address 0 from outside and has QEMU read it; memory is then as it was.
pub(super) async fn prove_addresses(
    monitor: &Client,
    pid: u32,
    ranges: &[MemoryRange],
    word: [u8; WORD_BYTES],
) -> Result<(), ProofError> {
    let host_address = address_of_zero(monitor).await?;
    let inside =
        |range: &MemoryRange| (range.host_address..range.host_address + range.bytes).contains(&host_address);
    if !ranges.iter().any(inside) {
        return Err(ProofError::Elsewhere);
    }
    let memory = ProcessMemory::open(pid, &[MemoryRange { host_address, bytes: BLOCK_BYTES as u64 }])?;
    let mut before = [0; BLOCK_BYTES];
    memory.read([PageIndex(0)].into_iter(), &mut before)?;
    let mut marked = before;
    marked[..WORD_BYTES].copy_from_slice(&word);
    memory.write([PageIndex(0)].into_iter(), &marked)?;
    let found = guest_word(monitor).await;
    memory.write([PageIndex(0)].into_iter(), &before)?;
    if found? == word { Ok(()) } else { Err(ProofError::Elsewhere) }
}

async fn address_of_zero(monitor: &Client) -> Result<u64, ProofError> {
    const COMMAND: &str = "gpa2hva 0x0";
    let answer = monitor.hmp(COMMAND).await?;
    let address = parse_address(&answer).map(|(_, address)| address);
    address.ok_or(ProofError::Answer { command: COMMAND, answer })
}

/// Two lines of `0000000000000000: 0x00 0x01 0x02 0x03 0x04 0x05 0x06 0x07`
async fn guest_word(monitor: &Client) -> Result<[u8; WORD_BYTES], ProofError> {
    const COMMAND: &str = "xp /16xb 0x0";
    let answer = monitor.hmp(COMMAND).await?;
    let bytes: Option<Vec<u8>> = answer
        .lines()
        .filter_map(|line| line.split_once(": "))
        .flat_map(|(_, bytes)| bytes.split_whitespace())
        .map(|byte| u8::from_str_radix(byte.trim_start_matches("0x"), 16).ok())
        .collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(ProofError::Answer { command: COMMAND, answer })
}
