use super::*;
use crate::{
    base::BaseOutline,
    geometry::{CHUNK_BYTES, Geometry},
    mapfile::{BaseId, DiskId, Identity},
    record::Boot,
    store::crash_storage::{CrashStorage, Fault},
};

type TestDesk = Desk<CrashStorage>;

fn desk() -> (TestDesk, CrashStorage) {
    let geometry = Geometry::new(8 * CHUNK_BYTES).expect("a good size");
    let identity = Identity { disk: DiskId([3; 16]), base: BaseId([4; 32]), geometry };
    let storage = CrashStorage::new(1);
    let outline = BaseOutline::new(geometry, geometry.chunks());
    let store = Store::create(storage.clone(), identity, outline, Boot([1; 16])).expect("nothing fails");
    (Desk::new(store), storage)
}

fn request(cookie: u64, offset: u64, length: u64, work: Work) -> Request {
    Request { id: RequestId { client: 1, cookie }, offset, length, work }
}

fn write(cookie: u64, offset: u64, bytes: &'static [u8], durable: bool) -> Request {
    request(cookie, offset, bytes.len() as u64, Work::Write { bytes: Bytes::from_static(bytes), durable })
}

/// What was asked of whoever has the desk, in short. Chunks that came are written at once.
fn told(desk: &mut TestDesk) -> Vec<String> {
    let tell = |action: &Action<_>| match action {
        Action::Reply(id, Reply::Failed(errno, _)) => format!("{} {errno:?}", id.cookie),
        Action::Reply(id, Reply::Read(_)) => format!("{} read", id.cookie),
        Action::Reply(id, _) => format!("{} done", id.cookie),
        Action::Fetch(chunk) => format!("fetch {}", chunk.0),
        Action::Fill(fill) => format!("fill {}", fill.chunk().0),
        Action::Sync(_) => "sync".into(),
        Action::SyncJournal(_) => "sync journal".into(),
    };
    let mut told = Vec::new();
    loop {
        let actions = desk.take_actions();
        if actions.is_empty() {
            return told;
        }
        for action in actions {
            match action {
                Action::Fill(fill) => {
                    let written = fill.write();
                    desk.filled(fill, written);
                }
                action => told.push(tell(&action)),
            }
        }
    }
}

fn content(chunk: u32) -> Result<Bytes, FetchFailure> {
    Ok(vec![chunk as u8; CHUNK_BYTES as usize].into())
}

static BLOCK: [u8; 4096] = [9; 4096];

#[test]
fn a_read_waits_for_its_chunks_and_others_go_on() {
    let (mut desk, _) = desk();
    desk.submit(request(1, CHUNK_BYTES - 512, 1024, Work::Read));
    desk.submit(write(2, 2 * CHUNK_BYTES, &BLOCK, false));
    assert_eq!(told(&mut desk), ["fetch 0", "fetch 1", "2 done"]);
    desk.fetched(ChunkIndex(1), content(1));
    assert!(told(&mut desk).is_empty());
    desk.fetched(ChunkIndex(0), content(0));
    assert_eq!(told(&mut desk), ["1 read"]);
    assert!(desk.is_drained());
}

#[test]
fn who_waits_for_one_chunk_is_served_in_order_and_it_is_fetched_once() {
    let (mut desk, _) = desk();
    desk.submit(write(1, 512, &BLOCK[..512], false));
    desk.submit(request(2, 0, 4096, Work::Read));
    desk.submit(request(3, 8192, 512, Work::Read));
    assert_eq!(told(&mut desk), ["fetch 0"]);
    desk.fetched(ChunkIndex(0), content(7));
    assert_eq!(told(&mut desk), ["1 done", "2 read", "3 read"]);
}

#[test]
fn whatever_changes_a_chunk_waits_while_it_is_filled() {
    let (mut desk, _) = desk();
    desk.submit(request(1, 0, 512, Work::Read));
    assert_eq!(told(&mut desk), ["fetch 0"]);
    desk.fetched(ChunkIndex(0), content(7));
    let Some(Action::Fill(fill)) = desk.take_actions().pop() else { panic!("it is to be written") };
    desk.submit(write(2, 8192, &BLOCK, false));
    desk.submit(request(3, CHUNK_BYTES - 4096, 8192, Work::Zero { durable: false }));
    desk.submit(write(4, CHUNK_BYTES, &BLOCK, false));
    assert_eq!(told(&mut desk), ["4 done"]);
    let written = fill.write();
    desk.filled(fill, written);
    assert_eq!(told(&mut desk), ["1 read", "2 done", "3 done"]);
    let mut bytes = [0; 4096];
    assert_eq!(desk.store().read(8192, &mut bytes).expect("nothing fails"), Outcome::Done);
    assert_eq!(bytes, BLOCK);
    assert!(desk.is_drained());
}

#[test]
fn a_chunk_that_cannot_be_had_fails_those_who_wait_for_it_and_nobody_else() {
    let (mut desk, _) = desk();
    desk.submit(request(1, 0, 512, Work::Read));
    desk.submit(request(2, 4 * CHUNK_BYTES, 512, Work::Read));
    desk.fetched(ChunkIndex(0), Err(FetchFailure("it is damaged".into())));
    desk.fetched(ChunkIndex(4), content(4));
    assert_eq!(told(&mut desk), ["fetch 0", "fetch 4", "1 Io", "2 read"]);
    // Who asks again has it fetched again: it may have been mended.
    desk.submit(request(3, 0, 512, Work::Read));
    assert_eq!(told(&mut desk), ["fetch 0"]);
}

#[test]
fn flushes_that_come_while_one_is_under_way_share_the_next() {
    let (mut desk, _) = desk();
    desk.submit(write(1, 0, &BLOCK, false));
    desk.submit(request(2, 0, 0, Work::Flush));
    desk.submit(request(3, 0, 0, Work::Flush));
    desk.submit(write(4, 8192, &BLOCK, true));
    assert_eq!(told(&mut desk), ["1 done", "sync"]);
    desk.data_synced(Ok(()));
    assert_eq!(told(&mut desk), ["sync journal"]);
    desk.journal_synced(Ok(()));
    assert_eq!(told(&mut desk), ["2 done", "sync"]);
    desk.data_synced(Ok(()));
    desk.journal_synced(Ok(()));
    assert_eq!(told(&mut desk), ["sync journal", "3 done", "4 done"]);
    assert!(desk.is_drained());
}

#[test]
fn a_disk_that_cannot_be_synced_takes_no_more_writes() {
    let (mut desk, _) = desk();
    desk.submit(write(1, 0, &BLOCK, true));
    desk.data_synced(Err(std::io::Error::other("the medium")));
    desk.submit(write(2, 0, &BLOCK, false));
    desk.submit(request(3, 0, 0, Work::Flush));
    desk.submit(request(4, 0, 4096, Work::Read));
    assert_eq!(told(&mut desk), ["sync", "1 Io", "2 Io", "3 Io", "4 read"]);
}

#[test]
fn whoever_has_no_control_is_refused_and_may_still_flush() {
    let (mut desk, _) = desk();
    desk.submit(request(1, 0, 512, Work::Read));
    let _ = told(&mut desk);
    desk.set_control(Control::HandingOver);
    desk.submit(write(2, 0, &BLOCK, false));
    desk.submit(request(3, 0, 0, Work::Flush));
    assert_eq!(told(&mut desk), ["1 Shutdown", "2 Shutdown", "sync"]);
    desk.set_control(Control::Here);
    desk.submit(write(4, 0, &BLOCK, false));
    assert_eq!(told(&mut desk), ["4 done"]);
}

#[test]
fn a_full_host_is_told_as_no_space() {
    let (mut desk, storage) = desk();
    storage.fault_at(storage.operations() + 1, Fault::Full);
    desk.submit(write(1, 0, &BLOCK, false));
    desk.submit(write(2, 0, &BLOCK, false));
    assert_eq!(told(&mut desk), ["1 NoSpace", "2 done"]);
}

#[test]
fn a_flush_that_finds_no_space_may_be_tried_again() {
    let (mut desk, storage) = desk();
    desk.submit(write(1, 0, &BLOCK, true));
    desk.submit(request(2, 0, 0, Work::Flush));
    storage.fault_at(storage.operations() + 1, Fault::Full);
    desk.data_synced(Ok(()));
    desk.submit(request(3, 0, 0, Work::Flush));
    desk.data_synced(Ok(()));
    desk.journal_synced(Ok(()));
    assert_eq!(told(&mut desk), ["sync", "1 NoSpace", "2 NoSpace", "sync", "sync journal", "3 done"]);
}

#[test]
fn what_a_client_wanted_goes_with_it() {
    let (mut desk, _) = desk();
    desk.submit(write(1, 512, &BLOCK[..512], false));
    desk.leave(1);
    desk.fetched(ChunkIndex(0), content(0));
    assert_eq!(told(&mut desk), ["fetch 0"]);
    let mut bytes = [1; 512];
    assert_eq!(desk.store().read(512, &mut bytes).expect("nothing fails"), Outcome::Done);
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn what_has_content_is_told_in_few_words() {
    let (mut desk, _) = desk();
    desk.submit(request(1, 0, CHUNK_BYTES, Work::Zero { durable: false }));
    desk.submit(write(2, 8192, &BLOCK, false));
    let _ = told(&mut desk);
    for one in [false, true] {
        desk.submit(request(3, 4096, 2 * CHUNK_BYTES, Work::Status { one }));
    }
    let tell = |action| match action {
        Action::Reply(_, Reply::Status(extents)) => extents,
        other => panic!("{other:?}"),
    };
    let statuses: Vec<_> = desk.take_actions().into_iter().map(tell).collect();
    let (hole, data) = (Allocation::Hole, Allocation::Data);
    let rest = CHUNK_BYTES as u32;
    assert_eq!(statuses[0], [(4096, hole), (4096, data), (rest - 12_288, hole), (rest + 4096, data)]);
    assert_eq!(statuses[1], [(4096, hole)]);
}

#[test]
fn hints_are_fetched_when_nothing_is_urgent() {
    let (mut desk, _) = desk();
    desk.prefetch((0..8).rev().map(ChunkIndex));
    assert_eq!(told(&mut desk), ["fetch 7", "fetch 6", "fetch 5", "fetch 4"]);
    desk.submit(request(1, 0, 512, Work::Read));
    desk.fetched(ChunkIndex(7), content(7));
    desk.fetched(ChunkIndex(6), content(6));
    assert_eq!(told(&mut desk), ["fetch 0", "fetch 3"]);
}
