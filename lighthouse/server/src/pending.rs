//! Calls that wait for an answer. The pure core knows each call by its id, the server keeps the
//! channel to its caller.
//!
//! A call that is dropped is withdrawn, one whose time is up is given up: its owner then answers it
//! with the reason.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};
use torchft_quorum::member::CallId;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The calls that have not been answered yet.
#[derive(Debug)]
pub struct PendingCalls<T>(HashMap<CallId, oneshot::Sender<T>>);

impl<T> Default for PendingCalls<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Clone> PendingCalls<T> {
    /// Adds a call, under an id that no other call of this process has.
    pub fn add(&mut self) -> (CallId, oneshot::Receiver<T>) {
        let id = CallId(NEXT_ID.fetch_add(1, Ordering::Relaxed));
        let (sender, answer) = oneshot::channel();
        self.0.insert(id, sender);
        (id, answer)
    }

    /// Answers a call, unless its caller has left.
    pub fn answer(&mut self, id: CallId, answer: T) {
        if let Some(sender) = self.0.remove(&id) {
            let _ = sender.send(answer);
        }
    }

    /// Gives all calls the same answer.
    pub fn answer_all(&mut self, answer: &T) {
        for (_, sender) in self.0.drain() {
            let _ = sender.send(answer.clone());
        }
    }

    /// Removes a call; whether it was still waiting.
    pub fn remove(&mut self, id: CallId) -> bool {
        self.0.remove(&id).is_some()
    }
}

/// What answers calls.
pub trait Answers {
    /// The caller hung up, unless it was answered.
    fn leave(&self, id: CallId);
    /// The caller's time is up: answers it with the reason.
    fn give_up(&self, id: CallId);
}

/// One call on its caller's side; dropping it withdraws the call.
#[derive(Debug)]
pub struct PendingCall<'o, O: Answers, T> {
    /// Who answers.
    pub owner: &'o O,
    /// The call.
    pub id: CallId,
    /// Where the answer arrives.
    pub answer: oneshot::Receiver<T>,
}

impl<O: Answers, T> PendingCall<'_, O, T> {
    /// Waits for the answer, `within` that time if it is bounded. `None`: the owner was closed.
    pub async fn wait(mut self, within: Option<Duration>) -> Option<T> {
        if let Some(within) = within {
            match timeout(within, &mut self.answer).await {
                Ok(answer) => return answer.ok(),
                Err(_elapsed) => self.owner.give_up(self.id),
            }
        }
        (&mut self.answer).await.ok()
    }
}

impl<O: Answers, T> Drop for PendingCall<'_, O, T> {
    fn drop(&mut self) {
        self.owner.leave(self.id);
    }
}
