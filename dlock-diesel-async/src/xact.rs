use std::fmt;
use std::time::Duration;

use dlock_core::proto::{Ask, TransactionDialect};
use dlock_core::{FencingToken, Holder, LockKey, Mode};
use dlock_diesel::{SharedLocks, TransactionLocks};

use crate::backend::{Cancel, DialectOf, LockConnection};
use crate::transaction::lock_transaction;
use crate::{Error, cancel, holders, run};

/// A lock that is not held yet, and that will end with the open transaction: the async form of
/// [`dlock_diesel::AdvisoryXactLock`].
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
///     conn.advisory_xact_lock(("bank", "account/1")).acquire().await?;
///     diesel::sql_query("UPDATE accounts SET balance = 0 WHERE id = 1").execute(conn).await?;
///     Ok::<(), dlock_diesel_async::Error>(())
/// }).await?; // free after COMMIT
/// # Ok(()) }
/// ```
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryXactLock<'c, C> {
    conn: &'c mut C,
    ask: Ask,
    cancel: Option<Cancel>,
}

impl<C> fmt::Debug for AdvisoryXactLock<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryXactLock")
            .field("ask", &self.ask)
            .finish_non_exhaustive()
    }
}

impl<'c, C: LockConnection<Backend: TransactionLocks>> AdvisoryXactLock<'c, C> {
    pub(crate) fn asking(conn: &'c mut C, ask: Ask) -> Self {
        Self {
            conn,
            ask: Ask {
                droppable: true,
                ..ask
            },
            cancel: None,
        }
    }

    /// Asks for the lock together with other readers: see [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::shared).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.transaction(async |conn| conn.advisory_xact_lock(("billing", "cache")).shared().acquire().await).await?;
    /// # Ok(()) }
    /// ```
    pub fn shared(mut self) -> Self
    where
        C::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait: see [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::timeout). After a timeout the transaction
    /// goes on.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let limit = std::time::Duration::from_secs(1);
    /// conn.transaction(async |conn| {
    ///     conn.advisory_xact_lock(("bank", "account/1")).timeout(limit).acquire().await
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval and sleeps in between: see [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::poll_every).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let interval = std::time::Duration::from_millis(50);
    /// conn.transaction(async |conn| {
    ///     conn.advisory_xact_lock(("bank", "account/1")).poll_every(interval).acquire().await
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// Sets what cancels the wait if its future is dropped: see
    /// [`AdvisoryLock::cancel_with`](crate::AdvisoryLock::cancel_with).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let token = conn.cancel_token();
    /// conn.transaction(async |conn| {
    ///     let cancel = async move { token.cancel_query(tokio_postgres::NoTls).await };
    ///     conn.advisory_xact_lock(("bank", "account/1")).cancel_with(cancel).acquire().await
    /// }).await?;
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
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_xact_lock(42).key(), &LockKey::from(42));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// The keys of all locks that are taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_xact_locks([1, 2]).keys().count(), 2);
    /// # Ok(()) }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        self.ask.keys()
    }

    /// Acquires the lock for the rest of the transaction. Waits until it is free: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::acquire). It takes 1 round trip if the lock is free, once
    /// prepared, 2 if it is taken, and 4 after a timeout.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.transaction(async |conn| conn.advisory_xact_lock(("bank", "account/1")).acquire().await).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped during the first try, the transaction can go on, and may hold the lock. If it is
    /// dropped while it waits, the connection is marked broken, and the lock or the place in the queue is free when the
    /// connection is closed. [`cancel_with`](Self::cancel_with) ends the wait at once. Prefer
    /// [`timeout`](Self::timeout).
    pub async fn acquire(self) -> Result<(), Error> {
        lock_transaction(self.conn, &self.ask, self.cancel)
            .await
            .map(drop)
    }

    /// Acquires the lock for the rest of the transaction if it is free, otherwise returns `false`: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::try_acquire). 1 round trip, once prepared. Cancel safety is
    /// that of [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.transaction(async |conn| {
    ///     if conn.advisory_xact_lock(("bank", "account/1")).try_acquire().await? {
    ///         // .. it is ours until COMMIT ..
    ///     }
    ///     Ok::<(), Error>(())
    /// }).await?;
    /// # Ok(()) }
    /// ```
    #[must_use = "the lock may not have been acquired"]
    pub async fn try_acquire(self) -> Result<bool, Error> {
        let granted = lock_transaction(self.conn, &self.ask.as_try(), self.cancel).await?;
        Ok(granted.is_some())
    }

    /// Draws a fencing token, if the session holds this lock: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::fencing_token). If the future is dropped, a number may be
    /// skipped.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_lock(("billing", "report")).transaction(async |conn| {
    ///     let token = conn.advisory_xact_lock(("billing", "report")).fencing_token().await?;
    ///     println!("working with {token}");
    ///     Ok::<_, Error>(())
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub async fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        let key = &self.ask.key;
        let machine = DialectOf::<C>::fencing_token_in_transaction(&self.ask);
        run::ask(
            self.conn,
            machine.map_err(|failure| run::refused(failure, key))?,
            key,
        )
        .await
    }

    /// Lists the sessions that hold the lock or wait for it: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryXactLock::holders). 1 round trip, once prepared. If the future is
    /// dropped, nothing happens.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel_async::AsyncConnection, dlock_diesel_async::*};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let holders = conn.advisory_xact_lock(("bank", "account/1")).holders().await?;
    /// # Ok(()) }
    /// ```
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_locks(self.conn, &self.ask.key, &self.ask.more).await
    }
}
