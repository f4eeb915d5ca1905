//! The QMP client against QEMU.

use std::{collections::BTreeMap, io::Read, os::unix::net::UnixStream, time::Duration};

use godwit_qemu::qmp::{Client, QmpError, RunState};
use serde_json::{Value, json};

use crate::qemu::{PATIENCE, Qemu, directory};

const SMALL: &str = "-M pc -m 16 -nodefaults -display none -S";

#[tokio::test]
async fn events_carry_qemus_own_time() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let mut events = client.events();
    assert_eq!(client.query_status().await.unwrap().state, RunState::Prelaunch);
    client.cont().await.unwrap();
    client.stop().await.unwrap();
    let (resume, stop) = (events.recv().await.unwrap(), events.recv().await.unwrap());
    assert_eq!((resume.name.as_str(), stop.name.as_str()), ("RESUME", "STOP"));
    assert!(resume.timestamp.unix_us() > 1_600_000_000_000_000);
    assert!(stop.timestamp >= resume.timestamp);
    assert_eq!(client.query_status().await.unwrap().state, RunState::Paused);
    client.system_powerdown().await.unwrap();
    let version = client.query_version().await.unwrap();
    assert!(version.major >= 7, "{version}");
    client
        .announce_self(Duration::from_millis(50), Duration::from_millis(50), 1, Duration::ZERO)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_end_of_qemu_ends_everything_that_waits() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let mut events = client.events();
    client.quit().await.unwrap();
    while events.recv().await.is_ok() {}
    assert!(client.is_closed());
    assert!(matches!(client.stop().await, Err(QmpError::Closed { .. })));
    assert!(client.events().recv().await.is_err());
}

#[tokio::test]
async fn refusals_name_the_command() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let error = client.execute("no-such-command", Value::Null).await.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { class, .. } if class == "CommandNotFound"), "{error}");
    assert!(error.to_string().contains("no-such-command"), "{error}");
    let error = client.balloon(1 << 20).await.unwrap_err();
    assert!(error.to_string().starts_with("QEMU refuses balloon: "), "{error}");
}

#[tokio::test]
async fn a_monitor_that_another_client_holds_says_so() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let first = qemu.client().await;
    let error = Client::connect(&qemu.monitor, Duration::from_millis(300)).await.unwrap_err();
    assert!(error.to_string().contains("another client holds it"), "{error}");
    drop(first);
    Client::connect(&qemu.monitor, PATIENCE).await.unwrap();
    let error = Client::connect(place.path().join("nobody"), PATIENCE).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }));
}

#[tokio::test]
async fn an_answer_that_comes_too_late_disturbs_nothing() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let late = client.execute_within(Duration::ZERO, "query-qmp-schema", Value::Null).await;
    assert!(matches!(late, Err(QmpError::Timeout { .. })));
    assert_eq!(client.query_status().await.unwrap().state, RunState::Prelaunch);
    let schema = client.execute("query-qmp-schema", Value::Null).await.unwrap();
    assert!(schema.as_array().unwrap().len() > 100);
    let (name, status) = tokio::join!(client.query_name(), client.query_status());
    assert_eq!((name.unwrap(), status.unwrap().running), (None, false));
}

#[tokio::test]
async fn migration_settings_are_put_back() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let saved = client.migration_settings().await.unwrap();
    let on = ["events", "return-path", "switchover-ack", "late-block-activate", "xbzrle"];
    let on: BTreeMap<String, bool> = on.into_iter().map(|name| (name.to_owned(), true)).collect();
    client.set_migrate_capabilities(&on).await.unwrap();
    let changed = json!({ "downtime-limit": 2_000_000, "max-bandwidth": 4096, "xbzrle-cache-size": 1 << 20 });
    client.set_migrate_parameters(changed.as_object().unwrap()).await.unwrap();
    assert_ne!(client.migration_settings().await.unwrap(), saved);

    let text = serde_json::to_string(&saved).unwrap();
    client.restore_migration_settings(&serde_json::from_str(&text).unwrap()).await.unwrap();
    assert_eq!(client.migration_settings().await.unwrap(), saved);
    // Every parameter that QEMU tells can also be said to it.
    client.set_migrate_parameters(&saved.parameters).await.unwrap();
    assert_eq!(client.migration_settings().await.unwrap(), saved);
}

#[tokio::test]
async fn qemu_migrates_into_a_descriptor_that_it_was_given() {
    let place = directory();
    let qemu = Qemu::by_hand(place.path(), SMALL);
    let client = qemu.client().await;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.get_fd("stream", theirs.into()).await.unwrap();
    client.migrate("fd:stream").await.unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut magic = [0; 4];
    ours.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");
    let refusal = client.migrate("fd:another").await.unwrap_err();
    assert!(matches!(refusal, QmpError::Refused { .. }), "{refusal}");
}
