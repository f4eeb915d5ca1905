//! What QEMU gives a guest of a processor, by its own account.

use godwit_qemu::{
    processor::{Outline, Processor, ProcessorMismatch},
    qmp::RunState,
};

use crate::qemu::{Qemu, directory};

/// A machine with this processor, waiting for a migration or not.
async fn processor(cpu: &str, more: &str) -> Processor {
    both(cpu, more).await.0
}

/// The same with its outline.
async fn both(cpu: &str, more: &str) -> (Processor, Outline) {
    let place = directory();
    let line = format!("-M pc -accel tcg -m 16 -nodefaults -display none -S -cpu {cpu} {more}");
    let qemu = Qemu::by_hand(place.path(), &line);
    let client = qemu.client().await;
    let expected = if more.is_empty() { RunState::Prelaunch } else { RunState::Inmigrate };
    assert_eq!(client.query_status().await.unwrap().state, expected);
    let outline = Outline::of(&client).await.unwrap().expect("nothing but an emulator was asked for");
    (Processor::of(&client).await.unwrap(), outline)
}

/// Whatever differs in detail differs in outline.
#[tokio::test]
async fn an_outline_tells_processors_apart() {
    let (here, outline) = both("qemu64", "").await;
    let (twin, same) = both("qemu64", "-incoming defer").await;
    assert_eq!((&here, &outline), (&twin, &same));
    for other in ["qemu64,+aes", "qemu64,-nx", "qemu64,phys-bits=42", "qemu64,vendor=GenuineIntel", "max"] {
        let (processor, other_outline) = both(other, "").await;
        assert_ne!((&here, &outline), (&processor, &other_outline), "{other}");
        assert_ne!(outline, other_outline, "{other}");
    }
}

#[tokio::test]
async fn a_waiting_twin_has_the_same() {
    let here = processor("qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes", "").await;
    assert_eq!(here, processor("qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes", "-incoming defer").await);
    assert!(!here.kvm && here.physical_address_bits == 40, "{here:?}");
    for name in ["fpu", "sse4.2", "aes", "nx", "lm"] {
        assert!(here.features.contains(name), "{name}: {here:?}");
    }
    assert!(!here.features.contains("avx2"), "{here:?}");
}

#[tokio::test]
async fn less_is_named_and_more_is_fine() {
    let (plain, all) = (processor("qemu64", "").await, processor("max,vendor=AuthenticAMD", "").await);
    plain.check_replacement(&all).unwrap();
    match all.check_replacement(&plain) {
        Err(ProcessorMismatch::Features(lacking)) => assert!(lacking.contains("avx2"), "{lacking:?}"),
        other => panic!("{other:?}"),
    }
}

/// TCG has no AVX-512: QEMU says so in its log, starts the machine nevertheless, and both ends have the same.
#[tokio::test]
async fn what_qemu_took_away_is_not_there() {
    let given = processor("qemu64,+avx512f", "").await;
    assert_eq!(given, processor("qemu64", "").await);
}

#[tokio::test]
async fn makers_and_address_bits_count() {
    let here = processor("qemu64,phys-bits=42", "").await;
    let there = processor("qemu64,vendor=GenuineIntel", "").await;
    assert!(matches!(here.check_replacement(&there), Err(ProcessorMismatch::Vendor { .. })));
    let there = processor("qemu64,phys-bits=40", "").await;
    assert_eq!(here.check_replacement(&there), Err(ProcessorMismatch::AddressBits { here: 42, there: 40 }));
}
