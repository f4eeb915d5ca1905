//! The agent's API, from the command line's side.

use std::path::PathBuf;

use axum::body::Bytes;
use http_body_util::BodyExt;
use hyper::{Method, Response, body::Incoming};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::exit::Failure;
use crate::{
    http::{self, HttpError},
    job::Event,
};

/// No event is longer.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// For requests without a body.
const NOTHING: Option<&()> = None;

/// Where the agent is.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.json(Method::GET, path, NOTHING).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, Failure> {
        self.json(Method::POST, path, Some(body)).await
    }

    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, Failure> {
        self.json(Method::PUT, path, Some(body)).await
    }

    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.json(Method::DELETE, path, NOTHING).await
    }

    /// The events of a migration, from the first on.
    pub(super) async fn events(&self, id: &str) -> Result<Events, Failure> {
        let response = self.send(Method::GET, &format!("/v1/migrations/{id}/events"), NOTHING).await?;
        Ok(Events { body: response.into_body(), buffer: Vec::new() })
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, Failure> {
        let response = self.send(method, path, body).await?;
        http::receive(response).await.map_err(failure)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            let socket = self.socket.display();
            Failure::unreachable(format!(
                "no agent answers at {socket} ({error}); is `godwit agent` running?"
            ))
        })?;
        http::send(stream, method, path, body).await.map_err(failure)
    }
}

fn failure(error: HttpError) -> Failure {
    match error {
        HttpError::Problem(problem) => problem.into(),
        other => Failure::unreachable(format!("the agent's answer was lost: {other}")),
    }
}

/// The events of one migration; ends when its worker ends or the agent goes away.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event; `None` at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(|error| {
                    Failure::failed(format!("the agent sent an event that makes no sense: {error}"))
                });
            }
            if self.buffer.len() > EVENT_BYTES_MAX {
                return Err(Failure::failed("the agent sent an event that is too long"));
            }
            match self.frame().await {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }

    /// The next piece; a broken connection is an end too, the caller asks for the report then.
    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Ok(data) = self.body.frame().await?.ok()?.into_data() {
                return Some(data);
            }
        }
    }
}
