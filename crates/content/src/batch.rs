//! The batch format, drawn in `docs/wire-format.md`.
//!
//! A batch's control data is kept by column, and wide integers by byte plane (all lowest bytes first), because each
//! column and plane has a character of its own and zstd does better on them apart.

use crate::bases::Reference;
use crate::delta::{Deltas, Run};
use crate::{BATCH_BLOCKS, BLOCK_BYTES, BlockId, Chain, SUB_BLOCKS, Slot};

/// How a block is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Zero,
    Reference,
    Delta,
    Literal,
    Mixed,
    /// A literal that zstd would only slow down.
    Dense,
    Shared,
}

/// How a sub-block is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SubForm {
    Zero,
    Reference,
    Delta,
    Literal,
}

pub(crate) type SubForms = [SubForm; SUB_BLOCKS];

/// The parts of a batch, decompressed.
#[derive(Default)]
pub(crate) struct Columns {
    pub(crate) forms: Vec<Form>,
    /// For each block, whether the target is to keep it for other guests too.
    pub(crate) kept: Vec<bool>,
    pub(crate) ids: Vec<BlockId>,
    /// One for each [`Form::Mixed`].
    pub(crate) sub_forms: Vec<SubForms>,
    /// One for each [`Form::Reference`] and each [`SubForm::Reference`], in order.
    pub(crate) references: Vec<Reference>,
    /// One for each [`Form::Shared`].
    pub(crate) slots: Vec<Slot>,
    pub(crate) deltas: Deltas,
    /// To be compressed.
    pub(crate) literals: Vec<u8>,
    /// Of each [`Form::Dense`], to be left as it is.
    pub(crate) dense: Vec<u8>,
}

/// The fixed start of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) block_count: usize,
    /// The running digest when this batch has been decoded.
    pub(crate) chain: Chain,
}

const FORMAT: u8 = 2;

const HEADER_BYTES: usize = 18;

/// Set in the byte of a form: the target is to keep the block for other guests too.
const KEPT: u8 = 0x80;

/// The most sub-blocks in a batch.
const BATCH_SUB_BLOCKS: usize = BATCH_BLOCKS * SUB_BLOCKS;

/// The largest control section: for each block form, id and sub-forms; for each sub-block a reference, a run count
/// and the most runs that a count can say. A block in a slot has none of the latter.
pub(crate) const CONTROL_LIMIT_BYTES: usize =
    BATCH_BLOCKS * (1 + 8 + 1) + BATCH_SUB_BLOCKS * (8 + 1 + 1 + 4 * u8::MAX as usize);

/// The largest XOR section and the largest sections of literals.
pub(crate) const CONTENT_LIMIT_BYTES: usize = BATCH_BLOCKS * BLOCK_BYTES;

/// What is wrong with a batch's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ShapeError {
    #[error("header is truncated")]
    Header,
    #[error("format {0} is unknown")]
    Format(u8),
    #[error("{0} blocks are too many")]
    BlockCount(usize),
    #[error("form {0} is unknown")]
    Form(u8),
    #[error("sub-block {0} doesn't exist")]
    SubBlock(u8),
    #[error("control data is truncated")]
    Control,
    #[error("runs leave their sub-block or lack content")]
    Runs,
    #[error("literals are truncated")]
    Literals,
    #[error("bytes are left over")]
    Excess,
}

impl Header {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        out.push(self.block_count as u8);
        out.extend_from_slice(&self.chain.to_bytes());
    }

    pub(crate) fn take(bytes: &mut &[u8]) -> Result<Self, ShapeError> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ShapeError::Header)?;
        let [format, block_count, chain @ ..] = *header;
        *bytes = rest;
        match usize::from(block_count) {
            _ if format != FORMAT => Err(ShapeError::Format(format)),
            count if count > BATCH_BLOCKS => Err(ShapeError::BlockCount(count)),
            block_count => Ok(Self { block_count, chain: Chain::from_bytes(chain) }),
        }
    }
}

impl Form {
    pub(crate) fn of(sub_forms: &SubForms) -> Self {
        match sub_forms {
            [SubForm::Delta, SubForm::Delta, SubForm::Delta, SubForm::Delta] => Self::Delta,
            [SubForm::Literal, SubForm::Literal, SubForm::Literal, SubForm::Literal] => Self::Literal,
            _ => Self::Mixed,
        }
    }

    fn parse(byte: u8) -> Result<Self, ShapeError> {
        [Self::Zero, Self::Reference, Self::Delta, Self::Literal, Self::Mixed, Self::Dense, Self::Shared]
            .get(usize::from(byte))
            .copied()
            .ok_or(ShapeError::Form(byte))
    }
}

impl SubForm {
    /// Four sub-forms in a byte, two bits each, the first in the lowest.
    fn pack(forms: &SubForms) -> u8 {
        (0..).zip(forms).fold(0, |byte, (position, form)| byte | (*form as u8) << (2 * position))
    }

    fn unpack(byte: u8) -> SubForms {
        let forms = [Self::Zero, Self::Reference, Self::Delta, Self::Literal];
        [0, 2, 4, 6].map(|shift| forms[usize::from(byte >> shift & 3)])
    }
}

impl Columns {
    pub(crate) fn clear(&mut self) {
        self.forms.clear();
        self.kept.clear();
        self.ids.clear();
        self.sub_forms.clear();
        self.references.clear();
        self.slots.clear();
        self.deltas.clear();
        self.literals.clear();
        self.dense.clear();
    }

    pub(crate) fn push(&mut self, id: BlockId, form: Form, sub_forms: SubForms, is_kept: bool) {
        self.ids.push(id);
        self.forms.push(form);
        self.kept.push(is_kept);
        if form == Form::Mixed {
            self.sub_forms.push(sub_forms);
        }
    }

    /// Each block with its form and its sub-blocks' forms; those of blocks that are zero, in a slot or references
    /// as a whole say nothing.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (BlockId, Form, SubForms)> {
        let mut mixed = self.sub_forms.iter();
        self.ids.iter().zip(&self.forms).map(move |(id, form)| {
            let sub_forms = match form {
                Form::Mixed => *mixed.next().unwrap_or(&[SubForm::Zero; SUB_BLOCKS]),
                Form::Delta => [SubForm::Delta; SUB_BLOCKS],
                Form::Literal | Form::Dense => [SubForm::Literal; SUB_BLOCKS],
                Form::Zero | Form::Reference | Form::Shared => [SubForm::Zero; SUB_BLOCKS],
            };
            (*id, *form, sub_forms)
        })
    }

    /// Writes all columns but the XOR bytes and the literals.
    pub(crate) fn put_control(&self, out: &mut Vec<u8>) {
        let marked = |(form, kept): (&Form, &bool)| *form as u8 | if *kept { KEPT } else { 0 };
        out.extend(self.forms.iter().zip(&self.kept).map(marked));
        put_planes(out, steps(self.ids.iter().map(|id| id.0)));
        out.extend(self.sub_forms.iter().map(SubForm::pack));
        put_planes(out, steps(self.references.iter().map(|reference| reference.id.0)));
        out.extend(self.references.iter().map(|reference| reference.sub_block));
        put_planes(out, steps(self.slots.iter().map(|slot| slot.0)));
        out.extend_from_slice(&self.deltas.run_counts);
        put_planes(out, self.deltas.runs.iter().map(|run| run.skip.to_le_bytes()));
        put_planes(out, self.deltas.runs.iter().map(|run| run.length.to_le_bytes()));
    }

    /// Reads what [`put_control`](Self::put_control) wrote for `block_count` blocks.
    pub(crate) fn take_control(&mut self, control: &[u8], block_count: usize) -> Result<(), ShapeError> {
        let mut reader = Reader(control);
        self.clear();
        for byte in reader.take(block_count)? {
            self.forms.push(Form::parse(*byte & !KEPT)?);
            self.kept.push(*byte & KEPT != 0);
        }
        self.ids.extend(unsteps(reader.planes(block_count)?).map(BlockId));
        let mixed = self.forms.iter().filter(|form| **form == Form::Mixed).count();
        self.sub_forms.extend(reader.take(mixed)?.iter().copied().map(SubForm::unpack));
        self.take_references(&mut reader)?;
        let in_slots = self.forms.iter().filter(|form| **form == Form::Shared).count();
        self.slots.extend(unsteps(reader.planes(in_slots)?).map(Slot));
        let delta_count = self.count_sub_blocks(Form::Delta, SubForm::Delta, SUB_BLOCKS);
        self.deltas.run_counts.extend_from_slice(reader.take(delta_count)?);
        let run_count = self.deltas.run_counts.iter().copied().map(usize::from).sum();
        let skips = reader.planes::<2>(run_count)?;
        let lengths = reader.planes::<2>(run_count)?;
        self.deltas.runs.extend(skips.zip(lengths).map(|(skip, length)| Run {
            skip: u16::from_le_bytes(skip),
            length: u16::from_le_bytes(length),
        }));
        reader.finish()
    }

    fn take_references(&mut self, reader: &mut Reader<'_>) -> Result<(), ShapeError> {
        let count = self.count_sub_blocks(Form::Reference, SubForm::Reference, 1);
        let ids = unsteps(reader.planes(count)?).map(BlockId);
        for (id, sub_block) in ids.zip(reader.take(count)?.iter().copied()) {
            match usize::from(sub_block) < SUB_BLOCKS {
                true => self.references.push(Reference { id, sub_block }),
                false => return Err(ShapeError::SubBlock(sub_block)),
            }
        }
        Ok(())
    }

    /// How often a sub-form occurs, where a block of `form` counts for `per_block`.
    fn count_sub_blocks(&self, form: Form, sub_form: SubForm, per_block: usize) -> usize {
        let whole = self.forms.iter().filter(|other| **other == form).count();
        let parts = self.sub_forms.iter().flatten().filter(|other| **other == sub_form).count();
        whole * per_block + parts
    }
}

/// Numbers as differences from the one after the id before, so that sequences become zeros; zigzag, so that small steps
/// back are small numbers too.
fn steps(numbers: impl ExactSizeIterator<Item = u64>) -> impl ExactSizeIterator<Item = [u8; 8]> {
    let mut expected = 0u64;
    numbers.map(move |number| {
        let step = number.wrapping_sub(expected) as i64;
        expected = number.wrapping_add(1);
        (step << 1 ^ step >> 63).to_le_bytes()
    })
}

/// The inverse of [`steps`].
fn unsteps(steps: impl Iterator<Item = [u8; 8]>) -> impl Iterator<Item = u64> {
    let mut expected = 0u64;
    steps.map(move |step| {
        let step = u64::from_le_bytes(step);
        let number = expected.wrapping_add(step >> 1 ^ (step & 1).wrapping_neg());
        expected = number.wrapping_add(1);
        number
    })
}

fn put_planes<const WIDTH: usize>(out: &mut Vec<u8>, values: impl ExactSizeIterator<Item = [u8; WIDTH]>) {
    let (start, count) = (out.len(), values.len());
    out.resize(start + count * WIDTH, 0);
    for (position, value) in values.enumerate() {
        for (plane, byte) in value.into_iter().enumerate() {
            out[start + plane * count + position] = byte;
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ShapeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(ShapeError::Control)?;
        self.0 = rest;
        Ok(taken)
    }

    fn planes<const WIDTH: usize>(
        &mut self,
        count: usize,
    ) -> Result<impl Iterator<Item = [u8; WIDTH]> + use<'a, WIDTH>, ShapeError> {
        let planes = self.take(count * WIDTH)?;
        Ok((0..count).map(move |position| std::array::from_fn(|plane| planes[plane * count + position])))
    }

    fn finish(self) -> Result<(), ShapeError> {
        if self.0.is_empty() { Ok(()) } else { Err(ShapeError::Excess) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_survive_their_steps(numbers: Vec<u64>) {
            prop_assert_eq!(unsteps(steps(numbers.iter().copied())).collect::<Vec<_>>(), numbers);
        }

        #[test]
        fn control_data_is_what_it_was_read_from(control: Vec<u8>, block_count in 0..8usize) {
            let mut columns = Columns::default();
            if columns.take_control(&control, block_count).is_ok() {
                let mut again = Vec::new();
                columns.put_control(&mut again);
                prop_assert_eq!(again, control);
            }
        }

        #[test]
        fn sub_forms_survive_packing(byte: u8) {
            prop_assert_eq!(SubForm::pack(&SubForm::unpack(byte)), byte);
        }
    }

    #[test]
    fn sequences_become_zeros() {
        let zeros = steps([7, 8, 9, 10].into_iter()).skip(1).filter(|step| *step == [0; 8]);
        assert_eq!(zeros.count(), 3);
    }

    #[test]
    fn the_header_has_its_documented_size() {
        let mut bytes = Vec::new();
        Header { block_count: 3, chain: Chain::default() }.put(&mut bytes);
        assert_eq!(bytes.len(), HEADER_BYTES);
    }
}
