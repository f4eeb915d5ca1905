//! One HTTP request over a stream that is already connected: a unix socket, or TLS to another agent.

use std::convert::Infallible;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Body, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::api::{AGENT_VERSIONS, Problem, VERSIONS_HEADER};

/// No answer is read beyond this; event streams aren't answers.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// The other end answered with an error.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The connection broke, or the other end doesn't speak HTTP.
    #[error("the connection failed: {0}")]
    Connection(#[from] hyper::Error),
    /// The answer isn't what it should be.
    #[error("the answer makes no sense: {0}")]
    Answer(String),
}

/// Sends a request and returns the answer's head; an error status becomes [`HttpError::Problem`].
///
/// # Errors
/// [`HttpError`].
pub(crate) async fn send<S>(
    stream: S,
    method: Method,
    path: &str,
    body: Option<&(impl Serialize + Sync)>,
) -> Result<Response<Incoming>, HttpError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let body = match body {
        Some(body) => serde_json::to_vec(body).map_err(|error| HttpError::Answer(error.to_string()))?,
        None => Vec::new(),
    };
    send_body(stream, method, path, Full::new(Bytes::from(body))).await
}

/// The same with any body.
///
/// # Errors
/// [`HttpError`].
pub(crate) async fn send_body<S, B>(
    stream: S,
    method: Method,
    path: &str,
    body: B,
) -> Result<Response<Incoming>, HttpError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes, Error = Infallible> + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "godwit")
        .header(header::CONTENT_TYPE, "application/json")
        .header(VERSIONS_HEADER, format!("{}-{}", AGENT_VERSIONS.lowest, AGENT_VERSIONS.highest))
        .body(body)
        .map_err(|error| HttpError::Answer(error.to_string()))?;
    let response = sender.send_request(request).await?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    match receive::<Problem>(response).await {
        Ok(problem) => Err(problem.into()),
        Err(_) => Err(HttpError::Answer(format!("HTTP status {status}"))),
    }
}

/// Reads the answer's body, within bounds.
///
/// # Errors
/// [`HttpError::Answer`] if it is too long or isn't a `T`.
pub(crate) async fn receive<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, HttpError> {
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| HttpError::Answer(error.to_string()))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| HttpError::Answer(error.to_string()))
}
