use std::time::Duration;

use super::transaction::TransactionSteps;
use super::{Keys, SessionSteps};
use crate::PostgresKey;
use crate::postgres::fault::{Failed, Fault, unknown};
use crate::postgres::sql;
use crate::postgres::turns::Turns;
use crate::proto::{
    Abandoned, Answer, Ask, Depth, Failure, Hold, Machine, Reason, Rows, Session, Several, Step,
    Wait,
};

/// Begins a transaction that holds several advisory locks until it ends: [`Begin`](super::super::begin::Begin) for
/// several.
///
/// At READ COMMITTED one message begins it and takes them all, and waits for a turn at most. If that does not succeed,
/// another transaction takes them one by one, and keeps what it has while it waits for the next. At the other levels
/// the session takes them first, and a second transaction takes them over, so that its snapshot is younger than the
/// grants.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Begin` | BEGIN, and the locks | done | granted |
/// | | | an error: not READ COMMITTED | `RollBack`, `Session` |
/// | | | an error: the turn is over, or one is taken | `RollBack`, `BeginAgain` |
/// | | | an error: one is taken, and `transaction_timeout` is set | the same; it is lifted |
/// | | | an error: it may be a cancel | `RollBack`, `Probe` |
/// | | | any other error | `RollBack`, fails |
/// | `Probe` | was it `statement_timeout`? Are there such locks? | 2: it was | `BeginAgain` |
/// | | | 1: there are | fails: it was a cancel |
/// | | | an error | fails: there are no such locks |
/// | | | an error: the table of locks is full | `Engine` |
/// | `Engine` | what does the server call itself? | not PostgreSQL | fails: there are no such locks |
/// | | | anything else | fails: the table of locks is full |
/// | `BeginAgain` | BEGIN; lifts `transaction_timeout` if it is set | done | `Each` |
/// | `Each` | [`Several`], as the transaction's | granted | granted; `PutBack` if that was lifted |
/// | | | gives up, or fails | `RollBack`, gives up or fails |
/// | `PutBack` | puts `transaction_timeout` back | done | granted |
/// | `Session` | [`Several`], as the session's | granted | `HandOver` |
/// | | | gives up, or fails | gives up, or fails |
/// | `HandOver` | BEGIN, hands the session's locks over | done | granted |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(in crate::postgres) struct BeginSeveral {
    keys: Keys,
    wait: Wait,
    droppable: bool,
    started: Duration,
    turns: Turns,
    at: usize,
    /// `transaction_timeout` is set, and must not end the session while it waits.
    lifts: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Start,
    Begin {
        millis: u32,
        sent: Duration,
    },
    RollBack(Then),
    Probe(Failed),
    /// What fails, unless it is another engine than PostgreSQL.
    Engine(Failure),
    BeginAgain,
    Each(Box<Several<TransactionSteps>>),
    PutBack,
    Session(Box<Several<SessionSteps>>),
    HandOver,
}

/// What follows a rollback.
#[derive(Debug)]
enum Then {
    BeginAgain,
    Session,
    Probe(Failed),
    GiveUp,
    Fail(Failure),
}

type Begun = Step<Option<()>>;

impl BeginSeveral {
    pub(in crate::postgres) fn new(keys: Keys, ask: &Ask) -> Self {
        Self {
            keys,
            wait: ask.wait,
            droppable: ask.droppable,
            started: Duration::ZERO,
            turns: Turns::new(ask.wait),
            at: 0,
            lifts: false,
            state: State::Start,
        }
    }

    pub(in crate::postgres) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The lock that was taken.
    pub(in crate::postgres) fn at(&self) -> usize {
        self.at
    }

    fn remaining(&self, now: Duration) -> Wait {
        let limit = self.wait.remaining(now.saturating_sub(self.started));
        Wait { limit, ..self.wait }
    }

    fn roll_back(&mut self, then: Then) -> Begun {
        self.state = State::RollBack(then);
        Step::Batch("ROLLBACK".into())
    }

    fn settle(&mut self, fault: Fault) -> Begun {
        let is_level = |detail: &str| {
            let mut levels = sql::TOKENS_OF_ISOLATION.iter();
            levels.any(|token| detail.contains(token))
        };
        let then = match fault {
            Fault::Lost(cause) => return Step::failed(Failure::lost(cause)),
            Fault::Refused(reason, cause) => Then::Fail(reason.clean(cause)),
            Fault::Detail(detail, _) if detail.contains(sql::TOKEN_TAKEN) => Then::BeginAgain,
            Fault::Detail(detail, _) if detail.contains(sql::TOKEN_CUT_SHORT) => {
                self.lifts = true;
                Then::BeginAgain
            }
            Fault::Detail(detail, _) if is_level(&detail) => Then::Session,
            Fault::Detail(_, failed) => Then::Fail(Reason::Database.clean(failed.cause)),
            Fault::Other(failed) if failed.is_timeout() => Then::BeginAgain,
            Fault::Other(failed) if failed.reason == Reason::Interrupted => Then::Probe(failed),
            Fault::Other(failed) => Then::Fail(failed.reason.clean(failed.cause)),
        };
        self.roll_back(then)
    }

    fn rolled_back(&mut self, then: Then, now: Duration) -> Begun {
        match then {
            Then::BeginAgain => self.begin_again(),
            Then::Session => {
                let wait = self.remaining(now);
                let keys = self.keys.clone();
                let mut several = SessionSteps::several(keys, wait, self.droppable);
                let step = several.start(now);
                self.state = State::Session(Box::new(several));
                self.follow_session(step)
            }
            Then::Probe(failed) => {
                let probe = sql::probe(failed.passed);
                self.state = State::Probe(failed);
                Step::Query(probe)
            }
            Then::GiveUp => Step::Done(Ok(None)),
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

    fn begin_again(&mut self) -> Begun {
        self.state = State::BeginAgain;
        Step::Batch(match self.lifts {
            true => sql::BEGIN_WITHOUT_TRANSACTION_TIMEOUT.into(),
            false => "BEGIN".into(),
        })
    }

    fn each(&mut self, now: Duration) -> Begun {
        // dlock has begun the transaction, so it is not the test's.
        let session = Session {
            depth: Depth::None,
            test_transaction: false,
        };
        let mut several =
            TransactionSteps::several(self.keys.clone(), self.remaining(now), session);
        let step = several.start(now);
        self.state = State::Each(Box::new(several));
        self.follow_each(step)
    }

    fn follow_each(&mut self, step: Step<Option<Hold<PostgresKey>>>) -> Begun {
        step.map(|result| {
            if let State::Each(several) = &self.state {
                self.at = several.at();
            }
            match result {
                Ok(Some(_)) if self.lifts => {
                    self.state = State::PutBack;
                    Step::Batch(sql::PUT_BACK_TRANSACTION_TIMEOUT.into())
                }
                Ok(Some(_)) => Step::Done(Ok(Some(()))),
                Ok(None) => self.roll_back(Then::GiveUp),
                Err(failure) if failure.reason == Reason::Lost => Step::failed(failure),
                Err(failure) => self.roll_back(Then::Fail(failure)),
            }
        })
    }

    fn follow_session(&mut self, step: Step<Option<Hold<PostgresKey>>>) -> Begun {
        step.map(|result| {
            if let State::Session(several) = &self.state {
                self.at = several.at();
            }
            match result {
                Ok(Some(_)) => {
                    self.state = State::HandOver;
                    let message = sql::begin_and_hand_over(self.keys.all(), self.keys.mode);
                    Step::Batch(message.into())
                }
                Ok(None) => Step::Done(Ok(None)),
                Err(failure) => Step::failed(failure),
            }
        })
    }
}

impl Machine for BeginSeveral {
    type Output = Option<()>;

    fn start(&mut self, now: Duration) -> Begun {
        self.started = now;
        self.turns.start(now);
        let millis = self.turns.first(now);
        self.state = State::Begin { millis, sent: now };
        Step::Batch(sql::begin_all(self.keys.all(), self.keys.mode, millis).into())
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Begun {
        match (std::mem::replace(&mut self.state, State::Start), answer) {
            (State::Begin { .. } | State::PutBack | State::HandOver, Answer::Done) => {
                Step::Done(Ok(Some(())))
            }
            (State::Begin { millis, sent }, Answer::Error(error)) => {
                self.settle(Fault::new(error, Failed::after(millis, sent, now)))
            }
            (State::RollBack(then), Answer::Done) => self.rolled_back(then, now),
            (State::RollBack(Then::Fail(failure)), Answer::Error(error)) if error.lost => {
                Step::failed(failure.lost_meanwhile())
            }
            (State::Probe(_), Answer::Rows(Rows::Number(Some(sql::CUT_SHORT)))) => {
                self.begin_again()
            }
            (State::Probe(failed), Answer::Rows(_)) => {
                Step::failed(Reason::Interrupted.clean(failed.cause))
            }
            (State::Probe(failed), answer) => self.fail(failed.probed(answer)),
            (State::Engine(failure), answer) => Step::failed(Failed::of_engine(failure, answer)),
            (State::BeginAgain, Answer::Done) => self.each(now),
            (State::Each(mut several), answer) => {
                let step = several.next(answer, now);
                self.state = State::Each(several);
                self.follow_each(step)
            }
            (State::Session(mut several), answer) => {
                let step = several.next(answer, now);
                self.state = State::Session(several);
                self.follow_session(step)
            }
            // After a hand-over nobody knows whether the session still holds the locks.
            (_, answer) => Step::failed(unknown(answer)),
        }
    }

    fn abandon(&self) -> Abandoned {
        let (broken, cancel) = match &self.state {
            State::Start => return Abandoned::default(),
            State::Session(several) => return several.abandon(),
            State::Probe(_) | State::Engine(_) => return Abandoned::broken(),
            State::RollBack(_) => (false, false),
            State::Begin { millis, .. } => (true, *millis > 0),
            State::Each(several) => (true, several.abandon().cancel),
            // If the transaction has the locks, they are free now. If the session kept them, when the connection is
            // closed.
            State::BeginAgain | State::PutBack | State::HandOver => (true, false),
        };
        // Twice: a late cancel may hit the first.
        Abandoned {
            messages: Abandoned::twice("ROLLBACK".to_owned()),
            broken,
            cancel,
            ..Abandoned::default()
        }
    }
}
