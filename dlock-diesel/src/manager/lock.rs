use std::fmt;
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::News;
use dlock_core::{LockKey, Mode};

use super::ManagedLockGuard;
use super::desk;
use super::worker::{self, Inner};
use crate::backend::DialectOf;
use crate::shared::trace::Waiting;
use crate::{Error, LockConnection, SharedLocks};

/// A lock of a [`LockManager`](crate::LockManager) that is not held yet, and how to ask for it.
///
/// # Examples
///
/// ```
/// # use dlock_diesel::*; use diesel::pg::PgConnection;
/// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
/// let held = locks.lock(("billing", "report")).acquire()?;
/// held.release()?;
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct ManagedLock<C> {
    inner: Arc<Inner<C>>,
    ask: Ask,
}

impl<C> fmt::Debug for ManagedLock<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagedLock")
            .field("ask", &self.ask)
            .finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> ManagedLock<C> {
    pub(super) fn new(inner: Arc<Inner<C>>, ask: Ask) -> Self {
        Self { inner, ask }
    }

    /// Asks for the lock together with other readers. PostgreSQL and SQLite only.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let reader = locks.lock(("billing", "cache")).shared().acquire()?;
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        <C as Connection>::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait, also while no connection can be opened. Zero only tries.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection; use std::time::Duration;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "report")).timeout(Duration::from_secs(1)).acquire()?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// The key of the lock. Of several, the first that was named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) {
    /// assert_eq!(locks.lock(("billing", "report")).key(), &LockKey::from(("billing", "report")));
    /// # }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// The keys of all locks that are taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) {
    /// assert_eq!(locks.locks([1, 2]).keys().count(), 2);
    /// # }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        self.ask.keys()
    }

    /// Acquires the lock. Waits until it is free.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "user/001")).acquire()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`]: the [limit](Self::timeout) passed. It names the holders where the server was asked to
    ///   wait, and not where the lock was held by this process, or was tried again and again.
    /// - [`Error::NotConnected`]: no connection could be opened, and there is no other. The next request tries again,
    ///   with a pause between 0.05 and 5 seconds.
    /// - [`Error::ManagerClosed`].
    /// - [`Error::Unsupported`]: the server has no such locks, or a pooler gives its sessions to several connections.
    /// - [`Error::Lost`]: three connections in a row were lost while they asked for this lock. One that is lost is
    ///   otherwise replaced, and the wait goes on.
    /// - Of several locks, the error names the one that was taken, or that failed. [`Error::InvalidKey`] also for an
    ///   empty list, and [`Error::TooManyLocks`] for more than 250 different keys.
    /// - Those of [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire): an invalid key, too many locks, a wait that
    ///   somebody has cancelled at the server. There is no deadlock error: **threads that wait for each other's
    ///   managed locks wait for ever**, unless there is a limit.
    ///
    /// # Round trips
    ///
    /// None if the lock comes from another thread of this process. Otherwise 1 where it is free, and 2 to 3 where it
    /// is taken, of which the last waits. The first lock opens a connection, on PostgreSQL twice: that tells whether a
    /// pooler stands in between. Of several locks, each takes that.
    pub fn acquire(self) -> Result<ManagedLockGuard<C>, Error> {
        let waited = wait(self.inner, &self.ask, None)?;
        let (guard, _) = waited.map_err(|news| desk::error(news, &self.ask.key))?;
        Ok(guard)
    }

    /// Acquires the lock if it is free, otherwise returns `None`. Everything else is as in [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let Some(held) = locks.lock(("billing", "report")).try_acquire()? else {
    ///     return Ok(()); // somebody makes the report
    /// };
    /// # Ok(()) }
    /// ```
    pub fn try_acquire(mut self) -> Result<Option<ManagedLockGuard<C>>, Error> {
        self.ask = self.ask.as_try();
        match wait(self.inner, &self.ask, None)? {
            Ok((guard, _)) => Ok(Some(guard)),
            Err(News::Taken { .. }) => Ok(None),
            Err(news) => Err(desk::error(news, &self.ask.key)),
        }
    }

    /// Acquires the lock, runs `f`, and releases the lock. If the lock was lost meanwhile, the error is
    /// [`Error::Lost`], unless `f` itself fails. `f` is not stopped: it asks
    /// [`is_lost`](ManagedLockGuard::is_lost) now and then.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn one_step() -> Result<(), Error> { todo!() }
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// locks.lock(("billing", "leader")).run(|held| {
    ///     while !held.is_lost() {
    ///         one_step()?;
    ///     }
    ///     Ok::<(), Error>(())
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn run<T, E>(self, f: impl FnOnce(&ManagedLockGuard<C>) -> Result<T, E>) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        let held = self.acquire().map_err(DieselError::from)?;
        let result = f(&held);
        after(result, held)
    }
}

/// Releases a lock after a body. An error of the release does not hide one of the body.
pub(super) fn after<C, T, E>(result: Result<T, E>, held: ManagedLockGuard<C>) -> Result<T, E>
where
    C: LockConnection + 'static,
    E: From<DieselError>,
{
    match (result, held.release()) {
        (Ok(_), Err(error)) => Err(DieselError::from(error).into()),
        (result, _) => result,
    }
}

/// What came of a wait: the guard, and the slot of a semaphore.
pub(super) type Waited<C> = Result<(ManagedLockGuard<C>, Option<u32>), News>;

/// Waits for a lock, or a slot of a semaphore with so many permits, or for the end of the request.
pub(super) fn wait<C: LockConnection + 'static>(
    inner: Arc<Inner<C>>,
    ask: &Ask,
    permits: Option<u32>,
) -> Result<Waited<C>, Error> {
    Waiting::of::<DialectOf<C>>(ask, permits).run(|| wait_for_turn(inner, ask, permits))
}

fn wait_for_turn<C: LockConnection + 'static>(
    inner: Arc<Inner<C>>,
    ask: &Ask,
    permits: Option<u32>,
) -> Result<Waited<C>, Error> {
    inner.start();
    let (ticket, waits, todo) = inner.desk.request::<DialectOf<C>>(ask, permits)?;
    let acting = Arc::clone(&inner);
    // If a subscriber of `tracing` panics from here on, the guard gives the request up, or the lock.
    let guard = ManagedLockGuard::new(inner, ticket, Arc::clone(&waits), ask.key.clone());
    acting.act(todo);
    let (waker, mut waiter) = (worker::waker(), waits.waiter());
    loop {
        match waiter.poll_held(&waker) {
            Poll::Pending => thread::park(),
            Poll::Ready(Err(news)) => return Ok(Err(news)),
            Poll::Ready(Ok(slot)) => return Ok(Ok((guard, slot))),
        }
    }
}
