//! The lighthouse as a state machine.

use std::sync::Arc;
use std::time::Duration;

use crate::effect::Effect;
use crate::member::{Member, Quorum, Ticket};
use crate::rules::{BadRules, Rules};
use crate::status::Status;
use crate::waiting::Waiting;

/// The lighthouse: who heartbeats, who asks, and the last quorum.
///
/// Every event returns the effects that follow from it, decided at once; nothing waits for a tick.
/// The shell calls [`Machine::tick`] when [`Machine::next_wake`] has come, and holds the callers'
/// deadlines: when one passes it calls [`Machine::give_up`].
#[derive(Debug)]
pub struct Machine {}

impl Machine {
    /// A lighthouse without memory. `epoch_ms` is the wall clock in milliseconds: the first quorum
    /// id lies above it, so that ids do not repeat when the lighthouse restarts.
    pub fn new(rules: Rules, epoch_ms: i64) -> Result<Self, BadRules> {
        todo!("{rules:?} {epoch_ms}")
    }

    /// `replica_id` is alive. An empty id is ignored.
    pub fn heartbeat(&mut self, replica_id: &str, now: Duration) -> Vec<Effect> {
        todo!("{replica_id} {now:?}")
    }

    /// `member` asks for a quorum. It is answered by exactly one `Publish` or `Refuse` that names
    /// `ticket`, unless it leaves before. `last_quorum_id` is the highest id it has seen, 0 if none.
    pub fn join(
        &mut self,
        ticket: Ticket,
        member: Member,
        last_quorum_id: i64,
        now: Duration,
    ) -> Vec<Effect> {
        todo!("{ticket:?} {member:?} {last_quorum_id} {now:?}")
    }

    /// The caller hung up: its request is withdrawn, without an answer. Unknown tickets are ignored.
    pub fn leave(&mut self, ticket: Ticket, now: Duration) -> Vec<Effect> {
        todo!("{ticket:?} {now:?}")
    }

    /// The caller's deadline has passed: its request is withdrawn and refused with
    /// [`crate::effect::Refusal::Deadline`], which says what it waited for. Unknown tickets are ignored.
    pub fn give_up(&mut self, ticket: Ticket, now: Duration) -> Vec<Effect> {
        todo!("{ticket:?} {now:?}")
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        todo!("{now:?}")
    }

    /// When time alone may change a decision; `None` while nobody asks. It may come early (a tick
    /// then does nothing and the next one is asked for), never late.
    pub fn next_wake(&self) -> Option<Duration> {
        todo!()
    }

    /// The last quorum.
    pub fn last_quorum(&self) -> Option<&Arc<Quorum>> {
        todo!()
    }

    /// Why no quorum forms.
    pub fn waiting(&self, now: Duration) -> Waiting {
        todo!("{now:?}")
    }

    /// What a person may want to see.
    pub fn status(&self, now: Duration) -> Status {
        todo!("{now:?}")
    }

    /// The rules it was given.
    pub fn rules(&self) -> &Rules {
        todo!()
    }
}
