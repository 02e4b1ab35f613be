//! Waits that stand in a message, and the limits that are lifted for them.

use super::parts::{HAS_OWN_LOCKS, Scope, high_and_low, literal, lock_row, shared};
use super::tokens::IS_STANDBY;
use crate::proto::{Bind, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// Chooses the length of a [quiet turn](super::turns) and keeps it in the session together with the key, where a block
/// of PL/pgSQL finds them. It answers with the milliseconds, negative where this role may not use that language.
///
/// At most `rest`. Where readers hold the lock, `long`. Otherwise by `deadlock_timeout`, after which a waiting session
/// looks for a deadlock:
///
/// - 0.9 of it for a session that holds no lock but those of this statement: it cannot be part of a deadlock, but for
///   one with a session that holds the lock and runs CREATE INDEX CONCURRENTLY. That one waits for the snapshot of the
///   turn, and goes on when the turn is over.
/// - 1.8 times of it for another session: long enough for a deadlock to be found.
pub(in crate::postgres) fn prepare_turn(key: PostgresKey, rest: u32, long: u32) -> Statement {
    const SQL: [&str; 6] = [
        "SELECT (CASE WHEN pg_catalog.set_config('dlock.high', $1::pg_catalog.text, false) IS NOT NULL AND \
         pg_catalog.set_config('dlock.low', $2::pg_catalog.text, false) IS NOT NULL AND \
         pg_catalog.set_config('dlock.millis', t.millis::pg_catalog.text, false) IS NOT NULL AND \
         EXISTS(SELECT FROM pg_catalog.pg_language l WHERE pg_catalog.nameeq(l.lanname, 'plpgsql') \
         AND pg_catalog.has_language_privilege(l.oid, 'USAGE')) THEN t.millis \
         ELSE pg_catalog.int8um(t.millis) END)::bigint \
         FROM (SELECT least($4, greatest(pg_catalog.numeric_mul(extract(epoch FROM \
         pg_catalog.current_setting('deadlock_timeout')::interval), CASE WHEN EXISTS(SELECT FROM pg_catalog.pg_locks l \
         WHERE pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) AND l.granted AND \
         pg_catalog.textne(l.locktype, 'virtualxid') AND \
         pg_catalog.int8ge(coalesce(l.relation::bigint, 16384), 16384)) THEN 1800 ELSE 900 END)::bigint, \
         CASE WHEN EXISTS(SELECT FROM \
         pg_catalog.pg_locks l WHERE pg_catalog.texteq(l.locktype, 'advisory') \
         AND pg_catalog.int8eq(l.classid::bigint, $1) \
         AND pg_catalog.int8eq(l.objid::bigint, $2) AND pg_catalog.int24eq(l.objsubid, $3) AND l.granted AND \
         pg_catalog.texteq(l.mode, 'ShareLock')) THEN $5 ELSE 1 END)) AS millis OFFSET 0) t /* ",
        ", ",
        ", ",
        ", ",
        ", ",
        " */",
    ];
    let [high, low, subid] = lock_row(key);
    let binds = [
        high,
        low,
        subid,
        Bind::BigInt(rest.into()),
        Bind::BigInt(long.into()),
    ];
    Statement::number(Prepared::ByText, &SQL, binds)
}

/// Waits one [turn](prepare_turn), in a block that catches the end of the turn, so that the server's log gets no line.
/// It fails if the wait fails. It does not answer whether the lock was granted: ask [`is_held`](super::is_held).
///
/// The block also catches a deadlock with a session that waits for this transaction to end, as in "ShareLock on virtual
/// transaction 3/17": that session goes on when the turn is over. Not so where the transaction began before this
/// message, because there it does not end with the turn. For a session's lock, the block first waits for the same lock
/// as the transaction's. `or_wait!` says why.
pub(in crate::postgres) fn turn(key: PostgresKey, mode: Mode, scope: Scope) -> String {
    const HIGH: &str = "pg_catalog.int8shl(pg_catalog.current_setting('dlock.high')::bigint, 32)";
    const LOW: &str = "pg_catalog.current_setting('dlock.low')::bigint";
    let key = match key {
        PostgresKey::BigInt(_) => format!("pg_catalog.int8or({HIGH}, {LOW})"),
        // Shifted back with their signs.
        PostgresKey::Pair(..) => format!(
            "pg_catalog.int8shr({HIGH}, 32)::int, pg_catalog.int8shr(pg_catalog.int8shl({LOW}, 32), 32)::int"
        ),
    };
    let shared = shared(mode);
    let take = match scope {
        // Last, because a cancel that comes after it would leave the lock behind.
        Scope::Session => {
            format!(" IF got THEN PERFORM pg_catalog.pg_advisory_lock{shared}({key}); END IF;")
        }
        Scope::Transaction => String::new(),
    };
    format!(
        "{WATCH_CLIENT}; DO $dlock$ DECLARE got pg_catalog.bool := false; detail pg_catalog.text; BEGIN BEGIN \
         PERFORM pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('dlock.millis'), true); \
         PERFORM pg_catalog.pg_advisory_xact_lock{shared}({key}); got := true; \
         EXCEPTION WHEN lock_not_available THEN NULL; \
         WHEN deadlock_detected THEN GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL; \
         IF pg_catalog.textregexne(detail, '[0-9]/[0-9]') OR \
         pg_catalog.timestamptz_ne(pg_catalog.now(), pg_catalog.statement_timestamp()) THEN RAISE; END IF; END;{take} \
         END $dlock$"
    )
}

/// Tells the [`turn`] of a message what [`prepare_turn`] has left in the session, which behind a pooler may be another
/// one. [`MILLIS`] stands for the length.
pub(in crate::postgres) fn tell_turn(key: PostgresKey) -> String {
    let (high, low) = high_and_low(key);
    format!(
        "SELECT pg_catalog.set_config('dlock.high', '{high}', true), \
         pg_catalog.set_config('dlock.low', '{low}', true), \
         pg_catalog.set_config('dlock.millis', '{MILLIS}', true)"
    )
}

/// Stands in a message for the milliseconds of its turn, until they are known.
pub(in crate::postgres) const MILLIS: &str = "{millis}";

/// Has the server leave the queue when the client is gone, which it would otherwise notice only at the end of the turn.
/// Some platforms cannot (<https://www.postgresql.org/docs/current/runtime-config-connection.html>). The setting is
/// read when a statement begins.
const WATCH_CLIENT: &str = "DO $dlock$ BEGIN \
    PERFORM pg_catalog.set_config('client_connection_check_interval', '200ms', true); \
    EXCEPTION WHEN OTHERS THEN NULL; END $dlock$";

/// Which limits of the user are lifted for a wait. `transaction_timeout` is the user's own where the transaction is,
/// and so it goes on after the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::postgres) enum Lift {
    Statement,
    StatementAndTransaction,
}

/// PostgreSQL 16 and older do not know it.
macro_rules! lift_transaction_timeout {
    () => {
        "pg_catalog.set_config('dlock.transaction_timeout', \
         coalesce(pg_catalog.current_setting('transaction_timeout', true), '0'), true), \
         CASE WHEN pg_catalog.textne(pg_catalog.current_setting('transaction_timeout', true), '0') \
         THEN pg_catalog.set_config('transaction_timeout', '0', true) END"
    };
}

macro_rules! put_back_transaction_timeout {
    () => {
        "CASE WHEN pg_catalog.textne(pg_catalog.current_setting('dlock.transaction_timeout'), '0') \
         THEN pg_catalog.set_config('transaction_timeout', pg_catalog.current_setting('dlock.transaction_timeout'), \
         true) END"
    };
}

/// Begins a transaction that lasts as long as its waits, until [`PUT_BACK_TRANSACTION_TIMEOUT`].
pub(in crate::postgres) const BEGIN_WITHOUT_TRANSACTION_TIMEOUT: &str =
    concat!("BEGIN; SELECT ", lift_transaction_timeout!());

/// From now on the user's limit counts.
pub(in crate::postgres) const PUT_BACK_TRANSACTION_TIMEOUT: &str =
    concat!("SELECT ", put_back_transaction_timeout!());

/// Lifts the limits that would cut a wait short and sets the wait's own, for the rest of the transaction or until
/// [`put_back`]. It fails on a standby, whose locks are its own.
fn limits(millis: u32, lift: Lift) -> String {
    let transaction = match lift {
        Lift::Statement => "",
        Lift::StatementAndTransaction => concat!(", ", lift_transaction_timeout!()),
    };
    format!(
        "SELECT pg_catalog.set_config('dlock.lock_timeout', pg_catalog.current_setting('lock_timeout'), true), \
         pg_catalog.set_config('dlock.statement_timeout', pg_catalog.current_setting('statement_timeout'), true), \
         pg_catalog.set_config('dlock.check_interval', \
         pg_catalog.current_setting('client_connection_check_interval'), true), \
         pg_catalog.set_config('lock_timeout', '{millis}', true), \
         pg_catalog.set_config('statement_timeout', '0', true), \
         CASE WHEN {HAS_OWN_LOCKS} THEN {IS_STANDBY}::pg_catalog.text END{transaction}"
    )
}

/// Puts back what [`limits`] and [`WATCH_CLIENT`] have changed. The transaction's own limit counts from then on.
fn put_back(lift: Lift) -> String {
    let transaction = match lift {
        Lift::Statement => "",
        Lift::StatementAndTransaction => concat!(", ", put_back_transaction_timeout!()),
    };
    format!(
        "SELECT pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('dlock.lock_timeout'), true), \
         pg_catalog.set_config('statement_timeout', pg_catalog.current_setting('dlock.statement_timeout'), true), \
         CASE WHEN pg_catalog.textne(pg_catalog.current_setting('client_connection_check_interval'), \
         pg_catalog.current_setting('dlock.check_interval')) THEN \
         pg_catalog.set_config('client_connection_check_interval', pg_catalog.current_setting('dlock.check_interval'), \
         true) END{transaction}"
    )
}

/// A wait without the limits that would cut it short, and with its own; afterwards they are as before. If it fails, the
/// transaction or savepoint that it stands in has to be undone.
pub(in crate::postgres) fn without_limits(millis: u32, lift: Lift, wait: &str) -> String {
    format!("{}; {wait}; {}", limits(millis, lift), put_back(lift))
}

/// The same for where going back to a savepoint puts the settings back.
pub(in crate::postgres) fn without_limits_until_undone(millis: u32, wait: &str) -> String {
    format!("{}; {wait}", limits(millis, Lift::Statement))
}

/// Waits for the lock, with the key as a constant. `or_wait!` says why a session's lock is taken last.
pub(in crate::postgres) fn wait(key: PostgresKey, mode: Mode, scope: Scope) -> String {
    let (shared, key) = (shared(mode), literal(key));
    let take = match scope {
        Scope::Session => {
            format!(", pg_catalog.pg_sleep(0), pg_catalog.pg_advisory_lock{shared}({key})")
        }
        Scope::Transaction => String::new(),
    };
    format!("SELECT pg_catalog.pg_advisory_xact_lock{shared}({key}){take}")
}
