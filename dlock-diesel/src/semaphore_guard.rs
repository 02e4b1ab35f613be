use std::fmt;
use std::ops::{Deref, DerefMut};

use diesel::connection::Connection;
use dlock_core::proto::{Ask, Hold};
use dlock_core::{FencingToken, Holder, LockKey};

use crate::backend::{KeyOf, LockConnection};
use crate::shared::trace;
use crate::{AdvisoryLockGuard, Error, Held, holders};

/// A permit of a semaphore: a slot that is held. It derefs to the connection, so the session that holds the slot does
/// the work.
///
/// It is released, and can be lost, as an [`AdvisoryLockGuard`] is.
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = MysqlConnection::establish("mysql://localhost/app")?;
/// let mut inside = conn.advisory_semaphore(("billing", "import"), 3).acquire()?;
/// diesel::sql_query("INSERT INTO items SELECT * FROM staged").execute(&mut *inside)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
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

    /// The number of the slot, from 0 to `permits - 1`. No other session has it at the same time, so it can stand for
    /// one of several devices, ports or directories.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
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
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// println!("inside {}", conn.advisory_semaphore(("render", "gpu"), 4).acquire()?.key());
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
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
    /// assert!(inside.is_held()?);
    /// # Ok(()) }
    /// ```
    pub fn is_held(&mut self) -> Result<bool, Error> {
        self.guard.is_held()
    }

    /// Draws a fencing token for what belongs to the slot: it is greater than every token that an earlier holder of
    /// this slot drew. See [`AdvisoryLockGuard::fencing_token`](crate::AdvisoryLockGuard::fencing_token).
    ///
    /// It is not for what all permits share. There a write with the greater token would keep out another session that
    /// is inside at the same time.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
    /// println!("device {} takes commands of {} and later", inside.slot(), inside.fencing_token()?);
    /// # Ok(()) }
    /// ```
    pub fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        self.guard.fencing_token()
    }

    /// A condition that is true only in the session that holds the slot: see
    /// [`AdvisoryLockGuard::held`](crate::AdvisoryLockGuard::held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*};
    /// # diesel::table! { items { id -> Integer, done -> Bool } }
    /// # fn example(conn: &mut PgConnection) -> QueryResult<()> {
    /// let mut inside = conn.advisory_semaphore(("billing", "import"), 3).acquire()?;
    /// let item = items::table.find(1).filter(inside.held());
    /// diesel::update(item).set(items::done.eq(true)).execute(&mut *inside)?;
    /// # Ok(()) }
    /// ```
    pub fn held(&self) -> Held<<M::Target as Connection>::Backend> {
        self.guard.held()
    }

    /// Lists the sessions that hold a slot or wait for one: see
    /// [`AdvisorySemaphore::holders`](crate::AdvisorySemaphore::holders).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let mut inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
    /// let waiting = inside.holders()?.iter().filter(|holder| !holder.granted).count();
    /// # Ok(()) }
    /// ```
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let key = self.guard.key().clone();
        let holders = holders::of_semaphore(&mut *self.guard, &key, self.permits);
        trace::kept(holders)
    }

    /// Releases the permit and returns the connection. It has the errors and round trips of
    /// [`AdvisoryLockGuard::release`](crate::AdvisoryLockGuard::release).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
    /// inside.release()?;
    /// # Ok(()) }
    /// ```
    pub fn release(self) -> Result<M, Error> {
        self.guard.release()
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
