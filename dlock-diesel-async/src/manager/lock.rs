use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use diesel::result::Error as DieselError;
use diesel_async::AsyncConnectionCore;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::{News, Ticket};
use dlock_core::{LockKey, Mode};
use dlock_diesel::SharedLocks;
use dlock_diesel::shared::desk::{self, Slot};
use dlock_diesel::shared::trace::Waiting as Traced;

use super::ManagedLockGuard;
use super::worker::Inner;
use crate::backend::{AsyncFunc, BoxFuture, DialectOf};
use crate::{Error, LockConnection};

/// A lock of a [`LockManager`](crate::LockManager) that is not held yet, and how to ask for it: the async form of
/// [`dlock_diesel::ManagedLock`].
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
/// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
/// let held = locks.lock(("billing", "report")).acquire().await?;
/// held.release().await?;
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct ManagedLock<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    ask: Ask,
}

impl<C: LockConnection + 'static> fmt::Debug for ManagedLock<C> {
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
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let reader = locks.lock(("billing", "cache")).shared().acquire().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// ```compile_fail
    /// # use dlock_diesel_async::*; use diesel_async::AsyncMysqlConnection;
    /// # async fn f(locks: LockManager<AsyncMysqlConnection>) -> Result<(), Error> {
    /// let reader = locks.lock(("billing", "cache")).shared().acquire().await?; // MySQL has no shared locks
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        <C as AsyncConnectionCore>::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait, also while no connection can be opened. Zero only tries.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection; use std::time::Duration;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "report")).timeout(Duration::from_secs(1)).acquire().await?;
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
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # fn f(locks: LockManager<AsyncPgConnection>) {
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
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # fn f(locks: LockManager<AsyncPgConnection>) {
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
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "user/001")).acquire().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`dlock_diesel`](dlock_diesel::ManagedLock::acquire).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, if the manager was not used before.
    ///
    /// # Cancel safety
    ///
    /// You can drop the future at any point. The request leaves the queue of this process at once. Nothing stays held:
    /// a lock that the server grants later is released. Other locks keep their connections.
    ///
    /// # Round trips
    ///
    /// None if the lock comes from another task of this process. Otherwise 1 where it is free, and 2 to 3 where it is
    /// taken, of which the last waits. The first lock opens a connection, on PostgreSQL twice: that tells whether a
    /// pooler stands in between. Of several locks, each takes that.
    pub async fn acquire(self) -> Result<ManagedLockGuard<C>, Error> {
        let waited = wait(self.inner, &self.ask, None).await?;
        let (guard, _) = waited.map_err(|news| desk::error(news, &self.ask.key))?;
        Ok(guard)
    }

    /// Acquires the lock if it is free, otherwise returns `None`. Everything else is as in [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let Some(held) = locks.lock(("billing", "report")).try_acquire().await? else {
    ///     return Ok(()); // somebody makes the report
    /// };
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(mut self) -> Result<Option<ManagedLockGuard<C>>, Error> {
        self.ask = self.ask.as_try();
        match wait(self.inner, &self.ask, None).await? {
            Ok((guard, _)) => Ok(Some(guard)),
            Err(News::Taken { .. }) => Ok(None),
            Err(news) => Err(desk::error(news, &self.ask.key)),
        }
    }

    /// Acquires the lock, runs `f`, and releases the lock. If the lock is lost, the future of `f` is dropped, and the
    /// error is [`Error::Lost`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn lead() -> Result<(), Error> { todo!() }
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// locks.lock(("billing", "leader")).run(async |_held| lead().await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops that of `f`, and then the guard.
    pub async fn run<'a, F, T, E>(self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r ManagedLockGuard<C>) -> Result<T, E>
            + AsyncFunc<&'r ManagedLockGuard<C>, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        // Boxed: see `AsyncLockBackend::transaction`.
        let running: BoxFuture<'_, _> = Box::pin(run(self, f));
        running.await
    }
}

/// What came of a wait: the guard, and the slot of a semaphore.
pub(super) type Waited<C> = Result<(ManagedLockGuard<C>, Option<u32>), News>;

/// Waits for a lock, or a slot of a semaphore with so many permits, or for the end of the request.
pub(super) async fn wait<C: LockConnection + 'static>(
    inner: Arc<Inner<C>>,
    ask: &Ask,
    permits: Option<u32>,
) -> Result<Waited<C>, Error> {
    let waiting = Traced::of::<DialectOf<C>>(ask, permits);
    waiting.during(wait_for_turn(inner, ask, permits)).await
}

async fn wait_for_turn<C: LockConnection + 'static>(
    inner: Arc<Inner<C>>,
    ask: &Ask,
    permits: Option<u32>,
) -> Result<Waited<C>, Error> {
    inner.start();
    let (ticket, waits, todo) = inner.desk.request::<DialectOf<C>>(ask, permits)?;
    // Armed before anything else can happen: from here on the request is cancelled if the future is dropped.
    let request = Waiting {
        inner,
        ticket: Some(ticket),
    };
    request.inner.act(todo);
    Ok(match request.poll(&waits).await {
        Ok(slot) => Ok((request.into_guard(waits, ask.key.clone()), slot)),
        Err(news) => {
            request.disarm();
            Err(news)
        }
    })
}

async fn run<'a, C, F, T, E>(lock: ManagedLock<C>, f: F) -> Result<T, E>
where
    C: LockConnection + 'static,
    for<'r> F: AsyncFnOnce(&'r ManagedLockGuard<C>) -> Result<T, E>
        + AsyncFunc<&'r ManagedLockGuard<C>, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let held = lock.acquire().await.map_err(DieselError::from)?;
    let result = until_lost(&held, f(&held)).await;
    after(result, held).await
}

/// Drops the body if the lock is lost.
pub(super) async fn until_lost<C, T, E>(
    held: &ManagedLockGuard<C>,
    body: impl Future<Output = Result<T, E>>,
) -> Result<T, E>
where
    C: LockConnection + 'static,
    E: From<DieselError>,
{
    let (mut body, mut loss) = (pin!(body), held.loss());
    // The loss comes first: the body does not go on after it.
    poll_fn(|cx| match loss.poll_ended(cx.waker()) {
        Poll::Ready(_) => Poll::Ready(Err(DieselError::from(desk::lost(held.key())).into())),
        Poll::Pending => body.as_mut().poll(cx),
    })
    .await
}

/// Releases a lock after a body. An error of the release does not hide one of the body.
pub(super) async fn after<C, T, E>(result: Result<T, E>, held: ManagedLockGuard<C>) -> Result<T, E>
where
    C: LockConnection + 'static,
    E: From<DieselError>,
{
    match (result, held.release().await) {
        (Ok(_), Err(error)) => Err(DieselError::from(error).into()),
        (result, _) => result,
    }
}

/// A request that is cancelled when it is dropped.
struct Waiting<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    /// `None` once nobody needs to cancel it.
    ticket: Option<Ticket>,
}

impl<C: LockConnection + 'static> Waiting<C> {
    async fn poll(&self, slot: &Slot) -> Result<Option<u32>, News> {
        let mut waiter = slot.waiter();
        poll_fn(|cx| waiter.poll_held(cx.waker())).await
    }

    fn disarm(mut self) {
        self.ticket = None;
    }

    fn into_guard(mut self, slot: Arc<Slot>, key: LockKey) -> ManagedLockGuard<C> {
        let ticket = self.ticket.take().expect("BUG: it is disarmed once");
        ManagedLockGuard::new(Arc::clone(&self.inner), ticket, slot, key)
    }
}

impl<C: LockConnection + 'static> Drop for Waiting<C> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let todo = self.inner.desk.cancel(ticket);
            self.inner.act(todo);
        }
    }
}
