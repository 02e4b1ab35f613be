use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use diesel::result::Error as DieselError;
use dlock_core::LockKey;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::News;
use dlock_diesel::shared::desk;

use super::ManagedLockGuard;
use super::lock::{after, until_lost, wait};
use super::worker::Inner;
use crate::backend::{AsyncFunc, BoxFuture};
use crate::{Error, LockConnection};

/// A semaphore of a [`LockManager`](crate::LockManager) that is not held yet, and how to ask for it: the async form of
/// [`dlock_diesel::ManagedSemaphore`], whose page says who is next.
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
/// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
/// let inside = locks.semaphore(("billing", "mail"), 10).acquire().await?;
/// inside.release().await?; // until here, at most 9 others send mail
/// # Ok(()) }
/// ```
#[must_use = "a semaphore does nothing until it is acquired"]
pub struct ManagedSemaphore<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    ask: Ask,
    permits: u32,
}

impl<C: LockConnection + 'static> fmt::Debug for ManagedSemaphore<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagedSemaphore")
            .field("ask", &self.ask)
            .field("permits", &self.permits)
            .finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> ManagedSemaphore<C> {
    pub(super) fn new(inner: Arc<Inner<C>>, ask: Ask, permits: u32) -> Self {
        Self {
            inner,
            ask,
            permits,
        }
    }

    /// Limits the wait, also while no connection can be opened. Zero only tries.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection; use std::time::Duration;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).timeout(Duration::from_secs(1)).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// The key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # fn f(locks: LockManager<AsyncPgConnection>) {
    /// assert_eq!(locks.semaphore(("render", "gpu"), 4).key(), &LockKey::from(("render", "gpu")));
    /// # }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// Acquires a permit. Waits until a slot is free.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`dlock_diesel`](dlock_diesel::ManagedSemaphore::acquire).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, if the manager was not used before.
    ///
    /// # Cancel safety
    ///
    /// That of [`ManagedLock::acquire`](crate::ManagedLock::acquire): you can drop the future at any point, and nothing
    /// stays held.
    ///
    /// # Round trips
    ///
    /// Those of [`dlock_diesel`](dlock_diesel::ManagedSemaphore::acquire).
    pub async fn acquire(self) -> Result<ManagedSemaphoreGuard<C>, Error> {
        let waited = wait(self.inner, &self.ask, Some(self.permits)).await?;
        let held = waited.map_err(|news| desk::error(news, &self.ask.key))?;
        Ok(ManagedSemaphoreGuard::new(held))
    }

    /// Acquires a permit if a slot is free and nobody waits for one, otherwise returns `None`. Everything else is as
    /// in [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// match locks.semaphore(("render", "gpu"), 4).try_acquire().await? {
    ///     Some(inside) => println!("slot {}", inside.slot()),
    ///     None => println!("all are busy"),
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(mut self) -> Result<Option<ManagedSemaphoreGuard<C>>, Error> {
        self.ask = self.ask.as_try();
        match wait(self.inner, &self.ask, Some(self.permits)).await? {
            Ok(held) => Ok(Some(ManagedSemaphoreGuard::new(held))),
            Err(News::Taken { .. }) => Ok(None),
            Err(news) => Err(desk::error(news, &self.ask.key)),
        }
    }

    /// Acquires a permit, runs `f`, and releases the permit. If the slot is lost, the future of `f` is dropped: see
    /// [`ManagedLock::run`](crate::ManagedLock::run).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn render(_: u32) -> Result<(), Error> { todo!() }
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// locks.semaphore(("render", "gpu"), 4).run(async |inside| render(inside.slot()).await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops that of `f`, and then the guard.
    pub async fn run<'a, F, T, E>(self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r ManagedSemaphoreGuard<C>) -> Result<T, E>
            + AsyncFunc<&'r ManagedSemaphoreGuard<C>, Result<T, E>, Fut: Send>
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

async fn run<'a, C, F, T, E>(semaphore: ManagedSemaphore<C>, f: F) -> Result<T, E>
where
    C: LockConnection + 'static,
    for<'r> F: AsyncFnOnce(&'r ManagedSemaphoreGuard<C>) -> Result<T, E>
        + AsyncFunc<&'r ManagedSemaphoreGuard<C>, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let inside = semaphore.acquire().await.map_err(DieselError::from)?;
    let result = until_lost(&inside.held, f(&inside)).await;
    after(result, inside.held).await
}

/// A permit of a semaphore of a [`LockManager`](crate::LockManager): a slot that is held. It is not a connection.
///
/// It derefs to a [`ManagedLockGuard`], which tells when the slot is [lost](ManagedLockGuard::lost) and draws
/// [fencing tokens](ManagedLockGuard::fencing_token). Dropped, it gives the slot back without waiting.
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
/// # async fn render(_: u32) {}
/// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
/// let inside = locks.semaphore(("render", "gpu"), 4).acquire().await?;
/// tokio::select! {
///     () = render(inside.slot()) => inside.release().await?,
///     () = inside.lost() => println!("another may have the device by now"),
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the permit is released immediately"]
pub struct ManagedSemaphoreGuard<C: LockConnection + 'static> {
    held: ManagedLockGuard<C>,
    slot: u32,
}

impl<C: LockConnection + 'static> ManagedSemaphoreGuard<C> {
    fn new((held, slot): (ManagedLockGuard<C>, Option<u32>)) -> Self {
        let slot = slot.expect("BUG: a permit is a slot");
        Self { held, slot }
    }

    /// The number of the slot, from 0 to `permits - 1`. Nobody else has it at the same time, so it can stand for one of
    /// several devices, ports or directories.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire().await?;
    /// let device = ["a", "b", "c", "d"][inside.slot() as usize];
    /// # Ok(()) }
    /// ```
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Gives the slot back, and waits until the server has released it or another task of this process has it. It has
    /// the errors, cancel safety and round trips of [`ManagedLockGuard::release`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(inside: ManagedSemaphoreGuard<AsyncPgConnection>) -> Result<(), Error> {
    /// inside.release().await?;
    /// # Ok(()) }
    /// ```
    pub async fn release(self) -> Result<(), Error> {
        self.held.release().await
    }
}

impl<C: LockConnection + 'static> Deref for ManagedSemaphoreGuard<C> {
    type Target = ManagedLockGuard<C>;

    fn deref(&self) -> &ManagedLockGuard<C> {
        &self.held
    }
}

impl<C: LockConnection + 'static> fmt::Debug for ManagedSemaphoreGuard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagedSemaphoreGuard")
            .field("key", self.held.key())
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
