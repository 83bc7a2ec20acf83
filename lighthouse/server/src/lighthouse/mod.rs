//! The lighthouse: one port, its state, the page and the client.

mod client;
mod command;
mod pages;
mod report;
mod state;

use std::sync::{Arc, Mutex};

use thiserror::Error;
use tokio::{runtime::Handle, task::AbortHandle};
use tonic::service::Routes;
use torchft_quorum::{
    coordinator::Coordinator,
    rules::{BadRules, Rules},
};

pub use client::LighthouseClient;
pub use command::run;

use crate::{
    address, clock,
    listen::{BoundPort, ListenError},
    lock::lock,
    options::LighthouseOptions,
    serve::ServerHandle,
    wire::lighthouse_service_server::LighthouseServiceServer,
};
use state::LighthouseState;

/// Why a lighthouse did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The options contradict themselves.
    #[error(transparent)]
    Rules(#[from] BadRules),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system did not let the runtime serve the port.
    #[error("cannot serve: {0}")]
    Serve(#[from] std::io::Error),
}

/// A running lighthouse.
#[derive(Debug)]
pub struct Lighthouse {
    address: String,
    state: Arc<LighthouseState>,
    timer_task: AbortHandle,
    server: Mutex<Option<ServerHandle>>,
}

impl Lighthouse {
    /// Binds the port and serves it in the running runtime. `host_name` is the name of this host,
    /// which is advertised when the port is bound on a wildcard address.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: LighthouseOptions, host_name: &str) -> Result<Self, StartError> {
        let coordinator = Coordinator::new(rules(&options), clock::wall_ms())?;
        let bound = BoundPort::bind(&options.bind)?;
        let address = address::advertised(&bound.host, host_name, bound.port).await;
        let state = Arc::new(LighthouseState::new(coordinator));
        let grpc = LighthouseServiceServer::from_arc(state.clone());
        let router = Routes::new(grpc).prepare().into_axum_router();
        let router = pages::router(state.clone()).merge(router);
        let server = ServerHandle::start(bound, router, &Handle::current())?;
        let timer_task = tokio::spawn(state.clone().timer_task()).abort_handle();
        tracing::info!(%address, min_replicas = options.min_replicas,
            join_timeout = ?options.join_timeout, heartbeat_timeout = ?options.heartbeat_timeout,
            "the lighthouse listens");
        Ok(Self {
            address,
            state,
            timer_task,
            server: Mutex::new(Some(server)),
        })
    }

    /// The address that clients dial, `http://host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Fails all pending calls and closes the port; a second call does nothing.
    pub async fn stop(&self) {
        self.state.close();
        self.timer_task.abort();
        let server = lock(&self.server).take();
        if let Some(server) = server {
            server.stop().await;
            tracing::info!(address = %self.address, "the lighthouse is closed");
        }
    }
}

fn rules(options: &LighthouseOptions) -> Rules {
    Rules {
        min_replicas: usize::try_from(options.min_replicas).unwrap_or(usize::MAX),
        join_timeout: options.join_timeout,
        heartbeat_timeout: options.heartbeat_timeout,
    }
}
