use std::time::Duration;

use super::sql;
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
    /// It may be [abandoned](Machine::abandon).
    abandonable: bool,
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
            abandonable: false,
            state: State::Unlock,
        }
    }

    pub(super) fn abandonable(mut self) -> Self {
        self.abandonable = true;
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
        Step::Query(if self.abandonable {
            sql::try_or_unlock(self.key, self.mode, None)
        } else {
            sql::unlock(self.key, self.mode)
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
        Abandoned {
            // Whether it was released nobody knows, and to release it once more could take an outer guard's hold.
            broken: !matches!(self.state, State::Read),
            ..Abandoned::default()
        }
    }
}
