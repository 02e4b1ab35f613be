//! The pump: sends what a machine of the core asks for, and hands it the answers.

use std::thread;

use dlock_core::LockKey;
use dlock_core::proto::{Aftermath, Answer, Failure, Machine, Session, Step};

use crate::backend::{DialectOf, LockBackend, LockConnection};
use crate::shared::{self, Pump, trace};
use crate::{Error, session};

/// Hears of each statement.
pub(crate) trait Watch {
    /// It is about to be sent. `false`: nobody wants the conversation any more.
    fn sent(&self) -> bool {
        true
    }
    /// It was answered, and not with an error.
    fn answered(&self) {}
}

impl Watch for () {}

/// Holds a conversation until it is done.
pub(crate) fn run<C: LockConnection, T>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
) -> Result<T, Error> {
    match talk(conn, machine, &()) {
        Some(result) => result.map_err(|failure| fail(conn, failure, key)),
        None => unreachable!("BUG: nobody gives up"),
    }
}

/// The same, but leaves the connection as it is after a failure. `None`: nobody wanted it any more, and what the
/// session holds nobody knows.
pub(crate) fn talk<C: LockConnection, T>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    watch: &impl Watch,
) -> Option<Result<T, Failure>> {
    let mut pump = Pump::<DialectOf<C>, _>::new(machine);
    let mut step = pump.start();
    loop {
        let is_statement = matches!(step, Step::Query(_) | Step::Batch(_));
        if is_statement && !watch.sent() {
            return None;
        }
        let answer = match step {
            Step::Query(statement) => C::Backend::load(conn, statement),
            Step::Batch(sql) => shared::answer(conn.batch_execute(&sql).map(|()| Answer::Done)),
            Step::Sleep(duration) => {
                thread::sleep(duration);
                Answer::Done
            }
            Step::Tell(holders) => {
                trace::holders(&holders);
                Answer::Done
            }
            Step::Done(result) => return Some(result),
        };
        if is_statement && !matches!(answer, Answer::Error(_)) {
            watch.answered();
        }
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
