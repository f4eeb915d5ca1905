//! The metrics over plain HTTP, where `metrics_listen` says: one path, no TLS, nothing that can be changed.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, response::Response, routing::get};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    agent::{
        Agent,
        listener::{self, Place},
    },
    output::one_line,
};

/// Where monitoring looks if it isn't told otherwise.
const PATH: &str = "/metrics";

/// Answers for as long as the agent lives, within the limits that hold for hosts.
pub(in crate::agent) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    let router = Router::new().route(PATH, get(page)).with_state(agent);
    listener::accept_all(listener, |stream, from, place| {
        tokio::spawn(answer(router.clone(), stream, from, place));
    })
    .await;
}

async fn answer(router: Router, stream: TcpStream, from: SocketAddr, _place: Place) {
    if let Err(error) = listener::serve_http(stream, router).await {
        tracing::debug!(%from, error = one_line(&error), "a connection for metrics ended");
    }
}

async fn page(State(agent): State<Arc<Agent>>) -> Response {
    agent.metrics_page().await
}
