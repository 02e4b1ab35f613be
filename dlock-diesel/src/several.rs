use std::ops::DerefMut;

use dlock_core::LockKey;
use dlock_core::proto::Ask;

use crate::AdvisoryLock;
use crate::backend::LockConnection;

impl<M: DerefMut<Target: LockConnection>> AdvisoryLock<M> {
    /// Several locks that are taken and released as one, on a connection that it owns:
    /// [`advisory_locks`](crate::AdvisoryLockExt::advisory_locks) makes one that borrows the connection.
    ///
    /// After a failure, a timeout or a panic, none of them is held. While it waits for one, it keeps those before it in
    /// the order of the server (`docs/keys.md`), in which everybody takes them. So two callers cannot deadlock, and a
    /// request does not lose what it has got while it waits for the rest. A single lock that is taken while others are
    /// held has no such order.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::{PgConnection, r2d2::{ConnectionManager, Pool}}, dlock_diesel::AdvisoryLock};
    /// # fn example(pool: Pool<ConnectionManager<PgConnection>>) -> Result<(), Box<dyn std::error::Error>> {
    /// let both = AdvisoryLock::new_all(pool.get()?, [("stock", 1), ("stock", 2)]).acquire()?;
    /// std::thread::spawn(move || drop(both));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire), about the key that they name: [`Error::Timeout`](crate::Error::Timeout) and
    /// [`Error::Deadlock`](crate::Error::Deadlock) name the lock that was waited for,
    /// [`Error::NotHeld`](crate::Error::NotHeld) the first that was lost; the others are released. In addition:
    ///
    /// - [`Error::InvalidKey`](crate::Error::InvalidKey) for an empty list.
    /// - [`Error::TooManyLocks`](crate::Error::TooManyLocks) for more than 250 different keys, before anything is sent:
    ///   on PostgreSQL a full table of locks would fail all sessions.
    ///
    /// # Round trips
    ///
    /// If all are free, 1 to acquire and 1 to release, once prepared. For each that is taken, at most 3 more (MySQL and
    /// MariaDB: 4), and the turns of a long wait. After a timeout, 1 to give back what it had.
    /// [`transaction`](Self::transaction) takes 2 on PostgreSQL at READ COMMITTED, and 5 at the other levels. With
    /// [`inside_transaction`](Self::inside_transaction) on PostgreSQL, those of each lock.
    pub fn new_all(conn: M, keys: impl IntoIterator<Item: Into<LockKey>>) -> Self {
        Self::asking(conn, Ask::all(keys.into_iter().map(Into::into)))
    }

    /// The keys of all locks that are taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, dlock_diesel::*}; fn example(conn: &mut PgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_locks([1, 2]).keys().count(), 2);
    /// # Ok(()) }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        self.ask.keys()
    }
}
