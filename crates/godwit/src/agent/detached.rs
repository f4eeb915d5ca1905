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
    use std::sync::Arc;

    use axum::{Router, body::Body, middleware, routing::post};
    use tokio::{select, sync::Notify};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_request_goes_on_when_its_client_leaves() {
        let [begun, proceed, done] = std::array::from_fn(|_| Arc::new(Notify::new()));
        let slow = {
            let [begun, proceed, done] = [&begun, &proceed, &done].map(Arc::clone);
            move || async move {
                begun.notify_one();
                proceed.notified().await;
                done.notify_one();
            }
        };
        let router = Router::new().route("/", post(slow)).layer(middleware::from_fn(detached));
        let request = Request::builder().method("POST").uri("/").body(Body::empty()).unwrap();
        select! {
            _ = router.oneshot(request) => panic!("answered too early"),
            () = begun.notified() => {}
        }
        proceed.notify_one();
        done.notified().await;
    }
}
