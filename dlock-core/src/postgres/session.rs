use std::time::Duration;

use super::fault::{Failed, Fault};
use super::mark::Mark;
use super::sql::{self, Lift, Scope};
use super::turns::{Next, QuietTurn, Turn, Turns};
use crate::proto::{Abandoned, Answer, Cause, Failure, Hold, Machine, Reason, Rows, Step, Wait};
use crate::{Mode, PostgresKey};

/// Acquires a session's lock outside a transaction.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | one statement that tries, and waits for a turn | 1 | granted |
/// | | | 0, without a turn | taken: gives up, `Sleep` (polling) |
/// | | | 3, without a turn: it is a standby | fails, nothing is held |
/// | | | 0, with a turn: `transaction_timeout` is set, or it is a standby | `Wait` |
/// | `Wait` | fails on a standby, lifts the user's limits, then waits | done | granted |
/// | `Turn` | a [`QuietTurn`] | granted | granted |
/// | | | over | the next turn, or gives up |
/// | | | unavailable | `Ask` |
/// | `Ask`, `Wait`, `Turn` | | an error: a deadlock, a standby, or the session is gone | fails, nothing is held |
/// | | | any other error | `Verify` |
/// | `Verify` | does it hold the lock, and the prepared statement? | 0, and the limit passed | as `Turn` over |
/// | | | 0, and it may be a cancel | `Probe` |
/// | | | 0 otherwise | fails, nothing is held |
/// | | | 1, and a turn has passed before | `GiveBack` |
/// | | | 2: there is no prepared statement | `Ask`, unprepared, once; then as 0 |
/// | | | an error | `Engine` |
/// | | | anything else | fails, the session is ended |
/// | `GiveBack` | releases it | 1 | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
/// | `Probe` | was it `statement_timeout`? Are there such locks? | 2: it was | `Wait` |
/// | | | 1: there are | fails: it was a cancel |
/// | | | an error | fails: there are no such locks |
/// | | | an error: the table of locks is full | `Engine` |
/// | `Engine` | what does the server call itself? | not PostgreSQL | fails: there are no such locks |
/// | | | anything else, and the limit passed | fails: a raw BEGIN, now aborted; the session is ended |
/// | | | anything else | fails, as it would have before |
/// | `Sleep` | | | `Ask` |
///
/// After an error that a grant may have preceded, a hold that is there is this request's or an outer guard's. A session
/// never waits for a lock it already holds, so after a turn that has passed it is this request's. Otherwise nobody can
/// know whose it is, and the session is ended.
#[derive(Debug)]
pub(super) struct AcquireSession {
    key: PostgresKey,
    mode: Mode,
    /// By this mark a message that is sent behind the statement can tell whether it was granted.
    mark: Option<Mark>,
    turns: Turns,
    /// A piece of the prepared statement's text that no other text has, if that was sent last.
    asked: Option<&'static str>,
    /// The session has forgotten the prepared statement (`DEALLOCATE ALL`).
    unprepared: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Ask {
        millis: u32,
        sent: Duration,
    },
    Wait {
        millis: u32,
        sent: Duration,
    },
    Turn(QuietTurn),
    Verify(Failed),
    GiveBack(Failed),
    Probe(Failed),
    /// What fails, unless it is another engine than PostgreSQL.
    Engine(Failure),
    Sleep,
}

type Acquired = Step<Option<Hold<PostgresKey>>>;

impl AcquireSession {
    pub(super) fn new(key: PostgresKey, mode: Mode, wait: Wait, droppable: bool) -> Self {
        Self {
            key,
            mode,
            mark: droppable.then(Mark::new),
            turns: Turns::new(wait),
            asked: None,
            unprepared: false,
            state: State::Sleep,
        }
    }

    /// Goes on with a wait of which the first turn is over.
    pub(super) fn go_on(&mut self, turns: Turns, now: Duration) -> Acquired {
        self.turns = turns;
        self.ended(now)
    }

    pub(super) fn key(&self) -> PostgresKey {
        self.key
    }

    fn ask(&mut self, millis: u32, now: Duration) -> Acquired {
        let statement = match (self.mark, millis) {
            (Some(mark), millis) => sql::droppable(self.key, self.mode, Some((mark, millis))),
            (None, 0) => sql::try_acquire(self.key, self.mode),
            (None, millis) => sql::acquire(self.key, self.mode, millis),
        };
        self.state = State::Ask { millis, sent: now };
        self.asked = statement.sql.last().copied();
        Step::Query(if self.unprepared {
            statement.never_kept()
        } else {
            statement
        })
    }

    fn wait(&mut self, millis: u32, now: Duration) -> Acquired {
        self.state = State::Wait { millis, sent: now };
        self.asked = None;
        let wait = sql::wait(self.key, self.mode, Scope::Session);
        let mark = self
            .mark
            .map_or(String::new(), |mark| format!("; {}", sql::leave_mark(mark)));
        Step::Batch(
            format!(
                "{}{mark}",
                sql::without_limits(millis, Lift::StatementAndTransaction, &wait)
            )
            .into(),
        )
    }

    fn turn(&mut self, rest: u32, long: u32, now: Duration) -> Acquired {
        let wait = sql::turn(self.key, self.mode, Scope::Session);
        let message = sql::without_limits(rest, Lift::StatementAndTransaction, &wait);
        let (turn, first) = QuietTurn::start(self.key, self.mode, (rest, long), message);
        self.state = State::Turn(turn);
        self.asked = None;
        self.follow(first.outside_a_transaction(), now)
    }

    fn follow(&mut self, turn: Turn, now: Duration) -> Acquired {
        match turn.step() {
            Ok(step) => step,
            Err(Turn::Granted(_)) => self.granted(),
            Err(Turn::Unavailable { millis }) => self.ask(millis, now),
            // The block catches the end of its turn, so the error is another one.
            Err(Turn::Failed { error, .. }) => self.settle(Fault::new(error, Failed::unlimited())),
            Err(Turn::Strange) => self.verify(Failed::strange()),
            Err(_) => self.ended(now),
        }
    }

    fn granted(&mut self) -> Acquired {
        let droppable = self.mark.is_some();
        let hold = Hold::new(self.key, self.mode, None, droppable);
        Step::Done(Ok(Some(hold)))
    }

    /// A turn ended without a grant.
    fn ended(&mut self, now: Duration) -> Acquired {
        self.turns.ended();
        self.taken(now)
    }

    fn taken(&mut self, now: Duration) -> Acquired {
        match self.turns.next(now) {
            Next::GiveUp => Step::Done(Ok(None)),
            Next::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            Next::First(millis) => self.ask(millis, now),
            Next::Quiet { rest, long } => self.turn(rest, long, now),
        }
    }

    fn settle(&mut self, fault: Fault) -> Acquired {
        match fault {
            Fault::Refused(reason, cause) => Step::failed(reason.clean(cause)),
            Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
            Fault::Detail(_, failed) | Fault::Other(failed) => self.verify(failed),
        }
    }

    fn verify(&mut self, failed: Failed) -> Acquired {
        self.state = State::Verify(failed);
        Step::Query(match self.asked {
            Some(asked) => sql::verify(self.key, self.mode, asked),
            None => sql::is_held(self.key, self.mode).never_kept(),
        })
    }

    /// The session does not hold the lock.
    fn nothing_held(&mut self, failed: Failed, now: Duration) -> Acquired {
        match failed.reason {
            Reason::Timeout { .. } => self.ended(now),
            Reason::Interrupted => {
                let probe = sql::probe(failed.passed);
                self.state = State::Probe(failed);
                Step::Query(probe)
            }
            Reason::TooManyLocks => self.ask_engine(failed.reason.clean(failed.cause)),
            reason => Step::failed(reason.clean(failed.cause)),
        }
    }

    fn ask_engine(&mut self, failure: Failure) -> Acquired {
        self.state = State::Engine(failure);
        Step::Query(sql::version())
    }
}

impl Machine for AcquireSession {
    type Output = Option<Hold<PostgresKey>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.turns.start(now);
        let millis = self.turns.first(now);
        self.ask(millis, now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (std::mem::replace(&mut self.state, State::Sleep), answer) {
            (State::Ask { .. }, Answer::Rows(Rows::Number(Some(sql::GRANTED))))
            | (State::Wait { .. }, Answer::Done) => self.granted(),
            (State::Ask { millis: 0, .. }, Answer::Rows(Rows::Number(Some(sql::TAKEN)))) => {
                self.taken(now)
            }
            (State::Ask { millis, .. }, Answer::Rows(Rows::Number(Some(sql::TAKEN)))) => {
                self.wait(millis, now)
            }
            (State::Ask { millis, sent } | State::Wait { millis, sent }, Answer::Error(error)) => {
                self.settle(Fault::new(error, Failed::after(millis, sent, now)))
            }
            (State::Ask { .. }, Answer::Rows(Rows::Number(Some(sql::STANDBY)))) => {
                Step::failed(Reason::Standby.clean(Cause::default()))
            }
            (State::Ask { .. } | State::Wait { .. }, _) => self.verify(Failed::strange()),

            (State::Turn(mut turn), answer) => {
                let next = turn.next(answer);
                self.state = State::Turn(turn);
                self.follow(next, now)
            }

            (State::Verify(_), Answer::Rows(Rows::Number(Some(sql::UNPREPARED))))
                if !self.unprepared =>
            {
                self.unprepared = true;
                let millis = self.turns.first(now);
                self.ask(millis, now)
            }
            (State::Verify(failed), Answer::Rows(Rows::Number(Some(0 | sql::UNPREPARED)))) => {
                self.nothing_held(failed, now)
            }
            (State::Verify(failed), Answer::Rows(Rows::Number(Some(1))))
                if self.turns.have_passed() =>
            {
                self.state = State::GiveBack(failed);
                Step::Query(sql::unlock(self.key, self.mode).never_kept())
            }
            (State::GiveBack(failed), Answer::Rows(Rows::Number(Some(1)))) => {
                Step::failed(failed.reason().clean(failed.cause))
            }

            (State::Probe(_), Answer::Rows(Rows::Number(Some(sql::CUT_SHORT)))) => {
                self.wait(self.turns.first(now).max(1), now)
            }
            (State::Probe(failed), Answer::Rows(_)) => {
                Step::failed(Reason::Interrupted.clean(failed.cause))
            }

            (State::Verify(_) | State::GiveBack(_) | State::Probe(_), Answer::Error(error))
                if error.lost =>
            {
                Step::failed(Failure::lost(error.cause))
            }
            // A transaction is open that Diesel does not know of, and the end of the turn has aborted it.
            (State::Verify(failed), Answer::Error(_)) if failed.is_timeout() => {
                self.ask_engine(Reason::InTransaction.broken(failed.cause))
            }
            (State::Verify(failed), Answer::Error(_)) => {
                self.ask_engine(failed.reason().broken(failed.cause))
            }
            (State::Engine(failure), answer) => Step::failed(Failed::of_engine(failure, answer)),
            (State::Verify(failed) | State::GiveBack(failed), _) => {
                Step::failed(failed.reason().broken(failed.cause))
            }
            (State::Probe(failed), answer) => match failed.probed(answer) {
                failure if failure.reason == Reason::TooManyLocks => self.ask_engine(failure),
                failure => Step::failed(failure),
            },

            (State::Sleep, _) => self.ask(0, now),
        }
    }

    fn abandon(&self) -> Abandoned {
        let Some(mark) = self.mark else {
            return Abandoned::broken();
        };
        let release =
            |mark: &str| Abandoned::twice(sql::release_if_granted(self.key, self.mode, mark));
        match &self.state {
            State::Sleep => Abandoned::default(),
            // Broken nevertheless: the mark of a statement that was cancelled after its grant is not there.
            State::Ask { millis, .. } => Abandoned {
                messages: release(&mark.with(*millis)),
                broken: true,
                cancel: *millis > 0,
                ..Abandoned::default()
            },
            State::Wait { .. } => Abandoned {
                messages: release(&mark.to_string()),
                broken: true,
                cancel: true,
                ..Abandoned::default()
            },
            // Another session had the lock before.
            State::Turn(turn) if turn.may_be_granted() => Abandoned {
                messages: Abandoned::twice(sql::unread(&sql::reclaim(self.key, self.mode))),
                broken: true,
                cancel: turn.waits(),
                ..Abandoned::default()
            },
            State::Turn(_)
            | State::Verify(_)
            | State::GiveBack(_)
            | State::Probe(_)
            | State::Engine(_) => Abandoned::broken(),
        }
    }
}
