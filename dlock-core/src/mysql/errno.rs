//! What the number of an error means.

use super::sql::Limit;
use crate::proto::{Cause, Reason};

/// `None` if the limit of the statement passed.
///
/// <https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html>,
/// <https://mariadb.com/kb/en/mariadb-error-code-reference/>
pub(super) fn reason(errno: Option<i64>, limit: Limit) -> Option<Reason> {
    Some(match errno {
        // ER_QUERY_TIMEOUT; ER_STATEMENT_TIMEOUT is MariaDB's. A try has no limit of its own.
        Some(3024 | 1969) if limit != Limit::Try => return None,
        // ER_USER_LOCK_DEADLOCK; ER_LOCK_DEADLOCK is MariaDB's.
        Some(3058 | 1213) => Reason::Deadlock,
        // ER_SP_DOES_NOT_EXIST: no function GET_LOCK. ER_NOT_SUPPORTED_YET, and MatrixOne's number for it.
        // ER_UNKNOWN_ERROR: Percona XtraDB Cluster, whose strict mode refuses GET_LOCK.
        Some(1305 | 1235 | 20105 | 1105) => Reason::Unsupported,
        // ER_TOO_LONG_IDENT: no key is that long, so it is a node of a cluster.
        Some(1059) => Reason::Cluster,
        // ER_USER_LOCK_WRONG_NAME, and its number since MySQL 9.
        Some(3057 | 4163) => Reason::WrongName,
        // ER_UNKNOWN_SYSTEM_VARIABLE
        Some(1193) => Reason::UnknownVariable,
        // ER_QUERY_INTERRUPTED
        Some(1317) => Reason::Interrupted,
        _ => Reason::Database,
    })
}

/// What is known of a request that failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The session has kept the error's number, which says what went wrong.
    Kept(Cause),
    /// There was no error, but an answer of another kind.
    Strange,
    /// The statement that keeps the number has failed, too. If the next question also fails, it is another engine, or
    /// the session is gone: drivers do not report a lost connection as one.
    Silent(Cause),
}

impl Fault {
    /// Whether it tells if the lock was asked for. With `max_error_count = 0` MySQL keeps no number.
    pub(super) fn tells(&self, errno: Option<i64>) -> bool {
        match self {
            Fault::Kept(_) => errno.is_some(),
            Fault::Strange => true,
            Fault::Silent(_) => false,
        }
    }

    /// `None` if the limit passed.
    pub(super) fn read(self, errno: Option<i64>, limit: Limit) -> Option<(Reason, Cause)> {
        match self {
            Fault::Kept(cause) => reason(errno, limit).map(|reason| (reason, cause)),
            Fault::Strange => Some((Reason::Database, Cause::default())),
            Fault::Silent(cause) => Some((Reason::Database, cause)),
        }
    }
}
