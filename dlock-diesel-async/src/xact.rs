use std::fmt;
use std::time::{Duration, Instant};

use dlock_core::{Dialect, Fence, Holder, LockKey, Mode, TransactionDialect, Wait};

use dlock_diesel::{SharedLocks, TransactionLocks, glue};

use crate::backend::{DialectOf, LockConnection};
use crate::drive::Cancel;
use crate::{Error, drive, session};

/// A lock that is not held yet, and that will end with the transaction: COMMIT, ROLLBACK, or ROLLBACK TO a savepoint
/// before it. There is nothing to release.
///
/// [`AdvisoryLockExt::advisory_xact_lock`](crate::AdvisoryLockExt::advisory_xact_lock) makes one.
///
/// # Examples
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
/// use dlock_diesel_async::AdvisoryLockExt;
///
/// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
/// conn.transaction(async |conn| {
///     conn.advisory_xact_lock("account/1").acquire().await?;
///     diesel::sql_query("UPDATE accounts SET balance = 0 WHERE id = 1").execute(conn).await?;
///     Ok::<(), dlock_diesel_async::Error>(())
/// }).await?; // free after COMMIT
/// # Ok(()) }
/// ```
///
/// # At REPEATABLE READ and SERIALIZABLE
///
/// The transaction sees what was committed when its first statement *started*, and if that is this lock, then that
/// was before the wait: it does not see what the previous holder did.
/// [`AdvisoryLock::transaction`](crate::AdvisoryLock::transaction) does.
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryXactLock<'c, C> {
    conn: &'c mut C,
    key: LockKey,
    mode: Mode,
    wait: Wait,
    cancel: Option<Cancel>,
}

impl<C> fmt::Debug for AdvisoryXactLock<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryXactLock")
            .field("key", &self.key)
            .field("mode", &self.mode)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}

impl<'c, C: LockConnection<Backend: TransactionLocks>> AdvisoryXactLock<'c, C> {
    pub(crate) fn new(conn: &'c mut C, key: LockKey) -> Self {
        Self {
            conn,
            key,
            mode: Mode::Exclusive,
            wait: Wait::default(),
            cancel: None,
        }
    }

    /// Asks for the lock together with other readers: see [`AdvisoryLock::shared`](crate::AdvisoryLock::shared).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.transaction(async |conn| conn.advisory_xact_lock("cache").shared().acquire().await).await?;
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        C::Backend: SharedLocks,
    {
        self.mode = Mode::Shared;
        self
    }

    /// Waits at most that long: see [`AdvisoryLock::timeout`](crate::AdvisoryLock::timeout). A timeout leaves the
    /// transaction as it was.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.transaction(async |conn| {
    ///     conn.advisory_xact_lock("account/1").timeout(Duration::from_secs(1)).acquire().await
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.wait.limit = Some(limit);
        self
    }

    /// Asks again at this interval: see [`AdvisoryLock::poll_every`](crate::AdvisoryLock::poll_every).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.transaction(async |conn| {
    ///     conn.advisory_xact_lock("account/1").poll_every(Duration::from_millis(50)).acquire().await
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.wait.poll = Some(interval);
        self
    }

    /// What cancels the wait when the future that waits is dropped: see
    /// [`AdvisoryLock::cancel_with`](crate::AdvisoryLock::cancel_with).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # use tokio_postgres::NoTls;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let token = conn.cancel_token();
    /// conn.transaction(async |conn| {
    ///     let lock = conn.advisory_xact_lock("account/1");
    ///     lock.cancel_with(async move { token.cancel_query(NoTls).await }).acquire().await
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub fn cancel_with<F>(mut self, cancel: F) -> Self
    where
        F: Future + Send + 'static,
    {
        self.cancel = Some(drive::cancel(cancel));
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
    /// assert_eq!(conn.advisory_xact_lock(42).key(), &LockKey::from(42));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Acquires the lock for the rest of the transaction, and waits until it is free.
    ///
    /// # Examples
    ///
    /// See [`AdvisoryXactLock`].
    ///
    /// # Errors
    ///
    /// - [`Error::NotInTransaction`] outside a transaction.
    /// - [`Error::Timeout`] after [`timeout`](Self::timeout). The transaction goes on, as it does after
    ///   [`Error::Deadlock`] and [`Error::Interrupted`].
    /// - [`Error::Database`] where the server refuses the lock without a wait; the transaction is aborted.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped while it asks, the lock may be held until the transaction ends. If it is dropped while it
    /// waits in the server's queue, the transaction cannot be committed any more and the connection counts as broken; the
    /// place in the queue, and the lock if it is granted, is free when the connection is closed, and with
    /// [`cancel_with`](Self::cancel_with) at once. Use [`timeout`](Self::timeout) instead.
    ///
    /// # Round trips
    ///
    /// 1 if the lock is free (once prepared), 2 if it is taken, 2 more after a timeout.
    pub async fn acquire(mut self) -> Result<(), Error> {
        let started = Instant::now();
        if self.take(self.wait).await? {
            return Ok(());
        }
        let server_key = DialectOf::<C>::key(&self.key)?;
        Err(drive::timeout(self.conn, self.key, &server_key, started.elapsed()).await)
    }

    /// Acquires the lock for the rest of the transaction if it is free: `false` if another connection has it.
    ///
    /// With [`timeout`](Self::timeout) it waits up to that limit first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::{AdvisoryLockExt, Error};
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// conn.transaction(async |conn| {
    ///     if conn.advisory_xact_lock("account/1").try_acquire().await? {
    ///         // .. it is ours until COMMIT ..
    ///     }
    ///     Ok::<(), Error>(())
    /// }).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), except that [`Error::Timeout`] is `false` here.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped while it asks, the lock may be held until the transaction ends. With
    /// [`timeout`](Self::timeout) see [`acquire`](Self::acquire).
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    #[must_use = "the lock may not have been acquired"]
    pub async fn try_acquire(mut self) -> Result<bool, Error> {
        let wait = match self.wait.limit {
            Some(_) => self.wait,
            None => Wait::TRY,
        };
        self.take(wait).await
    }

    /// Who holds the lock or waits for it now: see [`AdvisoryLock::holders`](crate::AdvisoryLock::holders).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let holders = conn.advisory_xact_lock("account/1").holders().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`], [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, nothing happens.
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let server_key = DialectOf::<C>::key(&self.key)?;
        drive::holders(self.conn, &server_key).await
    }

    async fn take(&mut self, wait: Wait) -> Result<bool, Error> {
        let server_key = DialectOf::<C>::key(&self.key)?;
        if session::depth(self.conn)?.is_none() {
            return Err(glue::not_in_transaction(&self.key));
        }
        let machine =
            DialectOf::<C>::acquire_in_transaction(&server_key, self.mode, wait, Fence::new());
        drive::drive(self.conn, machine, &self.key, self.cancel.take()).await
    }
}
