use std::fmt;
use std::ops::{Deref, DerefMut};

use diesel_async::AsyncConnectionCore;
use dlock_core::proto::{Ask, Hold};
use dlock_core::{FencingToken, Holder, LockKey};
use dlock_diesel::Held;
use dlock_diesel::shared::trace;

use crate::backend::{KeyOf, LockConnection};
use crate::{AdvisoryLockGuard, Error, holders};

/// A permit of a semaphore: the async form of [`dlock_diesel::AdvisorySemaphoreGuard`]. It is itself an
/// [`AsyncConnection`](diesel_async::AsyncConnection), so the session that holds the slot does the work.
///
/// Release it, do not drop it: what a drop does, and when the slot is free, is said at [`AdvisoryLockGuard`].
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
/// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
/// println!("working on GPU {}", inside.slot());
/// inside.release().await?;
/// # Ok(()) }
/// ```
#[must_use = "if unused, the permit is released immediately"]
pub struct AdvisorySemaphoreGuard<M: DerefMut<Target: LockConnection>> {
    guard: AdvisoryLockGuard<M>,
    permits: u32,
    slot: u32,
}

impl<M: DerefMut<Target: LockConnection>> AdvisorySemaphoreGuard<M> {
    pub(crate) fn new(conn: M, ask: Ask, permits: u32, hold: Hold<KeyOf<M::Target>>) -> Self {
        let slot = hold.slot().expect("BUG: a permit is a slot");
        Self {
            guard: AdvisoryLockGuard::new(conn, ask, hold),
            permits,
            slot,
        }
    }

    /// The number of the slot, from 0 to `permits - 1`: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphoreGuard::slot).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// let device = ["a", "b", "c", "d"][inside.slot() as usize];
    /// # Ok(()) }
    /// ```
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// println!("inside {}", conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?.key());
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        self.guard.key()
    }

    /// Asks the server whether the session still holds the slot: see
    /// [`AdvisoryLockGuard::is_held`](crate::AdvisoryLockGuard::is_held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// assert!(inside.is_held().await?);
    /// # Ok(()) }
    /// ```
    pub async fn is_held(&mut self) -> Result<bool, Error> {
        self.guard.is_held().await
    }

    /// Draws a fencing token for what belongs to the slot: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphoreGuard::fencing_token). Cancel safety is that of
    /// [`AdvisoryLockGuard::fencing_token`](crate::AdvisoryLockGuard::fencing_token).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// println!("device {} takes commands of {} and later", inside.slot(), inside.fencing_token().await?);
    /// # Ok(()) }
    /// ```
    pub async fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        self.guard.fencing_token().await
    }

    /// A condition that is true only in the session that holds the slot: see
    /// [`AdvisoryLockGuard::held`](crate::AdvisoryLockGuard::held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, diesel_async::RunQueryDsl, dlock_diesel_async::*};
    /// # diesel::table! { items { id -> Integer, done -> Bool } }
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> QueryResult<()> {
    /// let mut inside = conn.advisory_semaphore(("billing", "import"), 3).acquire().await?;
    /// let item = items::table.find(1).filter(inside.held());
    /// diesel::update(item).set(items::done.eq(true)).execute(&mut *inside).await?;
    /// # Ok(()) }
    /// ```
    pub fn held(&self) -> Held<<M::Target as AsyncConnectionCore>::Backend> {
        self.guard.held()
    }

    /// Lists the sessions that hold a slot or wait for one: see
    /// [`AdvisorySemaphore::holders`](crate::AdvisorySemaphore::holders).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// let waiting = inside.holders().await?.iter().filter(|holder| !holder.granted).count();
    /// # Ok(()) }
    /// ```
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let key = self.guard.key().clone();
        let holders = holders::of_semaphore(&mut *self.guard, &key, self.permits).await;
        trace::kept(holders)
    }

    /// Releases the permit and returns the connection. It has the errors and the cancel safety of
    /// [`AdvisoryLockGuard::release`](crate::AdvisoryLockGuard::release).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// inside.release().await?;
    /// # Ok(()) }
    /// ```
    pub async fn release(self) -> Result<M, Error> {
        self.guard.release().await
    }
}

impl<M: DerefMut<Target: LockConnection>> Deref for AdvisorySemaphoreGuard<M> {
    type Target = M::Target;

    fn deref(&self) -> &M::Target {
        &self.guard
    }
}

impl<M: DerefMut<Target: LockConnection>> DerefMut for AdvisorySemaphoreGuard<M> {
    fn deref_mut(&mut self) -> &mut M::Target {
        &mut self.guard
    }
}

impl<M: DerefMut<Target: LockConnection>> fmt::Debug for AdvisorySemaphoreGuard<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisorySemaphoreGuard")
            .field("key", self.key())
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
