use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use diesel::result::Error as DieselError;
use dlock_core::LockKey;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::News;

use super::lock::{after, wait};
use super::worker::Inner;
use super::{ManagedLockGuard, desk};
use crate::{Error, LockConnection};

/// A semaphore of a [`LockManager`](crate::LockManager) that is not held yet, and how to ask for it.
///
/// It is the same semaphore as [`AdvisorySemaphore`](crate::AdvisorySemaphore), whose page says what slots are, and
/// what different numbers of permits mean. Any number of its slots need no more connections than one lock does.
///
/// # Examples
///
/// ```
/// # use dlock_diesel::*; use diesel::pg::PgConnection;
/// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
/// let inside = locks.semaphore(("billing", "mail"), 10).acquire()?;
/// inside.release()?; // until here, at most 9 others send mail
/// # Ok(()) }
/// ```
///
/// # Who is next
///
/// Within a process, first come, first served. The process stands in the server's queue once for all of them. A slot
/// that is given back goes to the next task of the same process at most 64 times in a row, or for 0.1 seconds, as a
/// lock does. Then the other processes have their turn.
#[must_use = "a semaphore does nothing until it is acquired"]
pub struct ManagedSemaphore<C> {
    inner: Arc<Inner<C>>,
    ask: Ask,
    permits: u32,
}

impl<C> fmt::Debug for ManagedSemaphore<C> {
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection; use std::time::Duration;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).timeout(Duration::from_secs(1)).acquire()?;
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) {
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ManagedLock::acquire`](crate::ManagedLock::acquire). [`Error::InvalidKey`] also if `permits` is 0 or
    /// more than 1,000, and for the key of another library. [`Error::Timeout`] names no holders where this process has
    /// all slots.
    ///
    /// # Round trips
    ///
    /// None if the slot comes from another thread of this process. Otherwise 1 where one is free. Where all are taken,
    /// those of [`AdvisorySemaphore::acquire`](crate::AdvisorySemaphore::acquire) and 1 more, once for all threads that
    /// wait.
    pub fn acquire(self) -> Result<ManagedSemaphoreGuard<C>, Error> {
        let waited = wait(self.inner, &self.ask, Some(self.permits))?;
        let held = waited.map_err(|news| desk::error(news, &self.ask.key))?;
        Ok(ManagedSemaphoreGuard::new(held))
    }

    /// Acquires a permit if a slot is free and nobody waits for one, otherwise returns `None`. Everything else is as
    /// in [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// match locks.semaphore(("render", "gpu"), 4).try_acquire()? {
    ///     Some(inside) => println!("slot {}", inside.slot()),
    ///     None => println!("all are busy"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn try_acquire(mut self) -> Result<Option<ManagedSemaphoreGuard<C>>, Error> {
        self.ask = self.ask.as_try();
        match wait(self.inner, &self.ask, Some(self.permits))? {
            Ok(held) => Ok(Some(ManagedSemaphoreGuard::new(held))),
            Err(News::Taken { .. }) => Ok(None),
            Err(news) => Err(desk::error(news, &self.ask.key)),
        }
    }

    /// Acquires a permit, runs `f`, and releases the permit: see [`ManagedLock::run`](crate::ManagedLock::run).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn render(_: u32) -> Result<(), Error> { todo!() }
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// locks.semaphore(("render", "gpu"), 4).run(|inside| render(inside.slot()))?;
    /// # Ok(()) }
    /// ```
    pub fn run<T, E>(
        self,
        f: impl FnOnce(&ManagedSemaphoreGuard<C>) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        let inside = self.acquire().map_err(DieselError::from)?;
        let result = f(&inside);
        after(result, inside.held)
    }
}

/// A permit of a semaphore of a [`LockManager`](crate::LockManager): a slot that is held. It is not a connection.
///
/// It derefs to a [`ManagedLockGuard`], which tells whether the slot [is lost](ManagedLockGuard::is_lost) and draws
/// [fencing tokens](ManagedLockGuard::fencing_token). Dropped, it gives the slot back without waiting.
///
/// # Examples
///
/// ```
/// # use dlock_diesel::*; use diesel::pg::PgConnection;
/// # fn one_step(_: u32) -> bool { false }
/// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
/// let inside = locks.semaphore(("render", "gpu"), 4).acquire()?;
/// while !inside.is_lost() && one_step(inside.slot()) {}
/// inside.release()?;
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire()?;
    /// let device = ["a", "b", "c", "d"][inside.slot() as usize];
    /// # Ok(()) }
    /// ```
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Gives the slot back, and waits until the server has released it or another thread of this process has it. It has
    /// the errors and round trips of [`ManagedLockGuard::release`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(inside: ManagedSemaphoreGuard<PgConnection>) -> Result<(), Error> {
    /// inside.release()?;
    /// # Ok(()) }
    /// ```
    pub fn release(self) -> Result<(), Error> {
        self.held.release()
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
