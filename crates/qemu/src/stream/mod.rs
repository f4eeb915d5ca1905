//! QEMU's migration stream, read and rewritten as it flows by, without I/O.
//!
//! [`Splitter`] is pushed whatever the source's socket gave and tells a [`StreamSink`] which pages QEMU wrote. The sink
//! says page by page whether the record stays in the stream; what is forwarded to the destination is a valid stream of
//! the rest. Only the section `ram` is understood; device sections pass as they are.
//!
//! ```text
//!              "QEVM" 3                                        START of ram
//!   Preamble ───────────► Section ◄──── configuration, command ────┐──────────┐
//!                           ▲ │ ▲                                  │          ▼
//!                    footer │ │ └──────────────────────────────────┘       Records ──MEM_SIZE──► BlockList
//!                           │ └── PART, END of ram ──► Records                ▲                     │
//!                         Footer ◄──────── EOS ───────────┘                   └──────────── last ───┘
//!                           │
//!                           └── footer of END ──► Devices (everything passes, to the end)
//! ```
//!
//! An error leaves the splitter unusable: what it passed so far is a prefix of a valid stream, which a destination
//! doesn't load. It holds at most [`MAX_ELEMENT_BYTES`] of the stream and the block list.
//!
//! What the rewriting does, exactly:
//! - the record of a page that was [taken](PageRoute::Take) is dropped;
//! - a kept record is passed as it came, except where it says "same block as before" and the record before it in the
//!   *rewritten* stream is of another block: then the block's name is put in;
//! - a PART section in which nothing was kept is dropped with its header and footer: QEMU writes thousands of empty
//!   ones a second while it waits for the switch-over;
//! - all other bytes pass.
//!
//! Checked against QEMU 10.0; `docs/qemu-notes.md` has the format and the capabilities that must be off.

mod description;
mod element;
mod error;
mod global_state;
mod output;
mod splitter;

pub use description::Description;
pub use error::{StreamError, StreamProblem};
pub use global_state::GlobalState;
pub use splitter::Splitter;

/// Size of a page of the guest, the unit of the stream's RAM records.
pub const PAGE_BYTES: usize = 4096;

/// The longest name of a RAM block or section that the format can express.
pub const MAX_NAME_BYTES: usize = 255;

/// More RAM blocks than any machine has: each DIMM, ROM and video memory is one.
pub const MAX_RAM_BLOCKS: usize = 1024;

/// Longest machine type name in the configuration section.
pub const MAX_MACHINE_NAME_BYTES: usize = 256;

/// Longest argument of a command that may come before the device sections (`PING` has 4 bytes).
pub const MAX_COMMAND_BYTES: usize = 64;

/// Longest piece of stream that has to be seen whole, and so is copied when a push ends in its middle: a page, the
/// record's address and the block's name.
pub const MAX_ELEMENT_BYTES: usize = 8 + 1 + MAX_NAME_BYTES + PAGE_BYTES;

/// A RAM block as the stream's setup lists it; records name it by its position in that list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name, such as `pc.ram`; unique in a machine.
    pub name: String,
    /// Its size; a multiple of [`PAGE_BYTES`].
    pub used_bytes: u64,
}

/// A page that QEMU wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamPage<'a> {
    /// Position of its block in the list that [`StreamSink::ram_blocks`] was given.
    pub block: usize,
    /// Where in the block it begins; a multiple of [`PAGE_BYTES`] within the block's size.
    pub offset: u64,
    /// What it held when QEMU wrote it.
    pub content: PageContent<'a>,
    /// It was written after the guest stopped (the record is in the END section of `ram`), so the content is final.
    pub last: bool,
}

/// What a page record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// Every byte has this value; 0 in streams of QEMU from 2.4 on.
    Zero(u8),
    /// The page itself, borrowed from the pushed bytes.
    Bytes(&'a [u8; PAGE_BYTES]),
}

/// What becomes of a page's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageRoute {
    /// It is dropped from the stream; the sink sees to the page.
    Take,
    /// It stays; the destination's QEMU loads it.
    Keep,
}

/// A PART or END section of `ram` is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSectionEnd {
    /// Page records in it, taken or kept. A section isn't a pass: QEMU ends one about every 50 ms too.
    pub pages: u64,
    /// It was the END section: all of RAM was written, and everything passed from now on is device state.
    pub last: bool,
}

/// Receives what a [`Splitter`] finds, in stream order.
pub trait StreamSink {
    /// Bytes to be forwarded verbatim, in order.
    fn pass(&mut self, bytes: &[u8]);

    /// The RAM blocks, once, at setup and before any page.
    fn ram_blocks(&mut self, blocks: &[RamBlock]);

    /// A page; called before its record is passed or dropped.
    fn page(&mut self, page: &RamPage<'_>) -> PageRoute;

    /// A PART or END section of `ram` ended; its bytes, as far as they stay, have been passed.
    fn ram_section_end(&mut self, end: RamSectionEnd);
}
