use std::time::Duration;

use super::keys::Keys;
use crate::postgres::fault::unknown;
use crate::postgres::sql;
use crate::proto::{
    Abandoned, Answer, Cause, Failure, Hold, Machine, Reason, Rows, Statement, Step,
};
use crate::{LockKey, Mode, PostgresKey};

/// Releases several holds of a session outside a transaction, or in one that was begun after them.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Unlock` | releases all, prepared | 1 | released |
/// | | | -n | that one was not held; the others are released |
/// | | | an error | `Verify` |
/// | `Verify` | does the session know the prepared statement? | no: it was perhaps never asked | `Test` |
/// | `Test` | the prepared statement, for no lock | an error: it is not there | `UnlockAgain` |
/// | `UnlockAgain` | releases all, unprepared | 1, -n | as `Unlock` |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(in crate::postgres) struct ReleaseAll {
    keys: Vec<PostgresKey>,
    names: Vec<Option<Box<LockKey>>>,
    mode: Mode,
    state: State,
}

#[derive(Debug)]
enum State {
    Unlock,
    Verify(Cause),
    Test(Cause),
    UnlockAgain,
}

impl ReleaseAll {
    pub(super) fn new(holds: Vec<Hold<PostgresKey>>) -> Self {
        let mode = holds.first().map_or(Mode::Exclusive, |hold| hold.mode);
        Self {
            keys: Keys::of(&holds),
            names: holds.into_iter().map(|hold| hold.name).collect(),
            mode,
            state: State::Unlock,
        }
    }

    fn unlock(&self) -> Statement {
        sql::unlock_all(&self.keys, self.mode)
    }

    fn not_held(&mut self, place: i64) -> Step<()> {
        let index = usize::try_from(place.unsigned_abs()).ok();
        let name = index.and_then(|place| self.names.get_mut(place.checked_sub(1)?));
        Step::failed(match name {
            Some(name) => Failure {
                key: name.take(),
                ..Failure::not_held(Cause::default())
            },
            None => Reason::Database.broken(Cause::default()),
        })
    }
}

impl Machine for ReleaseAll {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(self.unlock())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        match (std::mem::replace(&mut self.state, State::Unlock), answer) {
            (State::Unlock | State::UnlockAgain, Answer::Rows(Rows::Number(Some(1)))) => {
                Step::Done(Ok(()))
            }
            (State::Unlock | State::UnlockAgain, Answer::Rows(Rows::Number(Some(place))))
                if place < 0 =>
            {
                self.not_held(place)
            }
            (State::Unlock, Answer::Error(error)) if !error.lost => {
                self.state = State::Verify(error.cause);
                Step::Query(sql::verify_all(&self.keys, self.mode, &self.unlock()))
            }
            (State::Verify(cause), Answer::Rows(Rows::Pair(_, Some(0)))) => {
                self.state = State::Test(cause);
                Step::Query(sql::unlock_all(&[], self.mode))
            }
            (State::Test(_), Answer::Error(error)) if !error.lost => {
                self.state = State::UnlockAgain;
                Step::Query(self.unlock().never_kept())
            }
            (_, Answer::Error(error)) if error.lost => Step::failed(Failure::lost(error.cause)),
            // Some may have been released.
            (State::Verify(cause) | State::Test(cause), _) => {
                Step::failed(Reason::Database.broken(cause))
            }
            (_, answer) => Step::failed(unknown(answer)),
        }
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
