//! What sync and async connections share, for `dlock-diesel-async`. It is not part of the API.

use std::time::Duration;

use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::{Answer, Holder, LockKey, Nonce, Reason};

use crate::Error;
pub use crate::query::{CoreQuery, HolderColumns, HolderRow, Value, to_holder};

/// How often a process that waits for its turn to migrate asks, unless it is told.
#[cfg(feature = "migrations")]
pub const MIGRATION_INTERVAL: Duration = Duration::from_millis(100);

/// What the machine is told. The first error is kept: it is the one to report.
pub fn answer(answer: QueryResult<Answer>, first_error: &mut Option<DieselError>) -> Answer {
    answer.unwrap_or_else(|error| {
        let answer = match is_out_of_step(&error) {
            true => Answer::OutOfStep,
            false => Answer::Error(constraint_of(&error)),
        };
        first_error.get_or_insert(error);
        answer
    })
}

/// The value that a statement was answered with, or an error if it is the answer to another one.
pub fn check(nonce: Option<Nonce>, answer: Option<i64>) -> QueryResult<Option<i64>> {
    match nonce {
        Some(nonce) => nonce
            .check(answer)
            .map_err(|_| DieselError::DeserializationError(Box::new(OutOfStep))),
        None => Ok(answer),
    }
}

/// Whether the connection gave the answer to another question.
fn is_out_of_step(error: &DieselError) -> bool {
    match error {
        DieselError::DeserializationError(error) => error.is::<OutOfStep>(),
        _ => false,
    }
}

#[derive(Debug, thiserror::Error)]
#[error(
    "the connection gave the answer to an earlier query: a future was dropped that waited for it, and the connection is \
     not fit for use any more"
)]
struct OutOfStep;

/// The error of a failure.
pub fn failed(reason: Reason, key: LockKey, error: Option<DieselError>) -> Error {
    if reason == Reason::NotHeld {
        return Error::NotHeld { key };
    }
    if reason == Reason::InTransaction {
        return Error::InTransaction { key };
    }
    if reason == Reason::Interrupted {
        return Error::Interrupted { key, source: error };
    }
    let source = error.unwrap_or_else(|| {
        DieselError::DeserializationError("the server answered with an unexpected value".into())
    });
    match reason {
        Reason::Deadlock => Error::Deadlock { key, source },
        Reason::TooManyLocks => Error::TooManyLocks { key, source },
        Reason::Unsupported => Error::Unsupported { key, source },
        _ => Error::Database(source),
    }
}

/// The field of an error in which the core's SQL puts the SQLSTATE.
fn constraint_of(error: &DieselError) -> Option<String> {
    match error {
        DieselError::DatabaseError(_, info) => info.constraint_name().map(str::to_owned),
        _ => None,
    }
}

/// The limit has passed.
pub fn timeout(key: LockKey, waited: Duration, holders: Vec<Holder>) -> Error {
    Error::Timeout {
        key,
        waited,
        holders,
    }
}

/// A transaction is open.
pub fn in_transaction(key: &LockKey) -> Error {
    Error::InTransaction { key: key.clone() }
}

/// No transaction is open.
pub fn not_in_transaction(key: &LockKey) -> Error {
    Error::NotInTransaction { key: key.clone() }
}

/// What futures and guards that are dropped do about SQLite's locks, which are in this process.
#[cfg(feature = "sqlite")]
pub mod sqlite {
    use diesel::result::Error as DieselError;

    pub use crate::sqlite::Asked;

    /// Frees the request's hold, or its place in the queue, also if it has not come there yet.
    pub fn give_up(request: i64) -> bool {
        crate::sqlite::give_up(request)
    }

    /// The request that was given up will not come any more.
    pub fn forget(request: i64) {
        crate::sqlite::forget(request);
    }

    /// For tests: whether the connection of this process is open.
    pub fn is_open(session: i64) -> bool {
        crate::sqlite::is_open(session)
    }

    /// For tests: whether the connection of this process waits for a lock.
    pub fn is_waiting(session: i64) -> bool {
        crate::sqlite::is_waiting(session)
    }

    /// The error of a statement of the core in words that help.
    pub fn explain(error: DieselError) -> DieselError {
        crate::sqlite::explain(error)
    }
}
