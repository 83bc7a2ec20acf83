//! A connection to one server: made within a deadline, kept alive, replaced when a call gets no answer.

use std::{
    collections::hash_map::RandomState, future::Future, hash::BuildHasher, sync::Mutex,
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Request, Response, Status, TimeoutExpired,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::{address, error::CallError, error::innermost, lock::lock, version};

const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_ACK: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const JITTER_MS: u64 = 100;
/// A quorum of 512 replica groups is about 60 KiB: let it come in one window and few frames.
const WINDOW: u32 = 4 << 20;
const FRAME: u32 = 1 << 20;

/// A connection to one server.
#[derive(Debug)]
pub struct Connection {
    /// What it is and where, for messages: `lighthouse http://host:port`.
    name: String,
    endpoint: Endpoint,
    /// Replaced when the server did not answer at all: a connection to a host that vanished gives
    /// no error until TCP gives up.
    channel: Mutex<Channel>,
}

impl Connection {
    /// Connects, trying again with growing pauses until `within` has passed.
    ///
    /// # Errors
    /// [`CallError::Address`] for a wrong form, [`CallError::Unreachable`] when the time is up.
    pub async fn connect(
        what: &'static str,
        address: &str,
        within: Duration,
    ) -> Result<Self, CallError> {
        let address = address::dialable(what, address)?;
        let name = format!("{what} {address}");
        let endpoint = endpoint(address)?;
        let channel = Mutex::new(dial(&name, &endpoint, within).await?);
        Ok(Self {
            name,
            endpoint,
            channel,
        })
    }

    /// The server's kind and address, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes one call that ends within `within`; the server is told that time.
    ///
    /// # Errors
    /// What the server answered, or that it did not answer in time.
    pub async fn call<Q, R, F>(
        &self,
        what: &str,
        message: Q,
        within: Duration,
        rpc: impl FnOnce(Channel, Request<Q>) -> F,
    ) -> Result<R, CallError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let end = Instant::now() + within;
        let call = rpc(self.channel(), request(message, within));
        let response = match timeout_at(end, call).await {
            Ok(Ok(response)) => response,
            Ok(Err(status)) if !is_silence(&status) => {
                return Err(CallError::from_status(&status, &self.name));
            }
            Ok(Err(_)) | Err(_) => {
                self.reconnect();
                let name = &self.name;
                let message = format!("no answer to {what} from {name} within {within:?}");
                return Err(CallError::Silent(message));
            }
        };
        self.check_version(&response)?;
        Ok(response.into_inner())
    }

    fn check_version<R>(&self, response: &Response<R>) -> Result<(), CallError> {
        let theirs = response.metadata().get(version::KEY);
        let theirs = theirs.map(|v| v.to_str().unwrap_or("unreadable"));
        version::check(theirs).map_err(|why| CallError::Mismatch(format!("{}: {why}", self.name)))
    }

    fn channel(&self) -> Channel {
        lock(&self.channel).clone()
    }

    fn reconnect(&self) {
        let fresh = self.endpoint.connect_lazy();
        *lock(&self.channel) = fresh;
    }
}

/// Whether the channel's own timer ended the call, and not the server.
fn is_silence(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<TimeoutExpired>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn endpoint(address: String) -> Result<Endpoint, CallError> {
    let endpoint = Endpoint::from_shared(address).map_err(|e| CallError::Refused(e.to_string()))?;
    Ok(endpoint
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_ACK)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME))
}

async fn dial(name: &str, endpoint: &Endpoint, within: Duration) -> Result<Channel, CallError> {
    let end = Instant::now() + within;
    let mut pause = FIRST_PAUSE;
    let mut why = "it did not answer".to_owned();
    loop {
        match timeout_at(end, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => why = innermost(&error),
            Err(_elapsed) => {}
        }
        let wait = pause + jitter();
        if Instant::now() + wait >= end {
            return Err(CallError::Unreachable(format!(
                "could not connect to {name} within {within:?}: {why}. \
                 Is it running, and does this address reach it from here?"
            )));
        }
        sleep(wait).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

fn request<Q>(message: Q, within: Duration) -> Request<Q> {
    let mut request = Request::new(message);
    request.set_timeout(within);
    let ours = MetadataValue::from_static(version::OURS);
    request.metadata_mut().insert(version::KEY, ours);
    request
}

/// A random delay, so that groups that lost the same server do not return to it all at once.
fn jitter() -> Duration {
    Duration::from_millis(RandomState::new().hash_one(0) % JITTER_MS)
}
