//! The manager server of a replica group, in the process of its rank 0.

mod client;
mod heartbeat;
mod local;
mod refusal;
mod service;
mod state;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, routing::get};
use thiserror::Error;
use tokio::{runtime::Handle, task::AbortHandle};
use tonic::service::Routes;
use torchft_quorum::gather::Group;

pub use client::ManagerClient;
pub use service::Kill;

use crate::{
    address,
    error::CallError,
    lighthouse::LighthouseClient,
    listen::{BoundPort, ListenError},
    lock::lock,
    serve::ServerHandle,
    wire::manager_service_server::ManagerServiceServer,
};
use service::Service;
use state::GroupState;

/// The options of a manager server.
#[derive(Clone, Debug)]
pub struct ManagerOptions {
    /// The group's name in the quorum.
    pub replica_id: String,
    /// The lighthouse, `http://host:port`.
    pub lighthouse_address: String,
    /// The name under which other hosts reach this one.
    pub host_name: String,
    /// Address to listen on, `host:port`.
    pub bind: String,
    /// The group's rendezvous store, `host:port`.
    pub store_address: String,
    /// Ranks in the group; at least 1.
    pub world_size: u64,
    /// The time between two heartbeats; above 0.
    pub heartbeat_interval: Duration,
    /// How long the first connection to the lighthouse may take.
    pub connect_timeout: Duration,
    /// How often a request that the lighthouse failed is sent again.
    pub quorum_retries: u32,
    /// Ends the process when an operator asks for it.
    pub kill: Kill,
}

/// Why a manager server did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The lighthouse cannot be reached.
    #[error(transparent)]
    Lighthouse(#[from] CallError),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system did not let the runtime serve the port.
    #[error("cannot serve: {0}")]
    Serve(#[from] std::io::Error),
    /// An option has a value that cannot be used.
    #[error("{0}")]
    Value(&'static str),
}

/// A running manager server.
#[derive(Debug)]
pub struct Manager {
    address: String,
    state: Arc<GroupState>,
    tasks: [AbortHandle; 2],
    server: Mutex<Option<ServerHandle>>,
}

impl Manager {
    /// Connects to the lighthouse, then serves the group, in the running runtime.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: ManagerOptions) -> Result<Self, StartError> {
        check(&options)?;
        check_name(&options.host_name).await;
        let bound = BoundPort::bind(&options.bind)?;
        let address = address::url(&options.host_name, bound.port);
        let within = options.connect_timeout;
        let lighthouse = LighthouseClient::connect(&options.lighthouse_address, within).await?;
        let lighthouse = Arc::new(lighthouse);
        let state = Arc::new(GroupState::new(
            group(&options, &address),
            lighthouse.clone(),
        ));
        let server = ServerHandle::start(bound, router(&state, options.kill), &Handle::current())?;
        let timer_task = tokio::spawn(state.clone().timer_task());
        let sending = heartbeat::send(lighthouse, options.replica_id, options.heartbeat_interval);
        let heartbeat = tokio::spawn(sending).abort_handle();
        state.set_heartbeat_task(heartbeat.clone());
        local::register(&address, &state);
        Ok(Self {
            address,
            state,
            tasks: [timer_task.abort_handle(), heartbeat],
            server: Mutex::new(Some(server)),
        })
    }

    /// The address that clients dial, `http://host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Fails all pending calls, stops the heartbeats and closes the port; a second call does nothing.
    pub async fn stop(&self) {
        local::remove(&self.address);
        self.tasks.iter().for_each(AbortHandle::abort);
        self.state.close();
        let server = lock(&self.server).take();
        if let Some(server) = server {
            server.stop().await;
        }
    }
}

fn check(options: &ManagerOptions) -> Result<(), StartError> {
    if options.replica_id.is_empty() {
        return Err(StartError::Value(
            "replica_id is empty: give the replica group a name",
        ));
    }
    if options.world_size == 0 {
        return Err(StartError::Value(
            "world_size is 0, but a group has at least one rank",
        ));
    }
    if options.heartbeat_interval.is_zero() {
        return Err(StartError::Value(
            "heartbeat_interval is 0, but must be above 0",
        ));
    }
    Ok(())
}

/// Warns when other groups will probably not find this host.
async fn check_name(host_name: &str) {
    if !address::resolves(host_name).await {
        tracing::warn!(
            hostname = host_name,
            "this host name does not resolve here: peers that cannot resolve it cannot heal from \
             this group; pass hostname= with a name or address that they can reach"
        );
    }
}

fn group(options: &ManagerOptions, address: &str) -> Group {
    Group {
        replica_id: options.replica_id.as_str().into(),
        address: address.to_owned(),
        store_address: options.store_address.clone(),
        world_size: options.world_size,
        quorum_retries: options.quorum_retries,
    }
}

fn router(state: &Arc<GroupState>, kill: Kill) -> Router {
    let state = state.clone();
    let grpc = ManagerServiceServer::new(Service { state, kill });
    let router = Routes::new(grpc).prepare().into_axum_router();
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .merge(router)
}
