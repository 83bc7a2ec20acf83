//! The version of our additions to the wire, as the metadata key `torchft-wire`.
//!
//! Absent means a peer of an existing torchft, which we accept. A higher major version is refused
//! by both sides, with a sentence that says why, before any message is interpreted.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue},
    middleware::Next,
    response::Response,
};
use tonic::Status;

/// The metadata key of the wire version.
pub const KEY: &str = "torchft-wire";
/// Our version, `major` or `major.minor`.
pub const OURS: &str = "1";

/// Refuses a peer that speaks a later major version.
///
/// # Errors
/// A sentence that names both versions.
pub fn check(theirs: Option<&str>) -> Result<(), String> {
    let Some(theirs) = theirs else { return Ok(()) };
    match (major(theirs), major(OURS)) {
        (Some(theirs), Some(ours)) if theirs <= ours => Ok(()),
        _ => Err(format!(
            "the peer speaks wire version {theirs}, this side speaks {OURS}: \
             install the same torchft on both sides"
        )),
    }
}

/// The wire version in a set of headers, if there is one.
#[must_use]
pub fn stated(headers: &HeaderMap) -> Option<&str> {
    headers.get(KEY).map(|v| v.to_str().unwrap_or("unreadable"))
}

/// Checks each request, and states our version on each reply.
pub async fn gate(request: Request, next: Next) -> Response {
    let mut response = match check(stated(request.headers())) {
        Ok(()) => next.run(request).await,
        Err(why) => Status::failed_precondition(why).into_http::<Body>(),
    };
    let ours = HeaderValue::from_static(OURS);
    response.headers_mut().insert(KEY, ours);
    response
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn an_existing_peer_states_nothing_and_is_accepted() {
        assert!(check(None).is_ok());
    }

    #[test]
    fn the_same_major_is_accepted_and_a_later_one_refused_by_name() {
        assert!(check(Some("1.7")).is_ok());
        assert!(check(Some("2")).is_err_and(|why| why.contains("wire version 2")));
        assert!(check(Some("x")).is_err());
    }
}
