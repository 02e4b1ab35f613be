//! The SQL text of PostgreSQL's locks.

use super::{Mark, Scope};
use crate::{Fence, Mode, OpenTransaction, Piece, PostgresKey, Statement};

/// The CONSTRAINT of the errors with which [`release_aborted`] tells what it did.
pub(super) const RELEASED: &str = "dlock_released";
pub(super) const NOT_HELD: &str = "dlock_not_held";

/// `pg_try_advisory_lock`: 1 or 0.
pub(super) fn try_lock(key: PostgresKey, mode: Mode, scope: Scope) -> Statement {
    let function = match (scope, mode) {
        (Scope::Session, Mode::Exclusive) => "SELECT pg_try_advisory_lock(",
        (Scope::Session, Mode::Shared) => "SELECT pg_try_advisory_lock_shared(",
        (Scope::Transaction, Mode::Exclusive) => "SELECT pg_try_advisory_xact_lock(",
        (Scope::Transaction, Mode::Shared) => "SELECT pg_try_advisory_xact_lock_shared(",
    };
    let statement = call(function, key);
    match scope {
        Scope::Session => statement.numbered(5 + form(key, mode)),
        Scope::Transaction => statement,
    }
}

/// One of four numbers.
fn form(key: PostgresKey, mode: Mode) -> u8 {
    match (key, mode) {
        (PostgresKey::BigInt(_), Mode::Exclusive) => 0,
        (PostgresKey::BigInt(_), Mode::Shared) => 1,
        (PostgresKey::Pair(..), Mode::Exclusive) => 2,
        (PostgresKey::Pair(..), Mode::Shared) => 3,
    }
}

/// The binds by their numbers, the mark and the key. Diesel puts them into the comment, so that the text is one piece,
/// which need not grow.
macro_rules! try_or_unlock {
    ($try:literal, $unlock:literal) => {
        concat!(
            "SELECT (CASE WHEN $1 = 0 THEN ",
            $unlock,
            " WHEN ",
            $try,
            " THEN set_config('dlock.granted', $1::text, false) IS NOT NULL ELSE false END)::int::bigint /* "
        )
    };
}

/// [`try_lock`] of a session's lock, which leaves the mark in the session if it was granted; without a mark, [`unlock`].
///
/// It is one text for both, so that the driver, which would first have to prepare another, sends the release in one
/// message: that is obeyed even if the future that sent it is dropped.
pub(super) fn try_or_unlock(key: PostgresKey, mode: Mode, mark: Option<Mark>) -> Statement {
    let text = match (key, mode) {
        (PostgresKey::BigInt(_), Mode::Exclusive) => {
            try_or_unlock!("pg_try_advisory_lock($2)", "pg_advisory_unlock($2)")
        }
        (PostgresKey::BigInt(_), Mode::Shared) => try_or_unlock!(
            "pg_try_advisory_lock_shared($2)",
            "pg_advisory_unlock_shared($2)"
        ),
        (PostgresKey::Pair(..), Mode::Exclusive) => {
            try_or_unlock!("pg_try_advisory_lock($2, $3)", "pg_advisory_unlock($2, $3)")
        }
        (PostgresKey::Pair(..), Mode::Shared) => try_or_unlock!(
            "pg_try_advisory_lock_shared($2, $3)",
            "pg_advisory_unlock_shared($2, $3)"
        ),
    };
    let mark = mark.map_or(0, |Mark(mark)| mark.get());
    let mut pieces = Vec::with_capacity(PIECES);
    pieces.extend([text.into(), Piece::BigInt(mark)]);
    push_call(&mut pieces, ", ", key, " */");
    Statement::cached(pieces).numbered(form(key, mode))
}

/// Releases the lock if the request with this mark was granted.
pub(super) fn release_if_granted(key: PostgresKey, mode: Mode, Mark(mark): Mark) -> String {
    format!(
        "SELECT CASE WHEN current_setting('dlock.granted', true) = '{mark}' THEN {} END",
        unlock_text(key, mode)
    )
}

/// Releases a lock where nobody reads the answer.
pub(super) fn release_unread(key: PostgresKey, mode: Mode, transaction: OpenTransaction) -> String {
    let unlock = format!("SELECT {}", unlock_text(key, mode));
    match transaction {
        OpenTransaction::None => unread(&unlock),
        OpenTransaction::RollBack => format!("ROLLBACK; {}", unread(&unlock)),
        OpenTransaction::Keep => unlock,
    }
}

/// A message for outside a transaction that `statement_timeout` does not cut short: nobody would know.
pub(super) fn unread(statement: &str) -> String {
    format!("SELECT set_config('statement_timeout', '0', true); {statement}")
}

/// `pg_advisory_unlock`: 1 or 0.
pub(super) fn unlock(key: PostgresKey, mode: Mode) -> Statement {
    let function = match mode {
        Mode::Exclusive => "SELECT pg_advisory_unlock(",
        Mode::Shared => "SELECT pg_advisory_unlock_shared(",
    };
    call(function, key).numbered(9 + form(key, mode))
}

fn call(function: &'static str, key: PostgresKey) -> Statement {
    let mut pieces = Vec::with_capacity(PIECES);
    push_call(&mut pieces, function, key, ")::int::bigint");
    Statement::cached(pieces)
}

/// Of the longest statement that is sent often.
const PIECES: usize = 7;

fn push_call(pieces: &mut Vec<Piece>, before: &'static str, key: PostgresKey, after: &'static str) {
    pieces.push(before.into());
    match key {
        PostgresKey::BigInt(key) => pieces.push(Piece::BigInt(key)),
        PostgresKey::Pair(first, second) => {
            pieces.extend([Piece::Integer(first), ", ".into(), Piece::Integer(second)]);
        }
    }
    pieces.push(after.into());
}

/// Whether this session holds the lock in this mode: 1 or 0.
pub(super) fn is_held(key: PostgresKey, mode: Mode) -> Statement {
    let mut pieces = vec!["SELECT (EXISTS(".into()];
    pieces.extend(own_hold(key, mode));
    pieces.push("))::int::bigint".into());
    Statement::cached(pieces)
}

/// Releases the one hold that an interrupted wait may have left: 1 if there was one, NULL if not. It does not call
/// `pg_advisory_unlock` for nothing, which writes a warning into the server's log.
pub(super) fn reclaim(key: PostgresKey, mode: Mode) -> Statement {
    let mut pieces = vec!["SELECT CASE WHEN EXISTS(".into()];
    pieces.extend(own_hold(key, mode));
    pieces.push(format!(") THEN {}::int::bigint END", unlock_text(key, mode)).into());
    // Its text holds the key.
    Statement::uncached(pieces)
}

/// The session's own locks are in its own database. To look that up in `pg_database` would need a place in the table of
/// locks, which may be full.
fn own_hold(key: PostgresKey, mode: Mode) -> Vec<Piece> {
    let mut pieces = vec!["SELECT FROM pg_locks l WHERE ".into()];
    pieces.extend(lock_rows(key));
    pieces.push(match mode {
        Mode::Exclusive => {
            " AND l.pid = pg_backend_pid() AND l.granted AND l.mode = 'ExclusiveLock'".into()
        }
        Mode::Shared => {
            " AND l.pid = pg_backend_pid() AND l.granted AND l.mode = 'ShareLock'".into()
        }
    });
    pieces
}

/// The rows of `pg_locks l` that belong to a key, in any database.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
fn lock_rows(key: PostgresKey) -> Vec<Piece> {
    let (high, low, subid) = match key {
        PostgresKey::BigInt(key) => ((key >> 32) as u32, key as u32, 1),
        PostgresKey::Pair(first, second) => (first as u32, second as u32, 2),
    };
    vec![
        "l.locktype = 'advisory' AND l.classid::bigint = ".into(),
        Piece::BigInt(high.into()),
        " AND l.objid::bigint = ".into(),
        Piece::BigInt(low.into()),
        " AND l.objsubid = ".into(),
        Piece::Integer(subid),
    ]
}

/// Who holds the lock or waits for it, holders first, then waiters in the order in which they came.
pub(super) fn holders(key: PostgresKey) -> Statement {
    let mut pieces = vec![
        "SELECT l.pid::bigint, a.application_name, a.usename::text, \
         (l.mode = 'ExclusiveLock')::int::bigint, l.granted::int::bigint, \
         (extract(epoch FROM coalesce(l.waitstart, a.xact_start, a.state_change)) * 1000000)::bigint \
         FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid WHERE "
            .into(),
    ];
    pieces.extend(lock_rows(key));
    pieces.push(
        " AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) \
         ORDER BY l.granted DESC, l.waitstart, l.pid"
            .into(),
    );
    Statement::cached(pieces)
}

/// Waits in the server's queue, for `millis` or without a limit, as one message, outside a transaction. It fails with
/// the SQLSTATE as the error's CONSTRAINT.
///
/// - The lock is waited for as one of the (implicit) transaction, and only then taken as one of the session, which does
///   not wait any more. For if the server grants a session's lock just as `lock_timeout` or a cancel fires, the
///   statement fails and the lock stays; a transaction's lock goes with the transaction. Measured on 15, 17 and 18.
/// - `statement_timeout` cannot be changed for the statement that runs, so the one before does it.
/// - In a transaction that somebody has begun with a raw BEGIN all this would stay; so it is refused there.
pub(super) fn wait(key: PostgresKey, mode: Mode, millis: Option<u32>) -> String {
    format!(
        "DO $dlock$ BEGIN PERFORM CASE {UNLESS_NEW} END, {}, {}; {WATCH_CLIENT}; END $dlock$; {}",
        lift("statement_timeout"),
        lift("transaction_timeout"),
        block(&wait_and_keep(key, mode, millis))
    )
}

/// [`wait`] in an open transaction. All of it stands behind a savepoint, so that a failure can be undone, and the
/// savepoint stays, so that the lock can be released if the transaction is aborted later.
pub(super) fn wait_fenced(
    key: PostgresKey,
    mode: Mode,
    millis: Option<u32>,
    fence: Fence,
) -> String {
    let wait_and_keep = wait_and_keep(key, mode, millis);
    // The inner block is rolled back, which undoes its setting and the transaction's lock; the session's stays.
    format!(
        "SAVEPOINT {fence}; DO $dlock$ BEGIN {BEFORE_WAIT}; {WATCH_CLIENT}; END $dlock$; {}",
        block(&format!(
            "BEGIN {wait_and_keep} RAISE EXCEPTION USING ERRCODE = 'DL000'; \
             EXCEPTION WHEN SQLSTATE 'DL000' THEN NULL; END; {AFTER_WAIT};"
        ))
    )
}

/// [`wait`] for a lock of the open transaction.
pub(super) fn wait_for_transaction(
    key: PostgresKey,
    mode: Mode,
    millis: Option<u32>,
    fence: Fence,
) -> String {
    format!(
        "SAVEPOINT {fence}; DO $dlock$ BEGIN {BEFORE_WAIT}; {WATCH_CLIENT}; END $dlock$; {}; RELEASE SAVEPOINT {fence}",
        block(&wait_in_transaction(key, mode, millis))
    )
}

/// One statement, so that nothing is left to be planned after the grant; its columns are computed in their order.
///
/// `pg_sleep(0)` does nothing but look whether the statement is to be ended. A limit that has passed just as the lock was
/// granted is noticed there, and not only after the session has the lock, too (3 times in 5,000 when aimed at; 18).
fn wait_and_keep(key: PostgresKey, mode: Mode, millis: Option<u32>) -> String {
    format!(
        "PERFORM {}, {}, pg_sleep(0), {};",
        limit(millis),
        lock_text(key, mode, Scope::Transaction),
        lock_text(key, mode, Scope::Session)
    )
}

/// Sets the limit of a wait, if it is another one: settings that are as they were need not be put back after the grant.
fn limit(millis: Option<u32>) -> String {
    match millis {
        Some(millis) => format!("set_config('lock_timeout', '{millis}', true)"),
        None => lift("lock_timeout"),
    }
}

/// Has the server leave the queue when the client is gone, which it would else notice only after the grant. Some
/// platforms cannot (<https://www.postgresql.org/docs/current/runtime-config-connection.html>).
const WATCH_CLIENT: &str = "BEGIN \
    PERFORM set_config('client_connection_check_interval', '200ms', true); \
    EXCEPTION WHEN OTHERS THEN NULL; END";

/// 16 and before do not know `transaction_timeout`. Put back, it counts from then on.
fn lift(timeout: &str) -> String {
    format!(
        "CASE WHEN current_setting('{timeout}', true) <> '0' THEN set_config('{timeout}', '0', true) END"
    )
}

/// Lifts what would cut a wait short, and keeps it and what [`WATCH_CLIENT`] sets for [`AFTER_WAIT`].
const BEFORE_WAIT: &str = "PERFORM \
    set_config('dlock.check_interval', current_setting('client_connection_check_interval'), true), \
    set_config('dlock.statement_timeout', current_setting('statement_timeout'), true), \
    set_config('statement_timeout', '0', true)";

/// Puts the settings back, in a transaction that goes on.
const AFTER_WAIT: &str = "PERFORM \
    set_config('client_connection_check_interval', current_setting('dlock.check_interval'), true), \
    set_config('statement_timeout', current_setting('dlock.statement_timeout'), true)";

/// A block that puts the SQLSTATE of what fails in it into the error's CONSTRAINT.
fn block(body: &str) -> String {
    format!(
        "DO $dlock$ BEGIN {body} EXCEPTION WHEN query_canceled OR OTHERS THEN \
         RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM, CONSTRAINT = SQLSTATE; END $dlock$"
    )
}

/// Waits for a lock of the transaction, and leaves its settings as they were.
fn wait_in_transaction(key: PostgresKey, mode: Mode, millis: Option<u32>) -> String {
    format!(
        "DECLARE before text := current_setting('lock_timeout'); \
         BEGIN PERFORM {}, {}, set_config('lock_timeout', before, true); {AFTER_WAIT}; END;",
        limit(millis),
        lock_text(key, mode, Scope::Transaction)
    )
}

/// Undoes a failed wait in an open transaction.
pub(super) fn undo(fence: Fence) -> String {
    format!("ROLLBACK TO SAVEPOINT {fence}; RELEASE SAVEPOINT {fence}")
}

/// Back to before a wait in an open transaction, and a statement there.
pub(super) fn back_to(fence: Fence, statement: &str) -> String {
    format!("ROLLBACK TO SAVEPOINT {fence}; {statement}")
}

/// Begins a transaction and takes the lock as one message, if that can be done at once: the lock is free, and the
/// transaction is at READ COMMITTED. Otherwise it fails.
///
/// At the other levels the transaction would see what was true before the lock was granted: its snapshot is taken as
/// the statement starts. The division by zero fails, and the comment tells whoever reads the server's log why.
///
/// If somebody has sent a BEGIN of which Diesel does not know, the transaction is older than this message. That is told
/// by the cast, whose error has the CONSTRAINT [`NOT_NEW`], for that transaction must not be rolled back.
///
/// The text is parsed and planned each time, so it calls as few functions as it can: each takes a microsecond or two.
pub(super) fn begin(key: PostgresKey, mode: Mode) -> String {
    let try_lock = match mode {
        Mode::Exclusive => format!("pg_try_advisory_xact_lock({})", literal(key)),
        Mode::Shared => format!("pg_try_advisory_xact_lock_shared({})", literal(key)),
    };
    format!(
        "BEGIN; /* dlock: an error here says that the lock is taken, or isolation is not read committed */ \
         SELECT (CASE WHEN CURRENT_TIMESTAMP = statement_timestamp() \
         THEN 1 / (current_setting('transaction_isolation') = 'read committed' AND {try_lock})::int ELSE -1 END)\
         ::information_schema.cardinal_number"
    )
}

/// Fails with the CONSTRAINT [`NOT_NEW`] in a transaction that is older than this message.
const UNLESS_NEW: &str = "WHEN now() <> statement_timestamp() \
    THEN (-pg_backend_pid())::information_schema.cardinal_number::int";

/// With it, `UNLESS_NEW` has found a transaction of somebody else.
///
/// It is the constraint of `information_schema.cardinal_number`, a domain that every database has: its numbers are not
/// negative. A cast to it turns an answer into an error that Diesel tells from others.
pub(super) const NOT_NEW: &str = "cardinal_number_domain_check";

/// The SQLSTATE with which [`begin_waiting`] refuses an isolation level.
pub(super) const ISOLATION: &str = "DL001";

/// Ends the aborted transaction that [`begin`] has left, begins another and waits for the lock in it, as one message.
/// It fails with the SQLSTATE as the error's CONSTRAINT, in an aborted transaction.
pub(super) fn begin_waiting(key: PostgresKey, mode: Mode, millis: Option<u32>) -> String {
    let wait = wait_in_transaction(key, mode, millis);
    format!(
        "ROLLBACK; BEGIN; DO $dlock$ BEGIN \
         PERFORM set_config('dlock.transaction_timeout', coalesce(current_setting('transaction_timeout', true), ''), true), \
         {}; {BEFORE_WAIT}; {WATCH_CLIENT}; END $dlock$; {}",
        lift("transaction_timeout"),
        block(&format!(
            "IF current_setting('transaction_isolation') <> 'read committed' THEN RAISE EXCEPTION USING \
             ERRCODE = '{ISOLATION}', MESSAGE = 'dlock: isolation is not read committed'; END IF; {wait} \
             IF current_setting('dlock.transaction_timeout') <> '' THEN PERFORM \
             set_config('transaction_timeout', current_setting('dlock.transaction_timeout'), true); END IF;"
        ))
    )
}

/// Begins a transaction and makes the lock that the session holds the transaction's.
pub(super) fn begin_holding(key: PostgresKey, mode: Mode) -> String {
    format!(
        "BEGIN; SELECT {}, {}",
        lock_text(key, mode, Scope::Transaction),
        unlock_text(key, mode)
    )
}

/// Releases a session's lock in the open transaction in which it was acquired. The savepoint goes first: if that fails,
/// the transaction had been aborted, and the savepoint is still there for [`release_aborted`]; if the unlock fails, it
/// is not, and so nothing is released twice.
pub(super) fn unlock_fenced(key: PostgresKey, mode: Mode, fence: Fence) -> String {
    format!(
        "RELEASE SAVEPOINT {fence}; SELECT set_config('dlock.unlocked', {}::int::text, true)",
        unlock_text(key, mode)
    )
}

/// What [`unlock_fenced`] has done: 1 or 0.
pub(super) fn unlocked() -> Statement {
    Statement::cached(vec![
        "SELECT current_setting('dlock.unlocked')::bigint".into(),
    ])
}

/// Releases a session's lock in an aborted transaction, where the server obeys nothing but a rollback: back to our
/// savepoint, unlock, and abort again, so that all else is as before. The error's CONSTRAINT is [`RELEASED`] or
/// [`NOT_HELD`].
pub(super) fn release_aborted(key: PostgresKey, mode: Mode, fence: Fence) -> String {
    format!(
        "ROLLBACK TO SAVEPOINT {fence}; DO $dlock$ BEGIN RAISE EXCEPTION USING \
         ERRCODE = 'in_failed_sql_transaction', \
         MESSAGE = 'dlock: the lock is released and the transaction stays aborted', \
         CONSTRAINT = CASE WHEN {} THEN '{RELEASED}' ELSE '{NOT_HELD}' END; END $dlock$",
        unlock_text(key, mode)
    )
}

fn lock_text(key: PostgresKey, mode: Mode, scope: Scope) -> String {
    let function = match (scope, mode) {
        (Scope::Session, Mode::Exclusive) => "pg_advisory_lock",
        (Scope::Session, Mode::Shared) => "pg_advisory_lock_shared",
        (Scope::Transaction, Mode::Exclusive) => "pg_advisory_xact_lock",
        (Scope::Transaction, Mode::Shared) => "pg_advisory_xact_lock_shared",
    };
    format!("{function}({})", literal(key))
}

fn unlock_text(key: PostgresKey, mode: Mode) -> String {
    match mode {
        Mode::Exclusive => format!("pg_advisory_unlock({})", literal(key)),
        Mode::Shared => format!("pg_advisory_unlock_shared({})", literal(key)),
    }
}

/// Quoted and cast, since a bare -9223372036854775808 is a numeric to PostgreSQL.
fn literal(key: PostgresKey) -> String {
    match key {
        PostgresKey::BigInt(key) => format!("'{key}'::bigint"),
        PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
    }
}
