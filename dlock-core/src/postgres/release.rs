use std::time::Duration;

use super::fault::unknown;
use super::sql;
use crate::proto::{
    Abandoned, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows, Savepoint,
    Session, Statement, Step, unique_nonzero,
};
use crate::{Mode, PostgresKey};

/// Releases one hold of a session's lock, also in an aborted transaction.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Unlock` | the release, prepared | 1 | released |
/// | | | 0 | not held |
/// | | | an error | `Verify` |
/// | `Verify` | does the session hold the lock, and the prepared statement? | 0, 2 | not held |
/// | | | 3: it holds the lock, and perhaps was never asked | `Test` |
/// | | | anything else | fails, the session is ended |
/// | `Test` | the prepared statement, for a lock that nobody has | an error: it is not there | `UnlockAgain` |
/// | | | anything else | fails, the session is ended |
/// | `UnlockAgain` | the release, unprepared | 1, 0 | released, not held |
/// | `UnlockBehind` | drops the savepoint, then releases | done | `Read` |
/// | | | an error | `Aborted` |
/// | `Read` | what has the release done? | 1, 0 | released, not held |
/// | `Aborted` | back to the savepoint, releases, aborts again | an error with a token | released, not held |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(super) struct Release {
    key: PostgresKey,
    mode: Mode,
    droppable: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Unlock,
    Verify(Cause),
    Test(Cause),
    UnlockAgain,
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
            state,
        }
    }
}

impl Release {
    /// The statement that the driver has prepared.
    fn unlock(&self, key: PostgresKey) -> Statement {
        match self.droppable {
            true => sql::droppable(key, self.mode, None),
            false => sql::unlock(key, self.mode),
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
            _ => Step::Query(self.unlock(self.key)),
        }
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        match (std::mem::replace(&mut self.state, State::Unlock), answer) {
            (
                State::Unlock | State::UnlockAgain | State::Read,
                Answer::Rows(Rows::Number(Some(1))),
            ) => RELEASED,
            (
                State::Unlock | State::UnlockAgain | State::Read,
                Answer::Rows(Rows::Number(Some(sql::TAKEN | sql::CUT_SHORT))),
            ) => not_held(Cause::default()),

            (State::Unlock, Answer::Error(error)) if !error.lost => {
                self.state = State::Verify(error.cause);
                let unlock = self.unlock(self.key);
                let text = unlock.sql.first().copied().unwrap_or_default();
                Step::Query(sql::verify(self.key, self.mode, text))
            }
            (State::Verify(cause), Answer::Rows(Rows::Number(Some(0 | sql::UNPREPARED)))) => {
                not_held(cause)
            }
            (State::Verify(cause), Answer::Rows(Rows::Number(Some(sql::UNPREPARED_AND_HELD)))) => {
                self.state = State::Test(cause);
                Step::Query(self.unlock(match self.key {
                    PostgresKey::BigInt(_) => PostgresKey::BigInt(unique_nonzero().get()),
                    PostgresKey::Pair(..) => {
                        let number = unique_nonzero().get();
                        PostgresKey::Pair((number >> 32) as i32, number as i32)
                    }
                }))
            }
            (State::Test(_), Answer::Error(error)) if !error.lost => {
                self.state = State::UnlockAgain;
                Step::Query(sql::unlock(self.key, self.mode).never_kept())
            }
            // The connection keeps no prepared statements: nobody knows what became of the release.
            (State::Test(cause), Answer::Rows(_)) => Step::failed(Reason::Database.broken(cause)),
            (State::Verify(cause), answer) => Step::failed(match answer {
                Answer::Error(error) if error.lost => Failure::lost(error.cause),
                _ => Reason::Database.broken(cause),
            }),

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
