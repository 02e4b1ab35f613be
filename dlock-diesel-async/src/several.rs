use std::ops::DerefMut;

use dlock_core::LockKey;
use dlock_core::proto::Ask;

use crate::AdvisoryLock;
use crate::backend::LockConnection;

impl<M: DerefMut<Target: LockConnection> + Send> AdvisoryLock<M> {
    /// Several locks that are taken and released as one, on a connection that it owns: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::new_all).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let both = AdvisoryLock::new_all(Box::new(conn), [("stock", 1), ("stock", 2)]).acquire().await?;
    /// both.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn new_all(conn: M, keys: impl IntoIterator<Item: Into<LockKey>>) -> Self {
        Self::asking(conn, Ask::all(keys.into_iter().map(Into::into)), None)
    }

    /// The keys of all locks that are taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_locks([1, 2]).keys().count(), 2);
    /// # Ok(()) }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        self.ask.keys()
    }
}
