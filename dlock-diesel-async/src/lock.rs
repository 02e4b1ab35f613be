use std::fmt;
use std::ops::DerefMut;
use std::time::Duration;

use diesel::result::Error as DieselError;
use diesel_async::AsyncConnectionCore;
use dlock_core::proto::Ask;
use dlock_core::{Holder, LockKey, Mode};
use dlock_diesel::SharedLocks;
use dlock_diesel::shared::trace;

use crate::backend::{AsyncFunc, AsyncLockBackend, BoxFuture, Cancel, LockConnection};
use crate::{AdvisoryLockGuard, Error, acquire, body, cancel, holders};

/// A lock that is not held yet, and how to ask for it: the async form of [`dlock_diesel::AdvisoryLock`].
///
/// [`AdvisoryLockExt::advisory_lock`](crate::AdvisoryLockExt::advisory_lock) makes one that borrows the connection,
/// [`new`](Self::new) one that owns it: a pooled connection, a `Box`.
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
/// let lock = conn.advisory_lock(("billing", "report")).acquire().await?;
/// lock.release().await?; // until here, no other session makes the report
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryLock<M> {
    pub(crate) conn: M,
    pub(crate) ask: Ask,
    pub(crate) cancel: Option<Cancel>,
}

impl<M> fmt::Debug for AdvisoryLock<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLock")
            .field("ask", &self.ask)
            .finish_non_exhaustive()
    }
}

impl<M: DerefMut<Target: LockConnection> + Send> AdvisoryLock<M> {
    /// A lock on a connection that it owns, so that you can store it or move it to a task.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let leader = AdvisoryLock::new(Box::new(conn), ("billing", "leader")).acquire().await?;
    /// tokio::spawn(async move { leader.release().await.map(drop) });
    /// # Ok(()) }
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>) -> Self {
        Self::asking(conn, Ask::new(key.into()), None)
    }

    pub(crate) fn asking(conn: M, mut ask: Ask, cancel: Option<Cancel>) -> Self {
        ask.droppable = true;
        let ask = trace::asking(ask);
        Self { conn, ask, cancel }
    }

    /// Asks for the lock together with other readers: see [`dlock_diesel`](dlock_diesel::AdvisoryLock::shared).
    /// PostgreSQL and SQLite only.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let reader = conn.advisory_lock(("billing", "cache")).shared().acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        <M::Target as AsyncConnectionCore>::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait: see [`dlock_diesel`](dlock_diesel::AdvisoryLock::timeout). If the network is silent, the wait
    /// ends 3 seconds after the limit, with [`Error::Lost`] and a broken connection. So does a try, after 3 seconds.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let limit = std::time::Duration::from_secs(1);
    /// let lock = conn.advisory_lock(("billing", "report")).timeout(limit).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval and sleeps in between, instead of waiting in the queue: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::poll_every).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let interval = std::time::Duration::from_secs(1);
    /// let lock = conn.advisory_lock(("billing", "index")).poll_every(interval).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// Allows a lock of the session while a transaction is open: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::inside_transaction). On PostgreSQL, in a transaction, it takes 2
    /// round trips to acquire and 2 to release. Release the guard, do not drop it: see [`AdvisoryLockGuard`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_lock(("billing", "service")).inside_transaction().acquire().await?.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn inside_transaction(mut self) -> Self {
        self.ask.inside_transaction = true;
        self
    }

    /// Sets what cancels the wait, from another connection, if its future is dropped: usually the driver's cancel token
    /// (on MySQL and MariaDB `token.cancel_query().await`). It is spawned on the runtime then, and only then.
    /// [`run`](Self::run) and [`transaction`](Self::transaction) also use it to cancel the statement that runs when
    /// their future is dropped; a guard has [`cancel_with`](AdvisoryLockGuard::cancel_with) of its own.
    ///
    /// Without it, a dropped wait stays in the server's queue until its connection is closed, and on PostgreSQL up to
    /// 0.9 seconds longer (0.2 seconds in later turns). **MySQL and MariaDB may grant it the lock meanwhile, and keep
    /// the lock until the connection is closed.** A late cancel may hit the next statement of an outer guard on this
    /// connection, but nothing of the next user of a pool.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let token = conn.cancel_token();
    /// let cancel = async move { token.cancel_query(tokio_postgres::NoTls).await };
    /// let lock = conn.advisory_lock(("billing", "report")).cancel_with(cancel).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn cancel_with<F>(mut self, cancel: F) -> Self
    where
        F: Future + Send + 'static,
    {
        self.ask.cancellable = true;
        self.cancel = Some(cancel::boxed(cancel));
        self
    }

    /// The key of the lock. Of several, the one that was named first.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_lock(("billing", "report")).key(), &LockKey::from(("billing", "report")));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// Acquires the lock. Waits until it is free: see [`dlock_diesel`](dlock_diesel::AdvisoryLock::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let lock = conn.advisory_lock(("billing", "user/001")).acquire().await?;
    /// lock.release().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// You can drop the future at any point. Nothing stays held that was not held before, and outer guards keep their
    /// locks, but the connection is usually marked broken: do not use it any more. Prefer [`timeout`](Self::timeout),
    /// and give [`cancel_with`](Self::cancel_with). `docs/design.md` in the repository has each case as a table.
    ///
    /// # Round trips
    ///
    /// As in [`dlock_diesel`](dlock_diesel::AdvisoryLock::acquire): 1, once prepared. But a statement that is not kept
    /// prepared takes 2, sometimes 3. So on PostgreSQL a timeout takes 4 in all (3 without naming the holders), the end
    /// of the first turn 2, and each further turn 5. On MySQL, a step of the part below a second takes up to 3.
    pub async fn acquire(mut self) -> Result<AdvisoryLockGuard<M>, Error> {
        let hold = acquire::lock(&mut *self.conn, &self.ask, &mut self.cancel).await?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        Ok(AdvisoryLockGuard::new(self.conn, self.ask, hold))
    }

    /// Acquires the lock if it is free, otherwise returns `None` (1 round trip, once prepared): see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::try_acquire). Cancel safety is that of [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let lock = conn.advisory_lock(("billing", "report")).try_acquire().await?; // Some(guard) or None
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(self) -> Result<Option<AdvisoryLockGuard<M>>, Error> {
        Ok(self.try_acquire_or_return().await?.ok())
    }

    /// As [`try_acquire`](Self::try_acquire), but returns the connection if another connection has the lock: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::try_acquire_or_return).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let lock_or_conn = AdvisoryLock::new(conn, ("billing", "worker/1")).try_acquire_or_return().await?;
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_or_return(mut self) -> Result<Result<AdvisoryLockGuard<M>, M>, Error> {
        self.ask = self.ask.as_try();
        let hold = acquire::lock(&mut *self.conn, &self.ask, &mut self.cancel).await?;
        Ok(match hold {
            Some(hold) => Ok(AdvisoryLockGuard::new(self.conn, self.ask, hold)),
            None => Err(self.conn),
        })
    }

    /// Acquires the lock, runs `f` and releases the lock, also after an error or a panic of `f`: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::run). 2 round trips, once prepared. Dropping the future drops that
    /// of `f`, and then the guard: see [`AdvisoryLockGuard`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_lock(("billing", "report")).run(async |_conn| Ok::<(), Error>(())).await?;
    /// # Ok(()) }
    /// ```
    pub async fn run<'a, F, T, E>(mut self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        M: 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        // Boxed: see `AsyncLockBackend::transaction`.
        let running: BoxFuture<'_, _> =
            Box::pin(body::run(&mut *self.conn, self.ask, self.cancel, f));
        running.await
    }

    /// Begins a transaction that holds the lock, runs `f` in it, and commits: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::transaction). With COMMIT it takes 2 round trips on PostgreSQL at
    /// READ COMMITTED, 3 at the other levels, and 4 on MySQL and MariaDB.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_lock(("bank", "account/1")).transaction(async |_conn| Ok::<(), Error>(())).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping the future rolls back, unless its COMMIT has come through, and marks the connection broken. On
    /// PostgreSQL the lock is free when the server reads that, on MySQL and MariaDB at the latest when the connection
    /// is closed. SQLite: on a runtime with one thread, and in a `LocalSet`, diesel-async panics when a statement of
    /// `f` is dropped.
    pub async fn transaction<'a, F, T, E>(mut self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        M: 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        let conn = &mut *self.conn;
        <<M::Target as AsyncConnectionCore>::Backend as AsyncLockBackend>::transaction(
            conn,
            self.ask,
            self.cancel,
            f,
        )
        .await
    }

    /// Lists the sessions that hold the lock or wait for it: see [`dlock_diesel`](dlock_diesel::AdvisoryLock::holders).
    /// Round trips are the same. Cancel safety is that of [`AdvisoryLockGuard::is_held`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let holders = conn.advisory_lock(("billing", "report")).holders().await?;
    /// # Ok(()) }
    /// ```
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_locks(&mut *self.conn, &self.ask.key, &self.ask.more).await
    }
}
