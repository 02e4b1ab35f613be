use std::time::Duration;

use crate::postgres::fault::{Failed, Fault};
use crate::postgres::mark::Mark;
use crate::postgres::sql;
use crate::proto::{
    Abandoned, Answer, Cause, Failure, Machine, Reason, Rows, Statement, Step, Tried, TriedEnd,
};
use crate::{Mode, PostgresKey};

/// Takes several locks of a session outside a transaction, all or none, without waiting.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | takes them all | 1 | all are held |
/// | | | -n | the one at that place is taken, and none is held |
/// | | | 3: it is a standby | fails, nothing is held |
/// | | | an error: the session is gone | fails, nothing is held |
/// | | | anything else | `Verify` |
/// | `Verify` | how many does the session hold? Does it know the statement? | 0, no | `Ask`, unprepared, once |
/// | | | 0, and the table of locks is full | `Engine` |
/// | | | 0 | fails, nothing is held |
/// | | | an error | `Engine` |
/// | | | anything else | fails, the session is ended |
/// | `Engine` | what does the server call itself? | not PostgreSQL | fails: there are no such locks |
/// | | | anything else | fails, as it would have before |
///
/// If the session holds one of them after an error, it may be an outer guard's. Nobody can know.
#[derive(Debug)]
pub(in crate::postgres) struct TryAll {
    keys: Vec<PostgresKey>,
    mode: Mode,
    mark: Mark,
    /// The session has forgotten the prepared statement (`DEALLOCATE ALL`).
    unprepared: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Ask,
    Verify(Failed),
    Engine(Failure),
}

impl TryAll {
    pub(super) fn new(keys: Vec<PostgresKey>, mode: Mode) -> Self {
        Self {
            keys,
            mode,
            mark: Mark::new(),
            unprepared: false,
            state: State::Ask,
        }
    }

    fn statement(&self) -> Statement {
        sql::take_all(&self.keys, self.mode, self.mark.number())
    }

    fn ask(&self) -> Step<Tried> {
        Step::Query(match self.unprepared {
            true => self.statement().never_kept(),
            false => self.statement(),
        })
    }

    fn verify(&mut self, failed: Failed) -> Step<Tried> {
        self.state = State::Verify(failed);
        Step::Query(sql::verify_all(&self.keys, self.mode, &self.statement()))
    }

    fn ask_engine(&mut self, failure: Failure) -> Step<Tried> {
        self.state = State::Engine(failure);
        Step::Query(sql::version())
    }

    fn asked(&mut self, answer: Answer) -> Step<Tried> {
        let count = self.keys.len();
        let tried = |held, end| Step::Done(Ok(Tried { held, end }));
        match answer {
            Answer::Rows(Rows::Number(Some(1))) => tried(count, TriedEnd::All),
            Answer::Rows(Rows::Number(Some(place))) if place < 0 => {
                match usize::try_from(place.unsigned_abs()) {
                    Ok(place) if place <= count => tried(0, TriedEnd::Taken(place - 1)),
                    _ => self.verify(Failed::strange()),
                }
            }
            Answer::Rows(Rows::Number(Some(sql::STANDBY))) => {
                Step::failed(Reason::Standby.clean(Cause::default()))
            }
            Answer::Error(error) => match Fault::new(error, Failed::unlimited()) {
                Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
                Fault::Refused(reason, cause) => Step::failed(reason.clean(cause)),
                Fault::Detail(_, failed) | Fault::Other(failed) => self.verify(failed),
            },
            _ => self.verify(Failed::strange()),
        }
    }

    fn verified(&mut self, failed: Failed, answer: Answer) -> Step<Tried> {
        match answer {
            Answer::Rows(Rows::Pair(Some(0), Some(0))) if !self.unprepared => {
                self.unprepared = true;
                self.ask()
            }
            Answer::Rows(Rows::Pair(Some(0), _)) => match failed.reason().clean(failed.cause) {
                failure if failure.reason == Reason::TooManyLocks => self.ask_engine(failure),
                failure => Step::failed(failure),
            },
            Answer::Error(error) if error.lost => Step::failed(Failure::lost(error.cause)),
            Answer::Error(_) => self.ask_engine(failed.reason().broken(failed.cause)),
            _ => Step::failed(failed.reason().broken(failed.cause)),
        }
    }
}

impl Machine for TryAll {
    type Output = Tried;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<Tried> {
        self.ask()
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<Tried> {
        match std::mem::replace(&mut self.state, State::Ask) {
            State::Ask => self.asked(answer),
            State::Verify(failed) => self.verified(failed, answer),
            State::Engine(failure) => Step::failed(Failed::of_engine(failure, answer)),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self.state {
            State::Ask => {
                let mark = self.mark.number();
                let release = sql::release_all_if_granted(&self.keys, self.mode, mark);
                Abandoned {
                    messages: vec![release.into()],
                    ..Abandoned::broken()
                }
            }
            State::Verify(_) | State::Engine(_) => Abandoned::broken(),
        }
    }
}
