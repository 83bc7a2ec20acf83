//! Errors between the core and callers: its refusals as call errors, and a failed call to the
//! lighthouse as the core's [`Failure`].

use tonic::Code;
use torchft_quorum::{
    gather::{Failure, FailureKind, GatherRefusal},
    vote::VoteRefusal,
};

use crate::error::CallError;

/// The error for a rank that gets no quorum.
pub fn of_gather(refusal: &GatherRefusal) -> CallError {
    let message = refusal.to_string();
    match refusal {
        // All ranks have asked, and the lighthouse has not answered.
        GatherRefusal::Deadline { missing, .. } if missing.is_empty() => {
            CallError::LighthouseAway(message)
        }
        GatherRefusal::Deadline { .. } => CallError::Deadline(message),
        GatherRefusal::UnknownRank { .. } => CallError::failed(Code::InvalidArgument, message),
        GatherRefusal::Superseded { .. } => CallError::failed(Code::Aborted, message),
        GatherRefusal::NotInQuorum(_) => CallError::failed(Code::NotFound, message),
        GatherRefusal::RankLeft { .. } => CallError::Refused(message),
        GatherRefusal::StepsDiffer { .. } => CallError::Mismatch(message),
        GatherRefusal::Lighthouse { failure, .. } => match failure.kind {
            FailureKind::Deadline => CallError::Deadline(message),
            // It is tried again until the deadline, so only that ends the wait.
            FailureKind::Unreachable => CallError::LighthouseAway(message),
            FailureKind::StateLost => CallError::StateLost(message),
            _ => CallError::Refused(message),
        },
    }
}

/// The error for a rank whose vote cannot count.
pub fn of_vote(refusal: &VoteRefusal) -> CallError {
    let message = refusal.to_string();
    match refusal {
        VoteRefusal::Deadline { .. } => CallError::Deadline(message),
        VoteRefusal::UnknownRank { .. } => CallError::failed(Code::InvalidArgument, message),
        VoteRefusal::Superseded { .. } => CallError::failed(Code::Aborted, message),
        VoteRefusal::StepsDiffer { .. } => CallError::Mismatch(message),
    }
}

/// The core's name for a failed request to the lighthouse, by what may help.
pub fn failure(error: &CallError) -> Failure {
    let kind = match error {
        CallError::Deadline(_) => FailureKind::Deadline,
        CallError::Silent(_)
        | CallError::LighthouseAway(_)
        | CallError::Unreachable(_)
        | CallError::Unavailable(_) => FailureKind::Unreachable,
        CallError::StateLost(_) => FailureKind::StateLost,
        CallError::Mismatch(_) | CallError::Refused(_) | CallError::Address(_) => {
            FailureKind::Refused
        }
        CallError::Failed { code, .. } => match code {
            Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
                FailureKind::Refused
            }
            _ => FailureKind::Failed,
        },
    };
    let message = error.message();
    Failure { kind, message }
}
