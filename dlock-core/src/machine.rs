use std::borrow::Cow;
use std::time::Duration;

use crate::{Failure, Statement};

/// A conversation with a server: it says what to send and is told the answer, until it is [`Step::Done`].
///
/// It has no clock and does no I/O, so that sync and async connections share it and a test can play the server.
///
/// # Examples
///
/// A server that grants the lock:
///
#[cfg_attr(feature = "postgres", doc = "```")]
#[cfg_attr(not(feature = "postgres"), doc = "```ignore")]
/// use std::time::Duration;
/// use dlock_core::{Answer, Dialect, Machine, Mode, Outcome, Postgres, Step, Wait};
///
/// let key = Postgres::key(&42.into())?;
/// let mut machine = Postgres::acquire(&key, Mode::Exclusive, Wait::default(), None);
/// let Step::Query(statement) = machine.start() else { panic!() };
/// assert!(statement.text().contains("pg_try_advisory_lock(?)"));
///
/// let step = machine.next(Answer::Value(Some(1)), Duration::from_millis(1));
/// assert_eq!(step, Step::Done(Outcome::Success));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
pub trait Machine: Send {
    /// The first step.
    fn start(&mut self) -> Step;

    /// The next step, after the `answer` to the last one and `elapsed` since the [`start`](Self::start).
    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step;

    /// Whether the error that was just answered was to be expected, so that it is not the one to report.
    fn expected_error(&self) -> bool {
        false
    }

    /// What to do when nobody will read the answer to the last step: the future was dropped that waited for it.
    fn abandon(&self) -> Abandoned;
}

/// What is to be done about a conversation that ended in the middle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Abandoned {
    /// Messages to be sent behind the last step, each by itself, whose answers nobody reads. A connection that gets
    /// out of step when an answer is not read ignores them.
    pub messages: Vec<Cow<'static, str>>,
    /// Whether the connection is no longer fit for others: it is still waiting, or nobody knows what it holds.
    pub broken: bool,
    /// Whether a wait in the server's queue goes on, which a request of another connection can cancel.
    pub waiting: bool,
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl Abandoned {
    /// A message that finds nothing to do the second time. For a cancel that comes too late for a wait hits what is sent
    /// behind it, once.
    pub(crate) fn twice(message: String) -> Vec<Cow<'static, str>> {
        vec![message.clone().into(), message.into()]
    }
}

/// What the caller of a [`Machine`] does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send a statement with binds, and answer with its one value or the error.
    Query(Statement),
    /// Send text that may hold several statements, as one message, and answer whether it succeeded.
    Batch(Cow<'static, str>),
    /// Sleep, then answer [`Answer::Done`].
    Sleep(Duration),
    /// The conversation is over.
    Done(Outcome),
}

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A [`Step::Batch`] succeeded, or a [`Step::Sleep`] is over.
    Done,
    /// The value of a [`Step::Query`], or NULL.
    Value(Option<i64>),
    /// Any error, of the server or of the connection, with the `constraint_name` that came with it: the one field
    /// of an error in which a SQLSTATE can travel through Diesel.
    Error(Option<String>),
    /// The answer to another question: nothing that the connection says can be relied on.
    OutOfStep,
}

/// How a conversation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The lock is acquired, or released.
    Success,
    /// The limit passed and somebody else has the lock. Nothing is left behind.
    TimedOut,
    /// Neither.
    Failed(Failure),
}

impl From<Outcome> for Step {
    fn from(outcome: Outcome) -> Self {
        Step::Done(outcome)
    }
}

impl From<Failure> for Step {
    fn from(failure: Failure) -> Self {
        Step::Done(Outcome::Failed(failure))
    }
}
