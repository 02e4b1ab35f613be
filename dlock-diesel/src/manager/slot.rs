use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use dlock_core::Holder;
use dlock_core::proto::manager::News;

use crate::shared::trace;

/// Where the news of a request arrive.
#[derive(Default)]
pub struct Slot {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    wakers: Vec<Waker>,
    traces: Vec<Callback>,
    callbacks: Vec<Callback>,
    /// Who has the lock, for the span of whoever waits.
    holders: Option<Arc<[Holder]>>,
}

/// Called when a lock is lost.
pub type Callback = Box<dyn FnOnce() + Send>;

#[derive(Clone, Debug, Default, PartialEq)]
enum Phase {
    #[default]
    Waiting,
    /// Of a semaphore: which slot.
    Held(Option<u32>),
    Ended(News),
}

/// Who is to be woken, and what is to be called.
#[derive(Default)]
pub(super) struct Awake {
    pub(super) wakers: Vec<Waker>,
    pub(super) traces: Vec<Callback>,
    pub(super) callbacks: Vec<Callback>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, news: News, awake: &mut Awake) {
        let mut state = self.lock();
        if news == News::Lost {
            awake.traces.append(&mut state.traces);
            awake.callbacks.append(&mut state.callbacks);
        }
        state.phase = match news {
            News::Granted { slot } => Phase::Held(slot),
            news => Phase::Ended(news),
        };
        awake.wakers.append(&mut state.wakers);
    }

    /// These have the lock. The next [`poll_held`](Self::poll_held) tells it.
    pub(super) fn tell_holders(&self, holders: &Arc<[Holder]>, awake: &mut Awake) {
        let mut state = self.lock();
        state.holders = Some(Arc::clone(holders));
        awake.wakers.append(&mut state.wakers);
    }

    /// Ready when the lock is held (of a semaphore: which slot), or the request has ended.
    pub fn poll_held(&self, waker: &Waker) -> Poll<Result<Option<u32>, News>> {
        let mut state = self.lock();
        let holders = state.holders.take();
        let poll = match &state.phase {
            Phase::Waiting => state.wait(waker),
            Phase::Held(slot) => Poll::Ready(Ok(*slot)),
            Phase::Ended(news) => Poll::Ready(Err(news.clone())),
        };
        drop(state);
        holders.iter().for_each(|holders| trace::holders(holders));
        poll
    }

    /// Ready when the request has ended.
    pub fn poll_ended(&self, waker: &Waker) -> Poll<News> {
        let mut state = self.lock();
        match &state.phase {
            Phase::Ended(news) => Poll::Ready(news.clone()),
            _ => state.wait(waker),
        }
    }

    /// Whether the loss was told.
    pub fn is_lost(&self) -> bool {
        self.lock().phase == Phase::Ended(News::Lost)
    }

    /// Calls it when the lock is lost, at once if it is.
    pub fn when_lost(&self, callback: Callback) {
        let mut state = self.lock();
        match state.phase {
            Phase::Ended(News::Lost) => {
                drop(state);
                callback();
            }
            Phase::Ended(_) => {}
            _ => state.callbacks.push(callback),
        }
    }

    /// The same, for a subscriber of `tracing`, before anybody has the slot.
    #[cfg(feature = "tracing")]
    pub(crate) fn trace_loss(&self, trace: Callback) {
        self.lock().traces.push(trace);
    }
}

impl State {
    fn wait<T>(&mut self, waker: &Waker) -> Poll<T> {
        if !self.wakers.iter().any(|other| other.will_wake(waker)) {
            self.wakers.push(waker.clone());
        }
        Poll::Pending
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").finish_non_exhaustive()
    }
}
