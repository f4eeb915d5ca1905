//! What the agent tells the service manager that started it, where there is one: that it is ready, that it stops, and
//! again and again that it isn't stuck (sd_notify(3)).

use std::{sync::Arc, time::Duration};

use sd_notify::{NotifyState, notify, watchdog_enabled};
use tokio::time::{MissedTickBehavior, interval};

use super::Agent;

/// Signs of life in the time after which the service manager ends an agent that gave none.
const SIGNS_OF_LIFE: u32 = 3;

/// Both sockets are open.
pub(super) fn ready() {
    tell(NotifyState::Ready);
}

/// The agent ends because it was asked to.
pub(super) fn stopping() {
    tell(NotifyState::Stopping);
}

/// Gives signs of life for as long as the agent lives, if the service manager waits for them.
///
/// Each one has been through the runtime that serves requests, and through the lock that all of them take.
pub(super) async fn keep_alive(agent: Arc<Agent>) {
    let Some(patience) = watchdog_enabled() else { return };
    let mut ticks = interval((patience / SIGNS_OF_LIFE).max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let _ = agent.migrations.count();
        tell(NotifyState::Watchdog);
    }
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = notify(&[state]) {
        tracing::warn!(%error, "the service manager can't be told");
    }
}
