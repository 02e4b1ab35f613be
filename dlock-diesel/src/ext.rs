use diesel::connection::Connection;
use dlock_core::LockKey;

use crate::backend::{LockConnection, TransactionLocks};
use crate::{AdvisoryLock, AdvisoryXactLock};

/// Adds locks to Diesel connections.
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = PgConnection::establish("postgres://localhost/app")?;
/// let lock = conn.advisory_lock("user/001").acquire()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait AdvisoryLockExt: Connection + Sized {
    /// A lock that the session holds until it is released. Nothing is sent before you [acquire](AdvisoryLock::acquire)
    /// it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut text = conn.advisory_lock("text").acquire()?;
    /// let mut number = text.advisory_lock(42).acquire()?; // a second lock, on the same connection
    /// let mut pair = number.advisory_lock((1, 2)).acquire()?;
    /// let invoice = pair.advisory_lock(LockKey::namespaced("billing", "invoice/7")).acquire()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryLock<&mut Self>
    where
        Self: LockConnection,
    {
        AdvisoryLock::new(self, key)
    }

    /// A lock that ends with the open transaction. PostgreSQL only.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| conn.advisory_xact_lock("account/1").acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_xact_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryXactLock<'_, Self>
    where
        Self: LockConnection<Backend: TransactionLocks>,
    {
        AdvisoryXactLock::new(self, key.into())
    }
}

// All connections have the methods. So a connection without locks gets the compile error of [`LockConnection`], which
// says what to do, instead of "no method named `advisory_lock`".
impl<C: Connection> AdvisoryLockExt for C {}
