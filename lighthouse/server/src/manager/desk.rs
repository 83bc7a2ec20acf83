//! A group's desk: its local ranks wait here for a quorum and for the end of a vote.
//!
//! One lock holds both machines and those who wait. It is taken for one event, never across an
//! await. Requests to the lighthouse run as tasks of their own, since a round outlives any caller.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::AbortHandle,
    time::{Instant, timeout_at},
};
use torchft_quorum::{
    gather::{Gather, GatherEffect, Group, RankAsk, Round},
    member::{Member, Ticket},
    vote::{Ballot, Vote, VoteEffect},
};

use super::refusal;
use crate::{
    alarm::Alarm,
    clock::Clock,
    convert,
    error::CallError,
    lighthouse::LighthouseClient,
    wire::{ManagerQuorumRequest, ManagerQuorumResponse},
};

type Quorums = oneshot::Sender<Result<ManagerQuorumResponse, CallError>>;
type Votes = oneshot::Sender<Result<bool, CallError>>;

/// Both machines of one group, and those who wait for them.
#[derive(Debug)]
pub struct Desk {
    clock: Clock,
    alarm: Alarm,
    lighthouse: Arc<LighthouseClient>,
    inner: Mutex<Inner>,
    /// Says to the lighthouse that the group is alive.
    heart: OnceLock<AbortHandle>,
}

#[derive(Debug)]
struct Inner {
    gather: Gather,
    vote: Vote,
    last_ticket: u64,
    for_quorum: HashMap<Ticket, Quorums>,
    for_vote: HashMap<Ticket, Votes>,
    /// The request that the lighthouse has now.
    asking: Option<(Round, AbortHandle)>,
    /// Why nobody is let in any more.
    ended: Option<CallError>,
}

impl Desk {
    /// A desk at which nobody waits.
    #[must_use]
    pub fn new(group: Group, lighthouse: Arc<LighthouseClient>) -> Self {
        let inner = Mutex::new(Inner {
            vote: Vote::new(group.world_size),
            gather: Gather::new(group),
            last_ticket: 0,
            for_quorum: HashMap::new(),
            for_vote: HashMap::new(),
            asking: None,
            ended: None,
        });
        let (clock, alarm) = (Clock::start(), Alarm::new());
        Self {
            clock,
            alarm,
            lighthouse,
            inner,
            heart: OnceLock::new(),
        }
    }

    /// Sends a failed request again when it is due. Never ends.
    pub async fn watch_the_clock(self: Arc<Self>) {
        loop {
            self.alarm.ring(self.clock).await;
            self.gather(&mut self.lock(), |gather, now| gather.tick(now));
        }
    }

    /// A local rank asks for a quorum, and waits for it `within` that time.
    ///
    /// # Errors
    /// Why there is none, with who was waited for.
    pub async fn quorum(
        self: &Arc<Self>,
        message: ManagerQuorumRequest,
        within: Duration,
    ) -> Result<ManagerQuorumResponse, CallError> {
        let deadline = self.clock.now() + within;
        let ask = convert::rank_ask(message, deadline);
        let mut seat = self.sit_for_quorum(ask)?;
        let end = Instant::from_std(self.clock.instant(deadline));
        let answered = match timeout_at(end, &mut seat.answer).await {
            Ok(answered) => answered,
            Err(_elapsed) => {
                let ticket = seat.ticket;
                self.gather(&mut self.lock(), |gather, _| gather.give_up(ticket));
                (&mut seat.answer).await
            }
        };
        answered.unwrap_or_else(|_closed| Err(going_down()))
    }

    /// A local rank votes on a step, and waits for the others, `within` that time if it is bounded.
    ///
    /// # Errors
    /// The vote cannot count, or the others did not vote in time.
    pub async fn vote(
        self: &Arc<Self>,
        ballot: Ballot,
        within: Option<Duration>,
    ) -> Result<bool, CallError> {
        let mut seat = self.sit_for_vote(ballot)?;
        let in_time = match within {
            Some(within) => tokio::time::timeout(within, &mut seat.answer).await,
            None => Ok((&mut seat.answer).await),
        };
        let answered = match in_time {
            Ok(answered) => answered,
            Err(_elapsed) => {
                self.vote_event(|vote| vote.give_up(seat.ticket));
                (&mut seat.answer).await
            }
        };
        answered.unwrap_or_else(|_closed| Err(going_down()))
    }

    /// Where the state of a rank can be fetched.
    ///
    /// # Errors
    /// That rank has not asked for a quorum yet.
    pub fn checkpoint_metadata(&self, group_rank: i64) -> Result<String, CallError> {
        let inner = self.lock();
        let found = inner.gather.checkpoint_metadata(group_rank);
        found.map(str::to_owned).ok_or_else(|| CallError::Failed {
            code: tonic::Code::NotFound,
            message: format!("rank {group_rank} has not said where its checkpoint is"),
        })
    }

    /// What stops beating with the group.
    pub fn give_heart(&self, heart: AbortHandle) {
        let _ = self.heart.set(heart); // a second one is never given
    }

    /// A local rank cannot go on: all others are told why, now and whenever they ask, and the
    /// lighthouse hears no more of this group, so that no other one waits for it.
    pub fn rank_ends(&self, group_rank: i64, why: &str) {
        if let Some(heart) = self.heart.get() {
            heart.abort();
        }
        self.end(CallError::Refused(format!(
            "{why} (group rank {group_rank} cannot go on, so this group ends)"
        )));
    }

    /// Sends everybody away; nobody is let in any more.
    pub fn close(&self) {
        self.end(going_down());
    }

    fn end(&self, why: CallError) {
        let mut inner = self.lock();
        let why = inner.ended.get_or_insert(why).clone();
        for (_, waiting) in inner.for_quorum.drain() {
            let _ = waiting.send(Err(why.clone()));
        }
        for (_, waiting) in inner.for_vote.drain() {
            let _ = waiting.send(Err(why.clone()));
        }
        if let Some((_, task)) = inner.asking.take() {
            task.abort();
        }
    }

    fn sit_for_quorum(
        self: &Arc<Self>,
        ask: RankAsk,
    ) -> Result<Seat<'_, Result<ManagerQuorumResponse, CallError>>, CallError> {
        let mut inner = self.lock();
        let ticket = inner.ticket()?;
        let (answers, answer) = oneshot::channel();
        inner.for_quorum.insert(ticket, answers);
        self.gather(&mut inner, |gather, now| gather.ask(ticket, ask, now));
        let desk = self;
        Ok(Seat {
            desk,
            ticket,
            answer,
        })
    }

    fn sit_for_vote(
        self: &Arc<Self>,
        ballot: Ballot,
    ) -> Result<Seat<'_, Result<bool, CallError>>, CallError> {
        let mut inner = self.lock();
        let ticket = inner.ticket()?;
        let (answers, answer) = oneshot::channel();
        inner.for_vote.insert(ticket, answers);
        inner.vote_event(|vote| vote.vote(ticket, ballot));
        let desk = self;
        Ok(Seat {
            desk,
            ticket,
            answer,
        })
    }

    fn gather(
        self: &Arc<Self>,
        inner: &mut Inner,
        event: impl FnOnce(&mut Gather, Duration) -> Vec<GatherEffect>,
    ) {
        for effect in event(&mut inner.gather, self.clock.now()) {
            self.carry_out(inner, effect);
        }
        self.alarm.set(inner.gather.next_wake());
    }

    fn carry_out(self: &Arc<Self>, inner: &mut Inner, effect: GatherEffect) {
        match effect {
            GatherEffect::RoundBegins(_) => inner.vote_event(Vote::begin),
            GatherEffect::Send {
                round,
                member,
                last_quorum_id,
                deadline,
                ..
            } => {
                let asking = self.clone().ask(round, member, last_quorum_id, deadline);
                inner.asking = Some((round, tokio::spawn(asking).abort_handle()));
            }
            GatherEffect::Cancel(round) => {
                if let Some((_, task)) = inner.asking.take_if(|(asked, _)| *asked == round) {
                    task.abort();
                }
            }
            GatherEffect::Answer { ticket, assignment } => {
                inner.answer(ticket, Ok(convert::assignment_message(assignment)));
            }
            GatherEffect::Refuse { ticket, refusal } => {
                inner.answer(ticket, Err(refusal::of_gather(&refusal)));
            }
        }
    }

    /// One try at the lighthouse.
    async fn ask(self: Arc<Self>, round: Round, member: Member, last_id: i64, deadline: Duration) {
        let within = deadline.saturating_sub(self.clock.now());
        let message = convert::member_message(&member);
        let answer = match self.lighthouse.quorum(message, last_id, within).await {
            Ok(quorum) => Ok(Arc::new(convert::quorum(quorum, self.clock.now()))),
            Err(error) => {
                tracing::debug!(replica = %member.replica_id, step = member.step, "{error}");
                Err(refusal::failure(&error))
            }
        };
        self.gather(&mut self.lock(), |gather, now| {
            gather.answered(round, answer, now)
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller of `ticket` hung up, unless it was answered.
    fn leave(self: &Arc<Self>, ticket: Ticket) {
        let mut inner = self.lock();
        if inner.for_quorum.remove(&ticket).is_some() {
            self.gather(&mut inner, |gather, _| gather.leave(ticket));
        }
        if inner.for_vote.remove(&ticket).is_some() {
            inner.vote_event(|vote| vote.leave(ticket));
        }
    }

    fn vote_event(&self, event: impl FnOnce(&mut Vote) -> Vec<VoteEffect>) {
        self.lock().vote_event(event);
    }
}

impl Inner {
    fn ticket(&mut self) -> Result<Ticket, CallError> {
        if let Some(why) = &self.ended {
            return Err(why.clone());
        }
        self.last_ticket += 1;
        Ok(Ticket(self.last_ticket))
    }

    // An answer that cannot be sent means that the caller has just left.

    fn answer(&mut self, ticket: Ticket, answer: Result<ManagerQuorumResponse, CallError>) {
        if let Some(waiting) = self.for_quorum.remove(&ticket) {
            let _ = waiting.send(answer);
        }
    }

    fn vote_event(&mut self, event: impl FnOnce(&mut Vote) -> Vec<VoteEffect>) {
        for effect in event(&mut self.vote) {
            let (ticket, answer) = match effect {
                VoteEffect::Answer { ticket, outcome } => {
                    tracing::debug!(?outcome, "vote");
                    (ticket, Ok(outcome.commits()))
                }
                VoteEffect::Refuse { ticket, refusal } => (ticket, Err(refusal::of_vote(&refusal))),
            };
            if let Some(waiting) = self.for_vote.remove(&ticket) {
                let _ = waiting.send(answer);
            }
        }
    }
}

/// A caller's place; leaving it withdraws what it asked for.
struct Seat<'d, T> {
    desk: &'d Arc<Desk>,
    ticket: Ticket,
    answer: oneshot::Receiver<T>,
}

impl<T> Drop for Seat<'_, T> {
    fn drop(&mut self) {
        self.desk.leave(self.ticket);
    }
}

fn going_down() -> CallError {
    CallError::Unavailable("this manager server was shut down".to_owned())
}
