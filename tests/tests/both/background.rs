//! What the server shows of work in the background.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use dlock_core::LockKey;
use dlock_tests::{TestConnection, wait_for};

use crate::support::*;

impl<T: Send + 'static> Background<T> {
    /// Waits until the server shows that it waits for a lock.
    #[track_caller]
    pub(crate) fn waits<O: TestConnection>(&self, observer: &mut O) {
        wait_for(format!("session {} to wait for a lock", self.id), || {
            assert!(!self.is_finished(), "session {} does not wait", self.id);
            observer.is_waiting(self.id)
        });
    }

    /// Waits until the server shows that it has waited for so long.
    #[track_caller]
    pub(crate) fn still_waits<O: TestConnection>(&self, observer: &mut O, at_least: Duration) {
        self.waits(observer);
        let started = Instant::now();
        wait_for("the session to wait still", || {
            assert!(!self.is_finished(), "the wait was cut short");
            observer.is_waiting(self.id) && started.elapsed() > at_least
        });
    }

    /// Cancels its statement once it waits, and waits for the end of the work. A cancel that comes between two statements
    /// has no effect. Then another one follows, as soon as that cannot be a second one for the same wait.
    #[track_caller]
    pub(crate) fn is_cancelled<O: TestConnection>(
        &self,
        observer: &mut O,
        mut waits: impl FnMut(&mut O) -> bool,
    ) {
        const AGAIN: Duration = Duration::from_secs(3);
        let mut cancelled: Option<Instant> = None;
        wait_for(format!("session {} to be cancelled", self.id), || {
            if self.is_finished() {
                return true;
            }
            if cancelled.is_none_or(|at| at.elapsed() > AGAIN) && waits(observer) {
                observer.cancel(self.id);
                cancelled = Some(Instant::now());
            }
            false
        });
    }

    /// Waits until PostgreSQL shows that its wait has started over: a further turn.
    #[track_caller]
    pub(crate) fn waits_again<O: TestConnection>(&self, observer: &mut O) {
        let since = format!(
            "SELECT max(waitstart)::text FROM pg_locks WHERE pid = {} AND locktype = 'advisory' AND NOT granted",
            self.id
        );
        let mut turns = BTreeSet::new();
        wait_for(format!("session {} to wait again", self.id), || {
            assert!(!self.is_finished(), "the wait was cut short");
            turns.extend(observer.text(&since));
            turns.len() > 1
        });
    }

    /// Waits until the server shows that it alone has the lock.
    #[track_caller]
    pub(crate) fn holds<O: TestConnection>(&self, observer: &mut O, key: impl Into<LockKey>) {
        let key = key.into();
        wait_for(format!("session {} to have {key}", self.id), || {
            holders(observer, &key) == [self.id]
        });
        assert_held_by(observer, key, self.id);
    }
}
