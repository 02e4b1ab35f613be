//! Runs the machines of the core on a connection.

use std::pin::Pin;
use std::time::{Duration, Instant};

use diesel::QueryResult;
use diesel::result::Error as DieselError;
use dlock_core::{Answer, Dialect, Failure, Holder, LockKey, Machine, Outcome, Statement, Step};
use dlock_diesel::glue::{self, answer, failed};
use tokio::runtime::Handle;

use crate::backend::{AsyncLockBackend, DialectOf, KeyOf, LockConnection};
use crate::{Error, session};

/// What the caller gave to cancel a wait from another connection.
pub(crate) type Cancel = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) fn cancel(cancel: impl Future + Send + 'static) -> Cancel {
    Box::pin(async move {
        cancel.await;
    })
}

/// A conversation with the server. If it is dropped while the server is at it, it is abandoned.
struct Conversation<'c, C: LockConnection, M: Machine> {
    conn: &'c mut C,
    machine: M,
    cancel: Option<Cancel>,
    /// Where the conversation takes place, for the future may be dropped elsewhere.
    runtime: Option<Handle>,
    in_flight: bool,
}

impl<C: LockConnection, M: Machine> Drop for Conversation<'_, C, M> {
    fn drop(&mut self) {
        if !self.in_flight {
            return;
        }
        let abandoned = self.machine.abandon();
        let cancel = self.cancel.take().filter(|_| abandoned.waiting);
        // If nobody cancels the wait, it must end when the connection is closed.
        let goes_on = abandoned.waiting && cancel.is_none();
        if !(goes_on && DialectOf::<C>::UNREAD_MESSAGES_HIDE_A_CLOSE) {
            for message in abandoned.messages {
                session::send_unread(self.conn, &message);
            }
        }
        if abandoned.broken {
            session::mark_broken(self.conn);
        }
        if let (Some(runtime), Some(cancel)) = (&self.runtime, cancel) {
            runtime.spawn(cancel);
        }
    }
}

/// Sends what the machine wants to be sent until it is done. `false` if its limit passed.
///
/// A session of which nobody knows what it holds is ended.
pub(crate) async fn drive<C: LockConnection>(
    conn: &mut C,
    machine: impl Machine,
    key: &LockKey,
    cancel: Option<Cancel>,
) -> Result<bool, Error> {
    let started = Instant::now();
    let mut first_error = None;
    let mut talk = Conversation {
        conn,
        machine,
        cancel,
        runtime: Handle::try_current().ok(),
        in_flight: false,
    };
    let mut step = talk.machine.start();
    let outcome = loop {
        talk.in_flight = true;
        let answer_or_error = match step {
            Step::Query(statement) => value(talk.conn, statement).await.map(Answer::Value),
            Step::Batch(sql) => talk.conn.batch_execute(&sql).await.map(|()| Answer::Done),
            Step::Sleep(duration) => {
                tokio::time::sleep(duration).await;
                Ok(Answer::Done)
            }
            Step::Done(outcome) => break outcome,
        };
        talk.in_flight = false;
        let answer = answer(answer_or_error, &mut first_error);
        step = talk.machine.next(answer, started.elapsed());
        if talk.machine.expected_error() {
            first_error = None;
        }
    };
    talk.in_flight = false;
    conclude(talk.conn, outcome, key, first_error).await
}

async fn conclude<C: LockConnection>(
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
        session::end(conn).await;
    }
    Err(failed(reason, key.clone(), error))
}

async fn value<C: LockConnection>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>> {
    let nonce = statement.nonce;
    let answer = <C::Backend as AsyncLockBackend>::value(conn, statement).await?;
    glue::check(nonce, answer)
}

/// Marks the connection broken if a question to it is not answered, where an answer that is not read puts it out of step.
struct Question<'c, C: LockConnection> {
    conn: &'c mut C,
    answered: bool,
}

impl<'c, C: LockConnection> Question<'c, C> {
    /// Refused where an answer would not be one to this question.
    fn new(conn: &'c mut C) -> Result<Self, Error> {
        if !DialectOf::<C>::SKIPS_UNREAD_ANSWERS {
            session::depth(conn)?;
        }
        Ok(Self {
            conn,
            answered: false,
        })
    }
}

impl<C: LockConnection> Drop for Question<'_, C> {
    fn drop(&mut self) {
        if !self.answered && !DialectOf::<C>::SKIPS_UNREAD_ANSWERS {
            session::mark_broken(self.conn);
        }
    }
}

/// Whether the connection's session holds the lock.
pub(crate) async fn is_held<C: LockConnection>(
    conn: &mut C,
    statement: Statement,
) -> Result<bool, Error> {
    let mut question = Question::new(conn)?;
    let answer = value(question.conn, statement).await;
    question.answered = answer.is_ok();
    Ok(answer? == Some(1))
}

/// Who holds the lock or waits for it.
pub(crate) async fn holders<C: LockConnection>(
    conn: &mut C,
    key: &KeyOf<C>,
) -> Result<Vec<Holder>, Error> {
    let mut question = Question::new(conn)?;
    let mut result = Ok(Vec::new());
    for statement in DialectOf::<C>::holders(key) {
        result = <C::Backend as AsyncLockBackend>::rows(question.conn, statement).await;
        // A server that does not collect what the first statement asks for answers without rows.
        if result.as_ref().is_ok_and(|holders| !holders.is_empty()) {
            break;
        }
    }
    question.answered = true;
    Ok(result?)
}

/// The error of a limit that has passed, with those who have the lock. That they cannot be told is no error.
pub(crate) async fn timeout<C: LockConnection>(
    conn: &mut C,
    key: LockKey,
    server_key: &KeyOf<C>,
    waited: Duration,
) -> Error {
    let holders = holders(conn, server_key).await.unwrap_or_default();
    glue::timeout(key, waited, holders)
}
