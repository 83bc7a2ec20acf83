//! The state of one replica group: its local ranks wait here for a quorum and for a commit vote.
//!
//! One lock holds both state machines and the pending calls. It is held for one event, never across
//! an await. A request to the lighthouse runs as a task of its own, since it outlives any one caller.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use tokio::task::AbortHandle;
use tonic::Code;
use torchft_quorum::{
    gather::{Gather, GatherEffect, Group, Round},
    member::{CallId, Member},
    vote::{CommitBarrier, RankVote, VoteEffect},
};

use super::refusal;
use crate::{
    clock::Clock,
    error::CallError,
    lighthouse::LighthouseClient,
    lock::lock,
    pending::{Answers, PendingCall, PendingCalls},
    timer::Timer,
    wire::{self, ManagerQuorumRequest, ManagerQuorumResponse},
};

type QuorumAnswer = Result<ManagerQuorumResponse, CallError>;
type VoteAnswer = Result<bool, CallError>;

/// Both state machines of one group, and the calls that wait for them.
#[derive(Debug)]
pub struct GroupState {
    clock: Clock,
    timer: Timer,
    lighthouse: Arc<LighthouseClient>,
    inner: Mutex<Inner>,
    /// The task that sends this group's heartbeats.
    heartbeat_task: OnceLock<AbortHandle>,
}

#[derive(Debug)]
struct Inner {
    gather: Gather,
    barrier: CommitBarrier,
    quorum_calls: PendingCalls<QuorumAnswer>,
    vote_calls: PendingCalls<VoteAnswer>,
    /// The request to the lighthouse that has no answer yet.
    request: Option<(Round, AbortHandle)>,
    /// Set when the group has ended: what every call is answered.
    ended: Option<CallError>,
}

impl GroupState {
    /// The state of a group of which no rank has called yet.
    #[must_use]
    pub fn new(group: Group, lighthouse: Arc<LighthouseClient>) -> Self {
        Self {
            clock: Clock::start(),
            timer: Timer::new(),
            lighthouse,
            inner: Mutex::new(Inner {
                barrier: CommitBarrier::new(group.world_size),
                gather: Gather::new(group),
                quorum_calls: PendingCalls::default(),
                vote_calls: PendingCalls::default(),
                request: None,
                ended: None,
            }),
            heartbeat_task: OnceLock::new(),
        }
    }

    /// Sends a failed request again when it is due. Never ends.
    pub async fn timer_task(self: Arc<Self>) {
        loop {
            self.timer.expired(self.clock).await;
            self.gather(&mut self.lock(), |gather, now| gather.tick(now));
        }
    }

    /// Requests a quorum for one local rank, and waits for it `within` that time.
    ///
    /// # Errors
    /// Why there is no quorum, and who was waited for.
    pub async fn quorum(
        self: &Arc<Self>,
        message: ManagerQuorumRequest,
        within: Duration,
    ) -> QuorumAnswer {
        let answer = self.ask(message, within)?.wait(Some(within)).await;
        answer.unwrap_or_else(|| Err(shutting_down()))
    }

    /// Casts the vote of one local rank, and waits for the others, `within` that time if it is
    /// bounded. Returns whether all of them voted for the step.
    ///
    /// # Errors
    /// The vote cannot count, or the others did not vote in time.
    pub async fn vote(self: &Arc<Self>, vote: RankVote, within: Option<Duration>) -> VoteAnswer {
        let answer = self.cast(vote)?.wait(within).await;
        answer.unwrap_or_else(|| Err(shutting_down()))
    }

    /// Where the state of a rank can be fetched.
    ///
    /// # Errors
    /// That rank has not asked for a quorum yet.
    pub fn checkpoint_metadata(&self, group_rank: i64) -> Result<String, CallError> {
        let inner = self.lock();
        let found = inner.gather.checkpoint_metadata(group_rank);
        found.map(str::to_owned).ok_or_else(|| {
            let message = format!("rank {group_rank} has not said where its checkpoint is");
            CallError::failed(Code::NotFound, message)
        })
    }

    /// Hands over the task that sends this group's heartbeats, to be ended with the group.
    pub fn set_heartbeat_task(&self, task: AbortHandle) {
        let _ = self.heartbeat_task.set(task); // called once
    }

    /// A local rank cannot go on: every other rank is told why, now and whenever it calls. The
    /// heartbeats end, so that no other group waits for this one.
    pub fn rank_ends(&self, group_rank: i64, why: &str) {
        if let Some(task) = self.heartbeat_task.get() {
            task.abort();
        }
        self.end(CallError::Refused(format!(
            "{why} (group rank {group_rank} cannot go on, so this group ends)"
        )));
    }

    /// Fails all pending calls, and every later one.
    pub fn close(&self) {
        self.end(shutting_down());
    }

    fn end(&self, why: CallError) {
        let mut inner = self.lock();
        let why = inner.ended.get_or_insert(why).clone();
        inner.quorum_calls.answer_all(&Err(why.clone()));
        inner.vote_calls.answer_all(&Err(why));
        if let Some((_, task)) = inner.request.take() {
            task.abort();
        }
    }

    fn ask(
        self: &Arc<Self>,
        message: ManagerQuorumRequest,
        within: Duration,
    ) -> Result<PendingCall<'_, Arc<Self>, QuorumAnswer>, CallError> {
        let ask = wire::rank_ask(message, self.clock.now() + within);
        let mut inner = self.open()?;
        let (id, answer) = inner.quorum_calls.add();
        self.gather(&mut inner, |gather, now| gather.ask(id, ask, now));
        let owner = self;
        Ok(PendingCall { owner, id, answer })
    }

    fn cast(
        self: &Arc<Self>,
        vote: RankVote,
    ) -> Result<PendingCall<'_, Arc<Self>, VoteAnswer>, CallError> {
        let mut inner = self.open()?;
        let (id, answer) = inner.vote_calls.add();
        inner.vote(|barrier| barrier.vote(id, vote));
        let owner = self;
        Ok(PendingCall { owner, id, answer })
    }

    fn gather(
        self: &Arc<Self>,
        inner: &mut Inner,
        event: impl FnOnce(&mut Gather, Duration) -> Vec<GatherEffect>,
    ) {
        for effect in event(&mut inner.gather, self.clock.now()) {
            self.carry_out(inner, effect);
        }
        self.timer.set(inner.gather.next_wake());
    }

    fn carry_out(self: &Arc<Self>, inner: &mut Inner, effect: GatherEffect) {
        match effect {
            GatherEffect::RoundBegins(_) => inner.vote(CommitBarrier::begin),
            GatherEffect::Send {
                round,
                member,
                last_quorum_id,
                deadline,
                ..
            } => {
                let request = self.clone().send(round, member, last_quorum_id, deadline);
                inner.request = Some((round, tokio::spawn(request).abort_handle()));
            }
            GatherEffect::Cancel(round) => {
                if let Some((_, task)) = inner.request.take_if(|(sent, _)| *sent == round) {
                    task.abort();
                }
            }
            GatherEffect::Answer {
                call_id,
                assignment,
            } => inner.quorum_calls.answer(call_id, Ok(assignment.into())),
            GatherEffect::Refuse { call_id, refusal } => {
                let refused = refusal::of_gather(&refusal);
                inner.quorum_calls.answer(call_id, Err(refused));
            }
        }
    }

    /// Sends one request to the lighthouse, and hands its answer to the state machine.
    async fn send(
        self: Arc<Self>,
        round: Round,
        member: Member,
        last_quorum_id: i64,
        deadline: Duration,
    ) {
        let within = deadline.saturating_sub(self.clock.now());
        let request = self
            .lighthouse
            .quorum((&member).into(), last_quorum_id, within);
        let answer = match request.await {
            Ok(quorum) => Ok(Arc::new(wire::quorum(quorum, self.clock.now()))),
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
        lock(&self.inner)
    }

    /// Locks the state for a new call, unless the group has ended.
    fn open(&self) -> Result<MutexGuard<'_, Inner>, CallError> {
        let inner = self.lock();
        match &inner.ended {
            Some(why) => Err(why.clone()),
            None => Ok(inner),
        }
    }
}

impl Answers for Arc<GroupState> {
    fn leave(&self, id: CallId) {
        let mut inner = self.lock();
        if inner.quorum_calls.remove(id) {
            self.gather(&mut inner, |gather, _| gather.leave(id));
        }
        if inner.vote_calls.remove(id) {
            inner.vote(|barrier| barrier.leave(id));
        }
    }

    fn give_up(&self, id: CallId) {
        let mut inner = self.lock();
        self.gather(&mut inner, |gather, _| gather.give_up(id));
        inner.vote(|barrier| barrier.give_up(id));
    }
}

impl Inner {
    fn vote(&mut self, event: impl FnOnce(&mut CommitBarrier) -> Vec<VoteEffect>) {
        for effect in event(&mut self.barrier) {
            let (id, answer) = match effect {
                VoteEffect::Answer { call_id, outcome } => {
                    tracing::debug!(?outcome, "vote");
                    (call_id, Ok(outcome.commits()))
                }
                VoteEffect::Refuse { call_id, refusal } => {
                    (call_id, Err(refusal::of_vote(&refusal)))
                }
            };
            self.vote_calls.answer(id, answer);
        }
    }
}

fn shutting_down() -> CallError {
    CallError::Unavailable("this manager server was shut down".to_owned())
}
