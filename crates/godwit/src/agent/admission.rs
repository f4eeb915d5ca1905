//! What every request of another agent passes before its body is read.
//!
//! ```text
//! a host under [peers]? ─► a version in common? ─► not too often? ─► the handler
//!           └──────────────────────┴──────────────────────┴── one line to the peer, nothing begun
//! ```

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use axum::{
    Extension,
    extract::{Request, State},
    http::HeaderMap,
    middleware::Next,
    response::Response,
};
use godwit_transport::{identity::HostName, session::Versions};

use super::{
    Agent,
    error::{AgentError, Refusal},
    peers::{INCOMING_PATH, REHEARSAL_PATH},
    probe::PROBE_PATH,
    rate::{Buckets, Rate},
};
use crate::api::{AGENT_VERSIONS, VERSIONS_HEADER};

/// Requests of one peer: questions about open hand-overs come in crowds when a host is back.
const REQUESTS: Rate = Rate { burst: 256, per_second: 64.0 };
/// Machines that one peer offers: each starts a QEMU and a worker here.
const OFFERS: Rate = Rate { burst: 32, per_second: 1.0 };
/// Probes of one peer: each takes up to a mebibyte of the link.
const PROBES: Rate = Rate { burst: 8, per_second: 0.5 };

/// How often each peer came. There are no more entries than hosts under `[peers]`.
#[derive(Debug)]
pub(super) struct Admission {
    requests: Mutex<Buckets<HostName>>,
    offers: Mutex<Buckets<HostName>>,
    probes: Mutex<Buckets<HostName>>,
}

impl Default for Admission {
    fn default() -> Self {
        let [requests, offers, probes] =
            [REQUESTS, OFFERS, PROBES].map(|rate| Mutex::new(Buckets::new(rate)));
        Self { requests, offers, probes }
    }
}

impl Admission {
    fn take(&self, peer: &HostName, path: &str, now: Instant) -> Result<(), Refusal> {
        let take = |buckets: &Mutex<Buckets<HostName>>, what| {
            let taken = buckets.lock().unwrap_or_else(PoisonError::into_inner).take(peer.clone(), now);
            taken.map_err(|wait| Refusal::TooOften { peer: peer.to_string(), what, wait })
        };
        take(&self.requests, "asks")?;
        match path {
            INCOMING_PATH | REHEARSAL_PATH => take(&self.offers, "offers machines"),
            PROBE_PATH => take(&self.probes, "measures the link"),
            _ => Ok(()),
        }
    }
}

/// Lets a request through to its handler, or refuses it.
pub(super) async fn admit(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<HostName>,
    request: Request,
    next: Next,
) -> Result<Response, AgentError> {
    if agent.config.peer(peer.as_str()).is_none() {
        return Err(Refusal::UnknownPeer(peer.to_string()).into());
    }
    check_versions(&peer, request.headers())?;
    agent.admission.take(&peer, request.uri().path(), Instant::now())?;
    Ok(next.run(request).await)
}

/// Fails unless the peer says which versions it speaks and one of them is spoken here.
fn check_versions(peer: &HostName, headers: &HeaderMap) -> Result<(), Refusal> {
    let said = headers.get(VERSIONS_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("");
    let theirs = parse_versions(said);
    match theirs.and_then(|theirs| AGENT_VERSIONS.common(theirs)) {
        Some(_) => Ok(()),
        None => Err(Refusal::Versions {
            peer: peer.to_string(),
            theirs: theirs.map_or_else(|| "no version that can be read".to_owned(), described),
            ours: described(AGENT_VERSIONS),
        }),
    }
}

fn described(versions: Versions) -> String {
    format!("versions {versions}")
}

/// Reads what [`crate::http`] writes: `1-2`.
fn parse_versions(text: &str) -> Option<Versions> {
    let (lowest, highest) = text.split_once('-')?;
    let versions = Versions { lowest: lowest.parse().ok()?, highest: highest.parse().ok()? };
    (versions.lowest <= versions.highest).then_some(versions)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn check(said: Option<&str>) -> Result<(), String> {
        let mut headers = HeaderMap::new();
        if let Some(said) = said {
            headers.insert(VERSIONS_HEADER, said.parse().unwrap());
        }
        check_versions(&"hosta".parse().unwrap(), &headers).map_err(|error| error.to_string())
    }

    #[test]
    fn neighbouring_versions_understand_each_other() {
        let Versions { lowest, highest } = AGENT_VERSIONS;
        check(Some(&format!("{lowest}-{highest}"))).unwrap();
        check(Some(&format!("{}-{lowest}", lowest - 1))).unwrap();
        check(Some(&format!("{highest}-{}", highest + 1))).unwrap();
    }

    #[test]
    fn a_refusal_names_the_versions_of_both() {
        let newer = check(Some("7-8")).unwrap_err();
        assert_eq!(newer, "hosta speaks versions 7 to 8 between agents, this host versions 1 to 1");
        let older = check(Some("0-0")).unwrap_err();
        assert!(older.contains("versions 0 to 0") && older.contains("versions 1 to 1"), "{older}");
        for unreadable in [None, Some(""), Some("1"), Some("2-1"), Some("1-99999"), Some("-1-1")] {
            let refusal = check(unreadable).unwrap_err();
            assert!(refusal.contains("no version that can be read"), "{refusal}");
        }
    }

    #[test]
    fn offers_run_out_before_questions_do() {
        let (admission, now) = (Admission::default(), Instant::now());
        let (hosta, hostb) = ("hosta".parse().unwrap(), "hostb".parse().unwrap());
        let offered = (0..100).filter(|_| admission.take(&hosta, INCOMING_PATH, now).is_ok()).count();
        assert_eq!(offered, 32);
        let refusal = admission.take(&hosta, INCOMING_PATH, now).unwrap_err().to_string();
        assert_eq!(refusal, "hosta offers machines too often; it may again in 1 s");
        admission.take(&hosta, "/v1/orders", now).unwrap();
        admission.take(&hostb, INCOMING_PATH, now).unwrap();
        admission.take(&hosta, INCOMING_PATH, now + Duration::from_secs(1)).unwrap();
    }
}
