use std::fmt;
use std::ops::DerefMut;
use std::time::{Duration, Instant};

use diesel_async::AsyncConnectionCore;
use dlock_core::{Dialect, Fence, Holder, LockKey, Mode, Wait};
use dlock_diesel::{SharedLocks, glue};

use crate::backend::{AsyncFunc, AsyncLockBackend, DialectOf, LockConnection};
use crate::drive::Cancel;
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
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use diesel_async::{AsyncConnection, AsyncPgConnection};
/// use dlock_diesel_async::AdvisoryLockExt;
///
/// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
/// let lock = conn.advisory_lock("report").timeout(Duration::from_secs(5)).acquire().await?;
/// // .. nobody else makes the report now ..
/// lock.release().await?;
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryLock<M> {
    pub(crate) conn: M,
    pub(crate) key: LockKey,
    pub(crate) mode: Mode,
    pub(crate) wait: Wait,
    pub(crate) cancel: Option<Cancel>,
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

impl<M: DerefMut<Target: LockConnection> + Send> AdvisoryLock<M> {
    /// A lock on a connection that it owns, to be stored or moved to a thread.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use diesel_async::AsyncPgConnection;
    /// use diesel_async::pooled_connection::{AsyncDieselConnectionManager, bb8::Pool};
    /// use dlock_diesel_async::AdvisoryLock;
    ///
    /// let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new("postgres://localhost/app");
    /// let pool = Pool::builder().build(manager).await?;
    /// let leader = AdvisoryLock::new(pool.get_owned().await?, "leader").acquire().await?;
    /// tokio::spawn(async move {
    ///     // .. lead ..
    ///     leader.release().await.map(drop)
    /// });
    /// # Ok(()) }
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>) -> Self {
        Self {
            conn,
            key: key.into(),
            mode: Mode::Exclusive,
            wait: Wait::default(),
            cancel: None,
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let reader = conn.advisory_lock("cache").shared().acquire().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Backend differences
    ///
    /// PostgreSQL and SQLite only. On MySQL and MariaDB it does not compile.
    pub fn shared(mut self) -> Self
    where
        <M::Target as AsyncConnectionCore>::Backend: SharedLocks,
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::{AdvisoryLockExt, Error};
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let result = conn.advisory_lock("report").timeout(Duration::from_millis(250)).acquire().await;
    /// if let Err(Error::Timeout { holders, .. }) = result {
    ///     println!("the report is being made by {holders:?}");
    /// }
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.wait.limit = Some(limit);
        self
    }

    /// Asks again at this interval (at least a millisecond) and sleeps in between, in place of waiting in the
    /// server's queue.
    ///
    /// It is slower, unfair, and costs a round trip for each time. (Inside a PostgreSQL transaction, and where
    /// [`transaction`](Self::transaction) begins one, each time is a wait of one millisecond.) It is for locks around
    /// migrations: a wait in PostgreSQL's queue holds a snapshot, for which a `CREATE INDEX CONCURRENTLY` of the holder
    /// waits, and that is a deadlock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let lock = conn.advisory_lock("index").poll_every(Duration::from_millis(500)).acquire().await?;
    /// # Ok(()) }
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # async fn call_external_service() {}
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.transaction(async |conn| {
    ///     let lock = conn.advisory_lock("external service").inside_transaction().acquire().await?;
    ///     call_external_service().await;
    ///     lock.release().await?;
    ///     diesel::QueryResult::Ok(())
    /// }).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Round trips
    ///
    /// On PostgreSQL, inside a transaction, 2 to acquire and 2 to release: a savepoint makes it possible to release
    /// the lock also when an error has aborted the transaction. Release the guard, do not drop it:
    /// see [`AdvisoryLockGuard`].
    pub fn inside_transaction(mut self) -> Self {
        self.inside_transaction = true;
        self
    }

    /// What cancels the wait, from another connection, when the future that waits is dropped: most often the cancel
    /// token of the driver. It is spawned on the runtime then, and never run otherwise.
    ///
    /// Without it, a wait that was dropped stays in the server's queue until its connection is closed: see
    /// [`acquire`](Self::acquire). A cancel that comes late, after the grant, may hit what an outer guard does next on the
    /// connection, never what the next user of a pool does.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// use dlock_diesel_async::AdvisoryLockExt;
    /// use tokio_postgres::NoTls;
    ///
    /// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
    /// let token = conn.cancel_token();
    /// let lock = conn.advisory_lock("report").cancel_with(async move { token.cancel_query(NoTls).await });
    /// let lock = tokio::time::timeout(Duration::from_secs(5), lock.acquire()).await??;
    /// # Ok(()) }
    /// ```
    ///
    /// # Backend differences
    ///
    /// - MySQL and MariaDB: `let token = conn.cancel_token();`, and `async move { token.cancel_query().await }`.
    /// - PostgreSQL with TLS: give `cancel_query` the connector that the connection was made with.
    /// - PostgreSQL, a connection that was made by `AsyncPgConnection::try_from(client)`: its driver is a task of yours, which
    ///   does not end before the answer comes, so that closing the connection takes nothing out of the queue. Give
    ///   `cancel_with`, or use `try_from_client_and_connection`.
    pub fn cancel_with<F>(mut self, cancel: F) -> Self
    where
        F: Future + Send + 'static,
    {
        self.cancel = Some(drive::cancel(cancel));
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::{AdvisoryLockExt, LockKey};
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// assert_eq!(conn.advisory_lock("report").key(), &LockKey::from("report"));
    /// # Ok(()) }
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel::prelude::*;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # diesel::table! { accounts { id -> Integer, balance -> Integer } }
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let mut lock = conn.advisory_lock("user/001").acquire().await?;
    /// diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut lock).await?;
    /// lock.release().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] after [`timeout`](Self::timeout), with who has the lock.
    /// - [`Error::InTransaction`] in an open transaction, unless it is a test transaction or
    ///   [`inside_transaction`](Self::inside_transaction) allows it. A raw `BEGIN` is not seen.
    /// - [`Error::InvalidKey`] for an empty key; nothing is sent.
    /// - [`Error::Deadlock`], [`Error::Interrupted`], [`Error::TooManyLocks`], [`Error::Unsupported`],
    ///   [`Error::Database`] as they say.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped at any point: nothing stays held that was not held before, and outer guards on the
    /// same connection keep their locks. What `tokio::time::timeout` and `tokio::select!` do is safe:
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut first = AsyncPgConnection::establish("").await?;
    /// # let mut second = AsyncPgConnection::establish("").await?;
    /// let lock = tokio::time::timeout(Duration::from_secs(1), first.advisory_lock("a").acquire()).await??;
    /// lock.release().await?;
    ///
    /// let lock = tokio::select! {
    ///     lock = first.advisory_lock("a").acquire() => lock?,
    ///     lock = second.advisory_lock("b").acquire() => lock?,
    /// };
    /// # Ok(()) }
    /// ```
    ///
    /// But [`timeout`](Self::timeout) is better than a timer around the future: the server ends the wait then, the
    /// connection stays fit for use, and so do the guards around it. (Against a network that is down neither helps but
    /// a timer.)
    ///
    /// - Dropped while it asks, which is one round trip: on PostgreSQL the lock, if it was granted, is released right
    ///   behind; on MySQL and MariaDB when the connection is closed.
    /// - Dropped while it waits in the server's queue, with [`cancel_with`](Self::cancel_with): the wait is cancelled at
    ///   once, and if it was granted just before, the lock is released right behind.
    /// - Dropped while it waits, without [`cancel_with`](Self::cancel_with): it stays in the queue until the connection is
    ///   closed. Then PostgreSQL takes it out within 0.3 seconds, if the server's platform lets it
    ///   (`client_connection_check_interval`), and MySQL and MariaDB within 1 second. If it is granted before, PostgreSQL
    ///   releases the lock right behind; **MySQL and MariaDB hold it until the connection is closed**. So give
    ///   [`cancel_with`](Self::cancel_with) where connections stay open: in a pool of deadpool, which closes what is broken
    ///   only at the next `get()` that meets it, or where the connection is your own. (bb8 closes it at once.)
    /// - In both cases the connection counts as broken, and on MySQL and MariaDB it is out of step: do not use it any
    ///   more, except to drop it. Guards around this future keep their locks, and their
    ///   [`release`](AdvisoryLockGuard::release) fails.
    /// - SQLite: the lock is given back, or the place in the queue, at once, and the connection stays fit for use.
    /// - A poll's sleep: nothing happens.
    ///
    /// # Round trips
    ///
    /// 1 if the lock is free (once prepared). If it is taken, 2 on PostgreSQL and 3 on MySQL and MariaDB (2 more where
    /// MariaDB's `max_statement_time` is set). After a timeout, 1 more on PostgreSQL and 1 or 2 more on MySQL and MariaDB,
    /// which ask who has the lock; on MySQL 3 more, which ask what became of the wait. Polling: 1 for each time (3 where
    /// [`transaction`](Self::transaction) polls on PostgreSQL).
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: waiting holds a snapshot, see [`poll_every`](Self::poll_every).
    /// - MySQL and MariaDB: names are shared by all databases of the server. A cycle of a row lock and this one is
    ///   not found by their deadlock detectors.
    pub async fn acquire(mut self) -> Result<AdvisoryLockGuard<M>, Error> {
        let started = Instant::now();
        match self.take(self.wait).await? {
            Some(hold) => Ok(AdvisoryLockGuard::new(self.conn, self.key, hold)),
            None => {
                let server_key = DialectOf::<M::Target>::key(&self.key)?;
                let waited = started.elapsed();
                Err(drive::timeout(&mut *self.conn, self.key, &server_key, waited).await)
            }
        }
    }

    /// Acquires the lock if it is free: `None` if another connection has it (or waits for it, on PostgreSQL and SQLite).
    ///
    /// With [`timeout`](Self::timeout) it waits up to that limit first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let Some(lock) = conn.advisory_lock("report").try_acquire().await? else {
    ///     println!("the report is being made already");
    ///     return Ok(());
    /// };
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), except that [`Error::Timeout`] is `None` here.
    ///
    /// # Cancel safety
    ///
    /// That of [`acquire`](Self::acquire).
    ///
    /// # Round trips
    ///
    /// 1, once prepared. With a [`timeout`](Self::timeout) those of [`acquire`](Self::acquire), without the one that
    /// asks who has the lock.
    pub async fn try_acquire(mut self) -> Result<Option<AdvisoryLockGuard<M>>, Error> {
        let wait = match self.wait.limit {
            Some(_) => self.wait,
            None => Wait::TRY,
        };
        let hold = self.take(wait).await?;
        Ok(hold.map(|hold| AdvisoryLockGuard::new(self.conn, self.key, hold)))
    }

    async fn take(&mut self, wait: Wait) -> Result<Option<Hold<M::Target>>, Error> {
        let conn = &mut *self.conn;
        let server_key = DialectOf::<M::Target>::key(&self.key)?;
        let depth = session::depth(conn)?;
        if depth.is_some() && !self.inside_transaction && !session::in_test_transaction(conn) {
            return Err(glue::in_transaction(&self.key));
        }
        let fence = depth.map(|_| Fence::new());
        let machine =
            DialectOf::<M::Target>::acquire_abandonable(&server_key, self.mode, wait, fence);
        let acquired = drive::drive(conn, machine, &self.key, self.cancel.take()).await?;
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
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # async fn build(conn: &mut AsyncPgConnection) -> Result<String, dlock_diesel_async::Error> { todo!() }
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let report = conn.advisory_lock("report").run(async |conn| build(conn).await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire) and of `f`, and if `f` succeeded, those of
    /// [`release`](AdvisoryLockGuard::release).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops that of `f`, and then the guard: see [`AdvisoryLockGuard`].
    ///
    /// # Round trips
    ///
    /// Those of [`acquire`](Self::acquire) and of [`release`](AdvisoryLockGuard::release).
    pub async fn run<'a, F, T, E>(self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<Error> + Send + 'a,
    {
        let mut guard = self.acquire().await?;
        let result = f(&mut *guard).await;
        // An error of `f` is not hidden by one of the release.
        match (result, guard.undo().await) {
            (Ok(_), Err(error)) => Err(error.into()),
            (result, _) => result,
        }
    }

    /// Begins a transaction that holds the lock, runs `f` in it, and commits; if `f` fails or panics, it rolls back.
    ///
    /// The lock is free only after COMMIT or ROLLBACK, and `f` sees all that the previous holder committed, whatever
    /// the isolation level.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # async fn move_money(conn: &mut AsyncPgConnection) -> Result<(), dlock_diesel_async::Error> { todo!() }
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.advisory_lock("account/1").transaction(async |conn| move_money(conn).await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire), of `f` and of COMMIT. An error of `f` is never hidden by one of the
    /// rollback.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future rolls the transaction back, unless its COMMIT may have come through, and the connection is
    /// marked broken. That is sent without waiting, and the lock is free as soon as the server reads it; on MySQL and
    /// MariaDB see [`AdvisoryLockGuard`]. A transaction nested in an open one is rolled back with that, and the lock is
    /// free when that ends or the connection is closed. While it waits for the lock: see [`acquire`](Self::acquire).
    ///
    /// # Round trips
    ///
    /// - PostgreSQL at READ COMMITTED: 2, those of a plain `conn.transaction`, if the lock is free, and 3 if it is taken.
    ///   At the other levels 6, and 1 more if the lock is taken.
    /// - MySQL and MariaDB: those of [`acquire`](Self::acquire), a plain `conn.transaction` (2) and
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
    /// - MySQL, MariaDB and SQLite: inside an open transaction it is refused with [`Error::InTransaction`].
    /// - SQLite: it begins with `BEGIN IMMEDIATE`, or with [`shared`](Self::shared) with a plain `BEGIN`: see
    ///   `dlock_diesel::AdvisoryLock::transaction`. On a runtime of one thread diesel-async panics when a future that runs
    ///   a statement on SQLite is dropped; dlock's own futures do not, but those of `f`, COMMIT and ROLLBACK are its.
    pub async fn transaction<'a, F, T, E>(self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        M: 'a,
        T: Send + 'a,
        E: From<Error> + Send + 'a,
    {
        <<M::Target as AsyncConnectionCore>::Backend as AsyncLockBackend>::transaction(self, f)
            .await
    }

    /// Who holds the lock or waits for it now, holders first, as far as the server lets this user see it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// for holder in conn.advisory_lock("report").holders().await? {
    ///     println!("{holder} {}", if holder.granted { "holds it" } else { "waits for it" });
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`], [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// That of [`AdvisoryLockGuard::is_held`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared; on MySQL and MariaDB up to 2.
    ///
    /// # Backend differences
    ///
    /// See [`Holder`].
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let server_key = DialectOf::<M::Target>::key(&self.key)?;
        drive::holders(&mut *self.conn, &server_key).await
    }
}
