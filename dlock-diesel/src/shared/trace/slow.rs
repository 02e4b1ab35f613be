//! Which waits have lasted more than a second: one thread for all of the process. A wait that blocks in a driver cannot
//! say so itself.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::dispatcher::{self, Dispatch};
use tracing::{Level, Span};

/// A wait of so long is worth an event. By then the server has named the holder, which it is asked after a second.
pub(super) const LONG: Duration = Duration::from_millis(1_250);

static WAITS: Mutex<Waits> = Mutex::new(Waits {
    list: BTreeMap::new(),
    next: 0,
    thread: Thread::Missing,
});
static MORE: Condvar = Condvar::new();

/// The waits that have not lasted so long yet, by the time at which they will have.
struct Waits {
    list: BTreeMap<Place, Wait>,
    next: u64,
    thread: Thread,
}

#[derive(Clone, Copy, PartialEq)]
enum Thread {
    Missing,
    /// It looks at the list again by itself.
    Awake,
    /// There was nothing in it.
    Asleep,
}

type Place = (Instant, u64);

struct Wait {
    span: Span,
    keys: String,
    /// The subscriber of the thread that waits.
    dispatch: Dispatch,
}

/// A wait that is over when this is dropped.
#[derive(Debug)]
pub(super) struct Watched(Place);

impl Watched {
    /// `None` if nobody would see the event.
    pub(super) fn new(span: &Span, keys: impl ToString) -> Option<Self> {
        if !tracing::enabled!(target: "dlock", Level::INFO) {
            return None;
        }
        let wait = Wait {
            span: span.clone(),
            keys: keys.to_string(),
            dispatch: dispatcher::get_default(Dispatch::clone),
        };
        let mut waits = lock();
        let place = (Instant::now() + LONG, waits.next);
        waits.next += 1;
        waits.list.insert(place, wait);
        match waits.thread {
            Thread::Missing => {
                let watch = thread::Builder::new().name("dlock-waits".into());
                if watch.spawn(watch_all).is_ok() {
                    waits.thread = Thread::Awake;
                }
            }
            Thread::Asleep => MORE.notify_one(),
            Thread::Awake => {}
        }
        Some(Self(place))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        lock().list.remove(&self.0);
    }
}

fn lock() -> MutexGuard<'static, Waits> {
    WAITS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch_all() {
    let mut waits = lock();
    loop {
        let now = Instant::now();
        // All of them last equally long, so none comes before the first.
        let rest = waits.list.first_key_value().map(|((at, _), _)| *at - now);
        waits.thread = match rest {
            Some(_) => Thread::Awake,
            None => Thread::Asleep,
        };
        waits = match rest {
            Some(Duration::ZERO) => {
                let first = waits.list.pop_first();
                // A subscriber may take its time, or a lock.
                drop(waits);
                first.into_iter().for_each(|(_, wait)| wait.tell());
                lock()
            }
            Some(rest) => {
                let woken = MORE.wait_timeout(waits, rest);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => MORE.wait(waits).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

impl Wait {
    fn tell(self) {
        let Self {
            span,
            keys,
            dispatch,
        } = self;
        dispatcher::with_default(&dispatch, || {
            tracing::info!(target: "dlock", parent: &span, key = keys, "waiting for more than a second");
        });
    }
}
