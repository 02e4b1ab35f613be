//! Runs the machines of the core on a connection.

use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::{Answer, Dialect, Failure, Holder, LockKey, Machine, Outcome, Statement, Step};

use crate::backend::DialectOf;
use crate::glue::{self, answer, failed};
use crate::{Error, LockBackend, LockConnection, session};

/// Sends what the machine wants to be sent until it is done. `false` if its limit passed.
///
/// A session of which nobody knows what it holds is ended.
pub(crate) fn drive<C: LockConnection>(
    conn: &mut C,
    mut machine: impl Machine,
    key: &LockKey,
) -> Result<bool, Error> {
    let started = Instant::now();
    let mut first_error = None;
    let mut step = machine.start();
    loop {
        let answer_or_error = match step {
            Step::Query(statement) => value(conn, statement).map(Answer::Value),
            Step::Batch(sql) => conn.batch_execute(&sql).map(|()| Answer::Done),
            Step::Sleep(duration) => {
                thread::sleep(duration);
                Ok(Answer::Done)
            }
            Step::Done(outcome) => return conclude(conn, outcome, key, first_error),
        };
        step = machine.next(answer(answer_or_error, &mut first_error), started.elapsed());
        if machine.expected_error() {
            first_error = None;
        }
    }
}

fn conclude<C: LockConnection>(
    conn: &mut C,
    outcome: Outcome,
    key: &LockKey,
    error: Option<DieselError>,
) -> Result<bool, Error> {
    let Failure { reason, broken } = match outcome {
        Outcome::Success => return Ok(true),
        Outcome::TimedOut => return Ok(false),
        Outcome::Failed(failure) => failure,
    };
    if broken {
        session::end(conn);
    }
    Err(failed(reason, key.clone(), error))
}

fn value<C: LockConnection>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>> {
    let nonce = statement.nonce;
    glue::check(nonce, <C::Backend as LockBackend>::value(conn, statement)?)
}

/// Whether the connection's session holds the lock.
pub(crate) fn is_held<C: LockConnection>(
    conn: &mut C,
    statement: Statement,
) -> Result<bool, Error> {
    Ok(value(conn, statement)? == Some(1))
}

/// Who holds the lock or waits for it.
pub(crate) fn holders<C: LockConnection>(
    conn: &mut C,
    key: &crate::backend::KeyOf<C>,
) -> Result<Vec<Holder>, Error> {
    let mut result = Ok(Vec::new());
    for statement in DialectOf::<C>::holders(key) {
        result = <C::Backend as LockBackend>::rows(conn, statement);
        // A server that does not collect what the first statement asks for answers without rows.
        if result.as_ref().is_ok_and(|holders| !holders.is_empty()) {
            break;
        }
    }
    Ok(result?)
}

/// The error of a limit that has passed, with those who have the lock. That they cannot be told is no error.
pub(crate) fn timeout<C: LockConnection>(
    conn: &mut C,
    key: LockKey,
    server_key: &crate::backend::KeyOf<C>,
    waited: Duration,
) -> Error {
    let holders = holders(conn, server_key).unwrap_or_default();
    glue::timeout(key, waited, holders)
}
