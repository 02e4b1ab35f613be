//! The SQL text of MySQL's and MariaDB's locks.
//!
//! `/*M! .. */` is read by MariaDB alone, `/*!80000 .. */` and `/*+ .. */` by MySQL alone. Names are sent as bytes, so
//! that the client's character set does not change them. All answers have the name `answer`: otherwise the whole text
//! would be the column's name, which comes with each answer.

#[macro_use]
mod text;
mod check;

use std::time::Duration;

use super::tag::Tag;
use crate::proto::manager::Token;
use crate::proto::{Bind, Columns, Condition, Failure, OpenTransaction, Prepared, Statement};

pub(super) use check::{check, several_writers};

/// What comes of [`acquire`].
pub(super) const GRANTED: i64 = 1;
pub(super) const TAKEN: i64 = 0;
/// The statement was killed: MariaDB has no error for that.
pub(super) const KILLED: i64 = 2;

/// The longest wait that both servers take, in milliseconds. MySQL waits for ever if the timeout is negative, but
/// MariaDB not at all.
pub(super) const FOREVER: i64 = 1_000_000_000_000;

mod several;

pub(super) use several::*;
pub(super) use text::{explained, may_be_one_of_several};
type Text = &'static [&'static str];

/// How long a statement waits for a lock that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// Not at all.
    Try,
    /// At most so many milliseconds, at least 1. MySQL may wait less, but at least half of it.
    Millis(u32),
    Forever,
}

impl Limit {
    fn millis(self) -> i64 {
        match self {
            Limit::Try => 0,
            Limit::Millis(millis) => millis.into(),
            Limit::Forever => FOREVER,
        }
    }

    /// The binary logarithm of the milliseconds after which MySQL ends the wait, if they are less than 1000.
    fn under_a_second(self) -> Option<usize> {
        match self {
            Limit::Millis(millis @ 1..1000) => Some(millis.ilog2() as usize),
            _ => None,
        }
    }

    /// What each server waits at least before it says that the lock is taken.
    pub(super) fn shortest_wait(self) -> Duration {
        Duration::from_millis(match self.under_a_second() {
            Some(logarithm) => 1 << logarithm,
            None => self.millis() as u64 / 1000 * 1000,
        })
    }
}

/// Tries to take a lock and waits where it must: [`GRANTED`], [`TAKEN`] or [`KILLED`].
///
/// Before it asks for the lock, it leaves the tag in the session, so that [`examine`] can tell what it did. MySQL
/// warns, when the statement is prepared, that a later version will not let a SELECT set a variable (MySQL 9.7 does).
pub(super) fn acquire(
    tag: Tag,
    key: &str,
    limit: Limit,
    droppable: bool,
    cluster: Cluster,
) -> Statement {
    const DROPPABLE_UNDER_A_SECOND: [[Text; 10]; 2] = [
        under_a_second!(droppable, checked),
        under_a_second!(droppable, unchecked),
    ];
    const ACQUIRE: [Text; 2] = [
        acquire!("4294967295", "DIV 1000", checked),
        acquire!("4294967295", "DIV 1000", unchecked),
    ];
    const UNDER_A_SECOND: [[Text; 10]; 2] = [
        under_a_second!(acquire, checked),
        under_a_second!(acquire, unchecked),
    ];
    let check = cluster.index();
    let millis = Bind::BigInt(limit.millis());
    let named = |name| match cluster {
        Cluster::Checked | Cluster::Alone => name,
        Cluster::Unchecked => Prepared::ByText,
    };
    if droppable {
        let (prepared, sql) = match limit.under_a_second() {
            Some(logarithm) => (Prepared::ByText, DROPPABLE_UNDER_A_SECOND[check][logarithm]),
            None => (named(Prepared::MysqlDroppable), DROPPABLE[check]),
        };
        let binds = [tag.bind(), Bind::Integer(0), name(key), name(key), millis];
        return Statement::number(prepared, sql, binds);
    }
    let (prepared, sql) = match limit.under_a_second() {
        Some(logarithm) => (Prepared::ByText, UNDER_A_SECOND[check][logarithm]),
        None => (named(Prepared::MysqlAcquire), ACQUIRE[check]),
    };
    Statement::number(prepared, sql, [tag.bind(), name(key), millis]).columns(Columns::Affected)
}

const DROPPABLE: [Text; 2] = [
    droppable!("4294967295", "DIV 1000", checked),
    droppable!("4294967295", "DIV 1000", unchecked),
];

/// Whether the statement asks if this may be one of several servers that take writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    Checked,
    /// The same, and [`several_writers`] has said no.
    Alone,
    /// A MariaDB that was built without Galera does not know the question.
    Unchecked,
}

impl Cluster {
    /// Of the two texts.
    fn index(self) -> usize {
        usize::from(self == Cluster::Unchecked)
    }

    /// Whether what it granted can be released by the statement that took it.
    pub(super) fn is_in_the_text(self) -> bool {
        self != Cluster::Unchecked
    }
}

/// Releases one hold: 1; 0 if another session has the lock, or nobody has.
pub(super) fn release(tag: Tag, key: &str, droppable: bool) -> Statement {
    const RELEASE: Text = &[
        explained!("SELECT 1 FROM DUAL WHERE RELEASE_LOCK(CONVERT("),
        " USING utf8mb4)) = 1 LIMIT 1 INTO @dlock_answer",
    ];
    if droppable {
        let binds = [
            tag.bind(),
            Bind::Integer(1),
            name(key),
            name(key),
            Bind::BigInt(0),
        ];
        return Statement::number(Prepared::MysqlDroppable, DROPPABLE[0], binds);
    }
    Statement::number(Prepared::MysqlRelease, RELEASE, [name(key)]).columns(Columns::Affected)
}

/// What the answer to [`acquire`], [`release`] or [`is_held`] says. Without rows, [`KILLED`] looks like [`TAKEN`].
pub(super) fn read(number: Option<i64>, tag: Tag, droppable: bool) -> Result<i64, Failure> {
    match droppable {
        true => tag.remove(number),
        false => Ok(number.unwrap_or(-1)),
    }
}

/// Tells [`KILLED`] from [`TAKEN`] after an [`acquire`] without rows. It is not kept, for the reason of [`acquire!`].
pub(super) fn unanswered(tag: Tag) -> Statement {
    Statement::number(
        Prepared::Never,
        &[
            explained!("SELECT 4611686018427387904 + CAST("),
            " AS SIGNED) + @dlock_answer AS answer",
        ],
        [tag.bind()],
    )
}

/// A session that is there obeys it, whatever the engine. Drivers do not tell the loss of a connection from other
/// errors.
pub(super) const ARE_YOU_THERE: &str = "SET @dlock_there = 1";

/// Keeps the number of the last error, which Diesel does not tell. It is sent right after the error. MySQL's error is
/// the last of the conditions, behind the warnings. An error that only the client knows leaves the number of an older
/// one.
///
/// It is one statement: MySQL does not answer the second of two in a message if it is killed in between, and the client
/// waits for that answer for ever (MySQL 9.7).
pub(super) const KEEP_ERRNO: &str = "GET DIAGNOSTICS CONDITION /*M! 1 */ /*!80000 @@warning_count */ \
    @dlock_errno = MYSQL_ERRNO";

/// The number that [`KEEP_ERRNO`] kept, or NULL; and whether the request was granted: 1 or 0.
///
/// The session may hold the lock by an outer guard. But it never waits for a lock that it holds, so if it has the lock
/// and was last asked for it by this request, this request was granted; or its name was refused (see
/// `unless_cluster!`), which the number says.
pub(super) fn examine(tag: Tag, request: Tag, key: &str) -> Statement {
    Statement::number(
        Prepared::ByText,
        &[
            explained!("SELECT CAST(@dlock_errno AS SIGNED) AS errno, 4611686018427387904 + CAST("),
            " AS SIGNED) + (@dlock_request <=> CAST(",
            " AS SIGNED) AND IS_USED_LOCK(CONVERT(",
            " USING utf8mb4)) <=> CONNECTION_ID()) AS answer",
        ],
        [tag.bind(), request.bind(), name(key)],
    )
    .columns(Columns::Pair)
}

/// Whether this session holds the lock: 1 or 0.
pub(super) fn is_held(tag: Tag, key: &str, droppable: bool) -> Statement {
    if droppable {
        const TEXT: Text = &[
            explained!("SELECT 4611686018427387904 + CAST("),
            " AS SIGNED) + (IS_USED_LOCK(CONVERT(",
            " USING utf8mb4)) <=> CONNECTION_ID()) AS answer",
        ];
        return Statement::number(Prepared::ByText, TEXT, [tag.bind(), name(key)]);
    }
    const TEXT: Text = &[
        explained!("SELECT 1 FROM DUAL WHERE IS_USED_LOCK(CONVERT("),
        " USING utf8mb4)) <=> CONNECTION_ID() LIMIT 1 INTO @dlock_answer",
    ];
    Statement::number(Prepared::ByText, TEXT, [name(key)]).columns(Columns::Affected)
}

/// Draws a number that is greater than all that were drawn before; NULL if this session does not hold the lock. The tag
/// stands before it.
///
/// `UUID_SHORT()` is the `server_id` in 8 bits, the second in which the server was started in 32, and a counter. The
/// first 8 bits are cut off: with them a token might not fit into a BIGINT, and a change of the `server_id` could set
/// all tokens back.
pub(super) fn draw_token(tag: Tag, key: &str) -> Statement {
    const TEXT: &[&str] = &[
        "/* dlock: draws a fencing token */ SELECT 4611686018427387904 + CAST(",
        " AS SIGNED) AS answer, IF(IS_USED_LOCK(CONVERT(",
        " USING utf8mb4)) <=> CONNECTION_ID(), CAST(UUID_SHORT() & 72057594037927935 AS SIGNED), NULL) AS token",
    ];
    Statement::number(Prepared::ByText, TEXT, [tag.bind(), name(key)]).columns(Columns::Pair)
}

/// A condition for the user's own statements: whether this session holds the lock. The servers ask once for each
/// statement, because it does not depend on any row.
pub(super) fn held(key: &str) -> Condition {
    const TEXT: &[&str] = &[
        "(IS_USED_LOCK(CONVERT(",
        " USING utf8mb4)) <=> CONNECTION_ID())",
    ];
    Condition::new(TEXT, [name(key)])
}

/// Releases a lock where nobody reads the answer.
pub(super) fn release_unread(key: &str, transaction: OpenTransaction) -> String {
    let release = format!("DO RELEASE_LOCK({})", literal(key));
    match transaction {
        OpenTransaction::RollBack => format!("ROLLBACK; {release}"),
        OpenTransaction::None | OpenTransaction::Keep => release,
    }
}

/// Releases, where nobody reads the answer, what a request may have been granted. The second time it does nothing.
pub(super) fn reclaim_unread(request: Tag, key: &str) -> String {
    let name = literal(key);
    let request = request.number();
    format!(
        "SET @dlock_request = IF(@dlock_request <=> {request} AND IS_USED_LOCK({name}) <=> CONNECTION_ID(), \
         0 * RELEASE_LOCK({name}), @dlock_request)"
    )
}

/// Who holds the lock and who waits for it, as far as the server lets this user see it.
/// <https://dev.mysql.com/doc/refman/8.4/en/performance-schema-metadata-locks-table.html>
///
/// The statements are not kept, for the reason of [`acquire!`].
pub(super) fn holders(key: &str) -> Vec<Statement> {
    const WITH_WAITERS: Text = &[
        "SELECT CAST(t.PROCESSLIST_ID AS SIGNED), NULL, p.USER, 1, m.LOCK_STATUS <=> 'GRANTED', \
         CAST((UNIX_TIMESTAMP(NOW(6)) - p.TIME) * 1000000 AS SIGNED) \
         FROM performance_schema.metadata_locks m \
         JOIN performance_schema.threads t ON t.THREAD_ID = m.OWNER_THREAD_ID \
         LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.PROCESSLIST_ID \
         WHERE m.OBJECT_TYPE = 'USER LEVEL LOCK' AND m.OBJECT_NAME = CONVERT(",
        " USING utf8mb4) AND t.PROCESSLIST_ID IS NOT NULL \
         ORDER BY m.LOCK_STATUS = 'GRANTED' DESC, p.TIME DESC",
    ];
    // Without the LIMIT the servers ask for the lock's holder twice, for the WHERE and for the column, and the second
    // time there may be none (MySQL 9.7).
    const HOLDER: Text = &[
        "SELECT CAST(h.ID AS SIGNED), NULL, p.USER, 1, 1, \
         CAST((UNIX_TIMESTAMP(NOW(6)) - p.TIME) * 1000000 AS SIGNED) \
         FROM (SELECT IS_USED_LOCK(CONVERT(",
        " USING utf8mb4)) AS ID LIMIT 1) h LEFT JOIN information_schema.PROCESSLIST p ON p.ID = h.ID \
         WHERE h.ID IS NOT NULL",
    ];
    [WITH_WAITERS, HOLDER]
        .map(|sql| Statement::number(Prepared::Never, sql, [name(key)]).columns(Columns::Holders))
        .to_vec()
}

/// The lock's name as a bind.
pub(super) fn name(key: &str) -> Bind {
    Bind::Binary(key.as_bytes().to_vec())
}

/// The lock's name where there are no binds.
fn literal(key: &str) -> String {
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("CONVERT(x'{hex}' USING utf8mb4)")
}

/// Sets the idle limit of a manager's session and leaves its token. The limit is whole seconds, at least 1.
pub(super) fn prepare_managed(lease: Duration, token: Token) -> Statement {
    const LONGEST: u64 = 31_536_000;
    let seconds = lease.as_millis().div_ceil(1000) as u64;
    Statement::number(
        Prepared::Never,
        &["SET SESSION wait_timeout = ", ", @dlock_session = ", ""],
        [
            Bind::BigInt(seconds.clamp(1, LONGEST) as i64),
            Bind::BigInt(token.number()),
        ],
    )
    .columns(Columns::Affected)
}

/// Whether the token is there: 1 or 0.
pub(super) fn is_managed(token: Token) -> Statement {
    const TEXT: Text = &[
        "SELECT 1 FROM DUAL WHERE @dlock_session <=> ",
        " LIMIT 1 INTO @dlock_answer",
    ];
    Statement::number(Prepared::ByText, TEXT, [Bind::BigInt(token.number())])
        .columns(Columns::Affected)
}
