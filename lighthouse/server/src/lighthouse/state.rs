//! The lighthouse's state and its gRPC service: calls come in, the coordinator decides, its effects
//! are carried out.
//!
//! One lock holds the coordinator and the pending calls. It is held for one event, never across an
//! await.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tonic::{Code, Request, Response, Status as GrpcStatus, async_trait};
use torchft_quorum::{
    coordinator::Coordinator,
    effect::{Effect, Refusal},
    member::{CallId, Member},
    status::Status,
};

use super::report;
use crate::{
    clock::Clock,
    deadline,
    error::CallError,
    lock::lock,
    pending::{Answers, PendingCall, PendingCalls},
    timer::Timer,
    wire::{
        EncodedQuorum, LighthouseHeartbeatRequest, LighthouseHeartbeatResponse,
        LighthouseQuorumRequest, lighthouse_service_server::LighthouseService,
    },
};

/// What a quorum request is answered.
pub type Answer = Result<EncodedQuorum, CallError>;

/// The coordinator and the calls that wait for it.
#[derive(Debug)]
pub struct LighthouseState {
    clock: Clock,
    timer: Timer,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    coordinator: Coordinator,
    calls: PendingCalls<Answer>,
    is_closed: bool,
}

impl LighthouseState {
    /// The state of a lighthouse that nobody has called yet.
    #[must_use]
    pub fn new(coordinator: Coordinator) -> Self {
        Self {
            clock: Clock::start(),
            timer: Timer::new(),
            inner: Mutex::new(Inner {
                coordinator,
                calls: PendingCalls::default(),
                is_closed: false,
            }),
        }
    }

    /// Calls the coordinator whenever time alone may change a decision. Never ends.
    pub async fn timer_task(self: Arc<Self>) {
        loop {
            self.timer.expired(self.clock).await;
            self.event(|coordinator, now| coordinator.tick(now));
        }
    }

    /// Waits for a quorum with `member` in it, `within` that time if it is bounded. Dropping the
    /// future withdraws the request.
    ///
    /// # Errors
    /// The coordinator's refusal.
    pub async fn request_quorum(
        &self,
        member: Member,
        last_quorum_id: i64,
        within: Option<Duration>,
    ) -> Answer {
        let answer = self.join(member, last_quorum_id)?.wait(within).await;
        answer.unwrap_or_else(|| Err(shutting_down()))
    }

    /// The last quorum, and what the next one waits for.
    #[must_use]
    pub fn status(&self) -> Status {
        self.lock().coordinator.status(self.clock.now())
    }

    /// Fails all pending calls, and every later one.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        inner.calls.answer_all(&Err(shutting_down()));
    }

    fn join(
        &self,
        member: Member,
        last_quorum_id: i64,
    ) -> Result<PendingCall<'_, Self, Answer>, CallError> {
        let mut inner = self.lock();
        if inner.is_closed {
            return Err(shutting_down());
        }
        let (id, answer) = inner.calls.add();
        self.decide(&mut inner, |coordinator, now| {
            coordinator.join(id, member, last_quorum_id, now)
        });
        let owner = self;
        Ok(PendingCall { owner, id, answer })
    }

    fn event(&self, event: impl FnOnce(&mut Coordinator, Duration) -> Vec<Effect>) {
        self.decide(&mut self.lock(), event);
    }

    fn decide(
        &self,
        inner: &mut Inner,
        event: impl FnOnce(&mut Coordinator, Duration) -> Vec<Effect>,
    ) {
        for effect in event(&mut inner.coordinator, self.clock.now()) {
            inner.carry_out(effect);
        }
        self.timer.set(inner.coordinator.next_wake());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Answers for LighthouseState {
    fn leave(&self, id: CallId) {
        let mut inner = self.lock();
        if inner.calls.remove(id) {
            self.decide(&mut inner, |coordinator, now| coordinator.leave(id, now));
        }
    }

    fn give_up(&self, id: CallId) {
        self.event(|coordinator, now| coordinator.give_up(id, now));
    }
}

impl Inner {
    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Publish {
                quorum,
                call_ids,
                why,
                renewed,
            } => {
                report::formed(&quorum, why, renewed.as_ref());
                let encoded = EncodedQuorum::of(&quorum);
                for id in call_ids {
                    self.calls.answer(id, Ok(encoded.clone()));
                }
            }
            Effect::Refuse { call_id, refusal } => {
                report::refused(&refusal);
                self.calls.answer(call_id, Err(refused(&refusal)));
            }
            Effect::Notice(notice) => report::notice(&notice),
        }
    }
}

#[async_trait]
impl LighthouseService for LighthouseState {
    async fn quorum(
        &self,
        request: Request<LighthouseQuorumRequest>,
    ) -> Result<Response<EncodedQuorum>, GrpcStatus> {
        let within = deadline::timeout_of(request.metadata())?.map(deadline::answer_within);
        let message = request.into_inner();
        let Some(requester) = message.requester else {
            return Err(GrpcStatus::invalid_argument("the request has no requester"));
        };
        let answer = self.request_quorum(requester.into(), message.last_quorum_id, within);
        Ok(Response::new(answer.await?))
    }

    async fn heartbeat(
        &self,
        request: Request<LighthouseHeartbeatRequest>,
    ) -> Result<Response<LighthouseHeartbeatResponse>, GrpcStatus> {
        let replica_id = &request.get_ref().replica_id;
        self.event(|coordinator, now| coordinator.heartbeat(replica_id, now));
        Ok(Response::new(LighthouseHeartbeatResponse {}))
    }
}

fn refused(refusal: &Refusal) -> CallError {
    let message = refusal.to_string();
    match refusal {
        Refusal::BadMember(_) => CallError::failed(Code::InvalidArgument, message),
        Refusal::Superseded { .. } => CallError::failed(Code::Aborted, message),
        Refusal::StateLost(_) => CallError::StateLost(message),
        // To its caller the same as no answer: it may ask again.
        Refusal::Deadline { absent: true, .. } | Refusal::HeldBack { .. } => {
            CallError::Silent(message)
        }
        Refusal::Deadline { .. } => CallError::Deadline(message),
    }
}

fn shutting_down() -> CallError {
    CallError::Unavailable("the lighthouse is shutting down".to_owned())
}
