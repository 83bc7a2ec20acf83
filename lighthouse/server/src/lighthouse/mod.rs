//! The lighthouse: one port, a desk behind it, a client for it.

mod client;
mod command;
mod desk;
mod pages;
mod report;
mod service;

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use tokio::{runtime::Handle, task::AbortHandle};
use tonic::service::Routes;
use torchft_quorum::{
    machine::Machine,
    rules::{BadRules, Rules},
};

pub use client::LighthouseClient;
pub use command::run;

use crate::{
    address, clock,
    listen::{Bound, ListenError},
    options::LighthouseOptions,
    serve::Served,
    wire::lighthouse_service_server::LighthouseServiceServer,
};
use desk::Desk;
use service::Service;

/// Why a lighthouse did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The rules make no sense.
    #[error(transparent)]
    Rules(#[from] BadRules),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The runtime would not take the port.
    #[error("cannot serve: {0}")]
    Serve(#[from] std::io::Error),
}

/// A running lighthouse.
#[derive(Debug)]
pub struct Lighthouse {
    address: String,
    desk: Arc<Desk>,
    clockwork: AbortHandle,
    served: Mutex<Option<Served>>,
}

impl Lighthouse {
    /// Binds the port and serves it in the running runtime. `host_name` is this machine's, which
    /// is advertised when the port is bound on a wildcard.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: LighthouseOptions, host_name: &str) -> Result<Self, StartError> {
        let machine = Machine::new(rules(&options), clock::wall_ms())?;
        let bound = Bound::bind(&options.bind)?;
        let address = address::advertised(&bound.host, host_name, bound.port).await;
        let desk = Arc::new(Desk::new(machine));
        let grpc = LighthouseServiceServer::new(Service(desk.clone()));
        let router = Routes::new(grpc).prepare().into_axum_router();
        let router = pages::router(desk.clone()).merge(router);
        let served = Served::start(bound, router, &Handle::current())?;
        let clockwork = tokio::spawn(desk.clone().watch_the_clock()).abort_handle();
        tracing::info!(%address, min_replicas = options.min_replicas,
            join_timeout = ?options.join_timeout, heartbeat_timeout = ?options.heartbeat_timeout,
            "the lighthouse listens");
        Ok(Self {
            address,
            desk,
            clockwork,
            served: Mutex::new(Some(served)),
        })
    }

    /// `http://host:port`, to be dialled by others.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sends everybody away and closes the port; a second call does nothing.
    pub async fn stop(&self) {
        self.desk.close();
        self.clockwork.abort();
        let served = self
            .served
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(served) = served {
            served.stop().await;
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
