use std::time::Duration;

use super::{Abandoned, Answer, Cause, Failure, Machine, Question, Read, Rows, Statement, Step};
use crate::FencingToken;

/// Draws a fencing token. The statements answer with NULL or 0 where the session does not hold the lock. It is asked in
/// the statement that draws, so that no other holder can come in between.
///
/// | sent | answer | then |
/// |---|---|---|
/// | a statement | a positive number | the token |
/// | | another number, or NULL | not held |
/// | | the session is lost | fails, lost |
/// | | any other error | the next statement, or fails |
///
/// A number that nobody reads is lost, and does no harm.
#[derive(Debug)]
pub(crate) struct DrawToken {
    question: Question<Option<FencingToken>>,
    not_held: fn(Cause) -> Failure,
}

impl DrawToken {
    pub(crate) fn new(statements: Vec<Statement>, not_held: fn(Cause) -> Failure) -> Self {
        let read = |rows| match rows {
            Rows::Number(number) => Read::Accept(token(number)),
            _ => Read::OutOfStep,
        };
        Self {
            question: Question::new(statements, read, Abandoned::default()),
            not_held,
        }
    }

    fn step(&self, step: Step<Option<FencingToken>>) -> Step<FencingToken> {
        let held = |token: Option<_>| token.ok_or_else(|| (self.not_held)(Cause::default()));
        step.map(|token| Step::Done(token.and_then(held)))
    }
}

/// The token of an answer. `None` where the lock is not held.
pub(crate) fn token(number: Option<i64>) -> Option<FencingToken> {
    number.filter(|number| *number > 0).map(FencingToken::from)
}

impl Machine for DrawToken {
    type Output = FencingToken;

    const TIMED: bool = false;

    fn start(&mut self, now: Duration) -> Step<FencingToken> {
        let step = self.question.start(now);
        self.step(step)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<FencingToken> {
        let step = self.question.next(answer, now);
        self.step(step)
    }

    fn abandon(&self) -> Abandoned {
        self.question.abandon()
    }
}
