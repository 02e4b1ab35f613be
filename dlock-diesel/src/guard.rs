use std::fmt;
use std::ops::{Deref, DerefMut};

use dlock_core::{Dialect, Fence, Holder, LockKey, Mode};

use crate::backend::{DialectOf, KeyOf, LockBackend, LockConnection};
use crate::session::Depth;
use crate::{Error, drive, session};

/// A lock that is held. It derefs to the connection, so that the session that holds the lock is the one that works.
///
/// Dropping it releases the lock; [`release`](Self::release) does so, too, and tells whether the lock had been held
/// to the end. A transaction that was begun under the lock and is still open is rolled back first. If the lock cannot
/// be released, the server's session is ended, which frees it, and the connection is marked broken, so that a pool
/// discards it. (A session of SQLite cannot be ended: there the lock is freed by itself.)
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = MysqlConnection::establish("mysql://localhost/app")?;
/// let mut lock = conn.advisory_lock("report").acquire()?;
/// diesel::sql_query("DELETE FROM reports").execute(&mut *lock)?;
/// lock.transaction(|conn| diesel::sql_query("INSERT INTO reports VALUES (1)").execute(conn))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The lock is the connection's: two guards whose connections are swapped ([`std::mem::swap`]) release nothing, and
/// answer [`Error::NotHeld`]. A guard that is leaked ([`std::mem::forget`]) leaves its lock with the connection, for whoever uses it next, until it
/// is closed.
///
/// # The lock can be lost
///
/// The server frees the lock when the session ends: a restart, a failover, an idle timeout
/// (`idle_session_timeout`, `wait_timeout`), an administrator. The connection is dead then, and the next statement on
/// it fails. [`is_held`](Self::is_held) asks.
#[must_use = "if unused, the lock is released immediately"]
pub struct AdvisoryLockGuard<M: DerefMut<Target: LockConnection>> {
    /// `None` only while it is released.
    conn: Option<M>,
    key: LockKey,
    hold: Hold<M::Target>,
}

/// One hold of a lock by a session.
pub(crate) struct Hold<C: LockConnection> {
    pub(crate) server_key: KeyOf<C>,
    pub(crate) mode: Mode,
    /// The transaction that it was acquired in.
    pub(crate) depth: Depth,
    pub(crate) fence: Option<Fence>,
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLockGuard<M> {
    pub(crate) fn new(conn: M, key: LockKey, hold: Hold<M::Target>) -> Self {
        Self {
            conn: Some(conn),
            key,
            hold,
        }
    }

    /// The key.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock("report").acquire()?;
    /// println!("working under {}", lock.key());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Asks the server whether the session still holds the lock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut lock = conn.advisory_lock("report").acquire()?;
    /// assert!(lock.is_held()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Database`], also if the connection is gone, and the lock with it.
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub fn is_held(&mut self) -> Result<bool, Error> {
        let statement = DialectOf::<M::Target>::is_held(&self.hold.server_key, self.hold.mode);
        drive::is_held(&mut **self, statement)
    }

    /// Who holds the lock or waits for it now: see [`AdvisoryLock::holders`](crate::AdvisoryLock::holders).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut lock = conn.advisory_lock("report").acquire()?;
    /// let waiting = lock.holders()?.iter().filter(|holder| !holder.granted).count();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared; on MySQL and MariaDB up to 2.
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        drive::holders(conn, &self.hold.server_key)
    }

    /// Releases the lock and gives the connection back. Other holds of it on the same connection stay.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error};
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock("report").acquire()?;
    /// match lock.release() {
    ///     Err(Error::NotHeld { .. }) => println!("somebody else may have been at it, too"),
    ///     result => drop(result?),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`] if the lock had been lost. The connection counts as broken then, as it is not what it was.
    /// - [`Error::InTransaction`] if a transaction that was begun under the lock is still open: it has been rolled
    ///   back, for to commit it without the lock would break exclusion. The lock is free.
    /// - [`Error::Database`] if the server could not be asked. Its session is ended then.
    ///   Also for a lock taken in one transaction (with
    ///   [`inside_transaction`](crate::AdvisoryLock::inside_transaction), on PostgreSQL) and released in the next.
    ///
    /// # Round trips
    ///
    /// 1, once prepared; 2 for a lock that was acquired inside a PostgreSQL transaction.
    pub fn release(mut self) -> Result<M, Error> {
        let mut conn = self.conn.take().expect(RELEASED);
        undo(&mut *conn, &self.key, &self.hold)?;
        Ok(conn)
    }
}

const RELEASED: &str = "BUG: the connection is there until the guard is released";

fn undo<C: LockConnection>(conn: &mut C, key: &LockKey, hold: &Hold<C>) -> Result<(), Error> {
    let left_open = match session::depth(conn) {
        Ok(depth) => depth > hold.depth,
        Err(broken) => {
            end(conn, hold);
            return Err(broken.into());
        }
    };
    if let Err(error) = session::roll_back_to(conn, hold.depth) {
        end(conn, hold);
        return Err(error.into());
    }
    // The savepoint went with the transaction if that has ended.
    let fence = hold
        .fence
        .filter(|_| session::depth(conn).is_ok_and(|depth| depth == hold.depth));
    let machine = DialectOf::<C>::release(&hold.server_key, hold.mode, fence);
    let released = drive::drive(conn, machine, key);
    if let Err(Error::NotHeld { .. }) = released {
        // Nothing is held, but this is not the session that it was.
        session::mark_broken(conn);
    }
    released?;
    if left_open {
        return Err(Error::InTransaction { key: key.clone() });
    }
    Ok(())
}

/// Ends the session. Where that is not to be had, only this hold is freed, and outer guards keep theirs.
fn end<C: LockConnection>(conn: &mut C, hold: &Hold<C>) {
    if let (true, Some(give_up)) = (session::end(conn), C::Backend::GIVE_UP) {
        give_up(&hold.server_key);
    }
}

impl<M: DerefMut<Target: LockConnection>> Deref for AdvisoryLockGuard<M> {
    type Target = M::Target;

    fn deref(&self) -> &M::Target {
        self.conn.as_deref().expect(RELEASED)
    }
}

impl<M: DerefMut<Target: LockConnection>> DerefMut for AdvisoryLockGuard<M> {
    fn deref_mut(&mut self) -> &mut M::Target {
        self.conn.as_deref_mut().expect(RELEASED)
    }
}

impl<M: DerefMut<Target: LockConnection>> Drop for AdvisoryLockGuard<M> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.as_deref_mut() {
            // What failed has ended the session or marked the connection broken.
            let _ = undo(conn, &self.key, &self.hold);
        }
    }
}

impl<M: DerefMut<Target: LockConnection>> fmt::Debug for AdvisoryLockGuard<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLockGuard")
            .field("key", &self.key)
            .field("mode", &self.hold.mode)
            .finish_non_exhaustive()
    }
}
