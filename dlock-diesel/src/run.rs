//! The pump: sends what a machine of the core asks for, and hands it the answers.

use std::thread;

use dlock_core::LockKey;
use dlock_core::proto::{Aftermath, Answer, Failure, Machine, Session, Step};

use crate::backend::{LockBackend, LockConnection};
use crate::shared::{self, Pump};
use crate::{Error, session};

/// Holds a conversation until it is done.
pub(crate) fn run<C: LockConnection, T>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
) -> Result<T, Error> {
    let mut pump = Pump::new(machine);
    let mut step = pump.start();
    loop {
        let answer = match step {
            Step::Query(statement) => C::Backend::load(conn, statement),
            Step::Batch(sql) => shared::answer(conn.batch_execute(&sql).map(|()| Answer::Done)),
            Step::Sleep(duration) => {
                thread::sleep(duration);
                Answer::Done
            }
            Step::Done(result) => return result.map_err(|failure| fail(conn, failure, key)),
        };
        step = pump.next(answer);
    }
}

/// Does to the connection what a failure asks for, and turns the failure into an error.
fn fail<C: LockConnection>(conn: &mut C, failure: Failure, key: &LockKey) -> Error {
    let (aftermath, error) = shared::failed(failure, key);
    match aftermath {
        Aftermath::Clean => {}
        Aftermath::MarkBroken => session::mark_broken(conn),
        Aftermath::EndSession | Aftermath::EndSessionUnread => {
            session::end(conn);
        }
    }
    error
}

/// The error of a conversation that was refused before anything was sent.
pub(crate) fn refused(failure: Failure, key: &LockKey) -> Error {
    shared::failed(failure, key).1
}

/// How many transactions are open, or an error if the connection is broken.
pub(crate) fn session<C: LockConnection>(conn: &mut C, key: &LockKey) -> Result<Session, Error> {
    session::session(conn).map_err(|error| shared::connection_error(error, key))
}
