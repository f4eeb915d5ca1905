//! The store against bytes in memory, to the byte.

use proptest::prelude::*;

use super::{DATA_FILE, Outcome, Source, Store, crash_storage::CrashStorage};
use crate::{
    base::BaseOutline,
    geometry::{Blocks, CHUNK_BYTES, ChunkIndex, Geometry},
    map::ChunkState,
    mapfile::{BaseId, DiskId, Identity, MapFile},
    record::{Boot, Event, Record},
    storage::{Storage, StorageFile},
};

const SIZE_BYTES: u64 = 2 * CHUNK_BYTES + 3 * 4096 + 512;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Discard(u64, u64),
    Read(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || {
        (0..SIZE_BYTES, prop_oneof![1..600_u64, 1..10_000_u64, 1..300_000_u64])
            .prop_map(|(offset, length)| (offset, length.min(SIZE_BYTES - offset)))
    };
    let step = prop_oneof![
        (range(), any::<u8>()).prop_map(|((offset, length), byte)| {
            Step::Write(offset, (0..length).map(|index| byte.wrapping_add((index % 251) as u8)).collect())
        }),
        range().prop_map(|(offset, length)| Step::Zero(offset, length)),
        range().prop_map(|(offset, length)| Step::Discard(offset, length)),
        range().prop_map(|(offset, length)| Step::Read(offset, length)),
    ];
    prop::collection::vec(step, 1..30)
}

fn base_byte(at: u64) -> u8 {
    // The second chunk of the base is zero.
    if (CHUNK_BYTES..2 * CHUNK_BYTES).contains(&at) { 0 } else { (at % 241) as u8 + 1 }
}

fn fill(store: &mut Store<CrashStorage>, chunk: ChunkIndex) {
    let length = u64::from(store.geometry().chunk_bytes(chunk));
    let content: Vec<u8> = (chunk.offset()..chunk.offset() + length).map(base_byte).collect();
    assert_eq!(store.fill(chunk, &content).expect("nothing fails"), Outcome::Done);
}

fn until_done(store: &mut Store<CrashStorage>, mut request: impl FnMut(&mut Store<CrashStorage>) -> Outcome) {
    for _ in 0..9 {
        match request(store) {
            Outcome::Done => return,
            Outcome::NeedsBase(chunk) => fill(store, chunk),
            Outcome::NeedsFlush => store.flush().expect("nothing fails"),
        }
    }
    panic!("a request waits for more chunks than the disk has");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_is_read_is_what_was_written(steps in steps()) {
        let geometry = Geometry::new(SIZE_BYTES).expect("a good size");
        let identity = Identity { disk: DiskId([7; 16]), base: BaseId([8; 32]), geometry };
        let outline = BaseOutline::new(geometry, [ChunkIndex(0), ChunkIndex(2)].into_iter());
        let mut store =
            Store::create(CrashStorage::new(1), identity, outline, Boot([1; 16])).expect("nothing fails");
        let mut model: Vec<u8> = (0..SIZE_BYTES).map(base_byte).collect();
        for step in steps {
            match step {
                Step::Write(offset, bytes) => {
                    until_done(&mut store, |store| store.write(offset, &bytes).expect("nothing fails"));
                    model[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                Step::Zero(offset, length) => {
                    until_done(&mut store, |store| store.zero(offset, length).expect("nothing fails"));
                    model[offset as usize..][..length as usize].fill(0);
                }
                Step::Discard(offset, length) => {
                    until_done(&mut store, |store| store.discard(offset, length).expect("nothing fails"));
                    let end = offset + length;
                    let end = if end == SIZE_BYTES { end } else { end / 4096 * 4096 };
                    let start = offset.next_multiple_of(4096);
                    if start < end {
                        model[start as usize..end as usize].fill(0);
                    }
                }
                Step::Read(offset, length) => {
                    let mut bytes = vec![0; length as usize];
                    until_done(&mut store, |store| store.read(offset, &mut bytes).expect("nothing fails"));
                    prop_assert_eq!(&bytes, &model[offset as usize..][..length as usize]);
                }
            }
        }
        let mut bytes = vec![0; SIZE_BYTES as usize];
        until_done(&mut store, |store| store.read(0, &mut bytes).expect("nothing fails"));
        prop_assert_eq!(bytes, model);
        let tally = store.tally();
        prop_assert_eq!(tally.base + tally.fetched + tally.written + tally.zero, SIZE_BYTES.div_ceil(4096));
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    let event = prop_oneof![
        any::<u64>().prop_map(Event::Written),
        Just(Event::Zeroed),
        Just(Event::Fetched),
        Just(Event::Forgotten)
    ];
    let change =
        |(chunk, blocks, event)| Record::Change { chunk: ChunkIndex(chunk), blocks: Blocks(blocks), event };
    prop_oneof![
        8 => (0..4_u32, any::<u64>(), event).prop_map(change),
        1 => (0..20_u64, 0..20_u64).prop_map(|(through, durable)| Record::Sealed { through, durable }),
        1 => (0..3_u8).prop_map(|boot| Record::Opened(Boot([boot; 16]))),
        1 => Just(Record::Closed),
    ]
}

proptest! {
    #[test]
    fn whatever_a_map_says_it_is_opened_or_refused(
        records in prop::collection::vec(any_record(), 0..20),
        states: [(u64, u64); 3],
    ) {
        let geometry = Geometry::new(SIZE_BYTES).expect("a good size");
        let identity = Identity { disk: DiskId([7; 16]), base: BaseId([8; 32]), geometry };
        let storage = CrashStorage::new(1);
        let data = storage.create(DATA_FILE).expect("nothing fails");
        data.set_length(SIZE_BYTES).expect("nothing fails");
        let file = storage.create("map.3").expect("nothing fails");
        let in_disk = |(chunk, (present, own)): (ChunkIndex, (u64, u64))| {
            let blocks = geometry.blocks(chunk).0;
            ChunkState::from_bits(present & blocks, own & blocks)
        };
        let states = geometry.chunks().zip(states).map(in_disk);
        MapFile::write(file, 3, &identity, states, records.into_iter()).expect("nothing fails");
        let outline = BaseOutline::new(geometry, geometry.chunks());
        if let Ok((mut store, _)) = Store::open(storage, Boot([1; 16]), |_| Ok(outline)) {
            let mut bytes = vec![0; SIZE_BYTES as usize];
            until_done(&mut store, |store| store.zero(100, 300_000).expect("nothing fails"));
            until_done(&mut store, |store| store.read(0, &mut bytes).expect("nothing fails"));
            store.close().expect("nothing fails");
        }
    }
}

#[test]
fn a_whole_block_is_written_without_fetching_its_chunk() {
    let geometry = Geometry::new(SIZE_BYTES).expect("a good size");
    let identity = Identity { disk: DiskId([7; 16]), base: BaseId([8; 32]), geometry };
    let outline = BaseOutline::new(geometry, geometry.chunks());
    let mut store =
        Store::create(CrashStorage::new(1), identity, outline, Boot([1; 16])).expect("nothing fails");

    assert_eq!(store.write(4096, &[1; 4096]).expect("nothing fails"), Outcome::Done);
    assert_eq!(store.write(0, &[1; 512]).expect("nothing fails"), Outcome::NeedsBase(ChunkIndex(0)));

    let extents: Vec<_> = store.extents(0, 12_288).map(|extent| (extent.length, extent.source)).collect();
    let base = Source::Base(ChunkIndex(0));
    assert_eq!(extents, [(4096, base), (4096, Source::File), (4096, base)]);
}
