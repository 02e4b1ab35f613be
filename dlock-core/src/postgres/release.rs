use std::time::Duration;

use super::fault::unknown;
use super::sql;
use crate::proto::{
    Abandoned, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows, Savepoint,
    Session, Statement, Step,
};
use crate::{Mode, PostgresKey};

/// Releases one hold of a session's lock, also in an aborted transaction.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Unlock` | the release, prepared | 1, 0 | released, not held |
/// | | | an error | `UnlockAgain` |
/// | `UnlockAgain` | the release, unprepared | 1, 0 | released, not held |
/// | `UnlockBehind` | drops the savepoint, then releases | done | `Read` |
/// | | | an error | `Aborted` |
/// | `Read` | what has the release done? | 1, 0 | released, not held |
/// | `Aborted` | back to the savepoint, releases, aborts again | an error with a token | released, not held |
/// | each | | anything else | fails, the session is ended |
///
/// A release that fails has released nothing, because it is the last that its statement does. It may have been
/// cancelled, or the session has forgotten the prepared statement (`DEALLOCATE ALL`, `DISCARD ALL`).
#[derive(Debug)]
pub(super) struct Release {
    key: PostgresKey,
    mode: Mode,
    droppable: bool,
    is_slot: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Unlock,
    UnlockAgain(Cause),
    UnlockBehind(Savepoint),
    Read,
    Aborted(Cause),
}

impl Release {
    pub(super) fn new(hold: Hold<PostgresKey>, session: Session) -> Self {
        let state = match hold.savepoint {
            Some(savepoint) if session.depth == hold.depth => State::UnlockBehind(savepoint),
            // It went with its transaction.
            savepoint => {
                savepoint.into_iter().for_each(Savepoint::gone);
                State::Unlock
            }
        };
        Self {
            key: hold.key,
            mode: hold.mode,
            droppable: hold.droppable,
            is_slot: hold.slot.is_some(),
            state,
        }
    }
}

impl Release {
    /// The statement that the driver has prepared.
    fn unlock(&self) -> Statement {
        match self.key {
            PostgresKey::BigInt(slot) if self.is_slot => sql::release_slot(slot),
            _ if self.droppable => sql::droppable(self.key, self.mode, None),
            _ => sql::unlock(self.key, self.mode),
        }
    }
}

const RELEASED: Step<()> = Step::Done(Ok(()));

fn not_held(cause: Cause) -> Step<()> {
    Step::failed(Failure::not_held(cause))
}

impl Machine for Release {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        match &self.state {
            State::UnlockBehind(savepoint) => {
                Step::Batch(sql::unlock_behind(savepoint, self.key, self.mode).into())
            }
            _ => Step::Query(self.unlock()),
        }
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        match (std::mem::replace(&mut self.state, State::Unlock), answer) {
            (
                State::Unlock | State::UnlockAgain(_) | State::Read,
                Answer::Rows(Rows::Number(Some(1))),
            ) => RELEASED,
            (State::Unlock | State::Read, Answer::Rows(Rows::Number(Some(0)))) => {
                not_held(Cause::default())
            }
            (State::UnlockAgain(cause), Answer::Rows(Rows::Number(Some(0)))) => not_held(cause),
            (State::Unlock, Answer::Error(error)) if !error.lost => {
                self.state = State::UnlockAgain(error.cause);
                Step::Query(sql::unlock(self.key, self.mode).never_kept())
            }

            (State::UnlockBehind(savepoint), Answer::Done) => {
                savepoint.gone();
                self.state = State::Read;
                Step::Query(sql::unlocked())
            }
            (State::UnlockBehind(savepoint), Answer::Error(error)) if !error.lost => {
                self.state = State::Aborted(error.cause);
                Step::Batch(sql::release_aborted(&savepoint, self.key, self.mode).into())
            }

            (
                State::Aborted(cause),
                Answer::Error(ErrorFields {
                    detail: Some(detail),
                    ..
                }),
            ) => {
                if detail.contains(sql::TOKEN_RELEASED) {
                    RELEASED
                } else if detail.contains(sql::TOKEN_NOT_HELD) {
                    not_held(cause)
                } else {
                    Step::failed(Reason::Database.broken(cause))
                }
            }

            // Whether it was released nobody knows.
            (_, answer) => Step::failed(unknown(answer)),
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
