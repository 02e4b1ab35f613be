use std::time::Duration;

use super::{Mark, sql};
use crate::{Abandoned, Answer, Fence, Machine, Mode, Outcome, PostgresKey, Reason, Step};

/// Releases one hold of a session's lock, in an aborted transaction too.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Postgres, Step};
///
/// let key = Postgres::key(&42.into())?;
/// let Step::Query(statement) = Postgres::release(&key, Mode::Exclusive, None).start() else { panic!() };
/// assert!(statement.text().contains("pg_advisory_unlock(?)"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct PostgresRelease {
    key: PostgresKey,
    mode: Mode,
    /// The lock was acquired in the open transaction, behind this savepoint.
    fence: Option<Fence>,
    /// With it, whether the lock was released can be told in a message that is sent behind.
    mark: Option<Mark>,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Unlock,
    UnlockFenced(Fence),
    /// Asked what the latter did.
    Read,
    /// The transaction had been aborted.
    Aborted,
}

impl PostgresRelease {
    pub(super) fn new(key: PostgresKey, mode: Mode, fence: Option<Fence>) -> Self {
        Self {
            key,
            mode,
            fence,
            mark: None,
            state: State::Unlock,
        }
    }

    pub(super) fn marked(mut self) -> Self {
        self.mark = Some(Mark::new());
        self
    }
}

impl Machine for PostgresRelease {
    fn start(&mut self) -> Step {
        if let Some(fence) = self.fence {
            self.state = State::UnlockFenced(fence);
            return Step::Batch(sql::unlock_fenced(self.key, self.mode, fence).into());
        }
        self.state = State::Unlock;
        Step::Query(match self.mark {
            Some(mark) => sql::unlock_marked(self.key, self.mode, mark),
            None => sql::unlock(self.key, self.mode),
        })
    }

    fn next(&mut self, answer: Answer, _elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Unlock | State::Read, Answer::Value(Some(1))) => Outcome::Success.into(),
            (State::Unlock | State::Read, Answer::Value(Some(0))) => Reason::NotHeld.clean().into(),

            (State::UnlockFenced(_), Answer::Done) => {
                self.state = State::Read;
                Step::Query(sql::unlocked())
            }
            (State::UnlockFenced(fence), Answer::Error(None)) => {
                self.state = State::Aborted;
                Step::Batch(sql::release_aborted(self.key, self.mode, fence).into())
            }

            (State::Aborted, Answer::Error(Some(constraint))) if constraint == sql::RELEASED => {
                Outcome::Success.into()
            }
            (State::Aborted, Answer::Error(Some(constraint))) if constraint == sql::NOT_HELD => {
                Reason::NotHeld.clean().into()
            }

            // Whether it was released nobody knows.
            _ => Reason::Database.broken().into(),
        }
    }

    fn abandon(&self) -> Abandoned {
        match (self.state, self.mark) {
            (State::Unlock, Some(mark)) => Abandoned {
                messages: vec![sql::release_unless_released(self.key, self.mode, mark).into()],
                ..Abandoned::default()
            },
            // The lock is free, and the rest has been sent.
            (State::Read | State::Aborted, _) => Abandoned::default(),
            // In an aborted transaction it is not.
            (State::Unlock | State::UnlockFenced(_), _) => Abandoned {
                broken: true,
                ..Abandoned::default()
            },
        }
    }
}
