use dlock_core::LockKey;

use crate::backend::{LockConnection, TransactionLocks};
use crate::{AdvisoryLock, AdvisoryXactLock};

/// Locks for Diesel connections.
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
pub trait AdvisoryLockExt: LockConnection + Sized {
    /// A lock that the session holds until it is released. Nothing is sent before it is
    /// [acquired](AdvisoryLock::acquire).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let mut text = conn.advisory_lock("text").acquire()?;
    /// let mut number = text.advisory_lock(42).acquire()?; // one more, on the same connection
    /// let mut pair = number.advisory_lock((1, 2)).acquire()?;
    /// let invoice = pair.advisory_lock(LockKey::namespaced("billing", "invoice/7")).acquire()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn advisory_lock(&mut self, key: impl Into<LockKey>) -> AdvisoryLock<&mut Self> {
        AdvisoryLock::new(self, key)
    }

    /// A lock that ends with the transaction that is open. PostgreSQL only.
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
        Self::Backend: TransactionLocks,
    {
        AdvisoryXactLock::new(self, key.into())
    }
}

impl<C: LockConnection> AdvisoryLockExt for C {}
