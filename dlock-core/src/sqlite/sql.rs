//! The SQL text of dlock's own functions. No statement names a table, so that none takes a lock or a snapshot of the
//! database, however long it waits, once SQLite has read the schema.

use super::SqliteKey;
use crate::{Mode, Piece, Statement};

/// Waits as long as it takes.
pub(super) const NO_LIMIT: i64 = -1;

/// Rolls back the transaction that is open, if one is: ROLLBACK alone fails where there is none.
pub(super) const ROLL_BACK: &str = "SAVEPOINT dlock; ROLLBACK";

const ACQUIRE: &str = "SELECT dlock_acquire(";
const RELEASE: &str = "SELECT dlock_release(";

/// Asks for the lock and waits that many milliseconds: [`GRANTED`](super::Sqlite::GRANTED) or one of the
/// others.
pub(super) fn acquire(key: SqliteKey, mode: Mode, millis: i64) -> Statement {
    Statement::cached(vec![
        ACQUIRE.into(),
        number(key),
        match mode {
            Mode::Exclusive => ", 1, ",
            Mode::Shared => ", 0, ",
        }
        .into(),
        Piece::BigInt(millis),
        ", ".into(),
        Piece::BigInt(key.request),
        ")".into(),
    ])
}

/// The request of [`acquire`] and [`release`].
pub(super) fn request(statement: &Statement) -> Option<i64> {
    match statement.pieces.as_slice() {
        [first, .., Piece::BigInt(request), _]
            if *first == ACQUIRE.into() || *first == RELEASE.into() =>
        {
            Some(*request)
        }
        _ => None,
    }
}

/// Whether it is [`release`].
pub(super) fn is_release(statement: &Statement) -> bool {
    statement.pieces.first() == Some(&RELEASE.into())
}

/// 1; 0 where this session has no hold under this number.
pub(super) fn release(key: SqliteKey) -> Statement {
    hold(RELEASE, key)
}

/// Whether this session has that hold: 1 or 0.
pub(super) fn is_held(key: SqliteKey) -> Statement {
    hold("SELECT dlock_is_held(", key)
}

/// Who holds the lock and who waits for it, as one text.
pub(super) fn holders(key: SqliteKey) -> Statement {
    Statement::cached(vec![
        "SELECT dlock_holders(".into(),
        number(key),
        ")".into(),
    ])
}

fn hold(before: &'static str, key: SqliteKey) -> Statement {
    Statement::cached(vec![
        before.into(),
        number(key),
        ", ".into(),
        Piece::BigInt(key.request),
        ")".into(),
    ])
}

fn number(key: SqliteKey) -> Piece {
    Piece::BigInt(key.key as i64)
}
