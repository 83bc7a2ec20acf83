//! What a call to a lighthouse or manager can end in, and how that travels in a gRPC status.
//!
//! The kind of a refusal travels in the metadata key `torchft-refusal`, so that a manager can hand
//! the lighthouse's refusal on to its ranks unchanged; a peer that does not know the key still has
//! the code and the text.

use std::error::Error as _;

use thiserror::Error;
use tonic::{Code, Status, metadata::MetadataValue};

use crate::address::AddressError;

const KIND: &str = "torchft-refusal";

/// How a call failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CallError {
    /// The deadline passed; says who was waited for and why.
    #[error("status: Cancelled, message: \"Timeout expired: {0}\"")]
    Deadline(String),
    /// The deadline passed without any answer, from a peer that may be stopped or gone.
    #[error("status: Cancelled, message: \"Timeout expired: {0}\"")]
    Silent(String),
    /// A manager server could not reach its lighthouse before the deadline: the group may ask again.
    #[error("status: Cancelled, message: \"Timeout expired: {0}\"")]
    LighthouseAway(String),
    /// No connection could be made within the connect timeout.
    #[error("{0}")]
    Unreachable(String),
    /// The connection failed, or the server is shutting down: trying again may help.
    #[error("status: Unavailable, message: \"{0}\"")]
    Unavailable(String),
    /// All groups that held a committed step are gone.
    #[error("{0}")]
    StateLost(String),
    /// The versions of the two sides, or the steps of a group's ranks, differ.
    #[error("{0}")]
    Mismatch(String),
    /// The quorum or the vote was refused for a reason other than time.
    #[error("{0}")]
    Refused(String),
    /// An address of the wrong form.
    #[error("{0}")]
    Address(#[from] AddressError),
    /// Anything else that the server answered.
    #[error("status: {code:?}, message: \"{message}\"")]
    Failed {
        /// The gRPC code.
        code: Code,
        /// The server's message.
        message: String,
    },
}

impl CallError {
    /// [`CallError::Failed`] with this code and message.
    #[must_use]
    pub fn failed(code: Code, message: String) -> Self {
        Self::Failed { code, message }
    }

    /// The error for a gRPC status in which a call to `peer` ended.
    #[must_use]
    pub fn from_status(status: &Status, peer: &str) -> Self {
        let message = status.message().to_owned();
        if status.source().is_some() {
            return Self::Unavailable(format!("{peer}: {}", innermost(status)));
        }
        if let Some(refusal) = refusal(status, &message) {
            return refusal;
        }
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => Self::Deadline(message),
            Code::Unavailable => Self::Unavailable(format!("{peer}: {message}")),
            code => Self::failed(code, message),
        }
    }

    /// The message without the prefix of [`std::fmt::Display`], to be handed on.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Deadline(message)
            | Self::Silent(message)
            | Self::LighthouseAway(message)
            | Self::Unavailable(message) => message.clone(),
            Self::Failed { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }

    fn code_and_kind(&self) -> (Code, Option<&'static str>) {
        match self {
            Self::Deadline(_) | Self::Unreachable(_) => (Code::DeadlineExceeded, None),
            Self::Silent(_) => (Code::DeadlineExceeded, Some("silent")),
            Self::LighthouseAway(_) => (Code::DeadlineExceeded, Some("lighthouse-away")),
            Self::Unavailable(_) => (Code::Unavailable, None),
            Self::StateLost(_) => (Code::FailedPrecondition, Some("state-lost")),
            Self::Mismatch(_) => (Code::FailedPrecondition, Some("mismatch")),
            Self::Refused(_) => (Code::FailedPrecondition, Some("quorum")),
            Self::Address(_) => (Code::InvalidArgument, None),
            Self::Failed { code, .. } => (*code, None),
        }
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        let (code, kind) = error.code_and_kind();
        let mut status = Status::new(code, error.message());
        if let Some(kind) = kind {
            let value = MetadataValue::from_static(kind);
            status.metadata_mut().insert(KIND, value);
        }
        status
    }
}

fn refusal(status: &Status, message: &str) -> Option<CallError> {
    let message = message.to_owned();
    match status.metadata().get(KIND)?.to_str().ok()? {
        "state-lost" => Some(CallError::StateLost(message)),
        "mismatch" => Some(CallError::Mismatch(message)),
        "silent" => Some(CallError::Silent(message)),
        "lighthouse-away" => Some(CallError::LighthouseAway(message)),
        _ => Some(CallError::Refused(message)),
    }
}

/// The text of the innermost cause, e.g. `Connection refused (os error 111)`.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for error in [
            CallError::Deadline("a".into()),
            CallError::Silent("s".into()),
            CallError::LighthouseAway("l".into()),
            CallError::StateLost("b".into()),
            CallError::Mismatch("c".into()),
            CallError::Refused("d".into()),
            CallError::failed(Code::NotFound, "e".into()),
        ] {
            let status = Status::from(error.clone());
            assert_eq!(CallError::from_status(&status, ""), error);
        }
    }
}
