//! The lighthouse's log lines, one for each event.

use torchft_quorum::{
    decide::Formed,
    effect::{Notice, Refusal, Renewal},
    member::Quorum,
};

/// Logs that a quorum formed: as info if its id is new, else as debug.
pub fn formed(quorum: &Quorum, why: Formed, renewed: Option<&Renewal>) {
    let (id, members, step) = (quorum.id, quorum.members.len(), quorum.max_step());
    match renewed {
        Some(renewal) => {
            tracing::info!(quorum_id = id, members, step, ?why, ?renewal, "new quorum");
        }
        None => tracing::debug!(quorum_id = id, members, step, ?why, "same quorum"),
    }
}

/// Logs that a request was refused.
pub fn refused(refusal: &Refusal) {
    match refusal {
        Refusal::StateLost(_) => tracing::error!("{refusal}"),
        Refusal::Deadline {
            replica_id, step, ..
        } => tracing::debug!(replica = %replica_id, step, "{refusal}"),
        Refusal::HeldBack { .. } => tracing::warn!("{refusal}"),
        Refusal::Superseded { .. } => tracing::debug!("{refusal}"),
        Refusal::BadMember(_) => tracing::warn!("{refusal}"),
    }
}

/// Logs an event for which nobody waits.
pub fn notice(notice: &Notice) {
    match notice {
        Notice::Paused { gap } => tracing::warn!(?gap, "{notice}"),
        Notice::SameName { .. } => tracing::warn!(
            "{notice}: they compute the same share of the data twice; give each group its own name, \
             or stop the one that should not run"
        ),
        Notice::Died { replica_id } => {
            tracing::info!(replica = %replica_id, "{notice}");
        }
        Notice::OtherGeneration { .. } => tracing::warn!("{notice}"),
        Notice::Restarted {
            from,
            to,
            quorum_id,
        } => tracing::warn!(from_step = from, to_step = to, quorum_id, "{notice}"),
    }
}
