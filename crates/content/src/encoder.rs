//! The sequential half of the source: which form each block takes.

use serde::{Deserialize, Serialize};

use crate::bases::{Bases, Keys, Reference, Seen};
use crate::batch::SubForm;
use crate::digest::{self, Chain, Digests, Link};
use crate::draft::{BlockOutline, Draft, Outline};
use crate::held::Held;
use crate::shared::{ContentDigest, SharedIndex};
use crate::{BATCH_BLOCKS, BLOCK_BYTES, Block, BlockId, BlockVersion, SUB_BLOCKS, is_zero, sub_blocks};

/// The bounds of an [`Encoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderLimits {
    /// Memory for what was last sent, pages and tables together, in bytes. Where it gets short, pages are kept
    /// compressed. With little or none, re-sent blocks cost as much as new ones; nothing else changes.
    pub base_bytes: usize,
    /// zstd's level, negative ones included; 0 is zstd's default.
    pub level: i32,
}

/// Which techniques an [`Encoder`] may use. All are on by default; switching them off is for measuring them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Techniques {
    /// Zero blocks, and zero sub-blocks, cost nothing.
    pub zero: bool,
    /// A block that the target has elsewhere is named.
    pub reference: bool,
    /// A block that the target has of another guest is named.
    pub shared: bool,
    /// A sub-block that the target has elsewhere is named.
    pub sub_block: bool,
    /// Of a block that was sent before, what changed is sent.
    pub delta: bool,
    /// zstd over what is left.
    pub compress: bool,
}

impl Techniques {
    /// Every technique.
    pub const ALL: Self =
        Self { zero: true, reference: true, shared: true, sub_block: true, delta: true, compress: true };
    /// None: every block is sent as it is.
    pub const NONE: Self = Self {
        zero: false,
        reference: false,
        shared: false,
        sub_block: false,
        delta: false,
        compress: false,
    };
}

impl Default for Techniques {
    fn default() -> Self {
        Self::ALL
    }
}

/// The source's half of the engine: turns versions of blocks into [`Draft`]s, in the order in which the target will
/// decode them.
///
/// Drafts must be sealed and sent all, in order: the encoder takes it that the target has what it drafted. After a
/// session that lost one, start with a new encoder and a new [`Decoder`](crate::Decoder).
pub struct Encoder {
    bases: Bases,
    chain: Chain,
    link: Link,
    level: i32,
    techniques: Techniques,
    key_of: fn(u128) -> u64,
    held: Held,
    shared: SharedIndex,
}

/// A reference's share of the control section, about: a longer delta gives way to it. A delta with a run is longer.
const REFERENCE_BYTES: usize = 4;

impl Encoder {
    /// An encoder that has sent nothing yet, with all techniques on.
    pub fn new(limits: EncoderLimits) -> Self {
        Self::with_keys(limits, |digest| digest as u64)
    }

    /// `key_of` makes the content index's keys; tests give one that collides.
    pub(crate) fn with_keys(limits: EncoderLimits, key_of: fn(u128) -> u64) -> Self {
        Self {
            bases: Bases::new(limits.base_bytes),
            chain: Chain::default(),
            link: Link::default(),
            level: limits.level,
            techniques: Techniques::ALL,
            key_of,
            held: Held::default(),
            shared: SharedIndex::default(),
        }
    }

    /// What the target holds already, from an earlier session. To be said before anything is drafted.
    pub fn assume_held(&mut self, held: Held) {
        self.held = held;
    }

    /// What the target holds of all guests that come from this host; empty, and not added to, unless the caller sees to
    /// both.
    pub fn shared_index(&mut self) -> &mut SharedIndex {
        &mut self.shared
    }

    /// Chooses zstd's level for the drafts that follow.
    pub fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Chooses the techniques for the drafts that follow.
    pub fn set_techniques(&mut self, techniques: Techniques) {
        self.techniques = techniques;
    }

    /// Memory in use for what was last sent, zstd's own aside; never more than [`EncoderLimits::base_bytes`] (but for a
    /// few hundred bytes if that is less).
    pub fn cached_bytes(&self) -> usize {
        self.bases.memory_bytes()
    }

    /// The running digest of everything drafted. Equals [`Decoder::chain`](crate::Decoder::chain) when the target
    /// has decoded all of it.
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// Whether the version last sent of a block is kept.
    pub(crate) fn has_base(&self, id: BlockId) -> bool {
        self.bases.holds(id)
    }

    /// Decides the form of up to [`BATCH_BLOCKS`] blocks, whose `contents` follow each other in the order of
    /// `versions`. Takes the contents over, so give a vector to save a copy. A block may occur more than once.
    ///
    /// # Panics
    /// If there are more than [`BATCH_BLOCKS`] versions, or not [`BLOCK_BYTES`] of contents for each.
    pub fn draft(&mut self, versions: &[BlockVersion], contents: impl Into<Vec<u8>>) -> Draft {
        let contents = contents.into();
        assert!(versions.len() <= BATCH_BLOCKS, "{} blocks do not fit a batch", versions.len());
        assert_eq!(contents.len(), versions.len() * BLOCK_BYTES, "contents of {} blocks", versions.len());
        let mut outline = Outline::default();
        self.link.start(self.chain);
        for (version, content) in versions.iter().zip(contents.as_chunks().0) {
            let block = self.outline(*version, content, &mut outline);
            outline.blocks.push(block);
        }
        self.chain = self.link.finish();
        let level = self.techniques.compress.then_some(self.level);
        let mut draft = Draft { contents, outline, chain: self.chain, level };
        if draft.weight_bytes() == 0 {
            // Many such drafts may wait, so that none keeps 256 KiB of zeros.
            draft.contents = Vec::new();
        }
        draft
    }

    /// The order of techniques that did best: zero, seen before, seen in another guest, delta, literal.
    fn outline(&mut self, version: BlockVersion, content: &Block, outline: &mut Outline) -> BlockOutline {
        if self.techniques.zero && is_zero(content) {
            self.held.take(version.id, content);
            self.bases.forget(version.id);
            self.link.push(version.id, &digest::zero_digests());
            return BlockOutline::zero(version.id);
        }
        let digests = digest::digests(content);
        self.link.push(version.id, &digests);
        let mut keys = self.keys(&digests);
        let held = self.held.take(version.id, content);
        if held == [true; SUB_BLOCKS] {
            self.bases.keep(version, content, &keys);
            outline.references.push(Reference { id: version.id, sub_block: 0 });
            return BlockOutline::reference(version.id);
        }
        let mut seen = self.bases.find(content, &keys);
        if let Some(id) = seen.whole.filter(|_| self.techniques.reference) {
            self.keep_repeated(version, content);
            outline.references.push(Reference { id, sub_block: 0 });
            return BlockOutline::reference(version.id);
        }
        let digest = self.digest_for_others(version, content);
        if let Some(slot) = digest.and_then(|digest| self.shared.find(&digest)) {
            self.bases.keep(version, content, &keys);
            outline.slots.push(slot);
            return BlockOutline::shared(version.id);
        }
        for (sub_block, _) in (0..).zip(held).filter(|(_, held)| *held) {
            seen.sub_blocks[usize::from(sub_block)] = Some(Reference { id: version.id, sub_block });
        }
        let mut block = self.outline_sub_blocks(version, content, &seen, outline);
        if let Some(digest) = digest.filter(|_| self.shared.is_growing()) {
            outline.kept.push(digest);
            block.is_kept = true;
        }
        keys.iter_mut()
            .zip(&seen.sub_blocks)
            .filter(|(_, seen)| seen.is_some())
            .for_each(|(key, _)| *key = None);
        self.bases.keep(version, content, &keys);
        block
    }

    fn outline_sub_blocks(
        &mut self,
        version: BlockVersion,
        content: &Block,
        seen: &Seen,
        outline: &mut Outline,
    ) -> BlockOutline {
        let mut block = BlockOutline::literal(version.id);
        let techniques = self.techniques;
        let base = self.bases.get(version.id).filter(|_| techniques.delta).map(sub_blocks);
        for (position, new) in sub_blocks(content).iter().enumerate() {
            if techniques.zero && techniques.sub_block && is_zero(new) {
                block.sub_forms[position] = SubForm::Zero;
                continue;
            }
            let delta_cost = base.and_then(|base| outline.deltas.push(&base[position], new));
            let seen = seen.sub_blocks[position].filter(|_| techniques.sub_block);
            block.sub_forms[position] = match (seen, delta_cost) {
                (Some(reference), cost) if cost.is_none_or(|cost| cost > REFERENCE_BYTES) => {
                    cost.inspect(|_| outline.deltas.pop());
                    outline.references.push(reference);
                    SubForm::Reference
                }
                (_, Some(cost)) => {
                    block.delta_cost += cost;
                    SubForm::Delta
                }
                (_, None) => SubForm::Literal,
            };
        }
        block
    }

    /// The digest by which other guests find a block, if that is of use. A hot block isn't: it won't stay what it is.
    fn digest_for_others(&self, version: BlockVersion, content: &Block) -> Option<ContentDigest> {
        let is_of_use = self.techniques.shared && !version.hot && self.shared.is_in_use();
        is_of_use.then(|| ContentDigest::of(content))
    }

    /// A repeated block is found again through the one that it repeats, so it needs room of its own only as a base.
    fn keep_repeated(&mut self, version: BlockVersion, content: &Block) {
        if version.hot || self.bases.holds(version.id) {
            self.bases.keep(version, content, &[None; SUB_BLOCKS]);
        }
    }

    fn keys(&self, digests: &Digests) -> Keys {
        if !self.techniques.reference && !self.techniques.sub_block {
            return [None; SUB_BLOCKS];
        }
        let zero = digest::zero_digests()[0];
        digests.map(|digest| (digest != zero || !self.techniques.zero).then(|| (self.key_of)(digest)))
    }
}
