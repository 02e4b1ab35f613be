use std::fmt;
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use dlock_core::proto::manager::{News, Ticket};
use dlock_core::{FencingToken, LockKey};

use super::desk::{self, Slot};
use super::worker::{self, Inner};
use crate::{Error, LockConnection};

/// A lock of a [`LockManager`](crate::LockManager) that is held. It is not a connection.
///
/// Dropped, it gives the lock back without waiting, on every server. [`release`](Self::release) also waits, and reports
/// a loss.
///
/// # Examples
///
/// ```
/// # use dlock_diesel::*; use diesel::pg::PgConnection;
/// # fn one_step() -> bool { false }
/// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
/// let held = locks.lock(("billing", "leader")).acquire()?;
/// while !held.is_lost() && one_step() {}
/// held.release()?;
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released immediately"]
pub struct ManagedLockGuard<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    /// `None` once it is given back.
    ticket: Option<Ticket>,
    slot: Arc<Slot>,
    key: LockKey,
}

impl<C: LockConnection + 'static> ManagedLockGuard<C> {
    pub(super) fn new(inner: Arc<Inner<C>>, ticket: Ticket, slot: Arc<Slot>, key: LockKey) -> Self {
        Self {
            inner,
            ticket: Some(ticket),
            slot,
            key,
        }
    }

    /// The key of the lock. Of several, the first that was named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(held: ManagedLockGuard<PgConnection>) {
    /// println!("working under {}", held.key());
    /// # }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Whether the lock may be another's by now. It looks at the clock and asks nobody, so it is true in time also
    /// when the process was stopped for a while, before anybody could be told.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(held: ManagedLockGuard<PgConnection>) {
    /// if held.is_lost() {
    ///     println!("stop");
    /// }
    /// # }
    /// ```
    pub fn is_lost(&self) -> bool {
        self.ticket
            .is_none_or(|ticket| self.inner.desk.is_lost(ticket))
    }

    /// Calls `callback` when the lock is lost, for whatever cause: once, and never after a release.
    ///
    /// It runs on a thread that the manager starts for the callbacks of this loss. If the system has no thread left, it
    /// runs on the thread that noticed the loss. If the lock is lost already, it runs at once, on the calling thread.
    ///
    /// The callback can use the manager, and can close it. [`LockManager::close`](crate::LockManager::close) waits for
    /// the end of all callbacks, so a callback must not wait for the thread that closes, or for a mutex that this
    /// thread holds. A drop of the last handle does not wait. A panic in a callback changes nothing for others: the
    /// panic hook reports it, and then it is swallowed. Only where the lock is lost already, the caller of `on_lost`
    /// gets it.
    ///
    /// A session that is ended is noticed within 0.75 seconds and a round trip. A network that is silent is noticed
    /// after nine tenths of the [lease](crate::LockManagerBuilder::lease).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # use std::sync::Arc; use std::sync::atomic::{AtomicBool, Ordering};
    /// # fn f(held: ManagedLockGuard<PgConnection>) {
    /// let stop = Arc::new(AtomicBool::new(false));
    /// let stops = Arc::clone(&stop);
    /// held.on_lost(move || stops.store(true, Ordering::Relaxed));
    /// # }
    /// ```
    pub fn on_lost(&self, callback: impl FnOnce() + Send + 'static) {
        self.slot.when_lost(Box::new(callback));
    }

    /// Waits until the lock is lost, at most so long. Returns whether it is.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection; use std::time::Duration;
    /// # fn one_step() {}
    /// # fn f(held: ManagedLockGuard<PgConnection>) {
    /// while !held.wait_lost(Duration::from_secs(1)) {
    ///     one_step();
    /// }
    /// # }
    /// ```
    pub fn wait_lost(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let (waker, mut waiter) = (worker::waker(), self.slot.waiter());
        while waiter.poll_ended(&waker) == Poll::Pending {
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return self.is_lost(),
                Some(rest) => thread::park_timeout(rest),
                None => thread::park(),
            }
        }
        true
    }

    /// Draws a fencing token: a number that is greater than every token that an earlier holder of any lock on this
    /// server drew. See [`AdvisoryLockGuard::fencing_token`](crate::AdvisoryLockGuard::fencing_token) for what it is
    /// for. The session that holds the lock draws it, and only if it still holds the lock.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn write(_: i64) {}
    /// # fn f(held: ManagedLockGuard<PgConnection>) -> Result<(), Error> {
    /// write(held.fencing_token()?.into()); // UPDATE .. WHERE fence < token
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Lost`] or [`Error::NotHeld`] if the lock is lost, also while the answer is due: at the latest when
    ///   nine tenths of the lease have passed.
    /// - [`Error::Database`] if the statement failed for another reason: a standby of PostgreSQL has no tokens.
    ///
    /// # Round trips
    ///
    /// 1, once prepared, on the connection that holds the lock. Others that use it come first.
    pub fn fencing_token(&self) -> Result<FencingToken, Error> {
        let Some(ticket) = self.ticket else {
            return Err(desk::lost(&self.key));
        };
        let (drawing, todo) = self.inner.desk.draw_token(ticket);
        self.inner.act(todo);
        let waker = worker::waker();
        loop {
            match drawing.poll(&waker) {
                Poll::Pending => thread::park(),
                Poll::Ready(answer) => {
                    return answer.map_err(|failure| desk::failed(failure, &self.key));
                }
            }
        }
    }

    /// Gives the lock back, and waits until the server has released it or another thread of this process has it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(held: ManagedLockGuard<PgConnection>) -> Result<(), Error> {
    /// held.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] or [`Error::NotHeld`]: another process may have worked at the same time.
    ///
    /// # Round trips
    ///
    /// 1, or none if another thread of this process gets the lock.
    pub fn release(mut self) -> Result<(), Error> {
        let Some(ticket) = self.ticket.take() else {
            return Err(desk::lost(&self.key));
        };
        self.inner.tell(|manager, now| manager.release(ticket, now));
        let (waker, mut waiter) = (worker::waker(), self.slot.waiter());
        loop {
            match waiter.poll_ended(&waker) {
                Poll::Pending => thread::park(),
                Poll::Ready(News::Released) => return Ok(()),
                Poll::Ready(news) => return Err(desk::error(news, &self.key)),
            }
        }
    }
}

impl<C: LockConnection + 'static> Drop for ManagedLockGuard<C> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let todo = self.inner.desk.cancel(ticket);
            self.inner.act(todo);
        }
    }
}

impl<C: LockConnection + 'static> fmt::Debug for ManagedLockGuard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagedLockGuard")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}
