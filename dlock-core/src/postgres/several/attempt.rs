use std::time::Duration;

use crate::postgres::fault::{Failed, Fault};
use crate::postgres::mark::Mark;
use crate::postgres::sql;
use crate::proto::{
    Abandoned, Answer, Failure, Machine, Reason, Rows, Statement, Step, Tried, TriedEnd,
};
use crate::{Mode, PostgresKey};

/// Takes several locks of a session outside a transaction, all or none, without waiting.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | takes them all | 1 | all are held |
/// | | | -n | the one at that place is taken, and none is held |
/// | | | an error: the session is gone | fails, nothing is held |
/// | | | anything else | `Verify` |
/// | `Verify` | how many does the session hold? Does it know the statement? | 0, no | `Ask`, unprepared, once |
/// | | | 0 | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
///
/// If the session holds one of them after an error, it may be an outer guard's. Nobody can know.
#[derive(Debug)]
pub(in crate::postgres) struct TryAll {
    keys: Vec<PostgresKey>,
    mode: Mode,
    mark: Mark,
    /// The session has forgotten the prepared statement (`DEALLOCATE ALL`).
    unprepared: bool,
    failed: Option<Failed>,
}

impl TryAll {
    pub(super) fn new(keys: Vec<PostgresKey>, mode: Mode) -> Self {
        Self {
            keys,
            mode,
            mark: Mark::new(),
            unprepared: false,
            failed: None,
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
        self.failed = Some(failed);
        Step::Query(sql::verify_all(&self.keys, self.mode, &self.statement()))
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
            Answer::Error(error) => match Fault::new(error, Failed::unlimited()) {
                Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
                Fault::Deadlock(cause) => Step::failed(Reason::Deadlock.clean(cause)),
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
            Answer::Rows(Rows::Pair(Some(0), _)) => {
                Step::failed(failed.reason().clean(failed.cause))
            }
            Answer::Error(error) if error.lost => Step::failed(Failure::lost(error.cause)),
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
        match self.failed.take() {
            None => self.asked(answer),
            Some(failed) => self.verified(failed, answer),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self.failed {
            None => {
                let mark = self.mark.number();
                let release = sql::release_all_if_granted(&self.keys, self.mode, mark);
                Abandoned {
                    messages: Abandoned::twice(release),
                    ..Abandoned::broken()
                }
            }
            Some(_) => Abandoned::broken(),
        }
    }
}
