use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use dlock_core::FencingToken;
use dlock_core::proto::Failure;
use dlock_core::proto::manager::QuestionId;

use super::Desk;

type Answer = Result<FencingToken, Failure>;

/// A fencing token that is being drawn. Dropped, nobody waits for it any more.
#[derive(Debug)]
pub struct Drawing<'d> {
    desk: &'d Desk,
    question: QuestionId,
    answered: Arc<Answered>,
}

impl<'d> Drawing<'d> {
    pub(super) fn new(desk: &'d Desk, question: QuestionId, answered: Arc<Answered>) -> Self {
        Self {
            desk,
            question,
            answered,
        }
    }

    /// Ready when the token is drawn, or the lock is lost.
    pub fn poll(&self, waker: &Waker) -> Poll<Answer> {
        self.answered.poll(waker)
    }
}

impl Drop for Drawing<'_> {
    fn drop(&mut self) {
        self.desk.forget(self.question);
    }
}

/// Where the answer arrives.
#[derive(Debug, Default)]
pub(super) struct Answered(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Asked,
    Waiting(Waker),
    Told(Answer),
}

impl Answered {
    /// Returns who is to be woken.
    pub(super) fn put(&self, answer: Answer) -> Option<Waker> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Told(answer)) {
            State::Waiting(waker) => Some(waker),
            _ => None,
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<Answer> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Told(answer) = &*state {
            return Poll::Ready(answer.clone());
        }
        *state = State::Waiting(waker.clone());
        Poll::Pending
    }
}
