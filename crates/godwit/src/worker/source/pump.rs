//! The pump: the thread that drains QEMU's migration stream.
//!
//! It owns the socket, puts the names of dirty pages on the stage, and collects what isn't guest memory for the target's
//! QEMU. It reads at memory speed until QEMU has been through all pages once, and after that one pass whenever the
//! [`Pace`] lets it: a QEMU that waits for the switch-over acknowledgement and finds little dirty would otherwise spin
//! through thousands of passes a second. While the pump doesn't read, QEMU blocks in its write and the guest runs on.

use std::{
    collections::HashMap,
    io::{self, Read},
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use godwit_content::{BLOCK_BYTES, BlockId};
use godwit_migration::wire;
use godwit_qemu::qmp::RunState;
use godwit_qemu::stream::{
    Description, GlobalState, PageRoute, RamBlock, RamPage, RamSectionEnd, Splitter, StreamError, StreamSink,
};

use super::{
    sender::{LinkClosed, StreamCourier, StreamSum},
    stage::{SharedStage, Stage, StageError},
};

/// Bytes read from QEMU at once.
const READ_BYTES: usize = 512 * 1024;

/// Heat means something over passes of this length at least; near the stop they are shorter.
const HEAT_PERIOD: Duration = Duration::from_millis(100);

/// What the pump tells the rest of the worker.
#[derive(Debug)]
pub(super) enum PumpEvent {
    /// The guest is stopped, and its last dirty page has been named.
    MemoryNamed,
    /// As far as can be told, QEMU has written the last byte of device state.
    Described,
    /// QEMU closed its stream after the last byte of device state; all of it has been put into the outbox.
    Ended {
        /// What was sent of it.
        sum: StreamSum,
        /// What the guest did just before it was stopped, if the stream says so.
        guest_did: Option<RunState>,
    },
    /// The pump can't go on.
    Failed(PumpError),
}

/// Why the pump stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum PumpError {
    /// The stream isn't what we know.
    #[error("QEMU's migration stream can't be followed")]
    Stream(#[from] StreamError),
    /// The stage refused a page.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The socket failed.
    #[error("can't read QEMU's migration stream")]
    Read(#[from] io::Error),
    /// QEMU closed the stream before guest memory was through.
    #[error("QEMU ended its migration stream too early")]
    TooEarly,
    /// The target takes nothing any more.
    #[error(transparent)]
    Link(#[from] LinkClosed),
}

/// Lets the pump read, or not; counts the passes.
#[derive(Default)]
pub(super) struct Pace {
    state: Mutex<Permit>,
    changed: Condvar,
    passes: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Permit {
    /// Until QEMU has been through its memory once.
    #[default]
    FirstPass,
    /// Not now.
    Hold,
    /// Until what was dirty at the permit has been named: to the end of the pass under way, and one more.
    Pass,
    /// Without end: the guest is about to stop, or has.
    Free,
    /// The worker gives up.
    Closed,
}

impl Pace {
    /// Lets the pump read one pass, if it isn't reading anyhow.
    pub(super) fn allow_pass(&self) {
        self.change(|permit| if permit == Permit::Hold { Permit::Pass } else { permit });
    }

    /// Lets the pump read to the end of the stream.
    pub(super) fn free(&self) {
        self.change(|permit| if permit == Permit::Closed { permit } else { Permit::Free });
    }

    /// Makes the pump end at its next read.
    pub(super) fn close(&self) {
        self.change(|_| Permit::Closed);
    }

    /// Passes that QEMU has made over the guest's memory.
    pub(super) fn passes(&self) -> u64 {
        self.passes.load(Ordering::Acquire)
    }

    fn pass_ended(&self) {
        self.passes.fetch_add(1, Ordering::AcqRel);
        self.change(|permit| match permit {
            Permit::FirstPass | Permit::Pass => Permit::Hold,
            other => other,
        });
    }

    /// Waits for a permit; `None` when the worker gives up.
    fn wait(&self) -> Option<Permit> {
        let held = self.changed.wait_while(self.lock(), |permit| *permit == Permit::Hold);
        let permit = *held.unwrap_or_else(|poisoned| poisoned.into_inner());
        (permit != Permit::Closed).then_some(permit)
    }

    fn change(&self, next: impl FnOnce(Permit) -> Permit) {
        let mut permit = self.lock();
        *permit = next(*permit);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Permit> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The pump's parts; [`Pump::run`] is its thread.
pub(super) struct Pump {
    pub(super) stream: UnixStream,
    pub(super) pages: PageNumbers,
    pub(super) stage: Arc<SharedStage>,
    pub(super) pace: Arc<Pace>,
    pub(super) courier: StreamCourier,
    /// When the mover's heat was last let decay.
    pub(super) heat_since: Instant,
}

/// Which pages of the stream are numbered, and how; the others stay in the stream.
#[derive(Debug, Clone, Default)]
pub(super) struct PageNumbers {
    by_name: HashMap<String, u64>,
    /// By the block's place in the stream's list.
    by_place: Vec<Option<u64>>,
}

impl PageNumbers {
    /// Numbers the pages of the named blocks; each comes with the number of its first page.
    pub(super) fn new(blocks: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self { by_name: blocks.into_iter().collect(), by_place: Vec::new() }
    }

    fn set_order(&mut self, blocks: &[RamBlock]) {
        self.by_place = blocks.iter().map(|block| self.by_name.get(&block.name).copied()).collect();
    }

    fn of(&self, page: &RamPage<'_>) -> Option<BlockId> {
        let first = (*self.by_place.get(page.block)?)?;
        Some(BlockId(first + page.offset / BLOCK_BYTES as u64))
    }
}

impl Pump {
    /// Drains the stream to its end, telling `tell` what happens; its last call is `Ended` or `Failed`.
    pub(super) fn run(mut self, tell: impl Fn(PumpEvent)) {
        match self.drain(&tell) {
            Ok(guest_did) => tell(PumpEvent::Ended { sum: self.courier.sum(), guest_did }),
            Err(error) => tell(PumpEvent::Failed(error)),
        }
    }

    fn drain(&mut self, tell: &impl Fn(PumpEvent)) -> Result<Option<RunState>, PumpError> {
        let mut relay = Relay::default();
        let mut splitter = Splitter::new();
        let mut buffer = vec![0; READ_BYTES];
        while let Some(permit) = self.pace.wait() {
            self.stage.wait_for_room();
            let read = self.stream.read(&mut buffer)?;
            if read == 0 {
                let is_whole = relay.memory_named;
                return if is_whole {
                    Ok(relay.global_state.before_stop())
                } else {
                    Err(PumpError::TooEarly)
                };
            }
            self.split(&mut splitter, &mut relay, &buffer[..read])?;
            self.hand_on(&mut relay, permit, tell)?;
        }
        Err(PumpError::TooEarly)
    }

    fn split(&mut self, splitter: &mut Splitter, relay: &mut Relay, bytes: &[u8]) -> Result<(), PumpError> {
        let mut stage = self.stage.lock();
        let mut sink =
            Sink { relay, pages: &mut self.pages, stage: &mut stage, now: Instant::now(), error: None };
        let split = splitter.push(bytes, &mut sink);
        let refused = sink.error.take();
        drop(stage);
        self.stage.wake();
        split?;
        refused.map_or(Ok(()), |error| Err(error.into()))
    }

    fn hand_on(
        &mut self,
        relay: &mut Relay,
        permit: Permit,
        tell: &impl Fn(PumpEvent),
    ) -> Result<(), PumpError> {
        self.courier.put(wire::STREAM, &relay.forward)?;
        self.courier.put(wire::DEVICE_STATE, &relay.device_state)?;
        relay.global_state.push(&relay.device_state);
        relay.description.push(&relay.device_state);
        relay.forward.clear();
        relay.device_state.clear();
        if relay.memory_named && !relay.memory_named_told {
            relay.memory_named_told = true;
            tell(PumpEvent::MemoryNamed);
        }
        if relay.memory_named && relay.description.is_complete() {
            tell(PumpEvent::Described);
        }
        if relay.passes.is_through(permit) {
            relay.passes = Passes::default();
            if self.heat_since.elapsed() >= HEAT_PERIOD {
                self.heat_since = Instant::now();
                self.stage.lock().mover.next_pass();
            }
            self.pace.pass_ended();
        }
        Ok(())
    }
}

/// What the pump has taken from the stream and not yet handed on.
#[derive(Default)]
struct Relay {
    forward: Vec<u8>,
    device_state: Vec<u8>,
    global_state: GlobalState,
    description: Description,
    memory_named: bool,
    memory_named_told: bool,
    passes: Passes,
}

/// Tells when QEMU has been through its memory. The stream doesn't say so, but within a pass addresses only go up.
#[derive(Default)]
struct Passes {
    newest: Option<(usize, u64)>,
    wraps: u32,
    found_nothing: bool,
}

impl Passes {
    fn named(&mut self, page: &RamPage<'_>) {
        let place = (page.block, page.offset);
        if self.newest.is_some_and(|newest| place <= newest) {
            self.wraps += 1;
        }
        self.newest = Some(place);
    }

    fn is_through(&self, permit: Permit) -> bool {
        // The pass under way at a permit began before it; the next one has seen everything.
        let wraps_wanted = if permit == Permit::FirstPass { 1 } else { 2 };
        self.wraps >= wraps_wanted || self.found_nothing
    }
}

struct Sink<'a> {
    relay: &'a mut Relay,
    pages: &'a mut PageNumbers,
    stage: &'a mut Stage,
    now: Instant,
    error: Option<StageError>,
}

impl StreamSink for Sink<'_> {
    fn pass(&mut self, bytes: &[u8]) {
        let held =
            if self.relay.memory_named { &mut self.relay.device_state } else { &mut self.relay.forward };
        held.extend_from_slice(bytes);
    }

    fn ram_blocks(&mut self, blocks: &[RamBlock]) {
        self.pages.set_order(blocks);
    }

    fn page(&mut self, page: &RamPage<'_>) -> PageRoute {
        self.relay.passes.named(page);
        let Some(id) = self.pages.of(page) else { return PageRoute::Keep };
        if let Err(error) = self.stage.name(id, &page.content, page.last, self.now) {
            self.error.get_or_insert(error);
        }
        PageRoute::Take
    }

    fn ram_section_end(&mut self, end: RamSectionEnd) {
        self.relay.passes.found_nothing |= end.pages == 0;
        if end.last {
            self.relay.memory_named = true;
            if let Err(error) = self.stage.complete() {
                self.error.get_or_insert(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use godwit_qemu::stream::PageContent;

    use super::*;

    fn pass(offsets: &[u64]) -> Passes {
        let mut passes = Passes::default();
        for &offset in offsets {
            passes.named(&RamPage { block: 0, offset, content: PageContent::Zero(0), last: false });
        }
        passes
    }

    #[test]
    fn the_first_pass_ends_where_addresses_begin_anew() {
        assert!(!pass(&[0, 4096, 8192]).is_through(Permit::FirstPass));
        assert!(pass(&[0, 4096, 8192, 4096]).is_through(Permit::FirstPass));
    }

    #[test]
    fn a_later_pass_is_one_that_began_after_its_permit() {
        let rest_of_an_older_pass = [4096, 8192, 0, 4096];
        assert!(!pass(&rest_of_an_older_pass).is_through(Permit::Pass));
        assert!(pass(&[4096, 8192, 0, 4096, 0]).is_through(Permit::Pass));
    }

    #[test]
    fn a_section_without_pages_ends_any_pass() {
        let passes = Passes { found_nothing: true, ..pass(&[4096]) };
        assert!(passes.is_through(Permit::Pass) && passes.is_through(Permit::FirstPass));
    }

    #[test]
    fn a_pace_holds_after_a_pass_and_never_once_it_is_free() {
        let pace = Pace::default();
        assert_eq!(pace.wait(), Some(Permit::FirstPass));
        pace.pass_ended();
        pace.allow_pass();
        assert_eq!(pace.wait(), Some(Permit::Pass));
        pace.free();
        pace.pass_ended();
        assert_eq!(pace.wait(), Some(Permit::Free));
        assert_eq!(pace.passes(), 2);
        pace.close();
        pace.free();
        assert_eq!(pace.wait(), None);
    }

    #[test]
    fn pages_are_numbered_by_name_whatever_the_order_of_the_stream() {
        let mut pages = PageNumbers::new([("b.ram".to_owned(), 0), ("a.ram".to_owned(), 16)]);
        let block = |name: &str| RamBlock { name: name.into(), used_bytes: 65536 };
        pages.set_order(&[block("a.ram"), block("pc.bios"), block("b.ram")]);
        let number =
            |block| pages.of(&RamPage { block, offset: 8192, content: PageContent::Zero(0), last: false });
        assert_eq!(
            [number(0), number(1), number(2), number(3)],
            [Some(BlockId(18)), None, Some(BlockId(2)), None]
        );
    }
}
