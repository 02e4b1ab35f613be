use std::fmt;
use std::ops::DerefMut;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use dlock_core::{Dialect, Fence, Holder, LockKey, Mode, Wait};

use crate::backend::{DialectOf, LockBackend, LockConnection, SharedLocks};
use crate::guard::Hold;
use crate::{AdvisoryLockGuard, Error, drive, session};

/// A lock that is not held yet, and how to ask for it.
///
/// [`AdvisoryLockExt::advisory_lock`](crate::AdvisoryLockExt::advisory_lock) makes one that borrows the connection,
/// [`new`](Self::new) one that owns it. `M` is what derefs to the connection: `&mut C`, a pooled connection, `Box<C>`.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = PgConnection::establish("postgres://localhost/app")?;
/// let lock = conn.advisory_lock("report").timeout(Duration::from_secs(5)).acquire()?;
/// // .. nobody else makes the report now ..
/// lock.release()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryLock<M> {
    pub(crate) conn: M,
    pub(crate) key: LockKey,
    pub(crate) mode: Mode,
    pub(crate) wait: Wait,
    inside_transaction: bool,
}

impl<M> fmt::Debug for AdvisoryLock<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLock")
            .field("key", &self.key)
            .field("mode", &self.mode)
            .field("wait", &self.wait)
            .field("inside_transaction", &self.inside_transaction)
            .finish_non_exhaustive()
    }
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLock<M> {
    /// A lock on a connection that it owns, to be stored or moved to a thread.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use diesel::pg::PgConnection;
    /// use diesel::r2d2::{ConnectionManager, Pool};
    /// use dlock_diesel::AdvisoryLock;
    ///
    /// let pool = Pool::new(ConnectionManager::<PgConnection>::new("postgres://localhost/app"))?;
    /// let leader = AdvisoryLock::new(pool.get()?, "leader").acquire()?;
    /// std::thread::spawn(move || {
    ///     // .. lead ..
    ///     drop(leader); // frees the lock, then gives the connection back to the pool
    /// });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>) -> Self {
        Self {
            conn,
            key: key.into(),
            mode: Mode::Exclusive,
            wait: Wait::default(),
            inside_transaction: false,
        }
    }

    /// Asks for the lock together with other readers: any number of shared holders, but no exclusive one.
    ///
    /// A connection that holds the lock shared can wait for it exclusively; if two do so, one of them gets
    /// [`Error::Deadlock`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let reader = conn.advisory_lock("cache").shared().acquire()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Backend differences
    ///
    /// PostgreSQL only. On MySQL and MariaDB it does not compile.
    pub fn shared(mut self) -> Self
    where
        <M::Target as Connection>::Backend: SharedLocks,
    {
        self.mode = Mode::Shared;
        self
    }

    /// Waits at most that long: from zero, which tries once, to [`Duration::MAX`], in steps of a millisecond
    /// (rounded up). Without it the wait has no limit, whatever `lock_timeout`, `statement_timeout` or the like are
    /// set to.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error};
    /// # let mut conn = PgConnection::establish("")?;
    /// let result = conn.advisory_lock("report").timeout(Duration::from_millis(250)).acquire();
    /// if let Err(Error::Timeout { holders, .. }) = result {
    ///     println!("the report is being made by {holders:?}");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.wait.limit = Some(limit);
        self
    }

    /// Asks again at this interval (at least a millisecond) and sleeps in between, in place of waiting in the
    /// server's queue.
    ///
    /// It is slower, unfair, and costs a round trip for each time. (Inside a PostgreSQL transaction, and where
    /// [`transaction`](Self::transaction) begins one, each time is a wait of one millisecond.) It is for locks around migrations: a wait in
    /// PostgreSQL's queue holds a snapshot, for which a `CREATE INDEX CONCURRENTLY` of the holder waits, and that is a
    /// deadlock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let lock = conn.advisory_lock("index").poll_every(Duration::from_millis(500)).acquire()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.wait.poll = Some(interval);
        self
    }

    /// Allows a lock of the session while a transaction is open, and to release it before COMMIT: then the next
    /// holder does not see what this one did. [`transaction`](Self::transaction) is nearly always what is wanted.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # fn call_external_service() {}
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| {
    ///     let lock = conn.advisory_lock("external service").inside_transaction().acquire()?;
    ///     call_external_service();
    ///     lock.release()?;
    ///     QueryResult::Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Round trips
    ///
    /// On PostgreSQL, inside a transaction, 1 to acquire and 2 to release: a savepoint makes it possible to release
    /// the lock also when an error has aborted the transaction.
    pub fn inside_transaction(mut self) -> Self {
        self.inside_transaction = true;
        self
    }

    pub(crate) fn refusing_transactions(mut self) -> Self {
        self.inside_transaction = false;
        self
    }

    /// The key.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// assert_eq!(conn.advisory_lock("report").key(), &LockKey::from("report"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Acquires the lock, and waits until it is free: in the server's queue, first come, first served.
    ///
    /// The lock is released when the guard is [released](AdvisoryLockGuard::release) or dropped. If this connection
    /// holds the lock already, it is held once more. On failure nothing is held that was not held before.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # diesel::table! { accounts { id -> Integer, balance -> Integer } }
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut lock = conn.advisory_lock("user/001").acquire()?;
    /// diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut *lock)?;
    /// lock.release()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] after [`timeout`](Self::timeout), with who has the lock.
    /// - [`Error::InTransaction`] in an open transaction, unless it is a test transaction or
    ///   [`inside_transaction`](Self::inside_transaction) allows it. A raw `BEGIN` is not seen, except on PostgreSQL
    ///   where the lock is taken: then that transaction is aborted.
    /// - [`Error::InvalidKey`] for an empty key; nothing is sent.
    /// - [`Error::Deadlock`], [`Error::Interrupted`], [`Error::TooManyLocks`], [`Error::Unsupported`],
    ///   [`Error::Database`] as they say.
    ///
    /// # Round trips
    ///
    /// 1 if the lock is free (once prepared). If it is taken, 2 on PostgreSQL and 3 on MySQL and MariaDB (6 more where
    /// MariaDB's `max_statement_time` is set). After a timeout, 1 more on PostgreSQL and 1 or 2 more on MySQL and MariaDB,
    /// which ask who has the lock; on MySQL 5 more, which ask what became of the wait. Polling: 1 for each time (3 where
    /// [`transaction`](Self::transaction) polls on PostgreSQL).
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: waiting holds a snapshot, see [`poll_every`](Self::poll_every).
    /// - MySQL and MariaDB: names are shared by all databases of the server. A cycle of a row lock and this one is
    ///   not found by their deadlock detectors.
    pub fn acquire(mut self) -> Result<AdvisoryLockGuard<M>, Error> {
        let started = Instant::now();
        match self.take(self.wait)? {
            Some(hold) => Ok(AdvisoryLockGuard::new(self.conn, self.key, hold)),
            None => {
                let server_key = DialectOf::<M::Target>::key(&self.key)?;
                let waited = started.elapsed();
                Err(drive::timeout(
                    &mut *self.conn,
                    self.key,
                    &server_key,
                    waited,
                ))
            }
        }
    }

    /// Acquires the lock if it is free: `None` if another connection has it (or waits for it, on PostgreSQL).
    ///
    /// Bind the guard: with `if lock.try_acquire()?.is_some() { .. }` the lock is free again before the block begins.
    ///
    /// With [`timeout`](Self::timeout) it waits up to that limit first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// let Some(lock) = conn.advisory_lock("report").try_acquire()? else {
    ///     println!("the report is being made already");
    ///     return Ok(());
    /// };
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), except that [`Error::Timeout`] is `None` here.
    ///
    /// # Round trips
    ///
    /// 1, once prepared. With a [`timeout`](Self::timeout) those of [`acquire`](Self::acquire), without the one that
    /// asks who has the lock.
    pub fn try_acquire(mut self) -> Result<Option<AdvisoryLockGuard<M>>, Error> {
        let wait = match self.wait.limit {
            Some(_) => self.wait,
            None => Wait::TRY,
        };
        let hold = self.take(wait)?;
        Ok(hold.map(|hold| AdvisoryLockGuard::new(self.conn, self.key, hold)))
    }

    fn take(&mut self, wait: Wait) -> Result<Option<Hold<M::Target>>, Error> {
        let conn = &mut *self.conn;
        let server_key = DialectOf::<M::Target>::key(&self.key)?;
        let depth = session::depth(conn)?;
        if depth.is_some() && !self.inside_transaction && !session::in_test_transaction(conn) {
            return Err(Error::InTransaction {
                key: self.key.clone(),
            });
        }
        let fence = depth.map(|_| Fence::new());
        let machine = DialectOf::<M::Target>::acquire(&server_key, self.mode, wait, fence);
        let acquired = drive::drive(conn, machine, &self.key)?;
        Ok(acquired.then_some(Hold {
            server_key,
            mode: self.mode,
            depth,
            fence,
        }))
    }

    /// Acquires the lock, runs `f` and releases the lock, also when `f` fails or panics.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # fn build(conn: &mut PgConnection) -> QueryResult<String> { todo!() }
    /// # let mut conn = PgConnection::establish("")?;
    /// let report = conn.advisory_lock("report").run(|conn| build(conn))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire) and of `f`, and if `f` succeeded, those of
    /// [`release`](AdvisoryLockGuard::release).
    ///
    /// # Round trips
    ///
    /// Those of [`acquire`](Self::acquire) and of [`release`](AdvisoryLockGuard::release).
    pub fn run<T, E>(self, f: impl FnOnce(&mut M::Target) -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error>,
    {
        let mut guard = self.acquire()?;
        let value = f(&mut guard)?; // an error drops the guard, which releases
        guard.release()?;
        Ok(value)
    }

    /// Begins a transaction that holds the lock, runs `f` in it, and commits; if `f` fails or panics, it rolls back.
    ///
    /// The lock is free only after COMMIT or ROLLBACK, and `f` sees all that the previous holder committed, whatever
    /// the isolation level.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # fn move_money(conn: &mut PgConnection) -> QueryResult<()> { todo!() }
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.advisory_lock("account/1").transaction(|conn| move_money(conn))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire), of `f` and of COMMIT. An error of `f` is never hidden by one of the
    /// rollback.
    ///
    /// # Round trips
    ///
    /// - PostgreSQL at READ COMMITTED: 2, those of a plain `conn.transaction`, if the lock is free, and 3 if it is taken.
    ///   At the other levels 6, and 1 more if the lock is taken.
    /// - MySQL and MariaDB: those of [`acquire`](Self::acquire), a plain `conn.transaction` (6) and
    ///   [`release`](AdvisoryLockGuard::release).
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: at READ COMMITTED only locks of the transaction are used, so that it works behind proxies that hand
    ///   each transaction to another session (PgBouncer's transaction pooling). At the other levels it does not.
    /// - PostgreSQL: in a transaction that was begun by a raw `BEGIN`, of which Diesel does not know, it is refused with
    ///   [`Error::InTransaction`], and that transaction is aborted.
    /// - PostgreSQL: inside an open transaction it nests as `conn.transaction` does, and the lock is held until the
    ///   outermost transaction ends (or the nested one is rolled back). What `f` sees there at REPEATABLE READ and
    ///   SERIALIZABLE is what the outer transaction sees.
    /// - PostgreSQL at SERIALIZABLE: a serialization failure (SQLSTATE 40001) between two holders in turn is possible,
    ///   for the server releases the lock just before it closes its books on the
    ///   transaction. Retry it, as every serializable transaction.
    /// - MySQL and MariaDB: inside an open transaction it is refused with [`Error::InTransaction`].
    pub fn transaction<T, E>(self, f: impl FnOnce(&mut M::Target) -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error>,
    {
        <<M::Target as Connection>::Backend as LockBackend>::transaction(self, f)
    }

    /// Who holds the lock or waits for it now, holders first, as far as the server lets this user see it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// for holder in conn.advisory_lock("report").holders()? {
    ///     println!("{holder} {}", if holder.granted { "holds it" } else { "waits for it" });
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`], [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared; on MySQL and MariaDB up to 2.
    ///
    /// # Backend differences
    ///
    /// See [`Holder`].
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let server_key = DialectOf::<M::Target>::key(&self.key)?;
        drive::holders(&mut *self.conn, &server_key)
    }
}
