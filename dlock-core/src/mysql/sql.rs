//! The SQL text of MySQL's and MariaDB's locks. `/*M! .. */` is read by MariaDB alone.

use crate::{Nonce, OpenTransaction, Piece, Statement};

/// The lock's name as a bind: bytes, so that the client's character set has no say.
fn name(key: &str) -> Piece {
    Piece::Binary(key.as_bytes().to_vec())
}

/// The lock's name where there are no binds.
fn literal(key: &str) -> String {
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("CONVERT(x'{hex}' USING utf8mb4)")
}

const _: () = assert!(Nonce::BASE == 4611686018427387904, "as the statements say");

/// Tells who reads the server's list of processes what it is. It is long and comes first, so that the text need not grow
/// much when Diesel puts it together. (A colon with a name behind it would be a bind to mysql_async.)
macro_rules! explained {
    ($text:literal) => {
        concat!(
            "/* dlock: a named lock; to its answer a number is added, so that it is not taken for that of another query */ ",
            $text
        )
    };
}

/// A question whose answer is a number or NULL, and `before`, the key and `after` in it. The number that the answer is
/// greater by is needed with diesel-async (0.9), which gives the answer that a dropped future did not read to the next
/// query, and no pool notices.
fn ask(before: &'static str, key: &str, after: &'static str) -> Statement {
    question(vec![before.into(), name(key), after.into()])
}

fn question(rest: Vec<Piece>) -> Statement {
    let nonce = Nonce::new();
    let mut pieces = Vec::with_capacity(rest.len() + 3);
    pieces.extend([
        explained!("SELECT 4611686018427387904 + CAST(").into(),
        nonce.bind(),
    ]);
    pieces.extend(rest);
    // Otherwise the whole text would be the column's name, which comes with each answer.
    pieces.push(" AS answer".into());
    Statement {
        pieces,
        cached: true,
        number: None,
        nonce: Some(nonce),
    }
}

/// Asks without waiting: 1, 0 where another session has the lock, and [`CAPPED`] where another session has it and
/// MariaDB's `max_statement_time` would cut a wait short.
pub(super) fn try_lock(key: &str) -> Statement {
    ask(" AS SIGNED) + CASE GET_LOCK(CONVERT(", key, TRIED).numbered(13)
}

/// What stands behind the key of a try.
const TRIED: &str =
    " USING utf8mb4), 0) WHEN 1 THEN 1 WHEN 0 THEN 0 /*M! - (@@max_statement_time > 0) */ END";

/// [`try_lock`] and [`release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Try,
    Release,
}

/// Either of two questions in one text, so that the driver, which would first have to prepare another, sends the release
/// in one message: that is obeyed even if the future that sent it is dropped.
pub(super) fn try_or_release(ask: Ask, key: &str) -> Statement {
    question(vec![
        " AS SIGNED) + IF(".into(),
        Piece::Integer((ask == Ask::Release).into()),
        ", RELEASE_LOCK(CONVERT(".into(),
        name(key),
        " USING utf8mb4)), CASE GET_LOCK(CONVERT(".into(),
        name(key),
        TRIED.into(),
        ")".into(),
    ])
    .numbered(4)
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
    let (limit, seconds) = match millis {
        None => (u32::MAX, "1000000000".to_owned()),
        Some(millis) => {
            let (seconds, rest) = (millis / 1000, millis % 1000);
            let longer = seconds + 10;
            let seconds = format!("IF(VERSION() LIKE '%MariaDB%', {seconds}.{rest:03}, {longer})");
            (millis, seconds)
        }
    };
    let nonce = Nonce::new();
    Statement {
        pieces: vec![
            format!(
                explained!("SELECT /*+ MAX_EXECUTION_TIME({limit}) */ 4611686018427387904 + CAST("),
                limit = limit
            )
            .into(),
            nonce.bind(),
            " AS SIGNED) + GET_LOCK(CONVERT(".into(),
            name(key),
            format!(" USING utf8mb4), {seconds}) AS answer").into(),
        ],
        cached: false,
        number: None,
        nonce: Some(nonce),
    }
}

/// 1; 0 where another session has the lock; NULL where nobody has.
pub(super) fn release(key: &str) -> Statement {
    ask(
        " AS SIGNED) + RELEASE_LOCK(CONVERT(",
        key,
        " USING utf8mb4))",
    )
    .numbered(14)
}

/// Releases a lock where nobody reads the answer.
pub(super) fn release_unread(key: &str, transaction: OpenTransaction) -> String {
    let release = format!("DO RELEASE_LOCK({})", literal(key));
    match transaction {
        OpenTransaction::RollBack => format!("ROLLBACK; {release}"),
        OpenTransaction::None | OpenTransaction::Keep => release,
    }
}

/// Releases, where nobody reads the answer, what a wait may have left.
pub(super) fn reclaim_unread(key: &str) -> String {
    let name = literal(key);
    format!("DO IF(IS_USED_LOCK({name}) <=> CONNECTION_ID(), RELEASE_LOCK({name}), 0)")
}

/// Whether this session holds the lock: 1 or 0.
pub(super) fn is_held(key: &str) -> Statement {
    ask(
        " AS SIGNED) + (IS_USED_LOCK(CONVERT(",
        key,
        " USING utf8mb4)) <=> CONNECTION_ID())",
    )
}

/// Keeps the number of the last error, which Diesel does not tell. To be sent right after the error. It is the last of
/// the conditions, behind the warnings; an error of the client's own leaves none.
pub(super) const KEEP_ERRNO: &str = "GET DIAGNOSTICS @dlock_conditions = NUMBER; \
    GET DIAGNOSTICS CONDITION @dlock_conditions @dlock_errno = MYSQL_ERRNO";

/// The number that [`KEEP_ERRNO`] kept, or NULL.
pub(super) fn errno() -> Statement {
    question(vec![
        " AS SIGNED) + IF(@dlock_conditions > 0, CAST(@dlock_errno AS SIGNED), NULL)".into(),
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
