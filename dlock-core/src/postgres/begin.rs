use std::time::Duration;

use super::{PostgresAcquire, Scope, sql};
use crate::{Answer, Machine, Mode, Outcome, PostgresKey, Reason, Step, Wait};

/// Begins a transaction that holds an advisory lock until it ends.
///
/// At READ COMMITTED, with the lock free, that is one message. Otherwise the session's lock is acquired first, and the
/// transaction that begins then takes it over: so its snapshot is younger than the grant, at every isolation level.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Postgres, Step, TransactionDialect, Wait};
///
/// let key = Postgres::key(&42.into())?;
/// let Step::Batch(sql) = Postgres::begin(&key, Mode::Exclusive, Wait::default()).start() else { panic!() };
/// assert!(sql.starts_with("BEGIN; SELECT"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct PostgresBegin {
    key: PostgresKey,
    mode: Mode,
    state: State,
    session: PostgresAcquire,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Begin,
    Rollback,
    Session,
    BeginHolding,
}

impl PostgresBegin {
    pub(super) fn new(key: PostgresKey, mode: Mode, wait: Wait) -> Self {
        Self {
            key,
            mode,
            state: State::Begin,
            session: PostgresAcquire::new(key, mode, Scope::Session, wait, false),
        }
    }

    fn relay(&mut self, step: Step) -> Step {
        if step == Step::Done(Outcome::Success) {
            self.state = State::BeginHolding;
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

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Begin | State::BeginHolding, Answer::Done) => Outcome::Success.into(),
            (State::Begin, _) => {
                // The server is in an aborted transaction that Diesel does not know of.
                self.state = State::Rollback;
                Step::Batch("ROLLBACK".into())
            }
            (State::Rollback, Answer::Done) => {
                self.state = State::Session;
                let step = self.session.start();
                self.relay(step)
            }
            (State::Rollback, _) => Reason::Database.broken().into(),
            (State::Session, answer) => {
                let step = self.session.next(answer, elapsed);
                self.relay(step)
            }
            // Nobody knows whether the session still holds the lock.
            (State::BeginHolding, _) => Reason::Database.broken().into(),
        }
    }
}
