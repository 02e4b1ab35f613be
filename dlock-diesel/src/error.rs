use std::time::{Duration, SystemTime};

use diesel::result::Error as DieselError;
use dlock_core::{Holder, InvalidKey, LockKey};

/// Why a lock could not be acquired, kept or released.
///
/// It converts into [`diesel::result::Error`] and back without loss. So `?` works in functions that return
/// [`QueryResult`](diesel::QueryResult), and closures for [`run`](crate::AdvisoryLock::run) and
/// [`transaction`](crate::AdvisoryLock::transaction) can return every error type that Diesel's own `transaction`
/// accepts.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel::prelude::*;
/// use dlock_diesel::{AdvisoryLockExt, Error};
///
/// # let mut conn = PgConnection::establish("")?;
/// match conn.advisory_lock(("billing", "report")).timeout(Duration::from_secs(1)).acquire() {
///     Ok(lock) => println!("it is ours: {lock:?}"),
///     Err(busy @ Error::Timeout { .. }) => println!("{busy}"), // it names the holder
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
/// dlock tells the variants apart by what servers do not translate: the error number on MySQL and MariaDB; on
/// PostgreSQL, where Diesel hides the SQLSTATE, by which fields an error has and by the client's clock. SQLite has no
/// number for a missing function and never translates its messages, so there the text counts.
///
/// PostgreSQL: if [`AdvisoryXactLock`](crate::AdvisoryXactLock) is cancelled before it has to wait, the error is
/// [`Database`](Self::Database), because the transaction is aborted and cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The limit passed before the lock was free. Nothing is held.
    #[error("lock {key} was not free within {waited:.1?}{}", held_by(.holders))]
    #[non_exhaustive]
    Timeout {
        /// The lock.
        key: LockKey,
        /// How long the wait lasted.
        waited: Duration,
        /// The sessions that held the lock or waited for it just after the limit had passed. Empty if the server shows
        /// none of them to this user.
        holders: Vec<Holder>,
    },

    /// The server found that this wait would never end. The connection keeps its other locks and its transaction.
    #[error("waiting for lock {key} is a deadlock: take locks in the same order everywhere")]
    #[non_exhaustive]
    Deadlock {
        /// The lock.
        key: LockKey,
        /// The server's error.
        source: DieselError,
    },

    /// Another session cancelled the wait (`pg_cancel_backend`, `KILL QUERY`). Nothing is held.
    #[error("waiting for lock {key} was interrupted")]
    #[non_exhaustive]
    Interrupted {
        /// The lock.
        key: LockKey,
        /// The server's error. MariaDB has none.
        source: Option<DieselError>,
    },

    /// The connection did not hold the lock when it was released or when a fencing token was drawn. Something released
    /// it, or a proxy gave the transaction to another session. Another holder may have worked at the same time.
    #[error("this connection does not hold lock {key}")]
    #[non_exhaustive]
    NotHeld {
        /// The lock.
        key: LockKey,
    },

    /// A transaction is open, so the lock would be free before COMMIT, and the next holder would not see the changes.
    ///
    /// dlock sees the transactions that Diesel opened. On PostgreSQL, a wait inside a transaction begun by a raw
    /// `BEGIN` that outlasts its first turn (0.9 seconds) aborts that transaction. Then `acquire` returns this error,
    /// and the session is ended.
    #[error(
        "lock {key} would be free before the open transaction commits: let the lock open the transaction, with \
         `advisory_lock(key).transaction(..)`, or on PostgreSQL take a lock that ends with it, with \
         `advisory_xact_lock(key)`; `inside_transaction()` allows the lock inside the transaction; a test may \
         begin with `begin_test_transaction`, which allows every lock"
    )]
    #[non_exhaustive]
    InTransaction {
        /// The lock.
        key: LockKey,
    },

    /// A transaction that was begun under the lock was left open. **Its changes are rolled back**, because a COMMIT
    /// without the lock would break exclusion. The lock is free.
    #[error(
        "a transaction begun under lock {key} was left open and has been rolled back: commit it before the lock is \
         released"
    )]
    #[non_exhaustive]
    TransactionLeftOpen {
        /// The lock.
        key: LockKey,
    },

    /// A lock that ends with the transaction was asked for, but no transaction is open.
    #[error(
        "lock {key} ends with the transaction, and none is open: open one first, with `conn.transaction(..)`, or let \
         the lock open it, with `advisory_lock(key).transaction(..)`"
    )]
    #[non_exhaustive]
    NotInTransaction {
        /// The lock.
        key: LockKey,
    },

    /// The server's table of locks is full. The locks of all sessions fail until some are released.
    ///
    /// Or [`advisory_locks`](crate::AdvisoryLockExt::advisory_locks) was given more than 250 different keys. That is
    /// refused before anything is sent, so that the table does not get full. `key` is the first one too many.
    #[error("{}", too_many(.key, .source))]
    #[non_exhaustive]
    TooManyLocks {
        /// The lock.
        key: LockKey,
        /// The server's error, or the limit.
        source: DieselError,
    },

    /// The server cannot take this key, for example because it is empty, or the list of keys is. Nothing was sent.
    #[error(transparent)]
    InvalidKey(#[from] InvalidKey),

    /// A lock would not exclude here. `source` says why: the server has no such locks; it is a standby, or a node of a
    /// Galera cluster, whose locks are its own; or on SQLite the connection was not made ready, the folder is not
    /// writable, or others do not see the lock file.
    #[error("lock {key} cannot be taken here")]
    #[non_exhaustive]
    Unsupported {
        /// The lock.
        key: LockKey,
        /// The server's error.
        source: DieselError,
    },

    /// The session has ended, or the connection to it: a restart, a failover, an idle limit, an administrator. Or the
    /// connection was marked broken before, for example because a future was dropped. The server has freed the lock, or
    /// will free it when the session ends. Another holder may be at work already.
    #[error(
        "lock {key} cannot be held on this connection: the session has ended, or the connection was marked broken; \
         drop the connection and acquire the lock on a new one"
    )]
    #[non_exhaustive]
    Lost {
        /// The lock.
        key: LockKey,
        /// The driver's error.
        source: DieselError,
    },

    /// A [`LockManager`](crate::LockManager) could not open a connection, or not within its lease, and has no other.
    #[error("no connection could be opened for lock {key}")]
    #[non_exhaustive]
    NotConnected {
        /// The lock.
        key: LockKey,
        /// The error of the closure that opens connections, or of the first statements on one that it opened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The [`LockManager`](crate::LockManager) is closed or dropped. Nothing is held.
    #[error("lock {key} was asked of a lock manager that is closed")]
    #[non_exhaustive]
    ManagerClosed {
        /// The lock.
        key: LockKey,
    },

    /// Any other error of the server, the connection or Diesel.
    #[error(transparent)]
    Database(DieselError),
}

impl Error {
    /// Finds dlock's error inside another error: a [`diesel::result::Error`], an error of the application, a boxed
    /// error or one of `anyhow`. It looks at the error itself and at its sources.
    ///
    /// # Examples
    ///
    /// A web service answers 409 if another session has the lock:
    ///
    /// ```
    /// use dlock_diesel::Error;
    ///
    /// fn status(error: &(dyn std::error::Error + 'static)) -> u16 {
    ///     match Error::find(error) {
    ///         Some(Error::Timeout { .. }) => 409,
    ///         _ => 500,
    ///     }
    /// }
    /// # let error = diesel::result::Error::NotFound;
    /// # assert_eq!(status(&error), 500);
    /// ```
    pub fn find<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Error> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Error>() {
                return Some(found);
            }
            if let Some(DieselError::QueryBuilderError(inner)) = error.downcast_ref() {
                if let Some(found) = inner.downcast_ref::<Error>() {
                    return Some(found);
                }
            }
            next = error.source();
        }
        None
    }
}

fn too_many(key: &LockKey, source: &DieselError) -> String {
    match source {
        DieselError::QueryBuilderError(_) => format!(
            "lock {key} is one too many to be taken together with the others: take one lock that stands for all of \
             them, or split the work"
        ),
        _ => format!(
            "lock {key} did not fit into the server's table of locks: release some, or raise \
             `max_locks_per_transaction`"
        ),
    }
}

/// What an operator needs at night: who has the lock, since when, and how to end that session.
fn held_by(holders: &[Holder]) -> String {
    let of = |granted| {
        holders
            .iter()
            .filter(move |holder| holder.granted == granted)
    };
    let names = |granted| {
        let names: Vec<_> = of(granted).map(Holder::to_string).collect();
        names.join(", ")
    };
    let Some(first) = of(true).next() else {
        return match names(false) {
            waiters if waiters.is_empty() => String::new(),
            waiters => format!(": waited for by {waiters}"),
        };
    };
    let since = first
        .since
        .map(|since| format!(", busy or idle since {}", utc(since)));
    let end = first
        .how_to_end()
        .map(|how| format!("; to end that session: {how}"));
    let (since, end) = (since.unwrap_or_default(), end.unwrap_or_default());
    format!(": held by {}{since}{end}", names(true))
}

/// The time as people read it, in UTC.
fn utc(time: SystemTime) -> String {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    // <https://howardhinnant.github.io/date_algorithms.html#civil_from_days>, after 1970.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Takes an [`Error`] that was converted before out of Diesel's error. Any other becomes [`Error::Database`].
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

/// [`Error::Database`] becomes the error inside. Every other variant becomes
/// [`QueryBuilderError`](DieselError::QueryBuilderError), Diesel's variant for any error, with the same message and
/// this error inside.
impl From<Error> for DieselError {
    fn from(error: Error) -> Self {
        match error {
            Error::Database(error) => error,
            error => DieselError::QueryBuilderError(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_people_read_it() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(at(1_709_251_199), "2024-02-29 23:59:59 UTC");
        assert_eq!(at(4_107_542_399), "2100-02-28 23:59:59 UTC");
        assert_eq!(at(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }
}
