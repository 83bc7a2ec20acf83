//! How the core's refusals look to a caller, and a failed call at the lighthouse to the core.

use tonic::Code;
use torchft_quorum::{
    gather::{Failure, FailureKind, GatherRefusal},
    vote::VoteRefusal,
};

use crate::error::CallError;

/// What a rank is answered that gets no quorum.
pub fn of_gather(refusal: &GatherRefusal) -> CallError {
    let words = refusal.to_string();
    match refusal {
        // All ranks have asked, and the lighthouse has not answered.
        GatherRefusal::Deadline { missing, .. } if missing.is_empty() => {
            CallError::LighthouseAway(words)
        }
        GatherRefusal::Deadline { .. } => CallError::Deadline(words),
        GatherRefusal::UnknownRank { .. } => failed(Code::InvalidArgument, words),
        GatherRefusal::Superseded { .. } => failed(Code::Aborted, words),
        GatherRefusal::NotInQuorum(_) => failed(Code::NotFound, words),
        GatherRefusal::RankLeft { .. } => CallError::Refused(words),
        GatherRefusal::RanksApart { .. } => CallError::Mismatch(words),
        GatherRefusal::Lighthouse { failure, .. } => match failure.kind {
            FailureKind::Deadline => CallError::Deadline(words),
            // It is tried again until the deadline, so only that ends the wait.
            FailureKind::Unreachable => CallError::LighthouseAway(words),
            FailureKind::StateLost => CallError::StateLost(words),
            _ => CallError::Refused(words),
        },
    }
}

/// What a rank is answered whose vote cannot count.
pub fn of_vote(refusal: &VoteRefusal) -> CallError {
    let words = refusal.to_string();
    match refusal {
        VoteRefusal::Deadline { .. } => CallError::Deadline(words),
        VoteRefusal::UnknownRank { .. } => failed(Code::InvalidArgument, words),
        VoteRefusal::Superseded { .. } => failed(Code::Aborted, words),
        VoteRefusal::StepsDiffer { .. } => CallError::Mismatch(words),
    }
}

/// What came of a request to the lighthouse, by what may help.
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
    let message = error.words();
    Failure { kind, message }
}

fn failed(code: Code, message: String) -> CallError {
    CallError::Failed { code, message }
}
