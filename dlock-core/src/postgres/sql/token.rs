//! What rests on the session's own lock: a fencing token, and a condition for statements of the user.

use super::locks::lock_rows;
use super::parts::lock_row;
use crate::proto::{Bind, Binds, Condition, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// Whether this session holds the lock. The mode is a bind, so that there is one text.
///
/// The planner sees that it does not depend on any row: PostgreSQL asks for the locks once for each statement, before
/// the first row, and does not touch the table if the lock is not held.
macro_rules! own_lock {
    ($before:literal, $after:literal) => {{
        const ROWS: [&str; 4] = lock_rows!(
            concat!($before, "EXISTS(SELECT FROM pg_catalog.pg_locks l WHERE "),
            " AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted AND pg_catalog.texteq(l.mode, "
        );
        &[ROWS[0], ROWS[1], ROWS[2], ROWS[3], concat!("))", $after)]
    }};
}

fn own_lock(key: PostgresKey, mode: Mode) -> Binds {
    let mode = match mode {
        Mode::Exclusive => "ExclusiveLock",
        Mode::Shared => "ShareLock",
    };
    let [high, low, subid] = lock_row(key);
    [high, low, subid, Bind::Text(mode.into())].into()
}

/// Draws a number that is greater than all that were drawn before; NULL if this session does not hold the lock.
///
/// It is a position in the write-ahead log, behind a record that the statement writes there. So it rises in every
/// transaction, however many subtransactions and isolation levels there are. `pg_current_xact_id` would give a
/// transaction that has written before it acquired the lock a number from before.
///
/// The record belongs to the transaction, so that COMMIT, which follows at once outside a transaction, flushes it: a
/// position that a crash undoes would be given out again. Where the user has switched that off (`synchronous_commit`),
/// it is on for this one transaction.
pub(in crate::postgres) fn draw_token(key: PostgresKey, mode: Mode) -> Statement {
    const TEXT: &[&str] = own_lock!(
        "SELECT CASE WHEN NOT ",
        " THEN NULL WHEN pg_catalog.texteq(pg_catalog.current_setting('synchronous_commit'), 'off') \
         AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL \
         ELSE pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_logical_emit_message(true, 'dlock', ''::pg_catalog.text), \
         '0/0'::pg_catalog.pg_lsn)::bigint END"
    );
    Statement::number(Prepared::ByText, TEXT, own_lock(key, mode))
}

/// A condition for the user's own statements: whether this session holds the lock.
pub(in crate::postgres) fn held(key: PostgresKey, mode: Mode) -> Condition {
    const TEXT: &[&str] = own_lock!("", "");
    Condition::new(TEXT, own_lock(key, mode))
}
