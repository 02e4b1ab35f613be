use diesel::connection::Connection;
use dlock_core::proto::Ask;
use dlock_core::{LockKey, Report};

use crate::backend::{LockConnection, TransactionLocks};
use crate::{AdvisoryLock, AdvisorySemaphore, AdvisoryXactLock, Error, check};

/// Adds locks to Diesel connections.
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = PgConnection::establish("postgres://localhost/app")?;
/// let lock = conn.advisory_lock(("billing", "user/001")).acquire()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait AdvisoryLockExt: Connection + Sized {
    /// A lock that the session holds until it is released. Nothing is sent before you [acquire](AdvisoryLock::acquire)
    /// it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut text = conn.advisory_lock("text").acquire()?;
    /// let mut number = text.advisory_lock(42).acquire()?; // a second lock, on the same connection
    /// let mut pair = number.advisory_lock((1, 2)).acquire()?;
    /// let invoice = pair.advisory_lock(LockKey::namespaced("billing", "invoice/7")).acquire()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// An enum with `#[derive(MultiConnection)]` cannot be locked: match it and lock the connection inside, or lock a
    /// second connection while you work through the enum. `docs/guide/pools.md` in the repository shows both.
    fn advisory_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryLock<&mut Self>
    where
        Self: LockConnection,
    {
        AdvisoryLock::new(self, key)
    }

    /// A semaphore: at most `permits` sessions hold it at once, over all processes and hosts. `permits` is from 1 to
    /// 1,000. Nothing is sent before you [acquire](AdvisorySemaphore::acquire) it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire()?;
    /// println!("working on GPU {}", inside.slot()); // 0, 1, 2 or 3
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_semaphore(
        &mut self,
        key: impl Into<LockKey>,
        permits: u32,
    ) -> AdvisorySemaphore<&mut Self>
    where
        Self: LockConnection,
    {
        AdvisorySemaphore::new(self, key, permits)
    }

    /// Several locks that are taken and released as one: all of them or none, under one deadline.
    ///
    /// They are taken in one order, whatever order they are named in, so two callers cannot deadlock on them. A key
    /// that is named twice counts once. See [`AdvisoryLock::new_all`] for errors and round trips.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # fn transfer(conn: &mut PgConnection) -> QueryResult<()> { todo!() }
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.advisory_locks([("bank", "account/1"), ("bank", "account/2")]).transaction(|conn| transfer(conn))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_locks(
        &mut self,
        keys: impl IntoIterator<Item: Into<LockKey>>,
    ) -> AdvisoryLock<&mut Self>
    where
        Self: LockConnection,
    {
        AdvisoryLock::new_all(self, keys)
    }

    /// Several locks that end with the open transaction, taken as one. PostgreSQL only.
    ///
    /// If they cannot all be had, none is held and the transaction goes on. It takes 1 round trip, unless the wait
    /// outlasts its first turn (0.9 seconds): then 4 more, and for each that is taken those of
    /// [`advisory_xact_lock`](Self::advisory_xact_lock). One more while a savepoint of dlock may be left in an aborted
    /// transaction.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| conn.advisory_xact_locks([("bank", "account/1"), ("bank", "account/2")]).acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_xact_locks(
        &mut self,
        keys: impl IntoIterator<Item: Into<LockKey>>,
    ) -> AdvisoryXactLock<'_, Self>
    where
        Self: LockConnection<Backend: TransactionLocks>,
    {
        AdvisoryXactLock::asking(self, Ask::all(keys.into_iter().map(Into::into)))
    }

    /// A lock that ends with the open transaction. PostgreSQL only.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| conn.advisory_xact_lock(("bank", "account/1")).acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_xact_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryXactLock<'_, Self>
    where
        Self: LockConnection<Backend: TransactionLocks>,
    {
        AdvisoryXactLock::asking(self, Ask::new(key.into()))
    }

    /// Looks for what would keep locks on this connection from excluding, or from being kept: for the start of a
    /// program, and for people.
    ///
    /// The [`Report`] names the server and what dlock can do there, and each trap that one connection can see: lock
    /// functions that are stubs, a standby, a cluster whose nodes have their own locks, a pooler in transaction mode,
    /// idle limits that end a holder, missing limits for a dead network, and what this user is not shown.
    ///
    /// It cannot see everything. A pooler shows if it renames prepared statements (PgBouncer 1.21 and later, unless
    /// `max_prepared_statements` is 0) or happens to answer from two sessions. The client's own limits never show.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use diesel::prelude::*;
    /// use dlock_diesel::AdvisoryLockExt;
    ///
    /// let mut conn = PgConnection::establish("postgres://localhost/app")?;
    /// let report = conn.check_advisory_locks()?;
    /// println!("{report}"); // one line if all is well
    /// assert!(report.excludes(), "two could lead at once");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InTransaction`] in an open transaction. [`Error::Lost`] if the session has ended. What the check finds
    /// is no error.
    ///
    /// # Round trips
    ///
    /// PostgreSQL: 10. MySQL and MariaDB: 10. SQLite: none.
    fn check_advisory_locks(&mut self) -> Result<Report, Error>
    where
        Self: LockConnection,
    {
        check::check(self)
    }
}

// All connections have the methods. So a connection without locks gets the compile error of [`LockConnection`], which
// says what to do, instead of "no method named `advisory_lock`".
impl<C: Connection> AdvisoryLockExt for C {}
