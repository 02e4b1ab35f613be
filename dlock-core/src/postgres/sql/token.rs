//! What rests on the session's own lock: a fencing token, and a condition for statements of the user.

use super::locks::lock_rows;
use super::parts::{hold_mode, lock_row};
use super::several::List;
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
    let [high, low, subid] = lock_row(key);
    [high, low, subid, Bind::Text(hold_mode(mode).into())].into()
}

/// Whether this session holds all of several locks. It depends on no row, either, and looks at the session's own locks
/// once for each key.
macro_rules! own_locks {
    ($before:literal, $after:literal) => {
        &[
            concat!($before, "(NOT EXISTS(SELECT FROM (SELECT "),
            "::pg_catalog.text::bigint[] AS keys, ",
            "::bigint AS bigints, ",
            concat!(
                "::pg_catalog.text AS mode OFFSET 0) b CROSS JOIN LATERAL pg_catalog.unnest(b.keys) WITH ORDINALITY \
                 k(x, n) LEFT JOIN pg_catalog.pg_locks l ON pg_catalog.texteq(l.locktype, 'advisory') \
                 AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted AND pg_catalog.int8eq(\
                 l.classid::bigint, pg_catalog.int8and(pg_catalog.int8shr(k.x, 32), 4294967295)) \
                 AND pg_catalog.int8eq(l.objid::bigint, pg_catalog.int8and(k.x, 4294967295)) \
                 AND pg_catalog.int24eq(l.objsubid, CASE WHEN pg_catalog.int8le(k.n, b.bigints) THEN 1 ELSE 2 END) \
                 AND pg_catalog.texteq(l.mode, b.mode) WHERE l.pid IS NULL))",
                $after
            ),
        ]
    };
}

fn own_locks(keys: &[PostgresKey], mode: Mode) -> Binds {
    let [array, bigints] = List::new(keys).binds();
    [array, bigints, Bind::Text(hold_mode(mode).into())].into()
}

/// Draws a number that is greater than all that were drawn before; NULL if this session does not hold all of the locks.
///
/// It is a position in the write-ahead log, behind a record that the statement writes there. So it rises in every
/// transaction, however many subtransactions and isolation levels there are. `pg_current_xact_id` would give a
/// transaction that has written before it acquired the lock a number from before.
///
/// The record belongs to the transaction, so that COMMIT, which follows at once outside a transaction, flushes it: a
/// position that a crash undoes would be given out again. Where the user has switched that off (`synchronous_commit`),
/// it is on for this one transaction.
pub(in crate::postgres) fn draw_token(keys: &[PostgresKey], mode: Mode) -> Statement {
    macro_rules! draw {
        ($own:ident) => {
            $own!(
                "SELECT CASE WHEN NOT ",
                " THEN NULL WHEN pg_catalog.texteq(pg_catalog.current_setting('synchronous_commit'), 'off') \
                 AND pg_catalog.set_config('synchronous_commit', 'local', true) IS NULL THEN NULL \
                 ELSE pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_logical_emit_message(true, 'dlock', \
                 ''::pg_catalog.text), '0/0'::pg_catalog.pg_lsn)::bigint END"
            )
        };
    }
    const ONE: &[&str] = draw!(own_lock);
    const SEVERAL: &[&str] = draw!(own_locks);
    match *keys {
        [key] => Statement::number(Prepared::ByText, ONE, own_lock(key, mode)),
        _ => Statement::number(Prepared::ByText, SEVERAL, own_locks(keys, mode)),
    }
}

/// A condition for the user's own statements: whether this session holds all of the locks.
pub(in crate::postgres) fn held(keys: &[PostgresKey], mode: Mode) -> Condition {
    const ONE: &[&str] = own_lock!("", "");
    const SEVERAL: &[&str] = own_locks!("", "");
    match *keys {
        [key] => Condition::new(ONE, own_lock(key, mode)),
        _ => Condition::new(SEVERAL, own_locks(keys, mode)),
    }
}
