use std::time::Duration;

use super::sql;
use crate::proto::{Answer, ErrorFields, Savepoint, Step};

/// A message behind a savepoint, in an open transaction: if it fails, it is undone, and the transaction goes on.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Send` | the message, which begins with the savepoint | done | ends: `Done` |
/// | | | an error | `Undo` |
/// | `Undo` | back to the savepoint, without it | done | ends: `Undone` |
/// | | | an error | `UndoAgain`: a late cancel may have hit it |
/// | `UndoAgain` | the same | done | ends: `Undone` |
/// | | | an error | ends: `Stuck` |
/// | each | | the session is gone | ends: `Stuck` |
#[derive(Debug)]
pub(super) struct Attempt {
    state: State,
}

#[derive(Debug)]
enum State {
    Send {
        sent: Duration,
    },
    Undo {
        error: ErrorFields,
        passed: Duration,
    },
    UndoAgain {
        error: ErrorFields,
        passed: Duration,
    },
}

/// How an [`Attempt`] goes on.
#[derive(Debug)]
pub(super) enum Attempted {
    Batch(String),
    Done,
    /// It failed so long after it was sent. The transaction is as before, and the savepoint has gone.
    Undone {
        error: ErrorFields,
        passed: Duration,
    },
    /// There was no savepoint to go back to: the transaction had been aborted before and nothing was asked for, or the
    /// session is gone.
    Stuck(ErrorFields),
}

impl Attempted {
    /// The step to take, if the attempt is not over.
    pub(super) fn step<T>(self) -> Result<Step<T>, Attempted> {
        match self {
            Attempted::Batch(sql) => Ok(Step::Batch(sql.into())),
            end => Err(end),
        }
    }
}

impl Attempt {
    /// The message is sent now.
    pub(super) fn sent(now: Duration) -> Self {
        Self {
            state: State::Send { sent: now },
        }
    }

    /// A message behind the savepoint has failed.
    pub(super) fn undo(
        savepoint: &Savepoint,
        error: ErrorFields,
        passed: Duration,
    ) -> (Self, Attempted) {
        if error.lost {
            let error_there = ErrorFields::default();
            return (
                Self {
                    state: State::Undo {
                        error: error_there,
                        passed,
                    },
                },
                Attempted::Stuck(error),
            );
        }
        (
            Self {
                state: State::Undo { error, passed },
            },
            Attempted::Batch(sql::undo(savepoint)),
        )
    }

    /// Whether the message itself is under way, and the savepoint may be there.
    pub(super) fn is_sent(&self) -> bool {
        matches!(self.state, State::Send { .. })
    }

    pub(super) fn next(
        &mut self,
        savepoint: &Savepoint,
        answer: Answer,
        now: Duration,
    ) -> Attempted {
        let state = std::mem::replace(&mut self.state, State::Send { sent: now });
        match (state, answer) {
            (State::Send { .. }, Answer::Done) => Attempted::Done,
            (State::Send { sent }, answer) => {
                let error = match answer {
                    Answer::Error(error) => error,
                    // Rows of a message: it is undone like a failure.
                    _ => ErrorFields::default(),
                };
                let (attempt, step) = Self::undo(savepoint, error, now.saturating_sub(sent));
                *self = attempt;
                step
            }
            (State::Undo { error, passed } | State::UndoAgain { error, passed }, Answer::Done) => {
                Attempted::Undone { error, passed }
            }
            (_, Answer::Error(error)) if error.lost => Attempted::Stuck(error),
            (State::Undo { error, passed }, _) => {
                self.state = State::UndoAgain { error, passed };
                Attempted::Batch(sql::undo(savepoint))
            }
            (State::UndoAgain { error, .. }, _) => Attempted::Stuck(error),
        }
    }
}
