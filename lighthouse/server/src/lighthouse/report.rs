//! What the lighthouse tells people: one line an event.

use torchft_quorum::{
    decide::Formed,
    effect::{Notice, Refusal, Renewal},
    member::Quorum,
};

/// A quorum was formed. A new id is news; the same members again are not.
pub fn formed(quorum: &Quorum, why: Formed, renewed: Option<&Renewal>) {
    let (id, members, step) = (quorum.id, quorum.members.len(), quorum.max_step());
    match renewed {
        Some(renewal) => {
            tracing::info!(quorum_id = id, members, step, ?why, ?renewal, "new quorum");
        }
        None => tracing::debug!(quorum_id = id, members, step, ?why, "same quorum"),
    }
}

/// A caller was sent away.
pub fn refused(refusal: &Refusal) {
    match refusal {
        Refusal::StateLost(_) => tracing::error!("{refusal}"),
        Refusal::Deadline {
            replica_id, step, ..
        } => tracing::debug!(replica = %replica_id, step, "{refusal}"),
        Refusal::Superseded { .. } => tracing::debug!("{refusal}"),
        Refusal::BadMember(_) => tracing::warn!("{refusal}"),
    }
}

/// Something that nobody waits for.
pub fn notice(notice: &Notice) {
    match notice {
        Notice::Paused { gap } => tracing::warn!(?gap, "{notice}"),
        Notice::SameName { .. } => tracing::warn!(
            "{notice}: they compute the same share of the data twice; give each group a name of \
             its own, or stop the one that should not be there"
        ),
        Notice::FellSilent { replica_id } => {
            tracing::info!(replica = %replica_id, "a member of the last quorum fell silent");
        }
        Notice::Restarted {
            from,
            to,
            quorum_id,
        } => tracing::warn!(
            from_step = from,
            to_step = to,
            quorum_id,
            "training goes on from an earlier step than the last quorum had reached"
        ),
    }
}
