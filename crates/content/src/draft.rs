//! The parallel half of the source: what a draft becomes on the wire.

use std::iter;

use crate::bases::Reference;
use crate::batch::{Columns, Form, Header, SubForm, SubForms};
use crate::compress::Compressor;
use crate::delta::{Deltas, RUN_BYTES};
use crate::density::is_dense;
use crate::{
    BLOCK_BYTES, Block, BlockId, Chain, ContentDigest, LevelGovernor, SUB_BLOCK_BYTES, SUB_BLOCKS, Slot,
    SubBlock, Tally, sub_blocks,
};

/// Blocks whose forms are decided, all but one question: whether a long delta is really shorter than the compressed
/// content. Owns what it needs, so that any thread can [`seal`](Draft::seal) it.
pub struct Draft {
    /// Of all blocks, or nothing if none of them needs its content.
    pub(crate) contents: Vec<u8>,
    pub(crate) outline: Outline,
    /// The running digest after this batch.
    pub(crate) chain: Chain,
    /// zstd's level, unless nothing is to be compressed.
    pub(crate) level: Option<i32>,
}

/// A batch as it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// What [`Decoder::decode`](crate::Decoder::decode) takes.
    pub bytes: Vec<u8>,
    /// What it is made of.
    pub tally: Tally,
}

/// Forms of blocks, in order, and what they consist of besides content.
#[derive(Default)]
pub(crate) struct Outline {
    pub(crate) blocks: Vec<BlockOutline>,
    pub(crate) references: Vec<Reference>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) deltas: Deltas,
    /// Of the blocks that the target is to keep.
    pub(crate) kept: Vec<ContentDigest>,
}

pub(crate) struct BlockOutline {
    id: BlockId,
    whole: Option<Form>,
    pub(crate) sub_forms: SubForms,
    /// What its deltas cost before compression.
    pub(crate) delta_cost: usize,
    /// Whether the target is to keep it for other guests too.
    pub(crate) is_kept: bool,
}

/// A block's delta of at least this size is weighed against zstd over the new content. Hardly anything compresses a
/// block to less.
const CONTESTED_BYTES: usize = 256;

/// A run's share of the control section once it is compressed, about.
const COMPRESSED_RUN_BYTES: usize = 3;

impl BlockOutline {
    pub(crate) fn zero(id: BlockId) -> Self {
        Self::whole(id, Form::Zero, SubForm::Zero)
    }

    pub(crate) fn reference(id: BlockId) -> Self {
        Self::whole(id, Form::Reference, SubForm::Reference)
    }

    pub(crate) fn shared(id: BlockId) -> Self {
        Self::whole(id, Form::Shared, SubForm::Zero)
    }

    pub(crate) fn literal(id: BlockId) -> Self {
        Self { whole: None, ..Self::whole(id, Form::Literal, SubForm::Literal) }
    }

    fn whole(id: BlockId, form: Form, sub_form: SubForm) -> Self {
        Self { id, whole: Some(form), sub_forms: [sub_form; SUB_BLOCKS], delta_cost: 0, is_kept: false }
    }
}

impl Draft {
    /// How many blocks it has.
    pub fn blocks(&self) -> usize {
        self.outline.blocks.len()
    }

    /// What the target will keep for other guests when it has decoded the batch, in order.
    pub fn kept(&self) -> &[ContentDigest] {
        &self.outline.kept
    }

    /// Compresses the batch. The result depends on the draft alone, not on what the compressor did before.
    pub fn seal(&self, compressor: &mut Compressor) -> Batch {
        self.sealed(self.level, compressor)
    }

    /// What the batch would take at the next higher level, in bytes; `None`: there is none, or nothing is compressed.
    pub fn bytes_above(&self, compressor: &mut Compressor) -> Option<u64> {
        let above = LevelGovernor::above(self.level?)?;
        Some(self.sealed(Some(above), compressor).tally.encoded_bytes)
    }

    /// What there is to compress, about; pages of zeros and references are nothing.
    pub fn weight_bytes(&self) -> u64 {
        self.delta_sizes().sum::<usize>() as u64
    }

    fn sealed(&self, level: Option<i32>, compressor: &mut Compressor) -> Batch {
        let mut columns = std::mem::take(&mut compressor.columns);
        let mut control = std::mem::take(&mut compressor.control);
        let mut tally = self.assemble(level, &mut columns, compressor);
        control.clear();
        columns.put_control(&mut control);

        let mut bytes = Vec::new();
        Header { block_count: self.blocks(), chain: self.chain }.put(&mut bytes);
        for section in [&control, &columns.deltas.xor, &columns.literals] {
            compressor.put_section(level, section, &mut bytes);
        }
        compressor.put_section(None, &columns.dense, &mut bytes);
        tally.encoded_bytes = bytes.len() as u64;
        compressor.columns = columns;
        compressor.control = control;
        Batch { bytes, tally }
    }

    /// What each block costs before compression if it is sent as its delta; dense parts count as they are.
    pub(crate) fn delta_sizes(&self) -> impl Iterator<Item = usize> {
        self.outline.blocks.iter().map(|block| {
            let literals = block.sub_forms.iter().filter(|form| **form == SubForm::Literal).count();
            block.delta_cost + literals * SUB_BLOCK_BYTES
        })
    }

    fn assemble(&self, level: Option<i32>, columns: &mut Columns, compressor: &mut Compressor) -> Tally {
        columns.clear();
        columns.references.extend_from_slice(&self.outline.references);
        columns.slots.extend_from_slice(&self.outline.slots);
        let mut tally = Tally { raw_bytes: (self.blocks() * BLOCK_BYTES) as u64, ..Tally::default() };
        let mut deltas = Cursor::new(&self.outline.deltas);
        let contents = self.contents.as_chunks().0.iter().chain(iter::repeat(&[0; BLOCK_BYTES]));
        for (block, content) in self.outline.blocks.iter().zip(contents) {
            let delta = deltas.take(block);
            let sub_forms = match level {
                // Of dense content nothing is shorter than its delta.
                Some(level) if block.delta_cost >= CONTESTED_BYTES && !is_dense(content) => {
                    settle(block, content, &delta, level, compressor)
                }
                _ => block.sub_forms,
            };
            if sub_forms.contains(&SubForm::Delta) {
                columns.deltas.append(delta.run_counts, delta.runs, delta.xor);
            }
            let form = match block.whole.unwrap_or(Form::of(&sub_forms)) {
                Form::Literal if level.is_some() && is_dense(content) => Form::Dense,
                form => form,
            };
            let literals = if form == Form::Dense { &mut columns.dense } else { &mut columns.literals };
            let contents = select(content, &sub_forms, SubForm::Literal);
            contents.for_each(|sub_block| literals.extend_from_slice(sub_block));
            columns.push(block.id, form, sub_forms, block.is_kept);
            count(&mut tally, form, &sub_forms);
        }
        tally.delta_bytes = (columns.deltas.xor.len() + columns.deltas.runs.len() * RUN_BYTES) as u64;
        tally.literal_bytes = (columns.literals.len() + columns.dense.len()) as u64;
        tally
    }
}

/// A block's deltas become literals if those compress better: programs that rewrite whole pages want it so.
fn settle(
    block: &BlockOutline,
    content: &Block,
    delta: &DeltaView<'_>,
    level: i32,
    compressor: &mut Compressor,
) -> SubForms {
    let mut literal = [0; BLOCK_BYTES];
    let mut length = 0;
    for sub_block in select(content, &block.sub_forms, SubForm::Delta) {
        literal[length..length + sub_block.len()].copy_from_slice(sub_block);
        length += sub_block.len();
    }
    let mut cost = |bytes: &[u8]| compressor.compress(level, bytes).map_or(bytes.len(), <[u8]>::len);
    let literal_cost = cost(&literal[..length]);
    let delta_cost = cost(delta.xor) + delta.runs.len() * COMPRESSED_RUN_BYTES;
    match literal_cost < delta_cost {
        true => block.sub_forms.map(|form| if form == SubForm::Delta { SubForm::Literal } else { form }),
        false => block.sub_forms,
    }
}

fn select<'a>(
    content: &'a Block,
    sub_forms: &'a SubForms,
    form: SubForm,
) -> impl Iterator<Item = &'a SubBlock> {
    sub_blocks(content).iter().zip(sub_forms).filter(move |(_, other)| **other == form).map(|(sub, _)| sub)
}

fn count(tally: &mut Tally, form: Form, sub_forms: &SubForms) {
    *match form {
        Form::Zero => &mut tally.zero_blocks,
        Form::Reference => &mut tally.reference_blocks,
        Form::Shared => &mut tally.shared_blocks,
        _ if sub_forms.contains(&SubForm::Reference) => &mut tally.partial_reference_blocks,
        _ if sub_forms.contains(&SubForm::Delta) => &mut tally.delta_blocks,
        _ => &mut tally.literal_blocks,
    } += 1;
}

/// Walks the deltas of a draft, block by block.
struct Cursor<'a> {
    rest: DeltaView<'a>,
}

struct DeltaView<'a> {
    run_counts: &'a [u8],
    runs: &'a [crate::delta::Run],
    xor: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn new(deltas: &'a Deltas) -> Self {
        Self { rest: DeltaView { run_counts: &deltas.run_counts, runs: &deltas.runs, xor: &deltas.xor } }
    }

    fn take(&mut self, block: &BlockOutline) -> DeltaView<'a> {
        let count = block.sub_forms.iter().filter(|form| **form == SubForm::Delta).count();
        let (run_counts, other_counts) = self.rest.run_counts.split_at(count);
        let runs = run_counts.iter().copied().map(usize::from).sum();
        let (runs, other_runs) = self.rest.runs.split_at(runs);
        let (xor, other_xor) = self.rest.xor.split_at(block.delta_cost - runs.len() * RUN_BYTES);
        self.rest = DeltaView { run_counts: other_counts, runs: other_runs, xor: other_xor };
        DeltaView { run_counts, runs, xor }
    }
}
