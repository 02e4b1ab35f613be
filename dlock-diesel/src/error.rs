use std::time::Duration;

use diesel::result::Error as DieselError;
use dlock_core::{Holder, InvalidKey, LockKey};

/// Why a lock could not be acquired, kept or released.
///
/// # Examples
///
/// Busy is an error only where a limit was asked for:
///
/// ```no_run
/// use std::time::Duration;
/// use diesel::prelude::*;
/// use dlock_diesel::{AdvisoryLockExt, Error};
///
/// # let mut conn = PgConnection::establish("")?;
/// match conn.advisory_lock("report").timeout(Duration::from_secs(1)).acquire() {
///     Ok(lock) => println!("it is ours: {lock:?}"),
///     Err(Error::Timeout { holders, .. }) => println!("somebody else is at it: {holders:?}"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// It converts into [`diesel::result::Error`], so that `?` works in functions that return
/// [`QueryResult`](diesel::QueryResult), and back again without a loss:
///
/// ```
/// use dlock_diesel::{Error, LockKey};
///
/// # #[cfg(feature = "postgres")] {
/// let invalid = LockKey::from("").to_postgres().unwrap_err();
/// let error: diesel::result::Error = Error::from(invalid).into();
/// assert!(matches!(Error::from(error), Error::InvalidKey(_)));
/// # }
/// ```
///
/// # Backend differences
///
/// The kinds are told apart by SQLSTATE and error number, never by the text of a message, which servers translate. An
/// error that a lock gets inside an open PostgreSQL transaction without waiting is [`Database`](Self::Database)
/// whatever its cause, for Diesel does not tell its SQLSTATE and the aborted transaction cannot be asked. SQLite has no
/// number of its own for a function that is missing, and never translates its messages: there the text tells.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The limit passed before the lock was free.
    #[error("lock {key} was not free within {waited:.1?}{}", held_by(.holders))]
    #[non_exhaustive]
    Timeout {
        /// The lock.
        key: LockKey,
        /// How long it was waited for.
        waited: Duration,
        /// Who held the lock or waited for it just after the limit had passed, as far as the server lets this user
        /// see it: it may be empty.
        holders: Vec<Holder>,
    },

    /// The server found that this wait would never end. Other locks of the connection are still held, and so is its
    /// transaction.
    #[error("waiting for lock {key} is a deadlock: take locks in the same order everywhere")]
    #[non_exhaustive]
    Deadlock {
        /// The lock.
        key: LockKey,
        /// What the server said.
        source: DieselError,
    },

    /// Somebody cancelled the wait (`pg_cancel_backend`, `KILL QUERY`).
    #[error("waiting for lock {key} was interrupted")]
    #[non_exhaustive]
    Interrupted {
        /// The lock.
        key: LockKey,
        /// What the server said. MariaDB says nothing.
        source: Option<DieselError>,
    },

    /// The connection did not hold the lock any more when it was to be released: something else released it, or there
    /// is a proxy that hands each transaction to another session. Other holders may have been at work meanwhile.
    #[error("lock {key} was not held any more when it was released")]
    #[non_exhaustive]
    NotHeld {
        /// The lock.
        key: LockKey,
    },

    /// A session's lock was asked for inside an open transaction, or released inside one that was begun under it: it
    /// would be free before COMMIT, and the next holder would not see what this one did.
    #[error(
        "lock {key} would be free before the open transaction commits: let the lock open the transaction, with \
         `advisory_lock(key).transaction(..)`, or on PostgreSQL take a lock that ends with it, with \
         `advisory_xact_lock(key)`; `inside_transaction()` allows it all the same"
    )]
    #[non_exhaustive]
    InTransaction {
        /// The lock.
        key: LockKey,
    },

    /// A transaction's lock outside a transaction: nothing would hold it.
    #[error(
        "lock {key} ends with the transaction, and none is open: open one first, with `conn.transaction(..)`, or let \
         the lock open it, with `advisory_lock(key).transaction(..)`"
    )]
    #[non_exhaustive]
    NotInTransaction {
        /// The lock.
        key: LockKey,
    },

    /// The server's table of locks is full: until some are released everybody else's locks fail, too.
    #[error(
        "lock {key} did not fit into the server's table of locks: release some, or raise `max_locks_per_transaction`"
    )]
    #[non_exhaustive]
    TooManyLocks {
        /// The lock.
        key: LockKey,
        /// What the server said.
        source: DieselError,
    },

    /// The server cannot take this key. Nothing was sent.
    #[error(transparent)]
    InvalidKey(#[from] InvalidKey),

    /// There are no such locks here. The message says why: the server has none, or on SQLite the connection was not made
    /// ready for them, or its folder cannot be written to.
    #[error("lock {key} cannot be taken here: {source}")]
    #[non_exhaustive]
    Unsupported {
        /// The lock.
        key: LockKey,
        /// What the server said.
        source: DieselError,
    },

    /// Any other error of the server, the connection or Diesel.
    #[error(transparent)]
    Database(DieselError),
}

fn held_by(holders: &[Holder]) -> String {
    let names = |granted| {
        let names: Vec<_> = holders
            .iter()
            .filter(|holder| holder.granted == granted)
            .map(Holder::to_string)
            .collect();
        names.join(", ")
    };
    match (names(true), names(false)) {
        (holders, _) if !holders.is_empty() => format!(": held by {holders}"),
        (_, waiters) if !waiters.is_empty() => format!(": waited for by {waiters}"),
        _ => String::new(),
    }
}

/// Takes an [`Error`] that was converted before out again.
impl From<DieselError> for Error {
    fn from(error: DieselError) -> Self {
        match error {
            DieselError::QueryBuilderError(inner) => match inner.downcast() {
                Ok(error) => *error,
                Err(inner) => Error::Database(DieselError::QueryBuilderError(inner)),
            },
            error => Error::Database(error),
        }
    }
}

/// [`Error::Database`] becomes the error inside. The others become [`QueryBuilderError`](DieselError::QueryBuilderError),
/// the variant of Diesel that takes any error, with the same message and this error inside.
impl From<Error> for DieselError {
    fn from(error: Error) -> Self {
        match error {
            Error::Database(error) => error,
            error => DieselError::QueryBuilderError(Box::new(error)),
        }
    }
}
