//! Questions to `pg_locks`.

use super::parts::{lock_row, unlock_text};
use crate::proto::{Bind, Columns, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// Pieces of a text around the binds of [`lock_row`].
macro_rules! lock_rows {
    ($before:expr, $after:expr) => {
        [
            concat!($before, "pg_catalog.texteq(l.locktype, 'advisory') AND pg_catalog.int8eq(l.classid::bigint, "),
            ") AND pg_catalog.int8eq(l.objid::bigint, ",
            ") AND pg_catalog.int24eq(l.objsubid, ",
            concat!(")", $after),
        ]
    };
}

/// The session's own locks are in its own database. To look that up in `pg_database` would need a place in the table of
/// locks, which may be full.
macro_rules! own_hold {
    ($mode:literal) => {
        concat!(
            " AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted AND pg_catalog.texteq(l.mode, '",
            $mode,
            "'))"
        )
    };
}

macro_rules! verify_rows {
    ($mode:literal, $after:expr) => {{
        const ROWS: [&str; 4] = lock_rows!(
            "SELECT (EXISTS(SELECT FROM pg_catalog.pg_locks l WHERE ",
            verified!($mode)
        );
        [ROWS[0], ROWS[1], ROWS[2], ROWS[3], $after]
    }};
}

/// What [`verify`] adds where the session does not know the prepared statement.
macro_rules! verified {
    ($mode:literal) => {
        concat!(
            own_hold!($mode),
            "::int OPERATOR(pg_catalog.+) CASE WHEN EXISTS(SELECT FROM pg_catalog.pg_prepared_statements p WHERE \
             pg_catalog.int4gt(pg_catalog.strpos(p.statement, "
        )
    };
}

/// Whether this session holds the lock in this mode: 1 or 0.
pub(in crate::postgres) fn is_held(key: PostgresKey, mode: Mode) -> Statement {
    const EXCLUSIVE: [&str; 4] = lock_rows!(
        "SELECT (EXISTS(SELECT FROM pg_catalog.pg_locks l WHERE ",
        concat!(own_hold!("ExclusiveLock"), ")::int::bigint")
    );
    const SHARED: [&str; 4] = lock_rows!(
        "SELECT (EXISTS(SELECT FROM pg_catalog.pg_locks l WHERE ",
        concat!(own_hold!("ShareLock"), ")::int::bigint")
    );
    let sql = match mode {
        Mode::Exclusive => &EXCLUSIVE,
        Mode::Shared => &SHARED,
    };
    Statement::number(Prepared::ByText, sql, lock_row(key))
}

/// The answer of [`verify`]: the session does not hold the lock, and does not know the prepared statement.
pub(in crate::postgres) const UNPREPARED: i64 = 2;

/// [`is_held`], for after the prepared statement `failed` has failed. If the session does not know it any more
/// (`DEALLOCATE ALL`, `DISCARD ALL`), it cannot have been executed: 2 if the lock is not held, 3 if it is. The text of
/// that statement is a bind, so that this one does not find itself.
pub(in crate::postgres) fn verify(key: PostgresKey, mode: Mode, failed: &str) -> Statement {
    const AFTER: &str = "), 0)) THEN 0 ELSE 2 END)::bigint";
    const EXCLUSIVE: [&str; 5] = verify_rows!("ExclusiveLock", AFTER);
    const SHARED: [&str; 5] = verify_rows!("ShareLock", AFTER);
    let sql = match mode {
        Mode::Exclusive => &EXCLUSIVE,
        Mode::Shared => &SHARED,
    };
    let [high, low, subid] = lock_row(key);
    let binds = [high, low, subid, Bind::Text(failed.to_owned())];
    Statement::number(Prepared::Never, sql, binds)
}

/// Who holds the lock or waits for it, holders first, then waiters in the order in which they came.
pub(in crate::postgres) fn holders(key: PostgresKey) -> Statement {
    // The function that the view pg_stat_activity is made of: to use it needs no privilege.
    const HOLDERS: [&str; 4] = lock_rows!(
        "SELECT l.pid::bigint, a.application_name, pg_catalog.pg_get_userbyid(a.usesysid)::pg_catalog.text, \
         pg_catalog.texteq(l.mode, 'ExclusiveLock')::int::bigint, l.granted::int::bigint, \
         pg_catalog.numeric_mul(extract(epoch FROM \
         coalesce(l.waitstart, a.xact_start, a.state_change)), 1000000)::bigint \
         FROM pg_catalog.pg_locks l LEFT JOIN LATERAL pg_catalog.pg_stat_get_activity(l.pid) a ON true WHERE ",
        " AND pg_catalog.oideq(l.database, (SELECT d.oid FROM pg_catalog.pg_database d WHERE \
         pg_catalog.nameeq(d.datname, pg_catalog.current_database()))) ORDER BY l.granted DESC, l.waitstart, l.pid"
    );
    Statement::number(Prepared::ByText, &HOLDERS, lock_row(key)).columns(Columns::Holders)
}

/// Releases what an abandoned wait in an open transaction may have left, where the session did not hold the lock
/// before.
pub(in crate::postgres) fn reclaim(key: PostgresKey, mode: Mode) -> String {
    let [high, low, subid] = lock_row(key).map(|bind| match bind {
        Bind::BigInt(number) => number,
        Bind::Integer(number) => number.into(),
        Bind::Binary(_) | Bind::Text(_) | Bind::NoText => {
            unreachable!("BUG: rows are found by numbers")
        }
    });
    let [head, ..] = lock_rows!("SELECT FROM pg_catalog.pg_locks l WHERE ", "");
    let mode_name = match mode {
        Mode::Exclusive => "ExclusiveLock",
        Mode::Shared => "ShareLock",
    };
    format!(
        "SELECT CASE WHEN EXISTS({head}{high}) AND pg_catalog.int8eq(l.objid::bigint, {low}) AND \
         pg_catalog.int24eq(l.objsubid, {subid}) AND \
         pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted \
         AND pg_catalog.texteq(l.mode, '{mode_name}')) THEN {} END",
        unlock_text(key, mode)
    )
}

pub(super) use lock_rows;
