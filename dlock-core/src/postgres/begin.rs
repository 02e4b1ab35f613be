use std::time::Duration;

use super::acquire::Code;
use super::{PostgresAcquire, Scope, sql};
use crate::wait::AfterBusy;
use crate::{Abandoned, Answer, Machine, Mode, Outcome, PostgresKey, Reason, Step, Wait};

/// Begins a transaction that holds an advisory lock until it ends.
///
/// At READ COMMITTED the transaction itself takes the lock: in one message where it is free, in two where it is taken.
/// At the other levels the session's lock is acquired first, and the transaction that begins then takes it over: so its
/// snapshot is younger than the grant.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Postgres, Step, TransactionDialect, Wait};
///
/// let key = Postgres::key(&42.into())?;
/// let Step::Batch(sql) = Postgres::begin(&key, Mode::Exclusive, Wait::default()).start() else { panic!() };
/// assert!(sql.starts_with("BEGIN; "));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct PostgresBegin {
    key: PostgresKey,
    mode: Mode,
    wait: Wait,
    state: State,
    session: PostgresAcquire,
    expected_error: bool,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Begun, and asked without waiting.
    Begin,
    /// That failed: begun again, and in the server's queue.
    Wait,
    /// That failed, too: ending the aborted transaction, of which Diesel does not know.
    RollBack(Failed),
    Sleep,
    /// Not READ COMMITTED: acquiring the session's lock.
    Session,
    /// Handing the session's lock over to a transaction.
    HandOver,
}

#[derive(Clone, Copy, Debug)]
enum Failed {
    Isolation,
    Lock(Code),
}

impl PostgresBegin {
    pub(super) fn new(key: PostgresKey, mode: Mode, wait: Wait) -> Self {
        Self {
            key,
            mode,
            wait,
            state: State::Begin,
            session: PostgresAcquire::new(key, mode, Scope::Session, wait, None).marked(),
            expected_error: false,
        }
    }

    /// After [`State::Begin`]: the lock is taken, or it is something else, of which a wait tells more.
    fn enqueue(&mut self, elapsed: Duration) -> Step {
        let millis = self.wait.untried(elapsed);
        self.state = State::Wait;
        Step::Batch(sql::begin_waiting(self.key, self.mode, millis).into())
    }

    fn sleep(&mut self, interval: Duration) -> Step {
        self.state = State::Sleep;
        Step::Sleep(interval)
    }

    fn settle(&mut self, failed: Failed, elapsed: Duration) -> Step {
        match failed {
            Failed::Isolation => {
                self.state = State::Session;
                let step = self.session.start();
                self.relay(step)
            }
            Failed::Lock(Code::LockNotAvailable) => match self.wait.after_busy(elapsed) {
                AfterBusy::GiveUp => Outcome::TimedOut.into(),
                AfterBusy::Sleep(interval) => self.sleep(interval),
                AfterBusy::Queue(_) => self.sleep(Wait::PAUSE),
            },
            // The lock was the transaction's, and that is rolled back.
            Failed::Lock(code) => code.reason().clean().into(),
        }
    }

    fn relay(&mut self, step: Step) -> Step {
        if step == Step::Done(Outcome::Success) {
            self.state = State::HandOver;
            return Step::Batch(sql::begin_holding(self.key, self.mode).into());
        }
        step
    }
}

impl Machine for PostgresBegin {
    fn start(&mut self) -> Step {
        self.state = State::Begin;
        Step::Batch(sql::begin(self.key, self.mode).into())
    }

    fn expected_error(&self) -> bool {
        self.expected_error
    }

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        // What Begin says is that the lock is taken; and then the other isolation levels.
        self.expected_error = matches!(
            self.state,
            State::Begin
                | State::RollBack(Failed::Isolation | Failed::Lock(Code::LockNotAvailable))
        );
        match (self.state, answer) {
            (State::Begin | State::Wait | State::HandOver, Answer::Done) => Outcome::Success.into(),
            // It is aborted now, and whoever began it rolls it back.
            (State::Begin, Answer::Error(Some(constraint))) if constraint == sql::NOT_NEW => {
                Reason::InTransaction.clean().into()
            }
            (State::Begin, _) => self.enqueue(elapsed),
            (State::Wait, answer) => {
                let sqlstate = match answer {
                    Answer::Error(sqlstate) => sqlstate,
                    _ => None,
                };
                self.state = State::RollBack(match sqlstate.as_deref() {
                    Some(sql::ISOLATION) => Failed::Isolation,
                    sqlstate => Failed::Lock(Code::new(sqlstate)),
                });
                Step::Batch("ROLLBACK".into())
            }
            (State::RollBack(failed), Answer::Done) => self.settle(failed, elapsed),
            (State::RollBack(_), _) => Reason::Database.broken().into(),
            (State::Sleep, _) => self.start(),
            (State::Session, answer) => {
                let step = self.session.next(answer, elapsed);
                self.relay(step)
            }
            // Nobody knows whether the session still holds the lock.
            (State::HandOver, _) => Reason::Database.broken().into(),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self.state {
            State::Sleep => Abandoned::default(),
            // Begin: it may be a transaction that Diesel does not know of that is rolled back. Hand-over: if the
            // transaction has the lock, it is free now; if the session kept it, when the connection is closed.
            State::Begin | State::Wait | State::RollBack(_) | State::HandOver => Abandoned {
                messages: vec!["ROLLBACK".into()],
                broken: !matches!(self.state, State::RollBack(_)),
                waiting: matches!(self.state, State::Wait),
            },
            State::Session => self.session.abandon(),
        }
    }
}
