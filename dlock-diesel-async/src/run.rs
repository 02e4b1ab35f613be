//! The pump: sends what a machine of the core asks for, and hands it the answers.
//!
//! Its functions say that their futures are `Send`, so that rustc looks into each once, and not again wherever a caller
//! spawns or boxes a future that awaits it.

#![expect(clippy::manual_async_fn, reason = "an `async fn` does not say `Send`")]

use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{Aftermath, Answer, Dialect, Failure, Machine, Session, Step};
use dlock_diesel::shared::{self, Pump, trace};
use tokio::runtime::Handle;

use crate::backend::{AsyncLockBackend, Cancel, DialectOf, LockConnection};
use crate::cancel::spawn;
use crate::{Error, session};

/// Hears of each statement.
pub(crate) trait Watch: Send {
    /// It is about to be sent.
    fn sent(&self) {}
    /// It was answered, and not with an error.
    fn answered(&self) {}
}

impl Watch for () {}

/// A conversation with the server. While an answer is due it is armed: if it is dropped then, it is abandoned.
struct Conversation<'c, C: LockConnection, M: Machine, W: Watch> {
    conn: &'c mut C,
    pump: Pump<DialectOf<C>, M>,
    watch: W,
    /// Taken only if it is needed.
    cancel: &'c mut Option<Cancel>,
    /// The runtime of the conversation. The future may be dropped outside of it.
    runtime: Option<Handle>,
    armed: bool,
}

impl<C: LockConnection, M: Machine, W: Watch> Conversation<'_, C, M, W> {
    async fn answer(
        &mut self,
        step: Step<M::Output>,
    ) -> Result<Answer, Result<M::Output, Failure>> {
        self.armed = true;
        let is_statement = matches!(step, Step::Query(_) | Step::Batch(_));
        if is_statement {
            self.watch.sent();
        }
        let answer = match step {
            Step::Query(statement) => C::Backend::load(self.conn, statement).await,
            Step::Batch(sql) => {
                let result = self.conn.batch_execute(&sql).await;
                shared::answer(result.map(|()| Answer::Done))
            }
            Step::Sleep(duration) => {
                tokio::time::sleep(duration).await;
                Answer::Done
            }
            Step::Tell(holders) => {
                trace::holders(&holders);
                Answer::Done
            }
            Step::Done(result) => {
                self.disarm();
                return Err(result);
            }
        };
        self.disarm();
        if is_statement && !matches!(answer, Answer::Error(_)) {
            self.watch.answered();
        }
        Ok(answer)
    }

    fn disarm(&mut self) {
        self.armed = false;
    }
}

impl<C: LockConnection, M: Machine, W: Watch> Drop for Conversation<'_, C, M, W> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let abandoned = self.pump.abandon();
        for message in abandoned.messages {
            C::Backend::send_unread(self.conn, &message);
        }
        for request in abandoned.requests {
            <C::Backend as dlock_diesel::LockBackend>::give_up(request);
        }
        if abandoned.broken {
            session::mark_broken(self.conn);
        }
        if abandoned.cancel {
            spawn(self.runtime.as_ref(), self.cancel.take());
        }
    }
}

/// Holds a conversation until it is done.
pub(crate) fn run<C: LockConnection, T: Send>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
    mut cancel: Option<Cancel>,
) -> impl Future<Output = Result<T, Error>> + Send {
    async move { run_cancellable(conn, machine, key, &mut cancel).await }
}

fn run_cancellable<C: LockConnection, T: Send>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
    cancel: &mut Option<Cancel>,
) -> impl Future<Output = Result<T, Error>> + Send {
    async move {
        match talk(conn, machine, cancel, ()).await {
            Ok(output) => Ok(output),
            Err(failure) => Err(fail(conn, failure, key).await),
        }
    }
}

/// The same, but leaves the connection as it is after a failure.
pub(crate) fn talk<C: LockConnection, T: Send>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    cancel: &mut Option<Cancel>,
    watch: impl Watch,
) -> impl Future<Output = Result<T, Failure>> + Send {
    async move {
        let mut talk = Conversation {
            conn,
            pump: Pump::new(machine),
            watch,
            cancel,
            runtime: Handle::try_current().ok(),
            armed: false,
        };
        let mut step = talk.pump.start();
        loop {
            match talk.answer(step).await {
                Ok(answer) => step = talk.pump.next(answer),
                Err(result) => return result,
            }
        }
    }
}

/// How much longer than its limit a wait may take until the server counts as gone. A server that is there needs a few
/// round trips to say that the limit has passed.
const GRACE: Duration = Duration::from_secs(3);

/// As [`run`], for a conversation that waits no longer than `limit`. If the network is silent, it ends [`GRACE`] later.
/// What is not needed of `cancel` stays there.
pub(crate) fn run_within<C: LockConnection, T: Send>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
    cancel: &mut Option<Cancel>,
    limit: Option<Duration>,
) -> impl Future<Output = Result<T, Error>> + Send {
    async move {
        let end = limit.filter(|_| C::Backend::HAS_NETWORK);
        let Some(end) = end.and_then(|limit| limit.checked_add(GRACE)) else {
            return run_cancellable(conn, machine, key, cancel).await;
        };
        // Dropping the conversation does what can be done without an answer.
        let talk =
            tokio::time::timeout(end, run_cancellable(&mut *conn, machine, key, cancel)).await;
        talk.unwrap_or_else(|_elapsed| {
            session::mark_broken(conn);
            Err(shared::silent(key, end))
        })
    }
}

/// Asks a question. Where an unread answer would be taken for the answer to it, a broken connection is not asked.
pub(crate) fn ask<C: LockConnection, T: Send>(
    conn: &mut C,
    machine: impl Machine<Output = T>,
    key: &LockKey,
) -> impl Future<Output = Result<T, Error>> + Send {
    async move {
        if DialectOf::<C>::UNREAD_ANSWERS_SHIFT {
            self::session(conn, key)?;
        }
        run(conn, machine, key, None).await
    }
}

/// Does to the connection what a failure asks for, and turns the failure into an error.
fn fail<C: LockConnection>(
    conn: &mut C,
    failure: Failure,
    key: &LockKey,
) -> impl Future<Output = Error> + Send {
    async move {
        let (aftermath, error) = shared::failed(failure, key);
        match aftermath {
            Aftermath::Clean => {}
            Aftermath::MarkBroken => session::mark_broken(conn),
            Aftermath::EndSession => session::end(conn).await,
            Aftermath::EndSessionUnread => session::end_unread(conn),
        }
        error
    }
}

/// The error of a conversation that was refused before anything was sent.
pub(crate) fn refused(failure: Failure, key: &LockKey) -> Error {
    shared::failed(failure, key).1
}

/// How many transactions are open, or an error if the connection is broken.
pub(crate) fn session<C: LockConnection>(conn: &mut C, key: &LockKey) -> Result<Session, Error> {
    session::session(conn).map_err(|error| shared::connection_error(error, key))
}
