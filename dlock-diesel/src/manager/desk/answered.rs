use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};

use dlock_core::FencingToken;
use dlock_core::proto::Failure;

type Answer = Result<FencingToken, Failure>;

/// Where the answer to a question arrives.
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

    pub(super) fn poll(&self, waker: &Waker) -> Poll<Answer> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Told(answer) = &*state {
            return Poll::Ready(answer.clone());
        }
        *state = State::Waiting(waker.clone());
        Poll::Pending
    }
}
