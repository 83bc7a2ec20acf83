//! A bound port. It is bound before any task is spawned, so that a taken port is an error of the
//! constructor.

use std::{io, net::TcpListener as StdListener};

use thiserror::Error;
use tokio::net::TcpListener;

use crate::address::{self, AddressError};

/// Why a server could not start to listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The address has the wrong form.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Another process has the port.
    #[error(
        "cannot listen on {bind}: the port is taken. Stop the process that has it, or choose another with --bind host:port (port 0 takes a free one)"
    )]
    Taken {
        /// The address.
        bind: String,
    },
    /// The system refused for another reason.
    #[error("cannot listen on {bind}: {cause}")]
    Io {
        /// The address.
        bind: String,
        /// The system's error.
        cause: io::Error,
    },
}

/// A bound, listening port that nobody serves yet.
#[derive(Debug)]
pub struct BoundPort {
    listener: StdListener,
    /// The host as it was written, without brackets.
    pub host: String,
    /// The port, also when port 0 was asked for.
    pub port: u16,
}

impl BoundPort {
    /// Binds `host:port`. `[::]` on a host without IPv6 becomes `0.0.0.0`, with a warning in the log.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(bind: &str) -> Result<Self, ListenError> {
        let (host, port) = address::bindable(bind)?;
        let (listener, host) = match StdListener::bind((host.as_str(), port)) {
            Ok(listener) => (listener, host),
            Err(cause) if host == "::" && has_no_ipv6(&cause) => {
                tracing::warn!(
                    bind,
                    "this host has no IPv6 ({cause}): listening on 0.0.0.0"
                );
                let any = "0.0.0.0".to_owned();
                (
                    StdListener::bind(("0.0.0.0", port)).map_err(|e| explain(bind, e))?,
                    any,
                )
            }
            Err(cause) => return Err(explain(bind, cause)),
        };
        let port = listener.local_addr().map_err(|e| explain(bind, e))?.port();
        Ok(Self {
            listener,
            host,
            port,
        })
    }

    /// Turns it into a listener of the running tokio runtime.
    ///
    /// # Errors
    /// The system's error.
    pub fn into_listener(self) -> io::Result<TcpListener> {
        self.listener.set_nonblocking(true)?;
        TcpListener::from_std(self.listener)
    }
}

fn explain(bind: &str, cause: io::Error) -> ListenError {
    let bind = bind.to_owned();
    match cause.kind() {
        io::ErrorKind::AddrInUse => ListenError::Taken { bind },
        _ => ListenError::Io { bind, cause },
    }
}

fn has_no_ipv6(cause: &io::Error) -> bool {
    // EAFNOSUPPORT has no kind of its own.
    cause.raw_os_error() == Some(97) || cause.kind() == io::ErrorKind::AddrNotAvailable
}
