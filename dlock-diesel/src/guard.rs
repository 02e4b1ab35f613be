use std::fmt;
use std::ops::{Deref, DerefMut};

use diesel::connection::Connection;
use dlock_core::proto::{Ask, Dialect, Hold};
use dlock_core::{FencingToken, Holder, LockKey};

use crate::backend::{DialectOf, KeyOf, LockBackend, LockConnection};
use crate::run::{self, run};
use crate::shared::trace::{self, Releasing};
use crate::{Error, Held, holders, session, shared};

/// A lock that is held. It derefs to the connection, so the session that holds the lock does the work.
///
/// Dropping the guard releases the lock. [`release`](Self::release) also releases it, and reports whether the session
/// held it to the end. Both first roll back a transaction that was begun under the lock and is still open. If the lock
/// cannot be released, dlock ends the server's session, which frees the lock, and marks the connection broken, so that
/// a pool discards it. (SQLite has no session to end. There, dlock frees the lock itself.)
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = MysqlConnection::establish("mysql://localhost/app")?;
/// let mut lock = conn.advisory_lock(("billing", "report")).acquire()?;
/// diesel::sql_query("DELETE FROM reports").execute(&mut *lock)?;
/// lock.transaction(|conn| diesel::sql_query("INSERT INTO reports VALUES (1)").execute(conn))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # The lock belongs to the connection
///
/// If you swap the connections of two guards ([`std::mem::swap`]), neither guard can release its lock, and both return
/// [`Error::NotHeld`]. If you leak a guard ([`std::mem::forget`]), the connection keeps the lock until it is closed,
/// whoever uses it next.
///
/// # The lock can be lost
///
/// The server frees the lock when the session ends: a restart, a failover, an idle limit (`idle_session_timeout`,
/// `wait_timeout`), an administrator. The connection is dead then, and its next statement fails.
/// [`is_held`](Self::is_held) asks.
#[must_use = "if unused, the lock is released immediately"]
pub struct AdvisoryLockGuard<M: DerefMut<Target: LockConnection>> {
    /// This and `hold` are `None` only during the release.
    conn: Option<M>,
    hold: Option<Hold<KeyOf<M::Target>>>,
    key: LockKey,
    /// The other locks that were taken together with it.
    more: Vec<LockKey>,
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLockGuard<M> {
    pub(crate) fn new(conn: M, ask: Ask, hold: Hold<KeyOf<M::Target>>) -> Self {
        Self {
            conn: Some(conn),
            hold: Some(hold),
            key: ask.key,
            more: ask.more,
        }
    }

    /// The key of the lock. Of several, the one that was named first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock(("billing", "report")).acquire()?;
    /// println!("working under {}", lock.key());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// The keys of all locks that were taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_locks([("bank", "account/1"), ("bank", "account/2")]).acquire()?;
    /// assert_eq!(lock.keys().count(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        std::iter::once(&self.key).chain(&self.more)
    }

    /// Asks the server whether the session still holds the lock: all of them, if there are several.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire()?;
    /// assert!(lock.is_held()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session has ended, or if the connection was marked broken. [`Error::Database`] if the
    /// statement failed for another reason.
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub fn is_held(&mut self) -> Result<bool, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        let hold = self.hold.as_ref().expect(RELEASED);
        let held = run(conn, DialectOf::<M::Target>::is_held(hold), &self.key);
        trace::is_held(held, &self.key)
    }

    /// Draws a fencing token: a number greater than every token that an earlier holder drew on this server, of whatever
    /// lock.
    ///
    /// It is for what the lock alone cannot protect: a holder that was stopped, lost its session, and goes on. Store
    /// the token with what you write, and write only over lower ones. `docs/guide/fencing.md` in the repository says
    /// when a token can go back.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # diesel::table! { reports { id -> Integer, body -> Text, fence -> BigInt } }
    /// # let mut conn = PgConnection::establish("")?;
    /// use reports::{body, fence};
    ///
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire()?;
    /// let token = i64::from(lock.fencing_token()?);
    /// let written = diesel::update(reports::table.find(1).filter(fence.lt(token)))
    ///     .set((body.eq("new"), fence.eq(token)))
    ///     .execute(&mut *lock)?;
    /// assert_eq!(written, 1, "a later holder was here");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`] if the session no longer holds the lock. The connection is marked broken.
    /// - [`Error::Lost`] if the session has ended, or the connection was marked broken before.
    /// - [`Error::Database`] if the statement failed for another reason: a standby of PostgreSQL has no tokens. On
    ///   MySQL and MariaDB (`KILL QUERY`) the connection is marked broken.
    ///
    /// # Round trips
    ///
    /// 1, once prepared. PostgreSQL writes a record of the transaction log, as a COMMIT does.
    ///
    /// # Backend differences
    ///
    /// On PostgreSQL, in an open transaction, the token is safe from a crash of the server only after COMMIT.
    pub fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        let hold = self.hold.as_ref().expect(RELEASED);
        let machine = DialectOf::<M::Target>::fencing_token(hold);
        // On MySQL, a draw that has failed cannot be sent again.
        let session = run::session(conn, &self.key);
        trace::kept(session.and_then(|_| run(conn, machine, &self.key)))
    }

    /// A condition that is true only in the session that holds the lock, for the WHERE of your own statements: the
    /// check and the write are one statement.
    ///
    /// It sends nothing. It also guards a statement that is sent on another connection by mistake, which then changes
    /// nothing. Where the session was ended, the statement fails anyway.
    ///
    /// # Examples
    ///
    /// See [`Held`].
    ///
    /// # Round trips
    ///
    /// None of its own. The server asks once for each statement, not for each row. On PostgreSQL it reads its table of
    /// locks, which takes longer the more locks all sessions hold.
    ///
    /// # Backend differences
    ///
    /// On MySQL and MariaDB it is not for a server with `binlog_format = STATEMENT`, whose replicas would change
    /// nothing.
    pub fn held(&self) -> Held<<M::Target as Connection>::Backend> {
        let hold = self.hold.as_ref().expect(RELEASED);
        Held::new(DialectOf::<M::Target>::held(hold))
    }

    /// Lists the sessions that hold the lock or wait for it: see
    /// [`AdvisoryLock::holders`](crate::AdvisoryLock::holders).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire()?;
    /// let waiting = lock.holders()?.iter().filter(|holder| !holder.granted).count();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`], [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1 on PostgreSQL, once prepared. 2 or 4 on MySQL and MariaDB.
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        trace::kept(holders::of_locks(conn, &self.key, &self.more))
    }

    /// Releases the lock and returns the connection. Other holds of the same lock on this connection stay.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error};
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock(("billing", "report")).acquire()?;
    /// match lock.release() {
    ///     Err(Error::NotHeld { .. }) => println!("another holder may have worked at the same time"),
    ///     result => drop(result?),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`] if the session no longer held the lock. The connection is marked broken.
    /// - [`Error::TransactionLeftOpen`] if a transaction that was begun under the lock is still open. It is rolled
    ///   back, and the lock is free.
    /// - [`Error::Lost`] if the session has ended, or if the connection was marked broken. Another holder may be at
    ///   work already.
    /// - [`Error::Database`] if the release failed. dlock has ended the session. PostgreSQL: this also happens to a
    ///   lock that was acquired in one transaction (with
    ///   [`inside_transaction`](crate::AdvisoryLock::inside_transaction)) and is released in another.
    ///
    /// # Round trips
    ///
    /// 1, once prepared. 2 for a lock that was acquired inside a PostgreSQL transaction. Dropping the guard takes as
    /// many.
    pub fn release(mut self) -> Result<M, Error> {
        let mut conn = self.conn.take().expect(RELEASED);
        let hold = self.hold.take().expect(RELEASED);
        release(&mut *conn, &self.key, hold)?;
        Ok(conn)
    }
}

const RELEASED: &str = "BUG: the connection is there until the guard is released";

fn release<C: LockConnection>(
    conn: &mut C,
    key: &LockKey,
    hold: Hold<KeyOf<C>>,
) -> Result<(), Error> {
    Releasing::of(key).run(|| give_back(conn, key, hold))
}

fn give_back<C: LockConnection>(
    conn: &mut C,
    key: &LockKey,
    hold: Hold<KeyOf<C>>,
) -> Result<(), Error> {
    let (base, requests) = (hold.depth(), DialectOf::<C>::requests(&hold));
    let rolled_back = session::session(conn).and_then(|session| {
        session::roll_back_to(conn, base)?;
        Ok(session.depth > base)
    });
    let session = rolled_back.and_then(|left_open| Ok((session::session(conn)?, left_open)));
    let (session, left_open) = match session {
        Ok(session) => session,
        Err(error) => {
            // The session could not be ended (SQLite). Free this hold only: outer guards keep theirs.
            if session::end(conn) {
                requests.for_each(C::Backend::give_up);
            }
            return Err(shared::connection_error(error, key));
        }
    };
    run(conn, DialectOf::<C>::release(hold, session), key)?;
    if left_open {
        return Err(shared::left_open(key));
    }
    Ok(())
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
        if let (Some(conn), Some(hold)) = (self.conn.as_deref_mut(), self.hold.take()) {
            // A release that failed has ended the session or marked the connection broken.
            let _ = release(conn, &self.key, hold);
        }
    }
}

impl<M: DerefMut<Target: LockConnection>> fmt::Debug for AdvisoryLockGuard<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLockGuard")
            .field("key", &self.key)
            .field("mode", &self.hold.as_ref().map(Hold::mode))
            .finish_non_exhaustive()
    }
}
