mod then;

use std::time::Duration;

use self::then::Then;
use super::fault::{Failed, Fault, unknown};
use super::session::AcquireSession;
use super::sql::{self, Lift, Scope};
use super::turns::{Next, QuietTurn, Turn, Turns};
use crate::proto::{Abandoned, Answer, Cause, Failure, Machine, Reason, Rows, Step, Wait};
use crate::{Mode, PostgresKey};

/// Begins a transaction that holds an advisory lock until it ends.
///
/// At READ COMMITTED the transaction itself takes the lock, in one message, and waits for it there. So nothing is ever
/// left with a session, which may be another one behind a pooler. At the other levels the session's lock is taken
/// first, and a second transaction takes it over, so that its snapshot is younger than the grant.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Begin` | BEGIN, and the lock | done | granted |
/// | | | an error: not READ COMMITTED | `Isolated`; without a wait `RollBack`, then `Session` |
/// | | | an error: `transaction_timeout` is set | `RollBack`, then `Wait` |
/// | `Wait` | BEGIN, lifts the user's limits, waits | done | granted |
/// | `Turn` | a [`QuietTurn`] that begins with BEGIN | granted | granted |
/// | | | over | `RollBack` |
/// | | | unavailable | `Wait` |
/// | `Begin`, `Wait`, `Turn` | | an error | `RollBack` |
/// | `Isolated` | takes the session's lock and hands it over | done | granted |
/// | | | an error | `RollBack`, then `Verify` |
/// | `RollBack` | ROLLBACK | done | by what has failed: |
/// | | | | the limit passed: the next turn, or gives up |
/// | | | | taken, and no wait was asked for: `Sleep`, or gives up |
/// | | | | not READ COMMITTED: `Session` |
/// | | | | unclear: `Probe`, `Verify`, or fails |
/// | | | an error | fails, the session is ended |
/// | `Verify` | does the session hold the lock? | 0, and the limit passed | `Session` |
/// | | | 0 otherwise | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
/// | `Session` | [`AcquireSession`] | granted | `HandOver` |
/// | `HandOver` | BEGIN, hands the session's lock over | done | granted |
/// | | | an error | fails, the session is ended |
/// | `Probe` | was it `statement_timeout`? Are there such locks? | 2: it was | `Wait` |
/// | | | 1: there are | fails: it was a cancel |
/// | | | an error | fails: there are no such locks |
/// | | | an error: the table of locks is full | `Engine` |
/// | `Engine` | what does the server call itself? | not PostgreSQL | fails: there are no such locks |
/// | | | anything else | fails: the table of locks is full |
/// | `Sleep` | | | `Begin` |
#[derive(Debug)]
pub(super) struct Begin {
    key: PostgresKey,
    mode: Mode,
    wait: Wait,
    droppable: bool,
    started: Duration,
    turns: Turns,
    state: State,
}

#[derive(Debug)]
enum State {
    Begin {
        millis: u32,
        sent: Duration,
    },
    Wait {
        millis: u32,
        sent: Duration,
    },
    Turn(QuietTurn),
    RollBack(Then),
    Isolated {
        millis: u32,
        sent: Duration,
    },
    Session(AcquireSession),
    HandOver,
    Verify(Failed),
    Probe(Failed),
    /// What fails, unless it is another engine than PostgreSQL.
    Engine(Failure),
    Sleep,
}

type Begun = Step<Option<()>>;

impl Begin {
    pub(super) fn new(key: PostgresKey, mode: Mode, wait: Wait, droppable: bool) -> Self {
        Self {
            key,
            mode,
            wait,
            droppable,
            started: Duration::ZERO,
            turns: Turns::new(wait),
            state: State::Sleep,
        }
    }

    pub(super) fn key(&self) -> PostgresKey {
        self.key
    }

    fn begin(&mut self, millis: u32, now: Duration) -> Begun {
        self.state = State::Begin { millis, sent: now };
        Step::Batch(sql::begin(self.key, self.mode, millis).into())
    }

    /// Waits as one of the transaction, without the limits of the user.
    fn wait(&mut self, millis: u32, now: Duration) -> Begun {
        self.state = State::Wait { millis, sent: now };
        let wait = sql::wait(self.key, self.mode, Scope::Transaction);
        let wait = sql::without_limits(millis, Lift::StatementAndTransaction, &wait);
        Step::Batch(format!("BEGIN; {wait}").into())
    }

    fn isolated(&mut self, now: Duration) -> Begun {
        let millis = self.turns.first(now).max(1);
        self.state = State::Isolated { millis, sent: now };
        Step::Batch(sql::begin_isolated(self.key, self.mode, millis).into())
    }

    /// Takes the session's lock, after the first turn if that has passed.
    fn session(&mut self, first_turn_passed: bool, now: Duration) -> Begun {
        let limit = self.wait.remaining(now.saturating_sub(self.started));
        let wait = Wait { limit, ..self.wait };
        let mut session = AcquireSession::new(self.key, self.mode, wait, self.droppable);
        let step = match first_turn_passed {
            true => session.go_on(self.turns, now),
            false => session.start(now),
        };
        self.state = State::Session(session);
        self.follow_session(step)
    }

    fn roll_back(&mut self, then: Then) -> Begun {
        self.state = State::RollBack(then);
        Step::Batch("ROLLBACK".into())
    }

    fn settle(&mut self, fault: Fault, now: Duration) -> Begun {
        let is_level = |detail: &str| {
            sql::TOKENS_OF_ISOLATION
                .iter()
                .any(|token| detail.contains(token))
        };
        let then = match fault {
            Fault::Lost(cause) => return Step::failed(Failure::lost(cause)),
            Fault::Refused(reason, cause) => Then::Fail(reason.clean(cause)),
            Fault::Detail(detail, _) if detail.contains(sql::TOKEN_TAKEN) => Then::TryAgain,
            Fault::Detail(detail, failed) if detail.contains(sql::TOKEN_CUT_SHORT) => Then::Wait {
                millis: failed.millis,
            },
            // The next message begins with the rollback.
            Fault::Detail(detail, failed) if is_level(&detail) && failed.millis > 0 => {
                return self.isolated(now);
            }
            Fault::Detail(detail, _) if is_level(&detail) => Then::Session,
            Fault::Detail(_, failed) => Then::Fail(Reason::Database.clean(failed.cause)),
            Fault::Other(failed) if failed.is_timeout() => Then::Next,
            Fault::Other(failed) if failed.reason == Reason::Interrupted => Then::Probe(failed),
            Fault::Other(failed) => Then::Fail(failed.reason.clean(failed.cause)),
        };
        self.roll_back(then)
    }

    /// The session's lock may have been granted.
    fn settle_isolated(&mut self, fault: Fault) -> Begun {
        let then = match fault {
            Fault::Lost(cause) => return Step::failed(Failure::lost(cause)),
            Fault::Refused(reason, cause) => Then::Fail(reason.clean(cause)),
            Fault::Detail(_, failed) | Fault::Other(failed) => Then::Verify(failed),
        };
        self.roll_back(then)
    }

    fn rolled_back(&mut self, then: Then, now: Duration) -> Begun {
        match then {
            Then::Next => {
                self.turns.ended();
                self.taken(now)
            }
            Then::TryAgain => self.taken(now),
            Then::Wait { millis } => self.wait(millis, now),
            Then::Session => self.session(false, now),
            Then::Verify(failed) => {
                self.state = State::Verify(failed);
                Step::Query(sql::is_held(self.key, self.mode).never_kept())
            }
            Then::Probe(failed) => {
                let probe = sql::probe(failed.passed);
                self.state = State::Probe(failed);
                Step::Query(probe)
            }
            Then::Fail(failure) => self.fail(failure),
        }
    }

    fn fail(&mut self, failure: Failure) -> Begun {
        if failure.reason != Reason::TooManyLocks {
            return Step::failed(failure);
        }
        self.state = State::Engine(failure);
        Step::Query(sql::version())
    }

    fn taken(&mut self, now: Duration) -> Begun {
        match self.turns.next(now) {
            Next::GiveUp => Step::Done(Ok(None)),
            Next::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            Next::First(millis) => self.begin(millis, now),
            Next::Quiet { rest, long } => {
                let wait = sql::turn(self.key, self.mode, Scope::Transaction);
                let wait = sql::without_limits(rest, Lift::StatementAndTransaction, &wait);
                let message = format!("BEGIN; {}; {wait}", sql::tell_turn(self.key));
                let (turn, first) = QuietTurn::start(self.key, self.mode, (rest, long), message);
                self.state = State::Turn(turn);
                self.follow_turn(first.outside_a_transaction(), now)
            }
        }
    }

    fn follow_turn(&mut self, turn: Turn, now: Duration) -> Begun {
        match turn.step() {
            Ok(step) => step,
            Err(Turn::Granted(_)) => Step::Done(Ok(Some(()))),
            Err(Turn::Unavailable { millis }) => self.wait(millis, now),
            // The block catches the end of its turn, so the error is another one.
            Err(Turn::Failed { error, .. }) => {
                self.settle(Fault::new(error, Failed::unlimited()), now)
            }
            Err(Turn::Strange) => {
                self.roll_back(Then::Fail(Reason::Database.clean(Cause::default())))
            }
            Err(_) => self.roll_back(Then::Next),
        }
    }

    fn follow_session<T>(&mut self, step: Step<Option<T>>) -> Begun {
        step.map(|result| match result {
            Ok(Some(_)) => {
                self.state = State::HandOver;
                Step::Batch(format!("BEGIN; {}", sql::hand_over(self.key, self.mode)).into())
            }
            Ok(None) => Step::Done(Ok(None)),
            Err(failure) => Step::failed(failure),
        })
    }
}

impl Machine for Begin {
    type Output = Option<()>;

    fn start(&mut self, now: Duration) -> Begun {
        self.started = now;
        self.turns.start(now);
        let millis = self.turns.first(now);
        self.begin(millis, now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Begun {
        match (std::mem::replace(&mut self.state, State::Sleep), answer) {
            (
                State::Begin { .. } | State::Wait { .. } | State::Isolated { .. } | State::HandOver,
                Answer::Done,
            ) => Step::Done(Ok(Some(()))),
            (
                State::Begin { millis, sent } | State::Wait { millis, sent },
                Answer::Error(error),
            ) => self.settle(Fault::new(error, Failed::after(millis, sent, now)), now),
            (State::Isolated { millis, sent }, Answer::Error(error)) => {
                self.settle_isolated(Fault::new(error, Failed::after(millis, sent, now)))
            }
            (State::Turn(mut turn), answer) => {
                let next = turn.next(answer);
                self.state = State::Turn(turn);
                self.follow_turn(next, now)
            }
            (State::RollBack(then), Answer::Done) => self.rolled_back(then, now),
            (State::Session(mut session), answer) => {
                let step = session.next(answer, now);
                self.state = State::Session(session);
                self.follow_session(step)
            }

            (State::Verify(failed), Answer::Rows(Rows::Number(Some(0)))) => {
                match failed.is_timeout() {
                    true => self.session(true, now),
                    false => Step::failed(failed.reason.clean(failed.cause)),
                }
            }
            (State::Verify(failed), answer) => Step::failed(match answer {
                Answer::Error(error) if error.lost => Failure::lost(error.cause),
                _ => failed.reason().broken(failed.cause),
            }),
            (State::Probe(_), Answer::Rows(Rows::Number(Some(sql::CUT_SHORT)))) => {
                self.wait(self.turns.first(now).max(1), now)
            }
            (State::Probe(failed), Answer::Rows(_)) => {
                Step::failed(Reason::Interrupted.clean(failed.cause))
            }
            (State::Probe(failed), answer) => self.fail(failed.probed(answer)),
            (State::Engine(failure), answer) => Step::failed(Failed::of_engine(failure, answer)),
            (State::Sleep, _) => self.begin(0, now),
            // After a hand-over nobody knows whether the session still holds the lock.
            (
                State::Begin { .. }
                | State::Wait { .. }
                | State::Isolated { .. }
                | State::RollBack(_)
                | State::HandOver,
                answer,
            ) => Step::failed(unknown(answer)),
        }
    }

    fn abandon(&self) -> Abandoned {
        let (broken, cancel) = match &self.state {
            State::Sleep => return Abandoned::default(),
            State::Session(session) => return session.abandon(),
            State::Verify(..) | State::Probe(_) | State::Engine(_) => return Abandoned::broken(),
            State::Turn(turn) if !turn.may_be_granted() => return Abandoned::default(),
            State::Turn(turn) => (true, turn.waits()),
            State::RollBack(Then::Verify(_)) => (true, false),
            State::RollBack(_) => (false, false),
            State::Begin { millis, .. } => (true, *millis > 0),
            State::Wait { .. } | State::Isolated { .. } => (true, true),
            // If the transaction has the lock, it is free now. If the session kept it, when the connection is closed.
            State::HandOver => (true, false),
        };
        // Twice: a late cancel may hit the first.
        let messages = Abandoned::twice("ROLLBACK".to_owned());
        Abandoned {
            messages,
            broken,
            cancel,
            ..Abandoned::default()
        }
    }
}
