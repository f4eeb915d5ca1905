//! Declaring a host lost.
//!
//! ```text
//!   hostb doesn't come back ─► fence it (its `fence_command`, or the operator's word) ─► record: epoch + 2^20, owner
//!        ─► the paused copy goes on, or `godwit vm run` may start the machine
//!        ─► order: "stand down", repeated until hostb answers that it has nothing of the machine any more
//! ```
//!
//! No record stops a host that can't be reached. If hostb still runs the machine while it is declared lost, two copies
//! run until the order reaches it: that is what the fence is for, and what the operator is told. A host that comes back
//! asks its peers for orders before it serves its operator.

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use godwit_migration::handover::{Epoch, Message, RecordState};
use serde::{Deserialize, Serialize};
use tokio::{process::Command, time::timeout};

use super::{Agent, AgentError, Delays, shell::Shell};
use crate::{
    agent::{
        error::Refusal,
        ownership::{self, Holder},
        state,
    },
    api::{Finding, FindingState, Orders, StandDownOrder},
    output::one_line,
    token::{Durability, Store},
};

/// How long a fence may take.
const FENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a peer may take to say what it ordered while this host was away.
const ORDERS_TIMEOUT: Duration = Duration::from_secs(2);

/// An order that hasn't been answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Order {
    machine: String,
    lost: String,
    epoch: Epoch,
}

impl Agent {
    /// Takes a machine here that is, or may be, at a host which is lost.
    pub(in crate::agent) async fn assume_lost(
        &self,
        machine: &str,
        lost: &str,
        confirmed: bool,
    ) -> Result<Finding, AgentError> {
        let directory = self.directory(machine)?;
        let _claim = self.busy.claim(machine, "the host that has it is being declared lost")?;
        let store = Store::open(directory.path());
        let holder = ownership::of(&directory)?.holder;
        let record = store.load()?.filter(|_| {
            holder == Holder::Peer(lost.to_owned()) || holder == Holder::Unsettled(lost.to_owned())
        });
        let Some(record) = record else {
            return Err(Refusal::NotThere { machine: machine.to_owned(), host: lost.to_owned() }.into());
        };
        if matches!(record.state, RecordState::Awaited { .. } | RecordState::Taking { .. }) {
            return Err(Refusal::Incomplete(machine.to_owned()).into());
        }
        self.fence(machine, lost, confirmed).await?;
        let reclaimed = record.reclaimed();
        let order = Order { machine: machine.to_owned(), lost: lost.to_owned(), epoch: reclaimed.epoch };
        state::make_private_dir(&self.state.stand_down())?;
        state::write_json(&self.order_file(machine, lost), &order)?;
        store.save(&reclaimed, Durability::Synced)?;
        let ran = match record.state {
            RecordState::GivenAway { run_state, .. } => run_state.is_live(),
            RecordState::Offered { stopped, .. } => stopped.is_none_or(|before| before.is_live()),
            _ => false,
        };
        let found = format!("{lost} had the machine, or may have had it, and is declared lost");
        let mut shell = Shell::new(self, machine);
        let went_on = shell.take_over(ran).await;
        let state = if went_on.is_ok() { FindingState::Settled } else { FindingState::Failed };
        let did = match went_on {
            Ok(()) => format!("{}; {lost} will be told to stand down when it answers", shell.account()),
            Err(error) => one_line(&error),
        };
        tracing::warn!(machine, lost, did, "a host is declared lost");
        Ok(self.finding(machine, found, did, state))
    }

    /// Makes sure that the lost host runs nothing: by its fence, or by the operator's word.
    async fn fence(&self, machine: &str, lost: &str, confirmed: bool) -> Result<(), AgentError> {
        let command = self.config.peer(lost).and_then(|peer| peer.fence_command.as_deref());
        let Some((program, arguments)) = command.and_then(<[String]>::split_first) else {
            if confirmed {
                return Ok(());
            }
            let (machine, lost) = (machine.to_owned(), lost.to_owned());
            return Err(Refusal::NotFenced { machine, lost }.into());
        };
        let failed = |reason: String| Refusal::FenceFailed { host: lost.to_owned(), reason };
        let mut fence = Command::new(program);
        fence.args(arguments).env("GODWIT_HOST", lost).env("GODWIT_MACHINE", machine);
        fence.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        match timeout(FENCE_TIMEOUT, fence.status()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(failed(status.to_string()).into()),
            Ok(Err(error)) => Err(failed(error.to_string()).into()),
            Err(_) => Err(failed(format!("no end after {} s", FENCE_TIMEOUT.as_secs())).into()),
        }
    }

    /// Repeats the orders that nobody has answered.
    pub(super) async fn repeat_orders(&self, delays: &mut Delays) {
        for order in self.open_orders() {
            let key = format!("{}@{}", order.machine, order.lost);
            if !delays.is_due(&key, Instant::now()) {
                continue;
            }
            let message = Message::StandDown { epoch: order.epoch };
            let answer = self.say(&order.lost, &order.machine, message).await;
            let state = if let Ok(Some(Message::StoodDown { epoch })) = answer {
                tracing::info!(machine = order.machine, host = order.lost, "stood down");
                forget_order(self, &order.machine, &order.lost, epoch);
                FindingState::Settled
            } else {
                FindingState::Waiting
            };
            delays.note(&key, state, Instant::now());
        }
    }

    /// What the asking host is to stand down from.
    pub(in crate::agent) fn orders_for(&self, lost: &str) -> Orders {
        let own = self.open_orders().into_iter().filter(|order| order.lost == lost);
        Orders {
            orders: own
                .map(|order| StandDownOrder { machine: order.machine, epoch: order.epoch.0 })
                .collect(),
        }
    }

    /// Asks all peers, before this host serves anybody, whether it was declared lost meanwhile.
    pub(in crate::agent) async fn obey_orders(self: &Arc<Self>) {
        let asked = self.config.peers.keys().map(|peer| async move {
            let ask = async {
                let found = self.find_peer(peer.as_str()).await?;
                self.get::<Orders>(&found, crate::agent::peers::ORDERS_PATH).await
            };
            (peer, timeout(ORDERS_TIMEOUT, ask).await)
        });
        for (peer, orders) in futures_util::future::join_all(asked).await {
            let Ok(Ok(Orders { orders })) = orders else { continue };
            for StandDownOrder { machine, epoch } in orders {
                self.stand_down(peer.as_str(), &machine, Epoch(epoch)).await;
            }
        }
    }

    async fn stand_down(self: &Arc<Self>, peer: &str, machine: &str, epoch: Epoch) {
        let Ok(peer) = peer.parse() else { return };
        match self.obey(&peer, machine, Message::StandDown { epoch }).await {
            Ok(_) => tracing::warn!(machine, %peer, "stood down: the machine was taken over"),
            Err(error) => tracing::warn!(machine, %peer, error = one_line(&error), "can't stand down"),
        }
    }

    /// The orders that haven't been answered, as long as they still hold: the record must have got as far.
    fn open_orders(&self) -> Vec<Order> {
        let entries = fs::read_dir(self.state.stand_down()).into_iter().flatten().flatten();
        let orders = entries.filter_map(|entry| state::read_json::<Order>(&entry.path()).ok());
        orders
            .filter(|order| {
                let record = Store::open(self.state.machine(&order.machine).path()).load();
                record.is_ok_and(|record| record.is_some_and(|record| record.epoch >= order.epoch))
            })
            .collect()
    }

    fn order_file(&self, machine: &str, lost: &str) -> PathBuf {
        self.state.stand_down().join(format!("{machine}@{lost}.json"))
    }
}

/// Forgets an order that was answered.
pub(super) fn forget_order(agent: &Agent, machine: &str, lost: &str, epoch: Epoch) {
    let path = agent.order_file(machine, lost);
    if state::read_json::<Order>(&path).is_ok_and(|order| order.epoch == epoch) {
        let _ = fs::remove_file(path);
    }
}
