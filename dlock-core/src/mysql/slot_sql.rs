//! The SQL text of semaphores. The locks of one have a common beginning of their names: `BASE:gate`, `BASE:0`, ...
//!
//! A JSON array of as many zeros gives a statement as many rows, one for each slot to try. The condition that they are
//! filtered by takes the lock, and `LIMIT 1` ends the statement with the first that is granted: 1 grant, and no other
//! slot is left locked (MySQL 9.7, MariaDB 10.11 and 11.8).

use super::sql::{Cluster, explained, may_be_one_of_several, name};
use super::tag::Tag;
use crate::proto::{Bind, Columns, Prepared, Statement};

type Text = &'static [&'static str];

macro_rules! rows {
    ($count:literal) => {
        concat!(
            "JSON_TABLE(CONCAT('[0', REPEAT(',0', ",
            $count,
            " - 1), ']'), '$[*]' COLUMNS (n FOR ORDINALITY))"
        )
    };
}

/// One value where this may be one of several servers that take writes, and otherwise another. An error would not do:
/// the statement has begun to answer then, and libmariadb (3.3) hangs when it executes it again.
macro_rules! if_cluster {
    ($then:literal, $otherwise:expr, checked) => {
        concat!(
            "IF(",
            may_be_one_of_several!(),
            ", ",
            $then,
            ", ",
            $otherwise,
            ")"
        )
    };
    ($then:literal, $otherwise:expr, unchecked) => {
        $otherwise
    };
}

/// Whether the session has a slot already.
macro_rules! own {
    () => {
        "IS_USED_LOCK(CONCAT(p.base, ':', (s.n + CONNECTION_ID()) MOD p.permits)) <=> CONNECTION_ID()"
    };
}

/// `$may` is the condition under which a slot is tried.
macro_rules! take_or_release {
    ($check:ident, $may:expr) => {
        &[
            explained!("SELECT CAST(MAX(t.slot) AS SIGNED) AS slot, 4611686018427387904 + CAST("),
            concat!(
                " AS SIGNED) + IFNULL(MAX(t.done), ",
                if_cluster!("/*M! 3 */ /*!80000 4 */", "0", $check),
                ") AS answer FROM (SELECT (s.n + CONNECTION_ID()) MOD p.permits AS slot, \
                 IF(p.to_release, IFNULL(RELEASE_LOCK(p.base), 0), 1) AS done FROM (SELECT CAST("
            ),
            " AS SIGNED) AS tag, CAST(",
            " AS SIGNED) AS to_release, CONVERT(",
            " USING utf8mb4) AS base, CAST(",
            concat!(
                " AS SIGNED) AS permits) p STRAIGHT_JOIN ",
                rows!("p.permits"),
                " s WHERE IF(p.to_release, 1, ",
                if_cluster!(
                    "0",
                    concat!(
                        "IF(",
                        $may,
                        " AND GET_LOCK(CONCAT(p.base, ':', (s.n + CONNECTION_ID()) MOD p.permits), 0) = 1, \
                         (@dlock_gate := 0) + (@dlock_slot := (s.n + CONNECTION_ID()) MOD p.permits) + \
                         ((@dlock_base := p.base) IS NULL) + (@dlock_request := p.tag) IS NOT NULL, 0)"
                    ),
                    $check
                ),
                ") LIMIT 1) t"
            ),
        ]
    };
}

macro_rules! any_slot {
    () => {
        concat!("IF(IS_FREE_LOCK(CONCAT(p.base, ':gate')), 1, ", own!(), ")")
    };
}

macro_rules! another_slot {
    () => {
        concat!(
            "IF(IS_FREE_LOCK(CONCAT(p.base, ':gate')), NOT (",
            own!(),
            "), 0)"
        )
    };
}

/// Takes a free slot without waiting, or releases a lock. It answers with the number of the slot, and 1 or 0 behind the
/// tag.
///
/// While others wait at the gate there is no free slot for a newcomer. But a session that has a slot already gets that
/// one once more, since the others may be waiting for it, unless it wants `another`.
fn take_or_release(
    tag: Tag,
    release: bool,
    base: &str,
    (permits, another): (u32, bool),
    cluster: Cluster,
) -> Statement {
    const CHECKED: Text = take_or_release!(checked, any_slot!());
    const UNCHECKED: Text = take_or_release!(unchecked, any_slot!());
    const ANOTHER_CHECKED: Text = take_or_release!(checked, another_slot!());
    const ANOTHER_UNCHECKED: Text = take_or_release!(unchecked, another_slot!());
    let (prepared, sql) = match (cluster, another) {
        (Cluster::Checked | Cluster::Alone, false) => (Prepared::MysqlSlot, CHECKED),
        (Cluster::Unchecked, false) => (Prepared::ByText, UNCHECKED),
        (Cluster::Checked | Cluster::Alone, true) => (Prepared::ByText, ANOTHER_CHECKED),
        (Cluster::Unchecked, true) => (Prepared::ByText, ANOTHER_UNCHECKED),
    };
    let binds = [
        tag.bind(),
        tag.bind(),
        Bind::Integer(release.into()),
        name(base),
        Bind::BigInt(permits.into()),
    ];
    Statement::number(prepared, sql, binds).columns(Columns::Pair)
}

/// The answer of [`take_slot`] on a node of a Galera cluster.
pub(super) const CLUSTER: i64 = 3;
/// The answer of [`take_slot`] on a MySQL that may be one of several that take writes.
pub(super) const PERHAPS_CLUSTER: i64 = 4;

/// Takes a free slot without waiting: its number, and 1, 0, [`CLUSTER`] or [`PERHAPS_CLUSTER`] behind the tag.
/// `another`: not one that the session has already.
pub(super) fn take_slot(
    tag: Tag,
    base: &str,
    (permits, another): (u32, bool),
    cluster: Cluster,
) -> Statement {
    take_or_release(tag, false, base, (permits, another), cluster)
}

/// Releases a slot by its name: 1 or 0 behind the tag.
pub(super) fn release_slot(tag: Tag, name: &str, cluster: Cluster) -> Statement {
    take_or_release(tag, true, name, (1, false), cluster)
}

/// Waits for a slot: its number, and [`GRANTED`](super::sql::GRANTED), [`TAKEN`](super::sql::TAKEN) or
/// [`KILLED`](super::sql::KILLED) behind the tag.
///
/// The first row waits in the queue for the gate, the whole seconds of the limit on MySQL. The others look for a free
/// slot (or for the gate, in what is left of the limit), with pauses of about a thirty-second of the time that they
/// have looked, from 0.5 to 10 milliseconds. That is 1,000 rounds, about 9 seconds. Then the gate is released.
///
/// The session remembers what it did in variables, which [`give_back`] and [`reclaim_unread`] need if the statement
/// fails. It is not kept: MySQL begins to answer before a wait is killed, and libmariadb (3.3) hangs when it executes a
/// kept statement again that has failed like that.
pub(super) fn wait_for_slot(tag: Tag, base: &str, permits: u32, millis: i64) -> Statement {
    const TEXT: Text = &[
        explained!(
            "/*M! SET STATEMENT max_statement_time = 0 FOR */ SELECT /*+ MAX_EXECUTION_TIME(4294967295) */ \
             t.slot, 4611686018427387904 + CAST("
        ),
        " AS SIGNED) + IF(t.slot >= 0, 1, IF(t.gate = 2, 2, 0)) + IF(t.gate = 1, \
             0 * IFNULL(RELEASE_LOCK(CONCAT(t.base, ':gate')), 0) + (@dlock_gate := 0), 0) AS answer FROM (SELECT \
             CAST(@dlock_slot AS SIGNED) AS slot, CAST(@dlock_gate AS SIGNED) AS gate, p.base FROM (SELECT CAST(",
        " AS SIGNED) AS tag, CONVERT(",
        " USING utf8mb4) AS base, CAST(",
        " AS SIGNED) AS permits, CAST(",
        concat!(
            " AS SIGNED) AS millis) p STRAIGHT_JOIN ",
            rows!("1000"),
            " r STRAIGHT_JOIN ",
            rows!("p.permits"),
            " s WHERE CASE WHEN r.n = 1 AND s.n = 1 AND (@dlock_gate := 0) + (@dlock_slot := -1) + \
             (@dlock_request := p.tag) + ((@dlock_base := p.base) IS NULL) + \
             (@dlock_deadline := UNIX_TIMESTAMP(SYSDATE(6)) + p.millis * 0.001) IS NULL THEN 1 \
             WHEN s.n = 1 AND r.n > 1 AND SLEEP(LEAST(0.01, 0.0005 * POW(1.03, r.n - 1))) <> 0 THEN 1 \
             WHEN s.n = 1 AND @dlock_gate <> 1 AND (@dlock_gate := IFNULL(GET_LOCK(CONCAT(p.base, ':gate'), \
             IF(r.n = 1, p.millis /*M! * 0.001 */ /*!80000 DIV 1000 */, 0)), 2)) = 2 THEN 1 \
             WHEN @dlock_gate = 1 AND \
             GET_LOCK(CONCAT(p.base, ':', (s.n + r.n + CONNECTION_ID()) MOD p.permits), 0) = 1 \
             THEN (@dlock_slot := (s.n + r.n + CONNECTION_ID()) MOD p.permits) >= 0 \
             ELSE s.n = p.permits AND (r.n = 1000 OR UNIX_TIMESTAMP(SYSDATE(6)) >= @dlock_deadline) END LIMIT 1) t"
        ),
    ];
    let binds = [
        tag.bind(),
        tag.bind(),
        name(base),
        Bind::BigInt(permits.into()),
        Bind::BigInt(millis),
    ];
    Statement::number(Prepared::Never, TEXT, binds).columns(Columns::Pair)
}

/// After a failed [`wait_for_slot`]: the number that [`KEEP_ERRNO`](super::sql::KEEP_ERRNO) kept, or NULL; and 1 behind
/// the tag. It gives back the gate and the slot of that request.
pub(super) fn give_back(tag: Tag, request: Tag) -> Statement {
    const TEXT: Text = &[
        explained!("SELECT CAST(@dlock_errno AS SIGNED) AS errno, 4611686018427387904 + CAST("),
        " AS SIGNED) + 1 + IF(@dlock_request <=> CAST(",
        " AS SIGNED), IF(@dlock_gate = 1, 0 * IFNULL(RELEASE_LOCK(CONCAT(@dlock_base, ':gate')), 0), 0) + \
         IF(@dlock_slot >= 0, 0 * IFNULL(RELEASE_LOCK(CONCAT(@dlock_base, ':', @dlock_slot)), 0), 0) + \
         (@dlock_gate := 0) + 0 * (@dlock_slot := -1), 0) AS answer",
    ];
    Statement::number(Prepared::ByText, TEXT, [tag.bind(), request.bind()]).columns(Columns::Pair)
}

/// Gives back, where nobody reads the answer, what a request may have been granted. The second time it does nothing.
pub(super) fn reclaim_unread(request: Tag) -> String {
    let request = request.number();
    format!(
        "SET @dlock_request = IF(@dlock_request <=> {request}, \
         IF(@dlock_gate = 1, 0 * IFNULL(RELEASE_LOCK(CONCAT(@dlock_base, ':gate')), 0), 0) + \
         IF(@dlock_slot >= 0, 0 * IFNULL(RELEASE_LOCK(CONCAT(@dlock_base, ':', @dlock_slot)), 0), 0), @dlock_request)"
    )
}

/// Who has a slot and who waits for one, as far as the server lets this user see it. To hold the gate is to wait.
pub(super) fn slot_holders(base: &str, permits: u32) -> Vec<Statement> {
    const WITH_WAITERS: Text = &[
        "SELECT CAST(t.PROCESSLIST_ID AS SIGNED), NULL, p.USER, 1, \
         m.LOCK_STATUS <=> 'GRANTED' AND m.OBJECT_NAME <> CONCAT(b.base, ':gate'), \
         CAST((UNIX_TIMESTAMP(NOW(6)) - p.TIME) * 1000000 AS SIGNED) \
         FROM (SELECT CONVERT(",
        " USING utf8mb4) AS base) b JOIN performance_schema.metadata_locks m \
         JOIN performance_schema.threads t ON t.THREAD_ID = m.OWNER_THREAD_ID \
         LEFT JOIN information_schema.PROCESSLIST p ON p.ID = t.PROCESSLIST_ID \
         WHERE m.OBJECT_TYPE = 'USER LEVEL LOCK' AND \
         LEFT(m.OBJECT_NAME, CHAR_LENGTH(b.base) + 1) = CONCAT(b.base, ':') AND t.PROCESSLIST_ID IS NOT NULL \
         ORDER BY 5 DESC, p.TIME DESC",
    ];
    const HOLDERS: Text = &[
        "SELECT CAST(h.ID AS SIGNED), NULL, p.USER, 1, 1, \
         CAST((UNIX_TIMESTAMP(NOW(6)) - p.TIME) * 1000000 AS SIGNED) \
         FROM (SELECT DISTINCT IS_USED_LOCK(CONCAT(b.base, ':', s.n - 1)) AS ID FROM (SELECT CONVERT(",
        " USING utf8mb4) AS base, CAST(",
        concat!(
            " AS SIGNED) AS permits) b STRAIGHT_JOIN ",
            rows!("b.permits"),
            " s LIMIT 1000) h LEFT JOIN information_schema.PROCESSLIST p ON p.ID = h.ID WHERE h.ID IS NOT NULL"
        ),
    ];
    let with_waiters = Statement::number(Prepared::Never, WITH_WAITERS, [name(base)]);
    let binds = [name(base), Bind::BigInt(permits.into())];
    let holders = Statement::number(Prepared::Never, HOLDERS, binds);
    [with_waiters, holders]
        .map(|statement| statement.columns(Columns::Holders))
        .to_vec()
}
