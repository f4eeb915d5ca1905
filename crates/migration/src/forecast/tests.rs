use proptest::prelude::*;

use super::*;

const TARGET: GateSettings = GateSettings { target_ms: 50.0, patience_ms: 3_000, settle_ms: 150 };
const PLAN: Plan = Plan { gate: TARGET, base_bytes: u64::MAX };

fn medium() -> MemorySample {
    MemorySample {
        pages: 131_072,
        zero_share: 0.6,
        whole_bytes: 2_000.0,
        delta_bytes: 160.0,
        delta_age_ms: 1_000.0,
        dirtying: Dirtying { hot_pages: 100.0, warm_pages: 32_768.0, warm_pages_per_second: 3_000.0 },
    }
}

fn link() -> Link {
    Link { rate_bytes_per_second: 12e6, round_trip_ms: 20.0 }
}

fn foreseen(memory: &MemorySample, link: &Link) -> Course {
    course(memory, link, &PLAN, &Learned::default())
}

/// Readings of a guest of which each interval writes `writes` random pages of `set` sampled ones.
fn readings(set: usize, writes: u64, intervals: u64) -> Vec<Changes> {
    let mut known = vec![false; set];
    let mut interval = |number: u64| {
        let before = known.iter().filter(|known| **known).count() as u64;
        let mut changed = vec![false; set];
        (0..writes).for_each(|write| changed[random(number * writes + write) as usize % set] = true);
        let count = |of: &dyn Fn(usize) -> bool| (0..set).filter(|page| of(*page)).count() as u64;
        let changes = Changes {
            elapsed_ms: 250,
            changed: count(&|page| changed[page]),
            again: count(&|page| changed[page] && known[page]),
            known: before,
        };
        known.iter_mut().zip(changed).for_each(|(known, changed)| *known |= changed);
        changes
    };
    (0..intervals).map(&mut interval).collect()
}

/// The n-th number of SplitMix64.
fn random(index: u64) -> u64 {
    let mut word = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[test]
fn a_working_set_is_found_from_pages_that_change_again() {
    // A quarter of the pages of a guest that writes 8,000 random pages of 32,768 a second.
    let fit = Dirtying::fit(131_072, 32_768, 0, &readings(8_192, 500, 4));
    assert!((fit.warm_pages_per_second / 8_000.0 - 1.0).abs() < 0.1, "{fit:?}");
    assert!((fit.warm_pages / 32_768.0 - 1.0).abs() < 0.25, "{fit:?}");
}

#[test]
fn a_guest_that_writes_nothing_is_seen_to() {
    let quiet = [Changes { elapsed_ms: 250, ..Changes::default() }; 4];
    assert_eq!(Dirtying::fit(65_536, 8_192, 0, &quiet), Dirtying::default());
    assert_eq!(Dirtying::default().distinct_pages(1e9), 0.0);
}

#[test]
fn a_guest_that_outruns_the_link_pauses_for_what_it_writes_while_that_is_sent() {
    let mut memory = medium();
    memory.delta_bytes = 4_000.0;
    memory.whole_bytes = 4_000.0;
    memory.dirtying = Dirtying { hot_pages: 0.0, warm_pages: 10_000.0, warm_pages_per_second: 20_000.0 };
    let pause_ms = foreseen(&memory, &link()).downtime_ms;
    let overhead_ms = 12.0 + 10.0 + 65_536.0 / 12_000.0;
    let send_ms = memory.dirtying.distinct_pages(pause_ms - overhead_ms) * 4_000.0 / 12e3;
    assert!((send_ms - (pause_ms - overhead_ms)).abs() < 1.0, "{pause_ms} {send_ms}");
}

#[test]
fn a_guest_is_slowed_as_much_as_it_takes_and_no_more() {
    assert_eq!(foreseen(&medium(), &link()).share_to_meet, Some(1.0));
    let mut busy = medium();
    busy.delta_bytes = 2_000.0;
    busy.dirtying.warm_pages_per_second = 20_000.0;
    let share = foreseen(&busy, &link()).share_to_meet.unwrap();
    assert!(foreseen(&busy.slowed(share), &link()).downtime_ms <= TARGET.target_ms);
    assert!(foreseen(&busy.slowed(share + 0.01), &link()).downtime_ms > TARGET.target_ms);
    let far = Link { round_trip_ms: 200.0, ..link() };
    assert_eq!(foreseen(&busy, &far).share_to_meet, None);
}

#[test]
fn what_has_no_base_any_more_goes_whole_again() {
    let of =
        |base_bytes| course(&medium(), &link(), &Plan { base_bytes, ..PLAN }, &Learned::default()).wire_bytes;
    let pages = medium().dirtying.distinct_pages(1e3 * medium().first_bytes() / 12e6 / 2.0);
    assert_eq!(of(u64::MAX), of(4096 * 131_072));
    assert!(of(0) - of(u64::MAX) > pages * 1_500.0);
    assert!(of(64 << 20) < of(0) && of(64 << 20) > of(u64::MAX));
}

#[test]
fn what_was_always_twice_as_much_is_corrected_and_one_odd_outcome_is_not() {
    let twice = |count| std::iter::repeat_n((10.0, 20.0), count);
    let range = Correction::learn(twice(30), 0.25).apply(10.0);
    assert!((19.0..20.0).contains(&range.likely), "{range:?}");
    assert!(range.high / range.low < 1.25, "{range:?}");
    let odd = Correction::learn(twice(30).chain([(10.0, 1e6)]), 0.25).apply(10.0);
    assert!((odd.likely / range.likely - 1.0).abs() < 0.01, "{odd:?}");
    let none = Correction::learn([(0.0, 5.0), (5.0, 0.0), (f64::NAN, 1.0)], 0.25).apply(10.0);
    assert_eq!(none.likely, 10.0);
}

#[test]
fn a_score_says_how_far_off_and_how_often_within() {
    let range = Range { low: 8.0, likely: 10.0, high: 12.0 };
    let score = Score::of(&[(range, 10.0), (range, 11.0), (range, 15.0)]);
    assert_eq!((score.count, score.median_width), (3, 0.4));
    assert!(
        (score.median_error - 0.1).abs() < 1e-9 && (score.coverage - 2.0 / 3.0).abs() < 1e-9,
        "{score:?}"
    );
    assert_eq!(Score::of(&[]), Score::default());
}

prop_compose! {
    fn any_memory()(
        pages in 1_u64..10_000_000,
        zero_share in 0.0..1.0,
        whole_bytes in 1.0..4_200.0,
        delta_share in 0.0..1.0,
        hot in 0.0..0.01,
        warm in 0.0..1.0,
        per_second in 0.0..100_000.0,
    ) -> MemorySample {
        let dirtying = Dirtying {
            hot_pages: pages as f64 * hot,
            warm_pages: pages as f64 * warm,
            warm_pages_per_second: per_second,
        };
        let delta_bytes = whole_bytes * delta_share;
        MemorySample { pages, zero_share, whole_bytes, delta_bytes, delta_age_ms: 1_000.0, dirtying }
    }
}

prop_compose! {
    fn any_link()(rate in 1e4..1e10, round_trip_ms in 0.0..500.0) -> Link {
        Link { rate_bytes_per_second: rate, round_trip_ms }
    }
}

fn no_less(more: &Course, less: &Course) -> bool {
    let holds = |more: f64, less: f64| more >= less * (1.0 - 1e-6);
    holds(more.total_ms, less.total_ms)
        && holds(more.wire_bytes, less.wire_bytes)
        && holds(more.downtime_ms, less.downtime_ms)
}

proptest! {
    #[test]
    fn figures_are_finite_and_positive(memory in any_memory(), link in any_link()) {
        let course = foreseen(&memory, &link);
        for figure in [course.total_ms, course.wire_bytes, course.downtime_ms] {
            prop_assert!(figure.is_finite() && figure > 0.0, "{:?}", course);
        }
    }

    #[test]
    fn nothing_is_faster_than_the_link(memory in any_memory(), link in any_link()) {
        let course = foreseen(&memory, &link);
        let whole_bytes = memory.pages as f64 * (1.0 - memory.zero_share) * memory.whole_bytes;
        prop_assert!(course.wire_bytes >= whole_bytes * (1.0 - 1e-6), "{:?}", course);
        prop_assert!(course.total_ms >= whole_bytes / link.rate_bytes_per_second * 1e3, "{:?}", course);
        prop_assert!(course.downtime_ms >= link.round_trip_ms / 2.0, "{:?}", course);
    }

    #[test]
    fn more_to_send_or_a_slower_link_is_never_better(
        memory in any_memory(), link in any_link(), factor in 1.0..10.0
    ) {
        let course = foreseen(&memory, &link);
        let mut larger = memory;
        larger.whole_bytes *= factor;
        prop_assert!(no_less(&foreseen(&larger, &link), &course));
        let mut slower = link;
        slower.rate_bytes_per_second /= factor;
        let slower = foreseen(&memory, &slower);
        prop_assert!(slower.total_ms >= course.total_ms && slower.downtime_ms >= course.downtime_ms);
    }

    #[test]
    fn a_guest_that_writes_more_pages_is_never_faster_moved(
        memory in any_memory(), link in any_link(), factor in 1.0..10.0
    ) {
        let mut busier = memory;
        busier.dirtying.hot_pages *= factor;
        prop_assert!(no_less(&foreseen(&busier, &link), &foreseen(&memory, &link)));
    }

    #[test]
    fn a_fit_is_within_what_there_is(
        total in 1_u64..10_000_000,
        hot in 0_u64..100,
        counts in prop::collection::vec((0_u64..2_000, 0_u64..2_000, 0_u64..4_000), 0..6),
    ) {
        let changes = |&(changed, again, known): &(u64, u64, u64)| {
            Changes { elapsed_ms: 250, changed, again: again.min(changed).min(known), known }
        };
        let changes: Vec<_> = counts.iter().map(changes).collect();
        let fit = Dirtying::fit(total, 8_192, hot, &changes);
        prop_assert!(fit.warm_pages.is_finite() && fit.warm_pages_per_second.is_finite());
        prop_assert!(fit.warm_pages >= 0.0 && fit.warm_pages_per_second >= 0.0);
        prop_assert!(fit.distinct_pages(1e12) <= fit.hot_pages + fit.warm_pages + 1e-6);
    }

    #[test]
    fn an_interval_contains_what_is_likely(
        pairs in prop::collection::vec((0.0..1e6, 0.0..1e6), 0..40), foreseen in 0.0..1e12
    ) {
        let range = Correction::learn(pairs, 0.25).apply(foreseen);
        prop_assert!(range.low <= range.likely && range.likely <= range.high && range.high.is_finite());
    }
}
