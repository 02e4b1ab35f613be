use std::time::Duration;

use super::{Mark, sql};
use crate::{Abandoned, Answer, Machine, Mode, Outcome, PostgresKey, Reason, Step};

/// Releases one hold of a session's lock, in an aborted transaction too.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Postgres, Step};
///
/// let key = Postgres::key(&42.into())?;
/// let Step::Query(statement) = Postgres::release(&key, Mode::Exclusive, false).start() else { panic!() };
/// assert!(statement.text().contains("pg_advisory_unlock(?)"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct PostgresRelease {
    key: PostgresKey,
    mode: Mode,
    /// The lock was acquired in the open transaction, behind a savepoint.
    fenced: bool,
    /// With it, whether the lock was released can be told in a message that is sent behind.
    mark: Option<Mark>,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Unlock,
    /// Unlocked (or not held): forgetting the savepoint.
    Unfence(Outcome),
    /// The transaction is aborted.
    Aborted,
}

impl PostgresRelease {
    pub(super) fn new(key: PostgresKey, mode: Mode, fenced: bool) -> Self {
        Self {
            key,
            mode,
            fenced,
            mark: None,
            state: State::Unlock,
        }
    }

    pub(super) fn marked(mut self) -> Self {
        self.mark = Some(Mark::new());
        self
    }

    fn unfence(&mut self, outcome: Outcome) -> Step {
        if !self.fenced {
            return outcome.into();
        }
        self.state = State::Unfence(outcome);
        Step::Batch("RELEASE SAVEPOINT dlock".into())
    }
}

impl Machine for PostgresRelease {
    fn start(&mut self) -> Step {
        self.state = State::Unlock;
        Step::Query(match self.mark {
            Some(mark) => sql::unlock_marked(self.key, self.mode, mark),
            None => sql::unlock(self.key, self.mode),
        })
    }

    fn next(&mut self, answer: Answer, _elapsed: Duration) -> Step {
        const NOT_HELD: Outcome = Outcome::Failed(crate::Failure {
            reason: Reason::NotHeld,
            broken: false,
        });
        match (self.state, answer) {
            (State::Unlock, Answer::Value(Some(1))) => self.unfence(Outcome::Success),
            (State::Unlock, Answer::Value(Some(0))) => self.unfence(NOT_HELD),
            (State::Unlock, Answer::Error(_)) if self.fenced => {
                self.state = State::Aborted;
                Step::Batch(sql::release_aborted(self.key, self.mode).into())
            }
            // Whether it was released nobody knows.
            (State::Unlock, _) => Reason::Database.broken().into(),

            (State::Unfence(outcome), Answer::Done) => outcome.into(),
            (State::Unfence(_), _) => Reason::Database.broken().into(),

            (State::Aborted, Answer::Error(Some(constraint))) if constraint == sql::RELEASED => {
                Outcome::Success.into()
            }
            (State::Aborted, Answer::Error(Some(constraint))) if constraint == sql::NOT_HELD => {
                NOT_HELD.into()
            }
            (State::Aborted, _) => Reason::Database.broken().into(),
        }
    }

    fn abandon(&self) -> Abandoned {
        match (self.state, self.mark) {
            (State::Unlock, Some(mark)) => Abandoned {
                messages: vec![sql::release_unless_released(self.key, self.mode, mark).into()],
                // In an aborted transaction that fails.
                broken: self.fenced,
                waiting: false,
            },
            // The lock is free, and the rest has been sent.
            (State::Unfence(_) | State::Aborted, _) => Abandoned::default(),
            (State::Unlock, None) => Abandoned {
                broken: true,
                ..Abandoned::default()
            },
        }
    }
}
