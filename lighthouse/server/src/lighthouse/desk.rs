//! The lighthouse's desk: callers wait here, the machine decides, its effects are carried out.
//!
//! One lock holds the machine and those who wait. It is taken for one event, never across an await.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};
use torchft_quorum::{
    effect::{Effect, Refusal},
    machine::Machine,
    member::{Member, Ticket},
    status::Status,
};

use super::report;
use crate::{alarm::Alarm, clock::Clock, convert, error::CallError, wire::EncodedQuorum};

/// What a caller is answered.
pub type Answer = Result<EncodedQuorum, CallError>;

/// The machine and those who wait for it.
#[derive(Debug)]
pub struct Desk {
    clock: Clock,
    alarm: Alarm,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    machine: Machine,
    waiting: HashMap<Ticket, oneshot::Sender<Answer>>,
    last_ticket: u64,
    is_closed: bool,
}

impl Desk {
    /// A desk at which nobody waits.
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        let inner = Mutex::new(Inner {
            machine,
            waiting: HashMap::new(),
            last_ticket: 0,
            is_closed: false,
        });
        let (clock, alarm) = (Clock::start(), Alarm::new());
        Self {
            clock,
            alarm,
            inner,
        }
    }

    /// Calls the machine whenever time alone may change a decision. Never ends.
    pub async fn watch_the_clock(self: Arc<Self>) {
        loop {
            self.alarm.ring(self.clock).await;
            self.event(|machine, now| machine.tick(now));
        }
    }

    /// `replica_id` is alive.
    pub fn heartbeat(&self, replica_id: &str) {
        self.event(|machine, now| machine.heartbeat(replica_id, now));
    }

    /// Waits for a quorum with `member` in it, `within` that time if it is bounded. A caller that
    /// drops this withdraws its request.
    ///
    /// # Errors
    /// The machine's refusal.
    pub async fn quorum(&self, member: Member, last_id: i64, within: Option<Duration>) -> Answer {
        let mut seat = self.sit(member, last_id)?;
        let in_time = match within {
            Some(within) => timeout(within, &mut seat.answer).await,
            None => Ok((&mut seat.answer).await),
        };
        let answered = match in_time {
            Ok(answered) => answered,
            Err(_elapsed) => {
                self.event(|machine, now| machine.give_up(seat.ticket, now));
                (&mut seat.answer).await
            }
        };
        answered.unwrap_or_else(|_closed| Err(going_down()))
    }

    /// What a person may want to see.
    #[must_use]
    pub fn status(&self) -> Status {
        self.lock().machine.status(self.clock.now())
    }

    /// Sends everybody away; nobody is let in any more.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        inner.waiting.clear();
    }

    fn sit(&self, member: Member, last_id: i64) -> Result<Seat<'_>, CallError> {
        let mut inner = self.lock();
        if inner.is_closed {
            return Err(going_down());
        }
        inner.last_ticket += 1;
        let ticket = Ticket(inner.last_ticket);
        let (answers, answer) = oneshot::channel();
        inner.waiting.insert(ticket, answers);
        self.decide(&mut inner, |machine, now| {
            machine.join(ticket, member, last_id, now)
        });
        Ok(Seat {
            desk: self,
            ticket,
            answer,
        })
    }

    fn event(&self, event: impl FnOnce(&mut Machine, Duration) -> Vec<Effect>) {
        self.decide(&mut self.lock(), event);
    }

    fn decide(&self, inner: &mut Inner, event: impl FnOnce(&mut Machine, Duration) -> Vec<Effect>) {
        for effect in event(&mut inner.machine, self.clock.now()) {
            inner.carry_out(effect);
        }
        self.alarm.set(inner.machine.next_wake());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Publish {
                quorum,
                tickets,
                why,
                renewed,
            } => {
                report::formed(&quorum, why, renewed.as_ref());
                let encoded = EncodedQuorum::of(&convert::quorum_message(&quorum));
                for ticket in tickets {
                    self.answer(ticket, Ok(encoded.clone()));
                }
            }
            Effect::Refuse { ticket, refusal } => {
                report::refused(&refusal);
                self.answer(ticket, Err(refused(&refusal)));
            }
            Effect::Notice(notice) => report::notice(&notice),
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        if let Some(answers) = self.waiting.remove(&ticket) {
            // An error means that the caller has just left.
            let _ = answers.send(answer);
        }
    }
}

/// A caller's place; leaving it withdraws the request.
struct Seat<'d> {
    desk: &'d Desk,
    ticket: Ticket,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut inner = self.desk.lock();
        if inner.waiting.remove(&self.ticket).is_some() {
            let ticket = self.ticket;
            self.desk
                .decide(&mut inner, |machine, now| machine.leave(ticket, now));
        }
    }
}

fn refused(refusal: &Refusal) -> CallError {
    let words = refusal.to_string();
    match refusal {
        Refusal::BadMember(_) => CallError::Failed {
            code: tonic::Code::InvalidArgument,
            message: words,
        },
        Refusal::Superseded { .. } => CallError::Failed {
            code: tonic::Code::Aborted,
            message: words,
        },
        Refusal::StateLost(_) => CallError::StateLost(words),
        // To its caller the same as no answer: it may ask again.
        Refusal::Deadline { absent: true, .. } => CallError::Silent(words),
        Refusal::Deadline { .. } => CallError::Deadline(words),
    }
}

fn going_down() -> CallError {
    CallError::Unavailable("the lighthouse is shutting down".to_owned())
}
