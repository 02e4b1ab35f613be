use std::fmt;
use std::ops::DerefMut;
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::Ask;
use dlock_core::{Holder, LockKey, Mode};

use crate::backend::{LockBackend, LockConnection, SharedLocks};
use crate::shared::trace;
use crate::{AdvisoryLockGuard, Error, acquire, body, holders};

/// A lock that is not held yet, and how to ask for it.
///
/// [`AdvisoryLockExt::advisory_lock`](crate::AdvisoryLockExt::advisory_lock) makes one that borrows the connection,
/// [`new`](Self::new) one that owns it. `M` is what derefs to the connection: `&mut C`, a pooled connection, `Box<C>`.
///
/// # Examples
///
/// ```
/// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
/// let lock = conn.advisory_lock(("billing", "report")).acquire()?;
/// lock.release()?; // until here, no other session makes the report
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryLock<M> {
    pub(crate) conn: M,
    pub(crate) ask: Ask,
}

impl<M> fmt::Debug for AdvisoryLock<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLock")
            .field("ask", &self.ask)
            .finish_non_exhaustive()
    }
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLock<M> {
    /// A lock on a connection that it owns, so that you can store it or move it to a thread.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::{PgConnection, r2d2::{ConnectionManager, Pool}}, dlock_diesel::AdvisoryLock};
    /// # fn example(pool: Pool<ConnectionManager<PgConnection>>) -> Result<(), Box<dyn std::error::Error>> {
    /// let leader = AdvisoryLock::new(pool.get()?, ("billing", "leader")).acquire()?;
    /// std::thread::spawn(move || drop(leader)); // frees the lock, then returns the connection to the pool
    /// # Ok(()) }
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>) -> Self {
        Self::asking(conn, Ask::new(key.into()))
    }

    pub(crate) fn asking(conn: M, ask: Ask) -> Self {
        let ask = trace::asking(ask);
        Self { conn, ask }
    }

    /// Asks for the lock together with other readers: any number of shared holders, and no exclusive one. PostgreSQL
    /// and SQLite only: on MySQL and MariaDB it does not compile. A connection that holds the lock shared can wait for
    /// it exclusively. If two do so, one of them gets [`Error::Deadlock`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let reader = conn.advisory_lock(("billing", "cache")).shared().acquire()?;
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        <M::Target as Connection>::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait: from zero, which tries once, to [`Duration::MAX`], in steps of a millisecond, rounded up.
    /// Without it the wait has no limit, whatever `lock_timeout`, `statement_timeout` and similar settings say. One
    /// exception: on PostgreSQL, a wait inside an open transaction counts for that transaction's `transaction_timeout`.
    /// The server counts the limit, so it does not end a wait
    /// [when the network is silent](crate#when-the-network-is-silent).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let limit = std::time::Duration::from_millis(250);
    /// let lock = conn.advisory_lock(("billing", "report")).timeout(limit).acquire()?; // or Error::Timeout
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval (at least a millisecond) and sleeps in between, instead of waiting in the server's queue.
    ///
    /// It is slower and unfair, and each try is a round trip. It is for migrations, and on PostgreSQL for an exclusive
    /// lock whose shared holders run `CREATE INDEX CONCURRENTLY`: a [turn](crate#waiting-on-postgresql) is too long
    /// there. On PostgreSQL with [`inside_transaction`](Self::inside_transaction), and in an outermost
    /// [`transaction`](Self::transaction), a try in vain costs 2 round trips and an ERROR line in the server's log.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let interval = std::time::Duration::from_millis(500);
    /// let lock = conn.advisory_lock(("billing", "index")).poll_every(interval).acquire()?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// Allows a lock of the session while a transaction is open. If it is released before COMMIT, the next holder does
    /// not see the changes. [`transaction`](Self::transaction) is nearly always what you want. In a transaction of
    /// PostgreSQL it takes 1 round trip to acquire (sometimes 2, because it first asks whether the transaction is
    /// aborted) and 2 to release: a savepoint makes it possible to release the lock after an error.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// conn.transaction(|conn| {
    ///     let lock = conn.advisory_lock("external service").inside_transaction().acquire()?;
    ///     // .. call the service ..
    ///     lock.release().map(drop)
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn inside_transaction(mut self) -> Self {
        self.ask.inside_transaction = true;
        self
    }

    /// The key of the lock. Of several, the one that was named first.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_lock(("billing", "report")).key(), &LockKey::from(("billing", "report")));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// Acquires the lock. Waits until it is free, in the server's queue, first come, first served. On PostgreSQL the
    /// wait [breathes](crate#waiting-on-postgresql).
    ///
    /// [Releasing](AdvisoryLockGuard::release) or dropping the guard releases the lock. A connection that already holds
    /// the lock gets a second hold. After an error, nothing is held that was not held before.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// let mut lock = conn.advisory_lock(("billing", "user/001")).acquire()?;
    /// diesel::sql_query("UPDATE accounts SET balance = 0").execute(&mut *lock)?;
    /// lock.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] after [`timeout`](Self::timeout). It names the holders.
    /// - [`Error::InTransaction`] while a transaction is open, unless it is that of `begin_test_transaction` or
    ///   [`inside_transaction`](Self::inside_transaction) allows it. dlock does not notice a raw `BEGIN`, but a wait in
    ///   one fails when it outlasts a turn.
    /// - [`Error::Deadlock`], [`Error::Interrupted`], [`Error::TooManyLocks`], [`Error::InvalidKey`],
    ///   [`Error::Unsupported`], [`Error::Lost`], [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared, whether the lock is free or taken, with or without a limit. 1 for each poll. In addition:
    ///
    /// - After a timeout: on PostgreSQL 1 to make sure that nothing is held and 1 to name the holders (3 in all); on
    ///   MySQL and MariaDB 2 or 4 to name them (3 or 5 in all).
    /// - PostgreSQL: 1 after the first turn of a wait and 3 for each further turn. Up to 3 if the lock is taken and
    ///   `transaction_timeout` or a short `statement_timeout` is set.
    /// - MySQL: up to ten steps of 5 for the part of a limit below a second.
    ///
    /// # Backend differences
    ///
    /// - MySQL and MariaDB: all databases of a server share lock names. No cycle with a row lock is found.
    /// - SQLite: each connection has to be [made ready](crate#features) once. There are no round trips.
    pub fn acquire(mut self) -> Result<AdvisoryLockGuard<M>, Error> {
        let hold = acquire::lock(&mut *self.conn, &self.ask)?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        Ok(AdvisoryLockGuard::new(self.conn, self.ask, hold))
    }

    /// Acquires the lock if it is free. `None`: another connection holds it or, on PostgreSQL and SQLite, waits for it.
    ///
    /// Bind the guard to a name: in `if lock.try_acquire()?.is_some() { .. }` the lock is free again before the block
    /// begins. With [`timeout`](Self::timeout) it waits up to that limit first. 1 round trip, once prepared. Errors and
    /// round trips of a wait are those of [`acquire`](Self::acquire), but it returns `None` instead of
    /// [`Error::Timeout`] and does not ask for the holders.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// match conn.advisory_lock(("billing", "report")).try_acquire()? {
    ///     Some(lock) => drop(lock.release()?),
    ///     None => println!("another session makes the report"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn try_acquire(self) -> Result<Option<AdvisoryLockGuard<M>>, Error> {
        Ok(self.try_acquire_or_return()?.ok())
    }

    /// As [`try_acquire`](Self::try_acquire), but returns the connection if another connection has the lock. A function
    /// that tries several locks in turn and returns a guard needs it, because of the borrow checker.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::PgConnection, dlock_diesel::{AdvisoryLock, AdvisoryLockGuard, Error}};
    /// fn any_worker(mut conn: &mut PgConnection) -> Result<Option<AdvisoryLockGuard<&mut PgConnection>>, Error> {
    ///     for key in ["worker/1", "worker/2"] {
    ///         match AdvisoryLock::new(conn, key).try_acquire_or_return()? {
    ///             Ok(lock) => return Ok(Some(lock)),
    ///             Err(back) => conn = back,
    ///         }
    ///     }
    ///     Ok(None)
    /// }
    /// ```
    pub fn try_acquire_or_return(mut self) -> Result<Result<AdvisoryLockGuard<M>, M>, Error> {
        self.ask = self.ask.as_try();
        let hold = acquire::lock(&mut *self.conn, &self.ask)?;
        Ok(match hold {
            Some(hold) => Ok(AdvisoryLockGuard::new(self.conn, self.ask, hold)),
            None => Err(self.conn),
        })
    }

    /// Acquires the lock, runs `f` and releases the lock, also after an error or a panic. 2 round trips, once prepared.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> QueryResult<()> {
    /// let refresh = diesel::sql_query("REFRESH MATERIALIZED VIEW report");
    /// conn.advisory_lock(("billing", "report")).run(|conn| refresh.execute(conn))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire) and of `f`. If `f` succeeded, those of
    /// [`release`](AdvisoryLockGuard::release). dlock's errors arrive as a [`diesel::result::Error`]. [`Error::from`]
    /// takes them out again.
    pub fn run<T, E>(mut self, f: impl FnOnce(&mut M::Target) -> Result<T, E>) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        body::run(&mut *self.conn, self.ask, f)
    }

    /// Begins a transaction that holds the lock, runs `f` in it, and commits. If `f` fails or panics, it rolls back.
    ///
    /// The lock is free only after COMMIT or ROLLBACK. `f` sees everything that the previous holder committed, at every
    /// isolation level.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> QueryResult<()> {
    /// let update = diesel::sql_query("UPDATE accounts SET balance = balance + 1 WHERE id = 1");
    /// conn.advisory_lock(("bank", "account/1")).transaction(|conn| update.execute(conn))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run) and of COMMIT. An error of the rollback never hides one of `f`.
    /// [`Error::TransactionLeftOpen`] if `f` begins one more transaction and leaves it open: everything is rolled back.
    ///
    /// # Round trips
    ///
    /// - PostgreSQL, with COMMIT: 2 at READ COMMITTED, as for a plain `conn.transaction`, and 3 at the other levels,
    ///   whether the lock is free or taken. A long wait, or a limit of the session, adds what it adds to
    ///   [`acquire`](Self::acquire). A [`timeout`](Self::timeout) in the first turn takes 3. Inside a transaction: 3.
    /// - MySQL and MariaDB: those of [`run`](Self::run) (2) and of a plain `conn.transaction` (6).
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL, at other levels than READ COMMITTED: it does not work behind PgBouncer's transaction pooling, and
    ///   each call writes an ERROR line ("invalid input syntax for type json") into the server's log. At SERIALIZABLE,
    ///   two holders in turn can get a serialization failure. Retry it.
    /// - PostgreSQL, inside an open transaction: it nests as `conn.transaction` does, and the outermost transaction
    ///   holds the lock. At REPEATABLE READ and SERIALIZABLE, `f` sees what that transaction sees.
    /// - PostgreSQL, after a raw `BEGIN`: it goes unnoticed, as by Diesel's own `transaction`. What was done since is
    ///   **rolled back** without an error where dlock has to begin again: at other levels than READ COMMITTED, also if
    ///   the lock is free; and where it is taken, with [`poll_every`](Self::poll_every), with `transaction_timeout`,
    ///   and after the first turn of a wait.
    /// - MySQL, MariaDB, SQLite: inside an open transaction it returns [`Error::InTransaction`].
    /// - SQLite: it begins with `BEGIN IMMEDIATE`, so it waits for other writers, but only as long as `busy_timeout`
    ///   says. With [`shared`](Self::shared) it begins with `BEGIN`.
    pub fn transaction<T, E>(
        mut self,
        f: impl FnOnce(&mut M::Target) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<DieselError>,
    {
        <M::Target as Connection>::Backend::transaction(&mut *self.conn, self.ask, f)
    }

    /// Lists the sessions that hold the lock or wait for it, holders first, as far as the server shows them to this
    /// user: see [`Holder`]. 1 round trip on PostgreSQL, once prepared. 2 or 4 on MySQL and MariaDB (4 if it is free).
    /// It fails with [`Error::InvalidKey`], [`Error::Lost`] or [`Error::Database`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// for holder in conn.advisory_lock(("billing", "report")).holders()? {
    ///     println!("{holder} {}", if holder.granted { "holds it" } else { "waits for it" });
    /// }
    /// # Ok(()) }
    /// ```
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_locks(&mut *self.conn, &self.ask.key, &self.ask.more)
    }
}
