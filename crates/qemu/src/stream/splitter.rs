//! The state machine that follows the stream.

use super::element::{Element, Unread};
use super::output::{CONTINUE, Output};
use super::{
    MAX_COMMAND_BYTES, MAX_ELEMENT_BYTES, MAX_MACHINE_NAME_BYTES, MAX_RAM_BLOCKS, PAGE_BYTES, PageContent,
    PageRoute, RamBlock, RamPage, RamSectionEnd, StreamError, StreamProblem, StreamSink,
};

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const RAM_VERSION: u32 = 4;

/// Section types (QEMU's `QEMU_VM_*`).
mod section {
    pub(super) const EOF: u8 = 0x00;
    pub(super) const START: u8 = 0x01;
    pub(super) const PART: u8 = 0x02;
    pub(super) const END: u8 = 0x03;
    pub(super) const FULL: u8 = 0x04;
    pub(super) const SUBSECTION: u8 = 0x05;
    pub(super) const CONFIGURATION: u8 = 0x07;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const FOOTER: u8 = 0x7e;
}

/// Flags in the low bits of a RAM record's address (QEMU's `RAM_SAVE_FLAG_*`).
mod flag {
    pub(super) const ZERO: u64 = 0x02;
    pub(super) const MEM_SIZE: u64 = 0x04;
    pub(super) const PAGE: u64 = 0x08;
    pub(super) const EOS: u64 = 0x10;
    pub(super) const XBZRLE: u64 = 0x40;
    pub(super) const HOOK: u64 = 0x80;
    pub(super) const COMPRESS: u64 = 0x100;
    pub(super) const MULTIFD_FLUSH: u64 = 0x200;
}

const FLAGS: u64 = PAGE_BYTES as u64 - 1;

/// Reads a migration stream in pieces of any size and rewrites it; see the [module](super).
///
/// ```
/// use godwit_qemu::stream::*;
///
/// #[derive(Default)]
/// struct Forward(Vec<u8>);
/// impl StreamSink for Forward {
///     fn pass(&mut self, bytes: &[u8]) { self.0.extend_from_slice(bytes) }
///     fn ram_blocks(&mut self, _: &[RamBlock]) {}
///     fn page(&mut self, _: &RamPage<'_>) -> PageRoute { PageRoute::Keep }
///     fn ram_section_end(&mut self, _: RamSectionEnd) {}
/// }
///
/// let mut splitter = Splitter::new();
/// let mut forward = Forward::default();
/// splitter.push(b"QEVM\0\0", &mut forward)?;
/// splitter.push(b"\0\x03", &mut forward)?;
/// assert_eq!(forward.0, b"QEVM\0\0\0\x03");
/// assert!(splitter.finish().is_err(), "there was no RAM in it");
/// # Ok::<(), StreamError>(())
/// ```
#[derive(Debug)]
pub struct Splitter {
    state: State,
    blocks: Vec<RamBlock>,
    ram_section: Option<u32>,
    /// Block of the last record that QEMU wrote: what its CONTINUE refers to.
    block: Option<usize>,
    output: Output,
    /// Where in QEMU's stream the element that is read next begins.
    offset: u64,
    /// The beginning of an element whose rest hasn't come yet.
    split: Vec<u8>,
    /// Bytes that `split` must have before it is worth another try.
    needed_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    Section { configured: Configured },
    Records(RamSection),
    BlockList { remaining_bytes: u64 },
    Footer(RamSection),
    Devices,
    Failed,
}

/// How far the optional configuration section is; it can only come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Configured {
    NotYet,
    Just,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RamSection {
    kind: RamSectionKind,
    pages: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RamSectionKind {
    Start,
    Part,
    End,
}

const BETWEEN_SECTIONS: State = State::Section { configured: Configured::Done };

impl Default for Splitter {
    fn default() -> Self {
        Self::new()
    }
}

impl Splitter {
    /// For a stream from its first byte.
    pub fn new() -> Self {
        Self {
            state: State::Preamble,
            blocks: Vec::new(),
            ram_section: None,
            block: None,
            output: Output::default(),
            offset: 0,
            split: Vec::new(),
            needed_bytes: 0,
        }
    }

    /// Reads on. Pages that lie whole in `bytes` aren't copied.
    ///
    /// # Errors
    /// The stream is damaged, or was written in a way that can't be split; then every later push fails too.
    pub fn push(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<(), StreamError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let used_bytes = match self.state {
                State::Devices => {
                    sink.pass(rest);
                    self.offset += rest.len() as u64;
                    rest.len()
                }
                _ if self.split.is_empty() => self.read_in_place(rest, sink)?,
                _ => self.read_joined(rest, sink)?,
            };
            rest = &rest[used_bytes..];
        }
        Ok(())
    }

    /// The source closed the connection.
    ///
    /// # Errors
    /// RAM wasn't complete. That the device sections are complete can't be seen from here: they have no length, and a
    /// guest has a say in their contents. The source's state `completed` or `postmigrate` says so.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.state {
            State::Devices => Ok(()),
            State::Failed => Err(self.error(StreamProblem::Failed)),
            _ => Err(self.error(StreamProblem::Truncated)),
        }
    }

    /// All of RAM has gone by; what is passed from now on is device state.
    pub fn ram_complete(&self) -> bool {
        self.state == State::Devices
    }

    /// Reads an element from the pushed bytes, or sets them aside if they are only its beginning.
    fn read_in_place(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<usize, StreamError> {
        match self.element(bytes, sink) {
            Ok(element_bytes) => {
                self.offset += element_bytes as u64;
                Ok(element_bytes)
            }
            Err(Unread::Short(needed_bytes)) => {
                self.split.extend_from_slice(bytes);
                self.needed_bytes = needed_bytes;
                Ok(bytes.len())
            }
            Err(Unread::Wrong(problem)) => Err(self.fail(problem)),
        }
    }

    /// Completes an element of which the beginning was set aside; takes no more of `bytes` than it needs.
    fn read_joined(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<usize, StreamError> {
        let missing_bytes = self.needed_bytes - self.split.len();
        let used_bytes = missing_bytes.min(bytes.len());
        self.split.extend_from_slice(&bytes[..used_bytes]);
        if used_bytes < missing_bytes {
            return Ok(used_bytes);
        }
        let mut split = std::mem::take(&mut self.split);
        match self.element(&split, sink) {
            Ok(element_bytes) => {
                debug_assert_eq!(element_bytes, split.len());
                self.offset += element_bytes as u64;
                split.clear();
            }
            Err(Unread::Short(needed_bytes)) => {
                debug_assert!(split.len() < needed_bytes && needed_bytes <= MAX_ELEMENT_BYTES);
                self.needed_bytes = needed_bytes;
            }
            Err(Unread::Wrong(problem)) => return Err(self.fail(problem)),
        }
        self.split = split;
        Ok(used_bytes)
    }

    fn error(&self, problem: StreamProblem) -> StreamError {
        StreamError { offset: self.offset, problem }
    }

    fn fail(&mut self, problem: StreamProblem) -> StreamError {
        self.state = State::Failed;
        self.split = Vec::new();
        self.error(problem)
    }

    /// Reads the element that `bytes` begin with and acts on it; returns its length. Acts only if it is complete.
    fn element(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<usize, Unread> {
        let mut element = Element::new(bytes);
        match self.state {
            State::Preamble => self.preamble(&mut element, sink)?,
            State::Section { configured } => self.section(&mut element, configured, sink)?,
            State::Records(section) => self.record(&mut element, section, sink)?,
            State::BlockList { remaining_bytes } => self.listed_block(&mut element, remaining_bytes, sink)?,
            State::Footer(section) => self.footer(&mut element, section, sink)?,
            State::Devices | State::Failed => return Err(StreamProblem::Failed.into()),
        }
        Ok(element.read().len())
    }

    fn preamble(&mut self, element: &mut Element<'_>, sink: &mut impl StreamSink) -> Result<(), Unread> {
        match element.u32()? {
            MAGIC => {}
            other => return Err(StreamProblem::Magic(other).into()),
        }
        match element.u32()? {
            VERSION => {}
            other => return Err(StreamProblem::Version(other).into()),
        }
        sink.pass(element.read());
        self.state = State::Section { configured: Configured::NotYet };
        Ok(())
    }

    fn section(
        &mut self,
        element: &mut Element<'_>,
        configured: Configured,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        match (element.u8()?, configured) {
            (section::CONFIGURATION, Configured::NotYet) => self.configuration(element, sink),
            (section::SUBSECTION, Configured::Just) => self.configuration_detail(element, sink),
            (section::COMMAND, _) => self.command(element, sink),
            (section::START, _) => self.ram_start(element, sink),
            (section::PART, _) => self.ram_section(element, RamSectionKind::Part, sink),
            (section::END, _) => self.ram_section(element, RamSectionKind::End, sink),
            (section::FULL, _) => {
                element.u32()?;
                Err(StreamProblem::ForeignSection(element.name()?.to_owned()).into())
            }
            (section::EOF, _) => Err(StreamProblem::EarlyEnd.into()),
            (other, _) => Err(StreamProblem::SectionType(other).into()),
        }
    }

    /// The machine type, which the destination's QEMU compares with its own.
    fn configuration(&mut self, element: &mut Element<'_>, sink: &mut impl StreamSink) -> Result<(), Unread> {
        let length = element.u32()?;
        if length as usize > MAX_MACHINE_NAME_BYTES {
            return Err(StreamProblem::MachineName(length).into());
        }
        element.skip(length as usize)?;
        sink.pass(element.read());
        self.state = State::Section { configured: Configured::Just };
        Ok(())
    }

    /// A subsection of the configuration. It lists only capabilities that are on and that both sides must agree on,
    /// all of which change the layout of RAM.
    fn configuration_detail(
        &mut self,
        element: &mut Element<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        let name = element.name()?;
        element.u32()?;
        match name {
            "configuration/uuid" => {
                element.skip(16)?;
            }
            "configuration/target-page-bits" => match element.u32()? {
                12 => {}
                other => return Err(StreamProblem::PageBits(other).into()),
            },
            "configuration/capabilities" => {
                if element.u32()? != 0 {
                    return Err(StreamProblem::Capability(element.name()?.to_owned()).into());
                }
            }
            other => return Err(StreamProblem::Configuration(other.to_owned()).into()),
        }
        sink.pass(element.read());
        Ok(())
    }

    fn command(&mut self, element: &mut Element<'_>, sink: &mut impl StreamSink) -> Result<(), Unread> {
        let kind = element.u16()?;
        let length = element.u16()?;
        if let Some(name) = disruptive_command(kind) {
            return Err(StreamProblem::Command { kind, name }.into());
        }
        if usize::from(length) > MAX_COMMAND_BYTES {
            return Err(StreamProblem::CommandLength { kind, bytes: length }.into());
        }
        element.skip(usize::from(length))?;
        sink.pass(element.read());
        self.state = BETWEEN_SECTIONS;
        Ok(())
    }

    fn ram_start(&mut self, element: &mut Element<'_>, sink: &mut impl StreamSink) -> Result<(), Unread> {
        let id = element.u32()?;
        let name = element.name()?;
        if name != "ram" {
            return Err(StreamProblem::ForeignSection(name.to_owned()).into());
        }
        element.u32()?;
        match element.u32()? {
            RAM_VERSION => {}
            other => return Err(StreamProblem::RamVersion(other).into()),
        }
        if self.ram_section.replace(id).is_some() {
            return Err(StreamProblem::RamStartedTwice.into());
        }
        sink.pass(element.read());
        self.state = State::Records(RamSection { kind: RamSectionKind::Start, pages: 0 });
        Ok(())
    }

    fn ram_section(
        &mut self,
        element: &mut Element<'_>,
        kind: RamSectionKind,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        let id = element.u32()?;
        if self.ram_section != Some(id) {
            return Err(StreamProblem::UnknownSection(id).into());
        }
        match kind {
            RamSectionKind::Part => self.output.begin_part(element.read()),
            _ => sink.pass(element.read()),
        }
        self.state = State::Records(RamSection { kind, pages: 0 });
        Ok(())
    }

    fn record(
        &mut self,
        element: &mut Element<'_>,
        section: RamSection,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        let word = element.u64()?;
        let (address, flags) = (word & !FLAGS, word & FLAGS);
        match flags & !CONTINUE {
            flag::PAGE | flag::ZERO if section.kind != RamSectionKind::Start => {
                self.page(element, address, flags, section, sink)
            }
            flag::EOS => {
                self.output.frame(element.read(), sink);
                self.state = State::Footer(section);
                Ok(())
            }
            flag::MEM_SIZE if section.kind == RamSectionKind::Start && self.blocks.is_empty() => {
                sink.pass(element.read());
                self.state = State::BlockList { remaining_bytes: address };
                Ok(())
            }
            flag::PAGE | flag::ZERO | flag::MEM_SIZE => Err(StreamProblem::Misplaced.into()),
            _ => Err(StreamProblem::RamFlags { flags, meaning: meaning(flags) }.into()),
        }
    }

    fn listed_block(
        &mut self,
        element: &mut Element<'_>,
        remaining_bytes: u64,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        let name = element.name()?.to_owned();
        let used_bytes = element.u64()?;
        let left_bytes = remaining_bytes.checked_sub(used_bytes);
        let Some(left_bytes) = left_bytes.filter(|_| used_bytes & FLAGS == 0 && used_bytes > 0) else {
            return Err(StreamProblem::BlockSize { name, used_bytes }.into());
        };
        if self.blocks.len() == MAX_RAM_BLOCKS {
            return Err(StreamProblem::TooManyBlocks.into());
        }
        if self.blocks.iter().any(|block| block.name == name) {
            return Err(StreamProblem::DuplicateBlock(name).into());
        }
        self.blocks.push(RamBlock { name, used_bytes });
        sink.pass(element.read());
        self.state = State::BlockList { remaining_bytes: left_bytes };
        if left_bytes == 0 {
            sink.ram_blocks(&self.blocks);
            self.state = State::Records(RamSection { kind: RamSectionKind::Start, pages: 0 });
        }
        Ok(())
    }

    fn page(
        &mut self,
        element: &mut Element<'_>,
        offset: u64,
        flags: u64,
        section: RamSection,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        let index = self.block_of(element, flags)?;
        let block = &self.blocks[index];
        if offset >= block.used_bytes {
            return Err(StreamProblem::PageOffset { name: block.name.clone(), offset }.into());
        }
        let content = match flags & flag::ZERO {
            0 => PageContent::Bytes(element.page()?),
            _ => PageContent::Zero(element.u8()?),
        };
        let last = section.kind == RamSectionKind::End;
        if sink.page(&RamPage { block: index, offset, content, last }) == PageRoute::Keep {
            self.output.page(element.read(), index, &block.name, sink);
        }
        self.block = Some(index);
        self.state = State::Records(RamSection { pages: section.pages + 1, ..section });
        Ok(())
    }

    fn block_of(&self, element: &mut Element<'_>, flags: u64) -> Result<usize, Unread> {
        if flags & CONTINUE != 0 {
            return self.block.ok_or(StreamProblem::NoBlock.into());
        }
        let name = element.name()?;
        let index = self.blocks.iter().position(|block| block.name == name);
        index.ok_or_else(|| StreamProblem::UnknownBlock(name.to_owned()).into())
    }

    fn footer(
        &mut self,
        element: &mut Element<'_>,
        section: RamSection,
        sink: &mut impl StreamSink,
    ) -> Result<(), Unread> {
        if element.u8()? != section::FOOTER || Some(element.u32()?) != self.ram_section {
            return Err(StreamProblem::Footer.into());
        }
        self.output.frame(element.read(), sink);
        self.output.end_section();
        let last = section.kind == RamSectionKind::End;
        self.state = if last { State::Devices } else { BETWEEN_SECTIONS };
        if section.kind != RamSectionKind::Start {
            sink.ram_section_end(RamSectionEnd { pages: section.pages, last });
        }
        Ok(())
    }
}

/// Commands after which the stream is no longer a plain pre-copy. `OPEN_RETURN_PATH` (1), `PING` (2) and
/// `SWITCHOVER_START` (11) are harmless.
fn disruptive_command(kind: u16) -> Option<&'static str> {
    match kind {
        1 | 2 | 11 => None,
        3 => Some("POSTCOPY_ADVISE"),
        4 => Some("POSTCOPY_LISTEN"),
        5 => Some("POSTCOPY_RUN"),
        6 => Some("POSTCOPY_RAM_DISCARD"),
        7 => Some("PACKAGED"),
        8 => Some("ENABLE_COLO"),
        9 => Some("POSTCOPY_RESUME"),
        10 => Some("RECV_BITMAP"),
        _ => Some("unknown"),
    }
}

fn meaning(flags: u64) -> &'static str {
    match flags {
        _ if flags & flag::XBZRLE != 0 => "xbzrle; switch the capability xbzrle off",
        _ if flags & flag::HOOK != 0 => "RDMA; migrate to a unix socket",
        _ if flags & flag::COMPRESS != 0 => "compressed page; switch the capability compress off",
        _ if flags & flag::MULTIFD_FLUSH != 0 => "multifd; switch the capability multifd off",
        _ => "unknown",
    }
}
