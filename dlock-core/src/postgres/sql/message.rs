//! Messages around a lock: transactions, savepoints, releases, and what is sent without reading an answer.

use std::time::Duration;

use super::parts::{HAS_OWN_LOCKS, Scope, literal, shared, unlock_text};
use super::prepared::transaction_timeout_is_set;
use super::tokens::IS_STANDBY;
use super::turn::{turn, wait, without_limits_until_undone};
use crate::postgres::mark::Mark;
use crate::proto::{Bind, OpenTransaction, Prepared, Savepoint, Statement, unique_nonzero};
use crate::{Mode, PostgresKey};

/// Whatever the answer is, a session that is there gives one.
pub(in crate::postgres) const ARE_YOU_THERE: &str = "SELECT 1";

/// Ends the session. The transaction may be aborted, and then nothing but ROLLBACK is obeyed. A role that was taken on
/// (SET ROLE) may not end a session of the role that logged in.
pub(in crate::postgres) const END_SESSION: &str = "ROLLBACK; RESET SESSION AUTHORIZATION; \
    SET ROLE NONE; SELECT pg_catalog.pg_advisory_unlock_all(); \
    SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())";

/// Ends the session where the role may not do that. It needs no privilege. PostgreSQL 13 and older do not know it.
pub(in crate::postgres) const END_IDLE_SESSION: &str =
    "SELECT pg_catalog.set_config('idle_session_timeout', '1', false)";

/// After a failed wait that left nothing: [`CUT_SHORT`] if `statement_timeout` explains it, and otherwise 1 if the
/// server has such locks. It takes one that nobody else has, without waiting, until the end of the transaction.
pub(in crate::postgres) fn probe(passed: Duration) -> Statement {
    const SQL: [&str; 3] = [
        "SELECT (CASE WHEN pg_catalog.textne(pg_catalog.current_setting('statement_timeout'), '0') AND \
         pg_catalog.interval_le(pg_catalog.current_setting('statement_timeout')::interval, \
         pg_catalog.textcat($1::pg_catalog.text, 'ms')::interval) THEN 2 \
         WHEN pg_catalog.pg_try_advisory_xact_lock($2) IS NOT NULL THEN 1 END)::bigint /* ",
        ", ",
        " */",
    ];
    let passed = passed.as_millis().try_into().unwrap_or(i64::MAX);
    let binds = [Bind::BigInt(passed), Bind::BigInt(unique_nonzero().get())];
    Statement::number(Prepared::Never, &SQL, binds)
}

/// Takes a session's lock without waiting, or fails with a token: for where an answer cannot be read.
///
/// CockroachDB grants a session's lock to everybody. Of these functions it lacks only `texteq`. If a later version has
/// it, `crdb_version` still refuses.
fn try_or_fail(key: PostgresKey, mode: Mode) -> String {
    format!(
        "SELECT CASE WHEN {HAS_OWN_LOCKS} OR pg_catalog.current_setting('crdb_version', true) IS NOT NULL \
         THEN {IS_STANDBY}::pg_catalog.text \
         WHEN pg_catalog.pg_try_advisory_lock{}({}) THEN '' \
         ELSE pg_catalog.concat('dlock_taken')::pg_catalog.json::pg_catalog.text END",
        shared(mode),
        literal(key)
    )
}

/// [`probe`] inside a transaction, where `statement_timeout` was lifted: it fails if there are no such locks.
pub(in crate::postgres) fn probe_inside(savepoint: &Savepoint) -> String {
    format!(
        "SAVEPOINT {savepoint}; SELECT pg_catalog.pg_try_advisory_xact_lock('{}'); {}",
        unique_nonzero(),
        undo(savepoint)
    )
}

/// Waits for a session's lock inside a transaction, or with 0 milliseconds only tries. The savepoint stays.
pub(in crate::postgres) fn wait_inside(
    savepoint: &Savepoint,
    key: PostgresKey,
    mode: Mode,
    millis: u32,
) -> String {
    if millis == 0 {
        return format!("SAVEPOINT {savepoint}; {}", try_or_fail(key, mode));
    }
    let wait = without_limits_until_undone(millis, &wait(key, mode, Scope::Session));
    // Going back undoes the settings and the transaction's lock; the session's lock stays.
    format!("SAVEPOINT {savepoint}; {wait}; ROLLBACK TO SAVEPOINT {savepoint}")
}

/// A [`turn`] inside a transaction. Afterwards the savepoint has gone.
pub(in crate::postgres) fn turn_inside(
    savepoint: &Savepoint,
    key: PostgresKey,
    mode: Mode,
    rest: u32,
) -> String {
    let wait = without_limits_until_undone(rest, &turn(key, mode, Scope::Session));
    format!("SAVEPOINT {savepoint}; {wait}; {}", undo(savepoint))
}

/// Leaves the mark in the session.
pub(in crate::postgres) fn leave_mark(mark: Mark) -> String {
    format!("SELECT pg_catalog.set_config('dlock.granted', '{mark}', false)")
}

/// Releases the lock if the request with this mark was granted, and only once: it is sent twice. It answers without a
/// row, so that no cancel can make it fail, and take back that the mark has gone, after it has released. See
/// `no_row_if!`.
pub(in crate::postgres) fn release_if_granted(key: PostgresKey, mode: Mode, mark: &str) -> String {
    unread(&format!(
        "SELECT WHERE NOT CASE WHEN pg_catalog.texteq(pg_catalog.current_setting('dlock.granted', true), '{mark}') \
         AND pg_catalog.set_config('dlock.granted', '', false) IS NOT NULL THEN {} IS NOT NULL ELSE true END",
        unlock_text(key, mode)
    ))
}

/// Releases a lock where nobody reads the answer.
pub(in crate::postgres) fn release_unread(
    key: PostgresKey,
    mode: Mode,
    transaction: OpenTransaction,
) -> String {
    let unlock = format!("SELECT {}", unlock_text(key, mode));
    match transaction {
        OpenTransaction::None => unread(&unlock),
        OpenTransaction::RollBack => format!("ROLLBACK; {}", unread(&unlock)),
        OpenTransaction::Keep => unlock,
    }
}

/// A message for outside a transaction that `statement_timeout` does not cut short: nobody would know.
pub(in crate::postgres) fn unread(statement: &str) -> String {
    format!("SELECT pg_catalog.set_config('statement_timeout', '0', true); {statement}")
}

/// Undoes a failed wait in an open transaction.
pub(in crate::postgres) fn undo(savepoint: &Savepoint) -> String {
    format!("ROLLBACK TO SAVEPOINT {savepoint}; RELEASE SAVEPOINT {savepoint}")
}

/// Begins a transaction, takes the lock and waits for it where it must, as one message: at READ COMMITTED. Where it
/// cannot, it fails with a token: on a standby, whose locks are its own; at the other levels, because there the
/// transaction would see what was true before the lock was granted (its snapshot is taken when the statement starts);
/// where the user's `transaction_timeout` might end the session in the middle of the wait; and where the lock is taken
/// and no wait was asked for.
///
/// The text is parsed and planned each time: each function costs a microsecond or so, also in a branch that is not
/// taken. So all but the free lock at READ COMMITTED stands in a text, which `query_to_xml` executes only where it is
/// needed. The text has no columns and never a row, so it needs no XML library, and its result is empty.
pub(in crate::postgres) fn begin(key: PostgresKey, mode: Mode, millis: u32) -> String {
    const READ_COMMITTED: &str =
        "pg_catalog.texteq(pg_catalog.current_setting('transaction_isolation'), 'read committed')";
    let (shared, key) = (shared(mode), literal(key));
    let wait = match millis {
        // `concat` is not evaluated by the planner.
        0 => "pg_catalog.concat('dlock_taken')::pg_catalog.json IS NULL".to_owned(),
        _ => format!(
            "CASE WHEN {} THEN pg_catalog.concat('dlock_cut_short')::pg_catalog.json IS NULL ELSE \
             pg_catalog.set_config('lock_timeout', pg_catalog.format('%s', pg_catalog.current_setting('lock_timeout'), \
             pg_catalog.set_config('lock_timeout', '{millis}', true), \
             pg_catalog.pg_advisory_xact_lock{shared}({key})), true) IS NULL END",
            transaction_timeout_is_set!()
        ),
    };
    format!(
        "BEGIN; SELECT pg_catalog.query_to_xml($dlock$SELECT WHERE CASE \
         WHEN {HAS_OWN_LOCKS} THEN {IS_STANDBY} IS NULL WHEN {READ_COMMITTED} THEN {wait} \
         ELSE pg_catalog.current_setting('transaction_isolation')::pg_catalog.json IS NULL END$dlock$, \
         true, true, '') WHERE NOT CASE WHEN {HAS_OWN_LOCKS} THEN false \
         WHEN {READ_COMMITTED} THEN pg_catalog.pg_try_advisory_xact_lock{shared}({key}) ELSE false END"
    )
}

/// Begins a transaction that holds the lock, whatever its isolation level, as one message: a first transaction takes
/// the session's lock, waiting so many milliseconds, and a second one, whose snapshot is younger, takes it over. It
/// fails in the first one if the wait fails. Settings end with the first one.
pub(in crate::postgres) fn begin_isolated(key: PostgresKey, mode: Mode, millis: u32) -> String {
    format!(
        "ROLLBACK; BEGIN; SELECT pg_catalog.set_config('statement_timeout', '0', true), \
         pg_catalog.set_config('lock_timeout', '{millis}', true), \
         CASE WHEN {} THEN pg_catalog.set_config('transaction_timeout', '0', true) END; {}; COMMIT AND CHAIN; {}",
        transaction_timeout_is_set!(),
        wait(key, mode, Scope::Session),
        hand_over(key, mode)
    )
}

/// Releases a session's lock in the open transaction in which it was acquired. The savepoint goes first: if that fails,
/// the transaction had been aborted, and the savepoint is still there for [`release_aborted`]; if the unlock fails, it
/// is not, and so nothing is released twice.
pub(in crate::postgres) fn unlock_behind(
    savepoint: &Savepoint,
    key: PostgresKey,
    mode: Mode,
) -> String {
    format!(
        "RELEASE SAVEPOINT {savepoint}; SELECT pg_catalog.set_config('dlock.unlocked', {}::int::pg_catalog.text, true)",
        unlock_text(key, mode)
    )
}

/// What [`unlock_behind`] has done: 1 or 0.
pub(in crate::postgres) fn unlocked() -> Statement {
    Statement::number(
        Prepared::ByText,
        &["SELECT pg_catalog.current_setting('dlock.unlocked')::bigint"],
        [],
    )
}

/// Releases a session's lock in an aborted transaction, where the server obeys nothing but a rollback: back to our
/// savepoint, unlock, and abort again, so that all else is as before. It fails with a token.
pub(in crate::postgres) fn release_aborted(
    savepoint: &Savepoint,
    key: PostgresKey,
    mode: Mode,
) -> String {
    format!(
        "ROLLBACK TO SAVEPOINT {savepoint}; \
         SELECT (CASE WHEN {} THEN 'dlock_released' ELSE 'dlock_not_held' END)::pg_catalog.json",
        unlock_text(key, mode)
    )
}

/// Makes the lock that the session holds a transaction's.
pub(in crate::postgres) fn hand_over(key: PostgresKey, mode: Mode) -> String {
    format!(
        "SELECT pg_catalog.pg_advisory_xact_lock{}({}), {}",
        shared(mode),
        literal(key),
        unlock_text(key, mode)
    )
}
