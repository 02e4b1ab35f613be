//! The SQL text of MySQL's and MariaDB's locks. `/*M! .. */` is read by MariaDB alone.

use crate::{Piece, Statement};

/// The lock's name as a bind: bytes, so that the client's character set has no say.
fn name(key: &str) -> Piece {
    Piece::Binary(key.as_bytes().to_vec())
}

fn call(before: &'static str, key: &str, after: &'static str) -> Statement {
    Statement::cached(vec![before.into(), name(key), after.into()])
}

/// Asks without waiting: 1, 0 where another session has the lock, and [`CAPPED`] where another session has it and
/// MariaDB's `max_statement_time` would cut a wait short.
pub(super) fn try_lock(key: &str) -> Statement {
    call(
        "SELECT CASE GET_LOCK(CONVERT(",
        key,
        " USING utf8mb4), 0) WHEN 1 THEN 1 WHEN 0 THEN 0 /*M! - (@@max_statement_time > 0) */ END",
    )
}

/// The third answer of [`try_lock`].
pub(super) const CAPPED: i64 = -1;

/// Takes the cap off, for the wait. A `SET STATEMENT max_statement_time = 0 FOR` would be simpler, but has no effect
/// on a prepared statement (10.11).
pub(super) const UNCAP: &str =
    "SET @dlock_max_statement_time = @@max_statement_time, SESSION max_statement_time = 0";

/// Puts the cap back on.
pub(super) const RECAP: &str = "SET SESSION max_statement_time = @dlock_max_statement_time";

/// Waits in the server's queue: 1 or 0.
///
/// MySQL rounds timeouts to whole seconds, so there it is the statement's own limit that counts (and that overrides
/// the session's `max_execution_time`, which a limit of 0 would not: 9.7); MariaDB ignores that hint and takes
/// fractions. A negative timeout would wait for ever on MySQL and not at all on MariaDB, so waits without a limit are
/// the longest that both take.
///
/// The statement is not kept: MySQL reports a wait that failed after it has begun to answer, and MariaDB's Connector/C
/// (3.3) then hangs for ever when the same statement is executed again.
pub(super) fn wait(key: &str, millis: Option<u32>) -> Statement {
    let Some(millis) = millis else {
        return Statement::uncached(vec![
            "SELECT /*+ MAX_EXECUTION_TIME(4294967295) */ GET_LOCK(CONVERT(".into(),
            name(key),
            " USING utf8mb4), 1000000000)".into(),
        ]);
    };
    let (seconds, rest) = (millis / 1000, millis % 1000);
    let longer = seconds + 10;
    Statement::uncached(vec![
        format!("SELECT /*+ MAX_EXECUTION_TIME({millis}) */ GET_LOCK(CONVERT(").into(),
        name(key),
        format!(" USING utf8mb4), IF(VERSION() LIKE '%MariaDB%', {seconds}.{rest:03}, {longer}))")
            .into(),
    ])
}

/// 1; 0 where another session has the lock; NULL where nobody has.
pub(super) fn release(key: &str) -> Statement {
    call("SELECT RELEASE_LOCK(CONVERT(", key, " USING utf8mb4))")
}

/// Whether this session holds the lock: 1 or 0.
pub(super) fn is_held(key: &str) -> Statement {
    call(
        "SELECT IS_USED_LOCK(CONVERT(",
        key,
        " USING utf8mb4)) <=> CONNECTION_ID()",
    )
}

/// Keeps the number of the last error, which Diesel does not tell. To be sent right after the error. It is the last of
/// the conditions, behind the warnings; an error of the client's own leaves none.
pub(super) const KEEP_ERRNO: &str = "GET DIAGNOSTICS @dlock_conditions = NUMBER; \
    GET DIAGNOSTICS CONDITION @dlock_conditions @dlock_errno = MYSQL_ERRNO";

/// The number that [`KEEP_ERRNO`] kept, or NULL.
pub(super) fn errno() -> Statement {
    Statement::cached(vec![
        "SELECT IF(@dlock_conditions > 0, CAST(@dlock_errno AS SIGNED), NULL)".into(),
    ])
}

/// Who holds the lock and who waits for it, as far as the server lets this user see it.
/// <https://dev.mysql.com/doc/refman/8.4/en/performance-schema-metadata-locks-table.html>
pub(super) fn holders(key: &str) -> Vec<Statement> {
    const COLUMNS: &str = "NULL, p.USER, 1, ";
    const SINCE: &str = ", CAST((UNIX_TIMESTAMP(NOW(6)) - p.TIME) * 1000000 AS SIGNED) FROM ";
    let with_waiters = Statement::cached(vec![
        format!(
            "SELECT CAST(t.PROCESSLIST_ID AS SIGNED), {COLUMNS}m.LOCK_STATUS = 'GRANTED'{SINCE}\
             performance_schema.metadata_locks m \
             JOIN performance_schema.threads t ON t.THREAD_ID = m.OWNER_THREAD_ID \
             LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.PROCESSLIST_ID \
             WHERE m.OBJECT_TYPE = 'USER LEVEL LOCK' AND m.OBJECT_NAME = CONVERT("
        )
        .into(),
        name(key),
        " USING utf8mb4) ORDER BY m.LOCK_STATUS = 'GRANTED' DESC, p.TIME DESC".into(),
    ]);
    let holder = Statement::cached(vec![
        format!("SELECT CAST(h.ID AS SIGNED), {COLUMNS}1{SINCE}(SELECT IS_USED_LOCK(CONVERT(")
            .into(),
        name(key),
        " USING utf8mb4)) AS ID) h LEFT JOIN information_schema.PROCESSLIST p ON p.ID = h.ID \
         WHERE h.ID IS NOT NULL"
            .into(),
    ]);
    vec![with_waiters, holder]
}
