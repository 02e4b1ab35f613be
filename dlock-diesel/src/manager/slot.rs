use std::collections::BTreeMap;
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
    wakers: BTreeMap<u64, Waker>,
    /// The number of the next waiter. None is used twice.
    next: u64,
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
        awake
            .wakers
            .extend(std::mem::take(&mut state.wakers).into_values());
    }

    /// These have the lock. The next [`poll_held`](Waiter::poll_held) tells it.
    pub(super) fn tell_holders(&self, holders: &Arc<[Holder]>, awake: &mut Awake) {
        let mut state = self.lock();
        state.holders = Some(Arc::clone(holders));
        awake
            .wakers
            .extend(std::mem::take(&mut state.wakers).into_values());
    }

    /// Somebody who waits for news, from the first poll on.
    pub fn waiter(&self) -> Waiter<'_> {
        Waiter {
            slot: self,
            number: None,
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
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// Somebody who waits for the news of a slot. Dropped, it leaves no waker behind.
#[derive(Debug)]
pub struct Waiter<'s> {
    slot: &'s Slot,
    /// `None` before it has waited.
    number: Option<u64>,
}

impl Waiter<'_> {
    /// Ready when the lock is held (of a semaphore: which slot), or the request has ended.
    pub fn poll_held(&mut self, waker: &Waker) -> Poll<Result<Option<u32>, News>> {
        let mut state = self.slot.lock();
        let holders = state.holders.take();
        let told = match &state.phase {
            Phase::Waiting => None,
            Phase::Held(slot) => Some(Ok(*slot)),
            Phase::Ended(news) => Some(Err(news.clone())),
        };
        let poll = match told {
            None => self.wait(state, waker),
            Some(told) => {
                drop(state);
                Poll::Ready(told)
            }
        };
        holders.iter().for_each(|holders| trace::holders(holders));
        poll
    }

    /// Ready when the request has ended.
    pub fn poll_ended(&mut self, waker: &Waker) -> Poll<News> {
        let state = self.slot.lock();
        match &state.phase {
            Phase::Ended(news) => Poll::Ready(news.clone()),
            _ => self.wait(state, waker),
        }
    }

    fn wait<T>(&mut self, mut state: MutexGuard<'_, State>, waker: &Waker) -> Poll<T> {
        let number = *self.number.get_or_insert_with(|| state.number());
        let known = state.wakers.get(&number);
        if !known.is_some_and(|known| known.will_wake(waker)) {
            let earlier = state.wakers.insert(number, waker.clone());
            // A waker is somebody's code.
            drop(state);
            drop(earlier);
        }
        Poll::Pending
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let waker = self.slot.lock().wakers.remove(&number);
            drop(waker);
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Counts(AtomicUsize);

    impl Wake for Counts {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_waiter_that_is_dropped_leaves_no_waker_and_the_others_are_woken() {
        let slot = Slot::default();
        let counts = Arc::new(Counts::default());
        let waker = Waker::from(Arc::clone(&counts));
        let mut kept = slot.waiter();
        assert!(kept.poll_ended(&waker).is_pending());
        let with_one = Arc::strong_count(&counts);
        for _ in 0..100 {
            let mut waiter = slot.waiter();
            assert!(waiter.poll_ended(&waker).is_pending());
            assert!(waiter.poll_ended(&waker).is_pending());
            assert_eq!(Arc::strong_count(&counts), with_one + 1);
        }
        assert_eq!(Arc::strong_count(&counts), with_one);

        let mut moved = slot.waiter();
        assert!(moved.poll_ended(Waker::noop()).is_pending());
        assert!(moved.poll_ended(&waker).is_pending());
        let mut awake = Awake::default();
        slot.put(News::Lost, &mut awake);
        awake.wakers.into_iter().for_each(Waker::wake);
        assert_eq!(counts.0.load(Ordering::SeqCst), 2);
        assert_eq!(kept.poll_ended(&waker), Poll::Ready(News::Lost));
    }
}
