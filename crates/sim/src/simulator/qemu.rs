//! A QEMU with a guest in it, as far as a migration can tell.
//!
//! ```text
//!   source:  Running ◄──────────► Paused            (its operator)
//!               │ the gate opens    │
//!               ▼                   ▼
//!            Stopped ──── SHUT answered, last byte ────► PostMigrate ── cont ──► Running
//!               └── its stream or return path ends: as before the stop, by itself
//!   target:  Incoming ── everything loaded ──► Loaded ── cont ──► Running
//! ```

use fastrand::Rng;
use godwit_content::{BLOCK_BYTES, BlockId, Memory, VecMemory};
use godwit_migration::handover::{QemuState, RunState};

/// What a QEMU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    /// By its operator.
    Paused,
    /// Stopped for the switch-over, its stream not completely written.
    Stopped {
        shut: bool,
        ran: RunState,
    },
    PostMigrate,
    /// A destination that hasn't loaded everything.
    Incoming,
    /// A destination that has, and waits for `cont`.
    Loaded,
}

#[derive(Debug)]
pub(super) struct Qemu {
    /// Tells one process from the next.
    pub(super) pid: u64,
    pub(super) phase: Phase,
    pub(super) memory: VecMemory,
    /// What isn't memory, once it was saved or loaded.
    pub(super) device_state: Vec<u8>,
    /// Pages written since they were last named.
    pub(super) dirty: Vec<bool>,
    pub(super) gate_open: bool,
}

impl Qemu {
    /// A machine that was just switched on.
    pub(super) fn booted(pid: u64, pages: usize, random: &mut Rng) -> Self {
        let mut qemu = Self::incoming(pid, pages);
        qemu.phase = Phase::Running;
        for page in 1..pages {
            // A third stays zero.
            if random.u8(..3) > 0 {
                qemu.fill(page, random);
            }
        }
        qemu
    }

    /// A destination.
    pub(super) fn incoming(pid: u64, pages: usize) -> Self {
        let memory = VecMemory::zeroed(pages);
        let dirty = vec![true; pages];
        Self { pid, phase: Phase::Incoming, memory, device_state: Vec::new(), dirty, gate_open: false }
    }

    pub(super) fn runs(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Whether it has all of the machine, so that it could run it.
    pub(super) fn is_complete(&self) -> bool {
        self.phase != Phase::Incoming
    }

    /// What a restarted worker finds.
    pub(super) fn state(&self) -> QemuState {
        match self.phase {
            Phase::Running => QemuState::Running,
            Phase::Incoming => QemuState::Incoming,
            Phase::Paused | Phase::Stopped { .. } | Phase::PostMigrate | Phase::Loaded => QemuState::Paused,
        }
    }

    /// How many steps its guest has done; it counts them in its memory.
    pub(super) fn steps(&self) -> u64 {
        let (steps, _) = self.memory.block(BlockId(0)).split_first_chunk().expect("a page has eight bytes");
        u64::from_le_bytes(*steps)
    }

    /// The guest does a step: it counts, and writes to a few pages, most of them ever the same.
    pub(super) fn step(&mut self, random: &mut Rng) {
        let mut counting = self.memory.block(BlockId(0)).to_vec();
        counting[..8].copy_from_slice(&(self.steps() + 1).to_le_bytes());
        self.write(0, &counting);
        let pages = self.dirty.len();
        for _ in 0..random.usize(..6) {
            let among = if random.u8(..4) > 0 { pages / 8 + 2 } else { pages };
            let page = random.usize(1..among.min(pages));
            match random.u8(..8) {
                0 => self.write(page, &[0; BLOCK_BYTES]),
                1 => self.copy(random.usize(1..pages), page),
                2 => self.fill(page, random),
                _ => self.touch(page, random),
            }
        }
    }

    /// The pages written since they were last named.
    pub(super) fn name_dirty(&mut self) -> Vec<BlockId> {
        let named = self.dirty.iter().enumerate().filter(|(_, dirty)| **dirty);
        let named = named.map(|(page, _)| BlockId(page as u64)).collect();
        self.dirty.fill(false);
        named
    }

    /// Goes back to what it did before it was stopped for the switch-over.
    pub(super) fn resume_by_itself(&mut self) {
        self.gate_open = false;
        if let Phase::Stopped { ran, .. } = self.phase {
            self.phase = if ran.is_live() { Phase::Running } else { Phase::Paused };
        }
    }

    fn write(&mut self, page: usize, content: &[u8]) {
        self.memory.write(&[BlockId(page as u64)], content).expect("the page exists");
        self.dirty[page] = true;
    }

    fn copy(&mut self, from: usize, to: usize) {
        let content = self.memory.block(BlockId(from as u64)).to_vec();
        self.write(to, &content);
    }

    /// Writes a page that compresses to about a quarter.
    fn fill(&mut self, page: usize, random: &mut Rng) {
        let mut content = [0; BLOCK_BYTES];
        random.fill(&mut content[..BLOCK_BYTES / 4]);
        self.write(page, &content);
    }

    /// Changes a few bytes of a page.
    fn touch(&mut self, page: usize, random: &mut Rng) {
        let mut content = self.memory.block(BlockId(page as u64)).to_vec();
        let at = random.usize(..BLOCK_BYTES - 16);
        random.fill(&mut content[at..at + 16]);
        self.write(page, &content);
    }
}
