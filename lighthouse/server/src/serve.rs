//! A server on one port: gRPC and HTTP side by side, from its start to its stop.

use std::time::Duration;

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    serve::ListenerExt,
};
use tokio::{runtime::Handle, sync::watch, task::JoinHandle, time::timeout};
use tonic::Status;

use crate::{listen::BoundPort, version};

/// How long pending replies may take once the port is closed.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// A running server. Dropping the handle without [`ServerHandle::stop`] leaves it running.
#[derive(Debug)]
pub struct ServerHandle {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl ServerHandle {
    /// Serves `router` on `bound`, in `runtime`.
    ///
    /// # Errors
    /// The system's, when the listener cannot be handed to the runtime.
    pub fn start(bound: BoundPort, router: Router, runtime: &Handle) -> std::io::Result<Self> {
        let _entered = runtime.enter();
        let listener = bound.into_listener()?.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!("no TCP_NODELAY: {error}");
            }
        });
        let router = router
            .fallback(unknown)
            .layer(middleware::from_fn(version::gate));
        let (stop, stopped) = watch::channel(false);
        let task = runtime.spawn(async move {
            let serving = axum::serve(listener, router)
                .with_graceful_shutdown(until_set(stopped.clone()))
                .into_future();
            tokio::select! {
                ended = serving => if let Err(error) = ended {
                    tracing::error!("the server failed and answers no more: {error}");
                },
                () = async { until_set(stopped).await; tokio::time::sleep(DRAIN_TIME).await } => {}
            }
        });
        Ok(Self { stop, task })
    }

    /// Closes the port, then waits for pending replies, for one second at most.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let patience = DRAIN_TIME + Duration::from_millis(100);
        if timeout(patience, self.task).await.is_err() {
            tracing::warn!(
                "connections were still open {patience:?} after the server stopped: they are dropped"
            );
        }
    }
}

/// Answers a request for an unknown method: as gRPC does if it came by gRPC, else with 404.
async fn unknown(request: Request) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        let path = request.uri().path();
        return Status::unimplemented(format!("there is no method {path}")).into_http();
    }
    StatusCode::NOT_FOUND.into_response()
}

async fn until_set(mut flag: watch::Receiver<bool>) {
    // An error means the sender is gone, which ends the server as well.
    let _ = flag.wait_for(|set| *set).await;
}
