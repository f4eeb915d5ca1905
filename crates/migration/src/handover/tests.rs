//! What is easier to read as a transcript than as a property; `tests/handover_model` tries everything else.

use super::*;

const FIRST: Epoch = Epoch(1);

fn source() -> Source {
    Source::new(Record::created().epoch.next(), SourceSettings::new("b"))
}

fn target() -> Target {
    Target::new(None, "a")
}

fn record(state: RecordState) -> Record {
    Record { epoch: FIRST, state }
}

/// Short forms of actions, so that transcripts fit on lines.
fn brief(actions: &[Action]) -> Vec<String> {
    let one = |action: &Action| match action {
        Action::Persist { record, sync } => {
            let json = serde_json::to_value(record).unwrap();
            format!("{} {sync:?}", json["state"].as_str().unwrap())
        }
        Action::Send(message) => serde_json::to_value(message).unwrap()["say"].as_str().unwrap().into(),
        Action::SendToken { .. } => "token".into(),
        Action::Report(outcome) => format!("{outcome:?}").split([' ', '{']).next().unwrap().into(),
        other => format!("{other:?}"),
    };
    actions.iter().map(one).collect()
}

fn opened_source() -> Source {
    let mut source = source();
    source.apply(SourceEvent::TargetReady);
    source.apply(SourceEvent::PeerSays(Message::HandoverOpened { epoch: FIRST }));
    source
}

fn given_source(run_state: RunState) -> Source {
    let mut source = opened_source();
    source.apply(SourceEvent::Decided);
    source.apply(SourceEvent::Stopped { run_state });
    source.apply(SourceEvent::StateFlushed);
    source
}

fn loading_target(run_state: RunState, leave_paused: bool) -> Target {
    let mut target = target();
    target.apply(TargetEvent::PeerSays(Message::OpenHandover { epoch: FIRST }));
    target.apply(TargetEvent::TokenReceived { epoch: FIRST, run_state, leave_paused });
    target.apply(TargetEvent::Verified);
    target
}

#[test]
fn a_source_gives_the_machine_away_in_four_steps() {
    let mut source = source();
    assert_eq!(
        brief(&source.apply(SourceEvent::Decided)),
        [""; 0],
        "the gate stays shut until both have it on disk"
    );
    assert_eq!(brief(&source.apply(SourceEvent::TargetReady)), ["offered Before", "open_handover"]);
    source.apply(SourceEvent::PeerSays(Message::HandoverOpened { epoch: FIRST }));
    assert!(source.is_ready());
    assert_eq!(brief(&source.apply(SourceEvent::Decided)), ["OpenGate"]);
    let run_state = RunState::Running;
    assert_eq!(brief(&source.apply(SourceEvent::Stopped { run_state })), ["offered Behind", "AnswerShut"]);
    assert_eq!(brief(&source.apply(SourceEvent::StateFlushed)), ["given_away Behind", "token"]);
    assert!(source.has_given_away());
    let taken = Message::Taken { epoch: FIRST, resumed_unix_us: Some(7) };
    assert_eq!(
        brief(&source.apply(SourceEvent::PeerSays(taken))),
        ["given_away Behind", "KillQemu", "HandedOver"]
    );
    assert!(source.is_settled());
}

/// Its operator paused the guest after it was asked what it does, and before QEMU stopped it.
#[test]
fn what_the_guest_did_may_become_known_better_until_the_token_leaves() {
    let mut source = source();
    source.apply(SourceEvent::TargetReady);
    source.apply(SourceEvent::PeerSays(Message::HandoverOpened { epoch: FIRST }));
    source.apply(SourceEvent::Decided);
    source.apply(SourceEvent::Stopped { run_state: RunState::Running });
    let paused = SourceEvent::Stopped { run_state: RunState::Paused };
    assert_eq!(brief(&source.apply(paused.clone())), ["offered Behind"]);
    assert_eq!(brief(&source.apply(paused)), [""; 0]);
    let actions = source.apply(SourceEvent::StateFlushed);
    assert!(matches!(actions[1], Action::SendToken { run_state: RunState::Paused, .. }), "{actions:?}");
    assert_eq!(brief(&source.apply(SourceEvent::Stopped { run_state: RunState::Running })), [""; 0]);
    assert!(source.has_given_away());
}

#[test]
fn a_target_runs_the_guest_when_loaded_and_synced() {
    let mut target = target();
    let open = TargetEvent::PeerSays(Message::OpenHandover { epoch: FIRST });
    assert_eq!(brief(&target.apply(open)), ["awaited Before", "handover_opened"]);
    let token =
        TargetEvent::TokenReceived { epoch: FIRST, run_state: RunState::Running, leave_paused: false };
    assert_eq!(brief(&target.apply(token)), ["Verify"]);
    assert_eq!(brief(&target.apply(TargetEvent::Verified)), ["taking Behind", "Load"]);
    assert_eq!(brief(&target.apply(TargetEvent::Loaded)), [""; 0]);
    assert_eq!(brief(&target.apply(TargetEvent::Synced)), ["mine Behind", "ContinueGuest"]);
    assert!(!target.may_refuse());
    let running = TargetEvent::GuestRunning { resumed_unix_us: Some(7) };
    assert_eq!(brief(&target.apply(running)), ["owner Behind", "taken", "Taken"]);
}

#[test]
fn only_a_guest_that_ran_is_continued() {
    for (run_state, leave_paused, continues) in [
        (RunState::Running, false, true),
        (RunState::Suspended, false, true),
        (RunState::Running, true, false),
        (RunState::Paused, false, false),
        (RunState::IoError, false, false),
        (RunState::Panicked, false, false),
    ] {
        let mut target = loading_target(run_state, leave_paused);
        target.apply(TargetEvent::Loaded);
        let actions = target.apply(TargetEvent::Synced);
        assert_eq!(actions.contains(&Action::ContinueGuest), continues, "{run_state:?} {leave_paused}");
    }
    for (run_state, continues) in [(RunState::Running, true), (RunState::Paused, false)] {
        let refused = Message::Refused { epoch: FIRST, reason: "no".into() };
        let actions = given_source(run_state).apply(SourceEvent::PeerSays(refused));
        assert_eq!(actions.contains(&Action::ContinueGuest), continues, "{run_state:?}");
    }
}

#[test]
fn a_refusal_is_on_disk_and_the_guest_dead_before_it_is_said() {
    let mut target = loading_target(RunState::Running, false);
    target.apply(TargetEvent::Loaded);
    target.apply(TargetEvent::Synced);
    let actions = target.apply(TargetEvent::ContFailed { reason: "disk is locked".into() });
    assert_eq!(brief(&actions), ["refused Before", "KillQemu", "refused", "Refused"]);
}

#[test]
fn silence_is_asked_about_then_reported_and_still_ends() {
    let mut source = given_source(RunState::Running);
    for _ in 0..5 {
        assert_eq!(brief(&source.apply(SourceEvent::Timeout)), ["query"]);
    }
    assert_eq!(brief(&source.apply(SourceEvent::Timeout)), ["Unsettled"]);
    assert_eq!(brief(&source.apply(SourceEvent::Timeout)), [""; 0]);
    assert_eq!(brief(&source.apply(SourceEvent::LinkRestored)), ["query"]);
    let refused = Message::Refused { epoch: FIRST, reason: "never heard of it".into() };
    let actions = source.apply(SourceEvent::PeerSays(refused));
    assert_eq!(brief(&actions), ["ContinueGuest", "owner Behind", "TakenBack"]);
}

#[test]
fn a_cancelled_stop_is_undone_before_it_is_recorded() {
    let mut source = opened_source();
    source.apply(SourceEvent::Decided);
    source.apply(SourceEvent::Stopped { run_state: RunState::Running });
    let actions = source.apply(SourceEvent::Abort { reason: "operator".into() });
    assert_eq!(brief(&actions), ["AbortMigration", "cancel", "ContinueGuest", "owner Behind", "TakenBack"]);
}

#[test]
fn a_target_that_knows_nothing_refuses_durably_and_for_ever() {
    let mut target = target();
    let query = TargetEvent::PeerSays(Message::Query { epoch: FIRST });
    assert_eq!(brief(&target.apply(query)), ["refused Before", "KillQemu", "refused", "Refused"]);
    let late = TargetEvent::PeerSays(Message::OpenHandover { epoch: FIRST });
    assert_eq!(brief(&target.apply(late)), ["refused"]);
}

#[test]
fn a_machine_that_lives_here_is_not_overwritten() {
    let mut target = Target::new(Some(Record::created()), "a");
    for message in [Message::OpenHandover { epoch: FIRST }, Message::Query { epoch: FIRST }] {
        assert_eq!(brief(&target.apply(TargetEvent::PeerSays(message))), ["refused"]);
    }
}

#[test]
fn records_say_who_may_run() {
    let peer = || String::from("b");
    let (granted, ask) = (Permission::Granted, Permission::AskFirst { peer: "b" });
    let denied = Permission::Denied { holder: "b" };
    let given = |settled| RecordState::GivenAway { peer: peer(), run_state: RunState::Running, settled };
    for (state, same_boot, rebooted) in [
        (RecordState::Owner { peer: None }, granted, granted),
        (RecordState::Offered { peer: peer(), stopped: None }, granted, ask),
        (given(false), ask, ask),
        (given(true), denied, denied),
        (RecordState::Awaited { peer: peer() }, denied, denied),
        (RecordState::Taking { peer: peer(), start: true }, denied, granted),
        (RecordState::Mine { peer: peer() }, granted, granted),
        (RecordState::Refused { peer: peer() }, denied, denied),
    ] {
        let record = record(state);
        assert_eq!((record.may_run(false), record.may_run(true)), (same_boot, rebooted), "{record:?}");
    }
}

#[test]
fn records_survive_their_file() {
    let record = record(RecordState::Offered { peer: "b".into(), stopped: Some(RunState::IoError) });
    let json = serde_json::to_string(&record).unwrap();
    assert_eq!(json, r#"{"epoch":1,"state":"offered","peer":"b","stopped":"io-error"}"#);
    assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record);
}

#[test]
fn a_source_whose_link_is_gone_for_good_says_so_at_once_and_still_hears() {
    let mut source = given_source(RunState::Running);
    assert_eq!(brief(&source.apply(SourceEvent::LinkLost)), ["Unsettled"]);
    assert_eq!(brief(&source.apply(SourceEvent::Timeout)), [""; 0]);
    let taken = Message::Taken { epoch: FIRST, resumed_unix_us: None };
    let actions = source.apply(SourceEvent::PeerSays(taken));
    assert_eq!(brief(&actions), ["given_away Behind", "KillQemu", "HandedOver"]);
}

#[test]
fn a_lost_host_ends_its_copy_durably_before_it_says_so() {
    let peer = || String::from("a");
    let reclaimed =
        record(RecordState::GivenAway { peer: "b".into(), run_state: RunState::Running, settled: false })
            .reclaimed();
    assert_eq!(reclaimed.may_run(true), Permission::Granted);
    let order = || TargetEvent::PeerSays(Message::StandDown { epoch: reclaimed.epoch });
    for state in [
        RecordState::Owner { peer: Some(peer()) },
        RecordState::Mine { peer: peer() },
        RecordState::Taking { peer: peer(), start: true },
        RecordState::Awaited { peer: peer() },
        RecordState::Offered { peer: peer(), stopped: None },
    ] {
        let mut lost = Target::new(Some(record(state)), "a");
        let actions = lost.apply(order());
        assert_eq!(brief(&actions), ["refused Before", "KillQemu", "stood_down", "Refused"]);
        let Action::Persist { record, .. } = &actions[0] else { panic!("{actions:?}") };
        assert_eq!(record.may_run(true), Permission::Denied { holder: "a" });
        // Asked again, it says so again; a token or an order of before means nothing to it.
        let mut again = Target::new(Some(record.clone()), "a");
        assert_eq!(brief(&again.apply(order()))[2], "stood_down");
        let older = TargetEvent::PeerSays(Message::StandDown { epoch: FIRST });
        assert_eq!(brief(&again.apply(older)), [""; 0]);
    }
}

#[test]
fn a_host_that_has_taken_over_does_not_stand_down_for_its_own_epoch() {
    let owner = record(RecordState::Owner { peer: Some("b".into()) });
    let mut target = Target::new(Some(owner), "b");
    assert_eq!(brief(&target.apply(TargetEvent::PeerSays(Message::StandDown { epoch: FIRST }))), [""; 0]);
}
