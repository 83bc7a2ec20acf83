//! The manager server: one a replica group, in the process of its first rank.

mod client;
mod desk;
mod heart;
mod local;
mod refusal;
mod service;

use std::{
    sync::{Arc, Mutex, PoisonError},
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
    listen::{Bound, ListenError},
    serve::Served,
    wire::manager_service_server::ManagerServiceServer,
};
use desk::Desk;
use service::Service;

/// What a manager server needs to know.
#[derive(Clone, Debug)]
pub struct ManagerOptions {
    /// The group's name in the quorum.
    pub replica_id: String,
    /// `http://host:port`.
    pub lighthouse_address: String,
    /// The name of this machine for others.
    pub host_name: String,
    /// Address to listen on, `host:port`.
    pub bind: String,
    /// The group's rendezvous store, `host:port`.
    pub store_address: String,
    /// Ranks in the group; at least 1.
    pub world_size: u64,
    /// How often the group says that it is alive; above 0.
    pub heartbeat_interval: Duration,
    /// How long the first connection to the lighthouse may take.
    pub connect_timeout: Duration,
    /// How often a request that the lighthouse failed is sent again.
    pub quorum_retries: u32,
    /// What a kill does.
    pub kill: Kill,
}

/// Why a manager server did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The lighthouse.
    #[error(transparent)]
    Lighthouse(#[from] CallError),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The runtime would not take the port.
    #[error("cannot serve: {0}")]
    Serve(#[from] std::io::Error),
    /// A value that makes no sense.
    #[error("{0}")]
    Value(&'static str),
}

/// A running manager server.
#[derive(Debug)]
pub struct Manager {
    address: String,
    desk: Arc<Desk>,
    tasks: [AbortHandle; 2],
    served: Mutex<Option<Served>>,
}

impl Manager {
    /// Connects to the lighthouse, then serves the group, in the running runtime.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(options: ManagerOptions) -> Result<Self, StartError> {
        check(&options)?;
        check_name(&options.host_name).await;
        let bound = Bound::bind(&options.bind)?;
        let address = address::url(&options.host_name, bound.port);
        let within = options.connect_timeout;
        let lighthouse = LighthouseClient::connect(&options.lighthouse_address, within).await?;
        let lighthouse = Arc::new(lighthouse);
        let desk = Arc::new(Desk::new(group(&options, &address), lighthouse.clone()));
        let served = Served::start(bound, router(&desk, options.kill), &Handle::current())?;
        let clockwork = tokio::spawn(desk.clone().watch_the_clock());
        let beating = heart::beat(lighthouse, options.replica_id, options.heartbeat_interval);
        let heart = tokio::spawn(beating).abort_handle();
        desk.give_heart(heart.clone());
        local::announce(&address, &desk);
        Ok(Self {
            address,
            desk,
            tasks: [clockwork.abort_handle(), heart],
            served: Mutex::new(Some(served)),
        })
    }

    /// `http://host:port`, to be dialled by others.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sends everybody away, stops the heartbeat and closes the port; a second call does nothing.
    pub async fn stop(&self) {
        local::withdraw(&self.address);
        self.tasks.iter().for_each(AbortHandle::abort);
        self.desk.close();
        let served = self
            .served
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(served) = served {
            served.stop().await;
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

/// Says so when peers will probably not find this machine.
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

fn router(desk: &Arc<Desk>, kill: Kill) -> Router {
    let desk = desk.clone();
    let grpc = ManagerServiceServer::new(Service { desk, kill });
    let router = Routes::new(grpc).prepare().into_axum_router();
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .merge(router)
}
