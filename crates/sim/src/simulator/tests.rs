use super::*;

fn run_all(seeds: std::ops::Range<u64>) -> Account {
    let mut all = Account::default();
    for seed in seeds {
        all += run(seed, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
    println!("{all:?}");
    all
}

#[test]
fn one_copy_runs_whatever_fails() {
    let all = run_all(0..200);
    assert!(all.completed > 0 && all.rolled_back > 0 && all.died_with_owner > 0, "{all:?}");
}

#[test]
#[ignore = "takes minutes: cargo xtask test --long"]
fn one_copy_runs_in_ten_thousand_migrations() {
    let all = run_all(1_000_000..1_006_000);
    assert!(all.migrations >= 10_000, "{all:?}");
}

#[test]
fn a_seed_is_always_the_same_story() {
    for seed in 0..20 {
        assert_eq!(trace(seed, None), trace(seed, None), "seed {seed}");
    }
}

/// The first seed whose migration breaks what the guard is for.
fn notice(sabotage: Sabotage, seeds: u64) {
    let expected = violates(sabotage);
    let violation = |seed| World::new(seed, Some(sabotage), false).run().err();
    let mut violations = (0..seeds).filter_map(|seed| Some((seed, violation(seed)?)));
    let noticed = violations.find(|(_, violation)| violation.contains(expected));
    let (seed, violation) = noticed.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed"));
    println!("{sabotage:?}: seed {seed}: {violation}");
}

#[test]
fn sabotage_is_noticed_by_what_its_guard_is_for() {
    for sabotage in [
        Sabotage::PageDropped,
        Sabotage::GivenAwayUnrecorded,
        Sabotage::SourceContinuesUnanswered,
        Sabotage::SourceKillsEarly,
        Sabotage::SourceForgetsToAsk,
        Sabotage::PausedGuestWoken,
    ] {
        notice(sabotage, 1_000);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask test --long"]
fn every_sabotage_is_noticed_by_what_its_guard_is_for() {
    Sabotage::ALL.into_iter().for_each(|sabotage| notice(sabotage, 40_000));
}

fn violates(sabotage: Sabotage) -> &'static str {
    match sabotage {
        Sabotage::PageDropped => "an incomplete copy: pages",
        Sabotage::SourceContinuesUnanswered => "two copies run",
        Sabotage::RefusalUnrecorded | Sabotage::GivenAwayUnrecorded | Sabotage::OfferedUnsynced => {
            "two hosts may start"
        }
        Sabotage::TargetRefusesAlive => "beside the running one",
        Sabotage::TakingUnrecorded => "steps goes on from",
        Sabotage::TargetStartsByItself
        | Sabotage::MineUnrecorded
        | Sabotage::SourceKillsEarly
        | Sabotage::SaidUnrecorded => "ends the last complete copy",
        Sabotage::SourceForgetsToAsk => "it doesn't settle",
        Sabotage::PausedGuestWoken => "was to stay paused",
    }
}
