//! The SQL text that calls dlock's own functions.
//!
//! No statement names a table. So once SQLite has read the schema, no statement takes a lock or a snapshot of the
//! database, however long it waits.

use super::key::SqliteKey;
use crate::Mode;
use crate::proto::{Bind, Binds, Columns, Condition, Prepared, Statement, unique};

/// The answer to a request: the lock is granted.
pub(super) const GRANTED: i64 = 1;
/// Another session has the lock.
pub(super) const BUSY: i64 = 0;
/// The request was given up by its number.
pub(super) const GIVEN_UP: i64 = -1;
/// No slot of a semaphore is free, or others wait for one.
pub(super) const NO_SLOT: i64 = -2;

/// The constraint of an error which says that this connection, or this database, can have no locks.
pub(super) const UNSUPPORTED: &str = "dlock_unsupported";
/// The constraint of an error which says that the holder of the lock waits for this session.
pub(super) const DEADLOCK: &str = "dlock_deadlock";

/// Rolls back the transaction that is open, if one is: ROLLBACK alone fails where there is none.
pub(super) const ROLL_BACK: &str = "SAVEPOINT dlock; ROLLBACK";

const NO_LIMIT: i64 = -1;

/// Asks for the lock and waits at most so many milliseconds, or without a limit:
/// [`GRANTED`], [`BUSY`] or [`GIVEN_UP`].
pub(super) fn acquire(key: SqliteKey, mode: Mode, millis: Option<u32>) -> Statement {
    let sql: &'static [&'static str] = match mode {
        Mode::Exclusive => &["SELECT dlock_acquire(", ", 1, ", ", ", ")"],
        Mode::Shared => &["SELECT dlock_acquire(", ", 0, ", ", ", ")"],
    };
    let millis = Bind::BigInt(millis.map_or(NO_LIMIT, i64::from));
    of_request(key, sql, [number(key.key), millis, request(key)])
}

/// Asks for a slot of a semaphore and waits at most so many milliseconds, or without a limit: the number of the slot,
/// [`NO_SLOT`] or [`GIVEN_UP`]. `another`: not one that the session has already.
pub(super) fn acquire_slot(
    gate: SqliteKey,
    (permits, another): (u32, bool),
    millis: Option<u32>,
) -> Statement {
    let sql: &'static [&'static str] = match another {
        false => &["SELECT dlock_acquire_slot(", ", ", ", 1, ", ", ", ")"],
        true => &["SELECT dlock_acquire_slot(", ", ", ", 0, ", ", ", ")"],
    };
    let millis = Bind::BigInt(millis.map_or(NO_LIMIT, i64::from));
    of_request(
        gate,
        sql,
        [
            number(gate.key),
            Bind::BigInt(permits.into()),
            millis,
            request(gate),
        ],
    )
}

/// 1; 0 where this session has no hold under this number.
pub(super) fn release(key: SqliteKey) -> Statement {
    of_request(
        key,
        &["SELECT dlock_release(", ", ", ")"],
        [number(key.key), request(key)],
    )
}

/// Whether this session has that hold: 1 or 0.
pub(super) fn is_held(key: SqliteKey) -> Statement {
    let sql = &["SELECT dlock_is_held(", ", ", ")"];
    Statement::number(Prepared::ByText, sql, [number(key.key), request(key)])
}

/// Whether this session has all of these holds: 1 or 0.
pub(super) fn all_held(holds: &[SqliteKey]) -> Statement {
    let sql = &["SELECT dlock_all_held(", ")"];
    Statement::number(Prepared::ByText, sql, [list(holds)])
}

/// Draws a number that is greater than all that were drawn before; 0 if this session does not have all of these holds.
pub(super) fn draw_token(holds: &[SqliteKey]) -> Statement {
    match *holds {
        [hold] => {
            let sql = &["SELECT dlock_fencing_token(", ", ", ")"];
            Statement::number(Prepared::ByText, sql, [number(hold.key), request(hold)])
        }
        _ => {
            let sql = &[
                "SELECT CASE WHEN dlock_all_held(",
                ") THEN dlock_fencing_token(",
                ", ",
                ") ELSE 0 END",
            ];
            let first = holds[0];
            let binds = [list(holds), number(first.key), request(first)];
            Statement::number(Prepared::ByText, sql, binds)
        }
    }
}

/// A condition for the user's own statements: whether this session has all of these holds. As a subquery it is asked
/// once for each statement, not for each row.
pub(super) fn held(holds: &[SqliteKey]) -> Condition {
    match *holds {
        [hold] => {
            let sql = &["(SELECT dlock_is_held(", ", ", "))"];
            Condition::new(sql, [number(hold.key), request(hold)])
        }
        _ => Condition::new(&["(SELECT dlock_all_held(", "))"], [list(holds)]),
    }
}

/// Several holds as one value: the numbers of each, all separated by spaces.
fn list(holds: &[SqliteKey]) -> Bind {
    let numbers = holds
        .iter()
        .map(|hold| format!("{} {}", hold.key, hold.request.0));
    Bind::Text(numbers.collect::<Vec<_>>().join(" "))
}

/// Who holds the lock and who waits for it, as one text.
pub(super) fn holders(key: u64) -> Statement {
    Statement::number(
        Prepared::ByText,
        &["SELECT dlock_holders(", ")"],
        [number(key)],
    )
    .columns(Columns::Text)
}

/// Who has a slot of the semaphore with this gate and who waits for one, as one text.
pub(super) fn slot_holders(gate: u64, permits: u32) -> Statement {
    Statement::number(
        Prepared::ByText,
        &["SELECT dlock_slot_holders(", ", ", ")"],
        [number(gate), Bind::BigInt(permits.into())],
    )
    .columns(Columns::Text)
}

/// The version, and what stands in the way of a lock, as lines. Each with its name.
pub(super) fn check() -> Vec<(&'static str, Statement)> {
    let version: &[&str] = &["SELECT 'version=' || sqlite_version()"];
    let locks: &[&str] = &["SELECT dlock_check(", ", ", ")"];
    let key = Bind::BigInt((unique() >> 3) as i64);
    let request = Bind::BigInt(unique() as i64);
    let ask = |sql, binds| Statement::number(Prepared::Never, sql, binds).columns(Columns::Text);
    vec![
        ("version", ask(version, Binds::default())),
        ("locks", ask(locks, Binds::from([key, request]))),
    ]
}

/// The driver gives the request up if the statement fails or nobody reads the answer.
fn of_request(key: SqliteKey, sql: &'static [&'static str], binds: impl Into<Binds>) -> Statement {
    Statement {
        request: Some(key.request),
        ..Statement::number(Prepared::ByText, sql, binds)
    }
}

fn number(key: u64) -> Bind {
    Bind::BigInt(key as i64)
}

fn request(key: SqliteKey) -> Bind {
    Bind::BigInt(key.request.0)
}
