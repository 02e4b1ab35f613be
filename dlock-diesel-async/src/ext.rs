use dlock_core::proto::Ask;
use dlock_core::{LockKey, Report};
use dlock_diesel::TransactionLocks;

use crate::backend::LockConnection;
use crate::{AdvisoryLock, AdvisorySemaphore, AdvisoryXactLock, Error, check};

/// Adds locks to async Diesel connections.
///
/// # Examples
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use diesel_async::{AsyncConnection, AsyncPgConnection};
/// use dlock_diesel_async::AdvisoryLockExt;
///
/// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
/// let lock = conn.advisory_lock(("billing", "user/001")).acquire().await?;
/// # Ok(()) }
/// ```
pub trait AdvisoryLockExt: LockConnection {
    /// A lock that the session holds until it is released. Nothing is sent before you [acquire](AdvisoryLock::acquire)
    /// it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_lock("text").acquire().await?.release().await?;
    /// conn.advisory_lock(42).acquire().await?.release().await?;
    /// conn.advisory_lock((1, 2)).acquire().await?.release().await?;
    /// let invoice = LockKey::namespaced("billing", "invoice/7");
    /// conn.advisory_lock(invoice).acquire().await?.release().await?;
    /// # Ok(()) }
    /// ```
    fn advisory_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryLock<&mut Self> {
        AdvisoryLock::new(self, key)
    }

    /// A semaphore: at most `permits` sessions hold it at once, over all processes and hosts. `permits` is from 1 to
    /// 1,000. Nothing is sent before you [acquire](AdvisorySemaphore::acquire) it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).acquire().await?;
    /// println!("working on GPU {}", inside.slot()); // 0, 1, 2 or 3
    /// inside.release().await?;
    /// # Ok(()) }
    /// ```
    fn advisory_semaphore(
        &mut self,
        key: impl Into<LockKey>,
        permits: u32,
    ) -> AdvisorySemaphore<&mut Self> {
        AdvisorySemaphore::new(self, key, permits)
    }

    /// Several locks that are taken and released as one: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLockExt::advisory_locks).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let accounts = conn.advisory_locks([("bank", "account/1"), ("bank", "account/2")]);
    /// accounts.transaction(async |_conn| Ok::<(), Error>(())).await?;
    /// # Ok(()) }
    /// ```
    fn advisory_locks(
        &mut self,
        keys: impl IntoIterator<Item: Into<LockKey>>,
    ) -> AdvisoryLock<&mut Self> {
        AdvisoryLock::new_all(self, keys)
    }

    /// Several locks that end with the open transaction, taken as one: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLockExt::advisory_xact_locks). PostgreSQL only.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// use diesel_async::AsyncConnection;
    /// conn.transaction(async |conn| conn.advisory_xact_locks([1, 2]).acquire().await).await?;
    /// # Ok(()) }
    /// ```
    fn advisory_xact_locks(
        &mut self,
        keys: impl IntoIterator<Item: Into<LockKey>>,
    ) -> AdvisoryXactLock<'_, Self>
    where
        Self::Backend: TransactionLocks,
    {
        AdvisoryXactLock::asking(self, Ask::all(keys.into_iter().map(Into::into)))
    }

    /// A lock that ends with the open transaction. PostgreSQL only.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// use diesel_async::AsyncConnection;
    /// conn.transaction(async |conn| conn.advisory_xact_lock(("bank", "account/1")).acquire().await).await?;
    /// # Ok(()) }
    /// ```
    fn advisory_xact_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryXactLock<'_, Self>
    where
        Self::Backend: TransactionLocks,
    {
        AdvisoryXactLock::asking(self, Ask::new(key.into()))
    }

    /// Looks for what would keep locks on this connection from excluding, or from being kept: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLockExt::check_advisory_locks).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// println!("{}", conn.check_advisory_locks().await?); // one line if all is well
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Nothing stays held. On MySQL and MariaDB the connection is marked broken.
    fn check_advisory_locks(&mut self) -> impl Future<Output = Result<Report, Error>> + Send {
        check::check(self)
    }
}

impl<C: LockConnection> AdvisoryLockExt for C {}
