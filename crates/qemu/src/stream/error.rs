//! What can be wrong with a migration stream.

use super::{MAX_COMMAND_BYTES, MAX_MACHINE_NAME_BYTES, MAX_RAM_BLOCKS};

/// The stream can't be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("migration stream, byte {offset}: {problem}")]
pub struct StreamError {
    /// Where the offending piece begins, counted from the start of QEMU's stream.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: StreamProblem,
}

/// What is wrong at one place of a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamProblem {
    /// It isn't a migration stream.
    #[error("begins with {0:#010x}, not with QEMU's \"QEVM\"")]
    Magic(u32),
    /// A stream of another format.
    #[error("has format version {0}, only 3 is known")]
    Version(u32),
    /// Longer than any machine type.
    #[error("machine name of {0} bytes, at most {MAX_MACHINE_NAME_BYTES} are expected")]
    MachineName(u32),
    /// The configuration section holds something whose length isn't known.
    #[error("unknown configuration \"{0}\"")]
    Configuration(String),
    /// The source migrates in a way that puts RAM elsewhere or lays out the block list differently.
    #[error("migration capability {0} is on at the source; switch it off with migrate-set-capabilities")]
    Capability(String),
    /// Guest pages of another size.
    #[error("guest pages of 2^{0} bytes, only 4096 bytes are supported")]
    PageBits(u32),
    /// A command that changes how the stream goes on, such as those of post-copy.
    #[error(
        "command {name} ({kind}) before RAM was complete; \
         switch the capabilities postcopy-ram, dirty-bitmaps and x-colo off"
    )]
    Command {
        /// Its number.
        kind: u16,
        /// QEMU's name for it.
        name: &'static str,
    },
    /// Longer than any known command.
    #[error("command {kind} with {bytes} bytes, at most {MAX_COMMAND_BYTES} are expected")]
    CommandLength {
        /// Its number.
        kind: u16,
        /// Its announced length.
        bytes: u16,
    },
    /// A section of a device before the end of RAM (virtio-mem, VFIO, dirty bitmaps); where it ends only the device
    /// knows.
    #[error(
        "section \"{0}\" comes before RAM is complete and can't be delimited; \
         unplug that device, or switch the capabilities dirty-bitmaps and background-snapshot off"
    )]
    ForeignSection(String),
    /// A PART or END of a section that never started.
    #[error("section {0} was never started")]
    UnknownSection(u32),
    /// `ram` was started twice.
    #[error("section \"ram\" started twice")]
    RamStartedTwice,
    /// RAM in another format.
    #[error("section \"ram\" has version {0}, only 4 is known")]
    RamVersion(u32),
    /// Not a section at all.
    #[error("unknown section type {0:#04x}")]
    SectionType(u8),
    /// The source wrote its end mark while RAM was still owed.
    #[error("ends before RAM is complete")]
    EarlyEnd,
    /// The footer is another section's, or there is none.
    #[error("footer of section \"ram\" is missing or another's")]
    Footer,
    /// Pages in a form that only QEMU can decode, or a flag of a newer QEMU.
    #[error("RAM record with flags {flags:#x}: {meaning}")]
    RamFlags {
        /// The low twelve bits of the record's address.
        flags: u64,
        /// What they are and what to do.
        meaning: &'static str,
    },
    /// The block list isn't where it belongs: once, at the section's start.
    #[error("RAM block list outside of the start of section \"ram\", or pages within it")]
    Misplaced,
    /// More blocks than any machine has.
    #[error("more than {MAX_RAM_BLOCKS} RAM blocks")]
    TooManyBlocks,
    /// The sizes don't add up: most likely the entries carry a field that isn't expected.
    #[error("RAM block \"{name}\" of {used_bytes} bytes doesn't fit the list's total")]
    BlockSize {
        /// Its name.
        name: String,
        /// Its announced size.
        used_bytes: u64,
    },
    /// Two blocks of one name.
    #[error("RAM block \"{0}\" is listed twice")]
    DuplicateBlock(String),
    /// A name that isn't UTF-8.
    #[error("name isn't valid UTF-8")]
    Name,
    /// A page of a block that isn't in the list.
    #[error("page of RAM block \"{0}\", which isn't listed")]
    UnknownBlock(String),
    /// A page that continues a block, but none came before.
    #[error("first page names no RAM block")]
    NoBlock,
    /// A page beyond its block's end.
    #[error("page at {offset:#x} is beyond RAM block \"{name}\"")]
    PageOffset {
        /// The block's name.
        name: String,
        /// The page's offset.
        offset: u64,
    },
    /// The connection ended first.
    #[error("ended while more was expected")]
    Truncated,
    /// The splitter met an error earlier.
    #[error("can't go on after an earlier error")]
    Failed,
}
