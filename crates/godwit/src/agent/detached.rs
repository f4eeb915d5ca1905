//! Requests are carried out to their end, whether whoever asked still waits or not.
//!
//! Without this, a client that goes away cuts its request off at any await: with a QEMU started and nothing written down,
//! or a target made ready of which nobody knows any more.

use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::error::AgentError;

/// Carries the rest of a request out in a task of its own.
pub(super) async fn detached(request: Request, next: Next) -> Response {
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => AgentError::Broken(error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        time::Duration,
    };

    use axum::{Router, body::Body, middleware, routing::post};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_request_goes_on_when_its_client_leaves() {
        let done = Arc::new(AtomicBool::new(false));
        let sets = done.clone();
        let slow = move || async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            sets.store(true, Ordering::Release);
        };
        let router = Router::new().route("/", post(slow)).layer(middleware::from_fn(detached));
        let request = Request::builder().method("POST").uri("/").body(Body::empty()).unwrap();
        let left = tokio::time::timeout(Duration::from_secs(1), router.oneshot(request)).await;
        assert!(left.is_err() && !done.load(Ordering::Acquire));
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(done.load(Ordering::Acquire));
    }
}
