use std::borrow::Cow;
use std::time::Duration;

use super::{ErrorFields, Failure, Request, Rows, Statement};
use crate::Holder;

/// One conversation with a server, without I/O: it says what to send next and gets the answer, until [`Step::Done`].
///
/// The caller passes the time (`now`) of a clock of its own that never goes back. A test can play the server.
pub trait Machine: Send {
    /// What a conversation that succeeds ends with.
    type Output;

    /// Whether it uses `now`. If not, the caller need not read its clock, which would take as long as a tenth of what
    /// dlock itself does for a free lock.
    const TIMED: bool = true;

    /// The first step.
    fn start(&mut self, now: Duration) -> Step<Self::Output>;

    /// The next step, after the `answer` to the last one.
    fn next(&mut self, answer: Answer, now: Duration) -> Step<Self::Output>;

    /// What the caller does if it will not read the answer to the last step, because its future was dropped.
    fn abandon(&self) -> Abandoned;
}

/// What the caller of a [`Machine`] does next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step<T> {
    /// Send a statement with binds and answer with its rows.
    Query(Statement),
    /// Send a text of one or more statements as one message, and answer whether all of them succeeded.
    Batch(Cow<'static, str>),
    /// Sleep, then answer [`Answer::Done`].
    Sleep(Duration),
    /// These have the lock that is waited for, as [`Ask::tell_holders`](super::Ask::tell_holders) wanted to know. Then
    /// answer [`Answer::Done`].
    Tell(Vec<Holder>),
    /// The conversation is over.
    Done(Result<T, Failure>),
}

impl<T> Step<T> {
    /// The conversation failed.
    pub(crate) fn failed(failure: Failure) -> Self {
        Step::Done(Err(failure))
    }

    /// The same step for a machine with another output.
    pub(crate) fn map<U>(self, then: impl FnOnce(Result<T, Failure>) -> Step<U>) -> Step<U> {
        match self {
            Step::Query(statement) => Step::Query(statement),
            Step::Batch(sql) => Step::Batch(sql),
            Step::Sleep(duration) => Step::Sleep(duration),
            Step::Tell(holders) => Step::Tell(holders),
            Step::Done(result) => then(result),
        }
    }
}

/// What the server said.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A [`Step::Batch`] succeeded, a [`Step::Sleep`] is over, or a [`Step::Tell`] is told.
    Done,
    /// The rows of a [`Step::Query`].
    Rows(Rows),
    /// Any error, of the server or of the connection.
    Error(ErrorFields),
}

/// What the caller does about a conversation that ended in the middle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Abandoned {
    /// Messages to send behind the last step, one by one. Nobody reads their answers.
    pub messages: Vec<Cow<'static, str>>,
    /// Whether the connection is no longer fit for others: it is still waiting, or nobody knows what it holds.
    pub broken: bool,
    /// Whether to cancel the statement from another connection, where the caller has a way to do so.
    pub cancel: bool,
    /// SQLite: the requests to give up, besides that of the last step.
    pub requests: Vec<Request>,
}

impl Abandoned {
    /// The connection is no longer fit for others, and there is nothing to send.
    pub(crate) fn broken() -> Self {
        Self {
            broken: true,
            ..Self::default()
        }
    }

    /// Sends an idempotent message twice. A cancel request that arrives after the wait has ended kills whatever runs
    /// next, once; the second copy survives.
    pub(crate) fn twice(message: String) -> Vec<Cow<'static, str>> {
        vec![message.clone().into(), message.into()]
    }
}
