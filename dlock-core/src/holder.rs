use std::fmt;
use std::time::{Duration, SystemTime};

use crate::Mode;

/// A session that holds a lock or waits for it, as far as the server lets this user see it.
///
/// # Examples
///
/// ```
/// use dlock_core::{Holder, Mode};
///
/// let holder = Holder::from_columns(4711, Some("billing".into()), None, 1, 1, None);
/// assert_eq!(holder.backend_id, 4711);
/// assert_eq!(holder.mode, Mode::Exclusive);
/// assert!(holder.granted);
/// assert_eq!(holder.to_string(), "4711 (billing)");
/// ```
///
/// # Backend differences
///
/// - PostgreSQL: sessions of other users show no times, except since when they wait, unless this user has
///   `pg_read_all_stats` (<https://www.postgresql.org/docs/current/monitoring-stats.html>).
/// - MySQL: who waits is seen with SELECT on `performance_schema.metadata_locks`; without it, and on MariaDB without
///   the `metadata_lock_info` plugin, only the holder is. The other fields need the PROCESS privilege for sessions of
///   other users (<https://dev.mysql.com/doc/refman/8.4/en/information-schema-processlist-table.html>).
/// - SQLite: connections of this process are told with the time, to which process they belong and how they hold or want
///   the lock. Of other processes, on Linux those that this user may look at (`/proc`) are told, without times, and who
///   waits among them as if exclusively; another one is `0 (another process)`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// PostgreSQL: the process id of the backend. MySQL: the connection id. SQLite: the id of the process whose connection
    /// it is.
    pub backend_id: i64,
    /// PostgreSQL: the session's `application_name`. SQLite: the program's name.
    pub application_name: Option<String>,
    /// The database user.
    pub user: Option<String>,
    /// How the lock is held or asked for.
    pub mode: Mode,
    /// Whether the session holds the lock; otherwise it waits for it.
    pub granted: bool,
    /// For a waiter, when its wait began. For a holder, when its transaction began or, outside a transaction, when
    /// its session last changed from busy to idle or back: servers do not record when a lock was taken. By the
    /// server's clock. On SQLite, when the lock was taken.
    pub since: Option<SystemTime>,
}

impl Holder {
    /// A holder from the columns of [`Dialect::holders`](crate::Dialect::holders), in their order: backend id,
    /// application name, user, 1 if exclusive, 1 if granted, microseconds since the Unix epoch.
    pub fn from_columns(
        backend_id: i64,
        application_name: Option<String>,
        user: Option<String>,
        exclusive: i64,
        granted: i64,
        since: Option<i64>,
    ) -> Self {
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        Self {
            backend_id,
            application_name: filled(application_name),
            user: filled(user),
            mode: if exclusive == 1 {
                Mode::Exclusive
            } else {
                Mode::Shared
            },
            granted: granted == 1,
            since: since
                .and_then(|micros| u64::try_from(micros).ok())
                .map(|micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros)),
        }
    }
}

/// The backend id and, in parentheses, the application name or else the user.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.backend_id)?;
        match self.application_name.as_ref().or(self.user.as_ref()) {
            Some(name) => write!(f, " ({name})"),
            None => Ok(()),
        }
    }
}
