use std::fmt;
use std::time::{Duration, SystemTime};

use crate::Mode;

/// A session that holds a lock or waits for it, as far as the server shows it to this user.
///
/// It describes the moment of the question. The session may have released the lock since.
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
/// - PostgreSQL: without the role `pg_read_all_stats`, the times of other users' holders are missing
///   (<https://www.postgresql.org/docs/current/monitoring-stats.html>). The times of waiting sessions are there.
/// - MySQL: waiting sessions are listed only with SELECT on `performance_schema`. The user and the time of other users'
///   sessions need the PROCESS privilege
///   (<https://dev.mysql.com/doc/refman/8.4/en/information-schema-processlist-table.html>).
/// - MariaDB: waiting sessions are listed only if the server runs with `performance_schema=ON` and the instrument
///   `wait/lock/metadata/sql/mdl`, which is off by default. Locks that were taken before it was switched on do not
///   appear. The privileges are those of MySQL.
/// - SQLite: connections of this process are reported in full. Other processes are reported only on Linux, only if this
///   user can read their `/proc` entry, and without times. Their waiting sessions always appear as exclusive. A process
///   that cannot be identified is `0 (another process)`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Holder {
    /// PostgreSQL: the process id of the backend. MySQL and MariaDB: the connection id. SQLite: the process id of the
    /// program.
    pub backend_id: i64,
    /// PostgreSQL: the session's `application_name`. SQLite: the name of the program.
    pub application_name: Option<String>,
    /// The database user.
    pub user: Option<String>,
    /// How the session holds the lock or asks for it.
    pub mode: Mode,
    /// `true` for a holder, `false` for a waiting session.
    pub granted: bool,
    /// For a waiting session: when its wait began. On PostgreSQL, a long wait begins anew with each of its turns.
    ///
    /// For a holder: when its transaction began or, outside a transaction, when its session last changed from busy to
    /// idle or back. Servers do not record when a lock was taken. SQLite: when the lock was taken.
    ///
    /// The clock is the server's.
    pub since: Option<SystemTime>,
    pub(crate) server: Option<ServerKind>,
}

/// What the number of a session is a number of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ServerKind {
    Postgres,
    Mysql,
    Sqlite,
}

/// All but the server, which is the same for all holders of a lock.
impl PartialEq for Holder {
    fn eq(&self, other: &Self) -> bool {
        let parts = |holder: &Self| (holder.backend_id, holder.mode, holder.granted, holder.since);
        parts(self) == parts(other)
            && self.application_name == other.application_name
            && self.user == other.user
    }
}

impl Eq for Holder {}

impl Holder {
    /// Makes a holder from the columns that a server answers with: the backend id, the application's name, the user, 1
    /// if exclusive, 1 if granted, and microseconds since the Unix epoch.
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
            server: None,
        }
    }

    /// The same holder, of a lock on such a server.
    pub(crate) fn on(mut self, server: ServerKind) -> Self {
        self.server = Some(server);
        self
    }

    /// For people: the statement that ends this session, or on SQLite the command that ends its process. That frees the
    /// lock. `None` if nobody knows the session, or if it is one of this process on SQLite.
    ///
    /// # Examples
    ///
    /// ```
    /// fn print(holder: &dlock_core::Holder) {
    ///     if let Some(how) = holder.how_to_end() {
    ///         println!("{holder} has the lock. To end it: {how}"); // SELECT pg_terminate_backend(4711)
    ///     }
    /// }
    /// ```
    pub fn how_to_end(&self) -> Option<String> {
        let id = self.backend_id;
        match self.server? {
            _ if id == 0 => None,
            ServerKind::Sqlite if id == i64::from(std::process::id()) => None,
            ServerKind::Postgres => Some(format!("SELECT pg_terminate_backend({id})")),
            ServerKind::Mysql => Some(format!("KILL {id}")),
            ServerKind::Sqlite => Some(format!("kill {id}")),
        }
    }
}

/// The backend id, and in parentheses the application's name or else the user, as in `4711 (billing)` or
/// `4711 (user test)`.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.backend_id)?;
        match (&self.application_name, &self.user) {
            (Some(name), _) => write!(f, " ({name})"),
            (None, Some(user)) => write!(f, " (user {user})"),
            (None, None) => Ok(()),
        }
    }
}
