//! Addresses: the forms that a user may write, and the one that a server advertises.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use thiserror::Error;
use tokio::{net::lookup_host, time::timeout};
use tonic::transport::Uri;

const LOOK_UP: Duration = Duration::from_secs(1);

/// An address that cannot be used, with the form that can.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// Not `http://host:port`.
    #[error("{whose} address {given:?} is not of the form http://host:port, e.g. {example}")]
    NotHttp {
        /// Whose address it is, e.g. `lighthouse`.
        whose: &'static str,
        /// What was given.
        given: String,
        /// An address of the right form.
        example: &'static str,
    },
    /// A bind address is not `host:port`.
    #[error(
        "bind address {given:?} is not of the form host:port, e.g. [::]:29510 or 0.0.0.0:29510"
    )]
    NotBindable {
        /// What was given.
        given: String,
    },
}

/// Checks that `given` is `http://host:port`, and returns it without a trailing slash.
///
/// # Errors
/// [`AddressError::NotHttp`], with the value and the form that is wanted.
pub fn dialable(whose: &'static str, given: &str) -> Result<String, AddressError> {
    let trimmed = given.trim().trim_end_matches('/');
    let uri = trimmed.parse::<Uri>().ok();
    let is_http = uri.is_some_and(|uri| {
        uri.scheme_str() == Some("http")
            && uri.host().is_some_and(|h| !h.is_empty())
            && uri.port_u16().is_some_and(|p| p > 0)
            && matches!(uri.path(), "" | "/")
    });
    if is_http {
        Ok(trimmed.to_owned())
    } else {
        Err(AddressError::NotHttp {
            whose,
            given: given.to_owned(),
            example: "http://localhost:29510",
        })
    }
}

/// Splits a bind address into host (without brackets) and port.
///
/// # Errors
/// [`AddressError::NotBindable`].
pub fn bindable(given: &str) -> Result<(String, u16), AddressError> {
    let wrong = || AddressError::NotBindable {
        given: given.to_owned(),
    };
    let (host, port) = given.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().map_err(|_| wrong())?;
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = bracketed.unwrap_or(host);
    if host.is_empty() || host.contains('/') || (bracketed.is_none() && host.contains(':')) {
        return Err(wrong());
    }
    Ok((host.to_owned(), port))
}

/// The URL that others dial: the host that was bound; for a wildcard the name of this host; if
/// that does not resolve, the loopback address, with a warning in the log.
pub async fn advertised(bind_host: &str, host_name: &str, port: u16) -> String {
    if !is_wildcard(bind_host) {
        return url(bind_host, port);
    }
    if resolves(host_name).await {
        return url(host_name, port);
    }
    tracing::warn!(
        host_name,
        "the name of this host does not resolve: advertising 127.0.0.1, which only this host can \
         reach; bind to the address that other hosts dial"
    );
    url("127.0.0.1", port)
}

fn is_wildcard(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
}

/// `http://host:port`, with an IPv6 literal in brackets.
#[must_use]
pub fn url(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(ip) => format!("http://{}", SocketAddr::new(ip, port)),
        Err(_) => format!("http://{host}:{port}"),
    }
}

/// Whether `host` resolves to an address on this host, within a second.
pub async fn resolves(host: &str) -> bool {
    match timeout(LOOK_UP, lookup_host((host, 0))).await {
        Ok(Ok(mut found)) => found.next().is_some(),
        Ok(Err(_)) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lighthouse_address_needs_scheme_host_and_port() {
        assert_eq!(
            dialable("lighthouse", "http://a:1/").as_deref(),
            Ok("http://a:1")
        );
        for wrong in [
            "a:1",
            "http://a",
            "https://a:1",
            "http://:1",
            "http://a:0",
            "http://a:1/x",
            "",
        ] {
            let error = dialable("lighthouse", wrong).expect_err(wrong).to_string();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("http://host:port"));
        }
    }

    #[test]
    fn a_bind_address_needs_host_and_port() {
        assert_eq!(bindable("[::]:29510"), Ok(("::".into(), 29510)));
        assert_eq!(bindable("127.0.0.1:0"), Ok(("127.0.0.1".into(), 0)));
        for wrong in ["29510", ":29510", "::1:2", "http://a:1", "a:70000"] {
            assert!(bindable(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_wildcard_is_not_advertised() {
        assert_eq!(advertised("::", "localhost", 7).await, "http://localhost:7");
        assert_eq!(advertised("0.0.0.0", "::1", 7).await, "http://[::1]:7");
        assert_eq!(advertised("127.0.0.1", "x", 7).await, "http://127.0.0.1:7");
        assert_eq!(
            advertised("::", "no such name", 7).await,
            "http://127.0.0.1:7"
        );
    }
}
