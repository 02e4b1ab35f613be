use std::time::Duration;

use super::sql;
use crate::{Abandoned, Answer, Machine, Outcome, Reason, Step};

/// Releases one hold of a named lock.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Mysql, Step};
///
/// let key = Mysql::key(&"report".into())?;
/// let Step::Query(statement) = Mysql::release(&key, Mode::Exclusive, None).start() else { panic!() };
/// assert!(statement.text().contains("RELEASE_LOCK(CONVERT(? USING utf8mb4))"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct MysqlRelease {
    key: String,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Release,
    /// The same in one message, which is obeyed even if nobody reads the answer.
    ReleaseOrFail,
    /// That failed: keeping the error's number.
    KeepErrno,
    /// And reading it.
    ReadErrno,
}

impl MysqlRelease {
    pub(super) fn new(key: String) -> Self {
        Self {
            key,
            state: State::Release,
        }
    }

    pub(super) fn abandonable(key: String) -> Self {
        Self {
            key,
            state: State::ReleaseOrFail,
        }
    }
}

impl Machine for MysqlRelease {
    fn start(&mut self) -> Step {
        match self.state {
            State::ReleaseOrFail => Step::Batch(sql::release_or_fail(&self.key).into()),
            _ => Step::Query(sql::release(&self.key)),
        }
    }

    fn next(&mut self, answer: Answer, _elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Release, Answer::Value(Some(1))) => Outcome::Success.into(),
            // Another session's, or nobody's.
            (State::Release, Answer::Value(Some(0) | None)) => Reason::NotHeld.clean().into(),

            (State::ReleaseOrFail, Answer::Done) => Outcome::Success.into(),
            (State::ReleaseOrFail, Answer::Error(_)) => {
                self.state = State::KeepErrno;
                Step::Batch(sql::KEEP_ERRNO.into())
            }
            (State::KeepErrno, Answer::Done) => {
                self.state = State::ReadErrno;
                Step::Query(sql::errno())
            }
            (State::ReadErrno, Answer::Value(Some(sql::NOT_RELEASED))) => {
                Reason::NotHeld.clean().into()
            }

            _ => Reason::Database.broken().into(),
        }
    }

    fn abandon(&self) -> Abandoned {
        // The connection is out of step. Whether it was released nobody knows, and to release it once more could take an
        // outer guard's hold.
        Abandoned {
            broken: true,
            ..Abandoned::default()
        }
    }
}
