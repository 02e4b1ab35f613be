use std::fmt;
use std::time::Duration;

use dlock_core::proto::{Ask, TransactionDialect};
use dlock_core::{FencingToken, Holder, LockKey, Mode};

use crate::backend::{DialectOf, LockConnection, SharedLocks, TransactionLocks};
use crate::transaction::lock_transaction;
use crate::{Error, holders, run};

/// A lock that is not held yet, and that will end with the open transaction: at COMMIT, at ROLLBACK, or at ROLLBACK TO
/// a savepoint before it. There is nothing to release.
///
/// [`AdvisoryLockExt::advisory_xact_lock`](crate::AdvisoryLockExt::advisory_xact_lock) makes one.
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// let mut conn = PgConnection::establish("postgres://localhost/app")?;
/// conn.transaction(|conn| {
///     conn.advisory_xact_lock(("bank", "account/1")).acquire()?;
///     diesel::sql_query("UPDATE accounts SET balance = 0 WHERE id = 1").execute(conn)
/// })?; // free after COMMIT
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # At REPEATABLE READ and SERIALIZABLE
///
/// The transaction sees what was committed when its first statement *started*. If that statement is this lock, it does
/// not see what the previous holder committed during the wait.
/// [`AdvisoryLock::transaction`](crate::AdvisoryLock::transaction) does.
#[must_use = "a lock does nothing until it is acquired"]
pub struct AdvisoryXactLock<'c, C> {
    conn: &'c mut C,
    ask: Ask,
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
        Self { conn, ask }
    }

    /// Asks for the lock together with other readers: see [`AdvisoryLock::shared`](crate::AdvisoryLock::shared).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| conn.advisory_xact_lock(("billing", "cache")).shared().acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn shared(mut self) -> Self
    where
        C::Backend: SharedLocks,
    {
        self.ask.mode = Mode::Shared;
        self
    }

    /// Limits the wait: see [`AdvisoryLock::timeout`](crate::AdvisoryLock::timeout). After a timeout the transaction
    /// goes on.
    ///
    /// A `transaction_timeout` counts the whole wait, because it is your limit for the transaction.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let limit = std::time::Duration::from_secs(1);
    /// conn.transaction(|conn| conn.advisory_xact_lock(("bank", "account/1")).timeout(limit).acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval: see [`AdvisoryLock::poll_every`](crate::AdvisoryLock::poll_every). Each try is 1 round
    /// trip.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let interval = std::time::Duration::from_millis(50);
    /// conn.transaction(|conn| conn.advisory_xact_lock(("bank", "account/1")).poll_every(interval).acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// The key of the lock. Of several, the one that was named first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// assert_eq!(conn.advisory_xact_lock(42).key(), &LockKey::from(42));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// The keys of all locks that are taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::AdvisoryLockExt;
    /// # let mut conn = PgConnection::establish("")?;
    /// assert_eq!(conn.advisory_xact_locks([1, 2]).keys().count(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        self.ask.keys()
    }

    /// Acquires the lock for the rest of the transaction. Waits until it is free. The wait
    /// [breathes](crate#waiting-on-postgresql) as far as an open transaction lets it.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| conn.advisory_xact_lock(("bank", "account/1")).acquire())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotInTransaction`] outside a transaction.
    /// - [`Error::Timeout`] after [`timeout`](Self::timeout). The transaction goes on, as it does after
    ///   [`Error::Deadlock`], and after [`Error::Interrupted`] of a wait.
    /// - [`Error::TooManyLocks`], [`Error::Unsupported`], [`Error::Lost`], [`Error::Database`]. If the first try fails,
    ///   the transaction is aborted.
    ///
    /// # Round trips
    ///
    /// 1 if the lock is free, once prepared, and 2 if it is taken. In a long wait, 1 after the first turn and 3 for
    /// each further turn. After a timeout, 1 to undo the wait and 1 to name the holders (4 in all).
    pub fn acquire(self) -> Result<(), Error> {
        lock_transaction(self.conn, &self.ask).map(drop)
    }

    /// Acquires the lock for the rest of the transaction if it is free. `false`: another connection has it.
    ///
    /// With [`timeout`](Self::timeout) it waits up to that limit first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.transaction(|conn| {
    ///     if conn.advisory_xact_lock(("bank", "account/1")).try_acquire()? {
    ///         // .. it is ours until COMMIT ..
    ///     }
    ///     Ok::<(), Error>(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`acquire`](Self::acquire), but `false` instead of [`Error::Timeout`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared. With a [`timeout`](Self::timeout), those of [`acquire`](Self::acquire) without the question
    /// for the holders.
    #[must_use = "the lock may not have been acquired"]
    pub fn try_acquire(self) -> Result<bool, Error> {
        Ok(lock_transaction(self.conn, &self.ask.as_try())?.is_some())
    }

    /// Draws a fencing token, if the session holds this lock: see
    /// [`AdvisoryLockGuard::fencing_token`](crate::AdvisoryLockGuard::fencing_token). It does not acquire the lock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// conn.advisory_lock(("billing", "report")).transaction(|conn| {
    ///     let token = conn.advisory_xact_lock(("billing", "report")).fencing_token()?;
    ///     println!("working with {token}");
    ///     Ok::<_, Error>(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if the session does not hold the lock, in the mode that was asked for. The transaction goes
    /// on. [`Error::InvalidKey`], [`Error::Lost`], [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        let key = &self.ask.key;
        let machine = DialectOf::<C>::fencing_token_in_transaction(&self.ask);
        run::run(
            self.conn,
            machine.map_err(|failure| run::refused(failure, key))?,
            key,
        )
    }

    /// Lists the sessions that hold the lock or wait for it: see
    /// [`AdvisoryLock::holders`](crate::AdvisoryLock::holders).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use diesel::prelude::*;
    /// # use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
    /// # let mut conn = PgConnection::establish("")?;
    /// let holders = conn.advisory_xact_lock(("bank", "account/1")).holders()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`], [`Error::Lost`], [`Error::Database`].
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_locks(self.conn, &self.ask.key, &self.ask.more)
    }
}
