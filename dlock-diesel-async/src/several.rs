use std::ops::DerefMut;

use dlock_core::proto::{Ask, Dialect};
use dlock_core::{Holder, LockKey};

use crate::backend::{DialectOf, LockConnection};
use crate::run::{self, refused};
use crate::{AdvisoryLock, Error};

impl<M: DerefMut<Target: LockConnection> + Send> AdvisoryLock<M> {
    /// Several locks that are taken and released as one, on a connection that it owns: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLock::new_all).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let both = AdvisoryLock::new_all(Box::new(conn), ["warehouse/1", "warehouse/2"]).acquire().await?;
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

/// Who holds one of these locks or waits for it, one lock after the other.
pub(crate) async fn holders<C: LockConnection>(
    conn: &mut C,
    key: &LockKey,
    more: &[LockKey],
) -> Result<Vec<Holder>, Error> {
    let mut holders = Vec::new();
    for key in std::iter::once(key).chain(more) {
        let machine = DialectOf::<C>::holders(key).map_err(|failure| refused(failure, key))?;
        holders.append(&mut run::ask(conn, machine, key).await?);
    }
    Ok(holders)
}
