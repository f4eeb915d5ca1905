//! What blocks are rebuilt from: the target's memory as it was before the batch, and blocks rebuilt earlier in it.

use std::collections::HashMap;

use crate::batch::{Columns, Form, ShapeError, SubForm, SubForms};
use crate::delta::{self, Run};
use crate::{
    BLOCK_BYTES, Block, BlockId, Memory, MemoryError, SUB_BLOCK_BYTES, SharedPageError, SharedPages,
    SubBlock, is_zero, sub_blocks,
};

/// Where a block's version is that was current when something referred to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// The number of a block read from memory.
    Read(usize),
    /// The number of a block of this batch.
    Rebuilt(usize),
    /// The number of a block read from a slot.
    Shared(usize),
}

/// Everything that a batch refers to.
#[derive(Default)]
pub(crate) struct Sources {
    /// Blocks of the batch, as far as it was looked at, by the number of their latest version.
    rebuilt: HashMap<BlockId, usize>,
    /// Blocks to be read from memory, by their number.
    read: HashMap<BlockId, usize>,
    ids: Vec<BlockId>,
    contents: Vec<u8>,
    /// What the slots hold that the batch names, in order.
    shared: Vec<Block>,
    /// One for each zero block, block in a slot, reference and delta, in order.
    needed: Vec<Version>,
}

impl Sources {
    /// Finds out what the batch refers to and reads it in one call.
    pub(crate) fn gather(&mut self, columns: &Columns, memory: &mut impl Memory) -> Result<(), MemoryError> {
        self.rebuilt.clear();
        self.read.clear();
        self.ids.clear();
        self.needed.clear();
        let (mut references, mut in_slots) = (columns.references.iter().map(|reference| reference.id), 0..);
        for (position, (id, form, sub_forms)) in columns.blocks().enumerate() {
            match form {
                Form::Zero => self.need_from_memory(id),
                Form::Reference => self.need(references.next()),
                Form::Dense => {}
                Form::Shared => self.needed.extend(in_slots.next().map(Version::Shared)),
                Form::Delta | Form::Literal | Form::Mixed => {
                    for sub_form in sub_forms {
                        match sub_form {
                            SubForm::Reference => self.need(references.next()),
                            SubForm::Delta => self.need(Some(id)),
                            SubForm::Zero | SubForm::Literal => {}
                        }
                    }
                }
            }
            self.rebuilt.insert(id, position);
        }
        self.contents.resize(self.ids.len() * BLOCK_BYTES, 0);
        if self.ids.is_empty() { Ok(()) } else { memory.read(&self.ids, &mut self.contents) }
    }

    /// Reads what the batch takes of other guests.
    pub(crate) fn gather_shared(
        &mut self,
        columns: &Columns,
        pages: &mut impl SharedPages,
    ) -> Result<(), SharedPageError> {
        self.shared.resize(columns.slots.len(), [0; BLOCK_BYTES]);
        columns.slots.iter().zip(&mut self.shared).try_for_each(|(slot, content)| pages.read(*slot, content))
    }

    /// Whether no later block of the batch replaces the one at `position`.
    pub(crate) fn is_last(&self, id: BlockId, position: usize) -> bool {
        self.rebuilt.get(&id) == Some(&position)
    }

    /// Notes the version that is current now. A reference that the columns lack is noticed when they are parsed.
    fn need(&mut self, id: Option<BlockId>) {
        match id.map(|id| (id, self.rebuilt.get(&id))) {
            Some((_, Some(number))) => self.needed.push(Version::Rebuilt(*number)),
            Some((id, None)) => self.need_from_memory(id),
            None => {}
        }
    }

    fn need_from_memory(&mut self, id: BlockId) {
        let number = *self.read.entry(id).or_insert_with(|| {
            self.ids.push(id);
            self.ids.len() - 1
        });
        self.needed.push(Version::Read(number));
    }

    fn content<'a>(&'a self, version: Version, rebuilt: &'a [Block]) -> &'a Block {
        match version {
            Version::Read(number) => &self.contents.as_chunks().0[number],
            Version::Rebuilt(number) => &rebuilt[number],
            Version::Shared(number) => &self.shared[number],
        }
    }
}

/// What is left of a batch's columns while its blocks are rebuilt in order.
pub(crate) struct Rebuild<'a> {
    sources: &'a Sources,
    needed: std::slice::Iter<'a, Version>,
    reference_sub_blocks: std::slice::Iter<'a, crate::bases::Reference>,
    run_counts: std::slice::Iter<'a, u8>,
    runs: &'a [Run],
    xor: &'a [u8],
    literals: &'a [u8],
    dense: &'a [u8],
}

impl<'a> Rebuild<'a> {
    pub(crate) fn new(columns: &'a Columns, sources: &'a Sources) -> Self {
        Self {
            sources,
            needed: sources.needed.iter(),
            reference_sub_blocks: columns.references.iter(),
            run_counts: columns.deltas.run_counts.iter(),
            runs: &columns.deltas.runs,
            xor: &columns.deltas.xor,
            literals: &columns.literals,
            dense: &columns.dense,
        }
    }

    /// Rebuilds the next block into `block`, which is zero; `earlier` are the blocks before it. Returns whether the
    /// block may differ from memory: zero blocks are compared, others aren't.
    pub(crate) fn block(
        &mut self,
        form: Form,
        sub_forms: SubForms,
        earlier: &[Block],
        block: &mut Block,
    ) -> Result<bool, ShapeError> {
        match form {
            Form::Zero => {
                let version = self.needed()?;
                return Ok(!is_zero(self.sources.content(version, earlier)));
            }
            Form::Reference => {
                self.reference_sub_blocks.next();
                let version = self.needed()?;
                *block = *self.sources.content(version, earlier);
            }
            Form::Dense => {
                let (literal, rest) = self.dense.split_first_chunk().ok_or(ShapeError::Literals)?;
                *block = *literal;
                self.dense = rest;
            }
            Form::Shared => {
                let version = self.needed()?;
                *block = *self.sources.content(version, earlier);
            }
            Form::Delta | Form::Literal | Form::Mixed => {
                let (targets, _) = block.as_chunks_mut::<SUB_BLOCK_BYTES>();
                for (position, (target, form)) in targets.iter_mut().zip(sub_forms).enumerate() {
                    self.sub_block(form, position, earlier, target)?;
                }
            }
        }
        Ok(true)
    }

    /// Everything that the batch brought must have been used.
    pub(crate) fn finish(self) -> Result<(), ShapeError> {
        let used_up = self.xor.is_empty() && self.literals.is_empty() && self.dense.is_empty();
        if used_up { Ok(()) } else { Err(ShapeError::Excess) }
    }

    fn sub_block(
        &mut self,
        form: SubForm,
        position: usize,
        earlier: &[Block],
        target: &mut SubBlock,
    ) -> Result<(), ShapeError> {
        match form {
            SubForm::Zero => {}
            SubForm::Literal => {
                let (literal, rest) = self.literals.split_first_chunk().ok_or(ShapeError::Literals)?;
                *target = *literal;
                self.literals = rest;
            }
            SubForm::Reference => {
                let reference = self.reference_sub_blocks.next().ok_or(ShapeError::Control)?;
                let version = self.needed()?;
                let source = sub_blocks(self.sources.content(version, earlier));
                *target = source[usize::from(reference.sub_block)];
            }
            SubForm::Delta => {
                let version = self.needed()?;
                *target = sub_blocks(self.sources.content(version, earlier))[position];
                let count = self.run_counts.next().ok_or(ShapeError::Control)?;
                let (runs, rest) =
                    self.runs.split_at_checked(usize::from(*count)).ok_or(ShapeError::Control)?;
                self.runs = rest;
                delta::apply(runs, &mut self.xor, target).ok_or(ShapeError::Runs)?;
            }
        }
        Ok(())
    }

    fn needed(&mut self) -> Result<Version, ShapeError> {
        self.needed.next().copied().ok_or(ShapeError::Control)
    }
}
