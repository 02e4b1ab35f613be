use std::time::Duration;

use super::{Sqlite, SqliteKey, sql};
use crate::wait::AfterBusy;
use crate::{Abandoned, Answer, Machine, Mode, Outcome, Reason, Step, Wait};

/// Acquires a lock.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Sqlite, Step, Wait};
///
/// let key = Sqlite::key(&"report".into())?;
/// let mut machine = Sqlite::acquire(&key, Mode::Exclusive, Wait::default(), None);
/// let Step::Query(statement) = machine.start() else { panic!() };
/// assert!(statement.text().contains("dlock_acquire(?, 1, ?, ?)"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct SqliteAcquire {
    key: SqliteKey,
    mode: Mode,
    wait: Wait,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Ask,
    Sleep,
    /// A strange answer: giving back what there is.
    GiveBack,
}

impl SqliteAcquire {
    pub(super) fn new(key: SqliteKey, mode: Mode, wait: Wait) -> Self {
        Self {
            key,
            mode,
            wait,
            state: State::Ask,
        }
    }

    /// There is no way to the functions, so that a try costs as much as a wait: the first question may be one.
    fn ask(&mut self, elapsed: Duration) -> Step {
        self.state = State::Ask;
        let millis = match self.wait.after_busy(elapsed) {
            AfterBusy::GiveUp | AfterBusy::Sleep(_) => 0,
            AfterBusy::Queue(Some(millis)) => millis.into(),
            AfterBusy::Queue(None) => sql::NO_LIMIT,
        };
        Step::Query(sql::acquire(self.key, self.mode, millis))
    }

    fn busy(&mut self, elapsed: Duration) -> Step {
        match self.wait.after_busy(elapsed) {
            AfterBusy::GiveUp => Outcome::TimedOut.into(),
            AfterBusy::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            AfterBusy::Queue(_) => self.ask(elapsed),
        }
    }
}

impl Machine for SqliteAcquire {
    fn start(&mut self) -> Step {
        self.ask(Duration::ZERO)
    }

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Ask, Answer::Value(Some(Sqlite::GRANTED))) => Outcome::Success.into(),
            (State::Ask, Answer::Value(Some(Sqlite::BUSY))) => self.busy(elapsed),
            (State::Ask, Answer::Value(Some(Sqlite::GIVEN_UP))) => {
                Reason::Interrupted.clean().into()
            }
            (State::Ask, Answer::Error(Some(constraint))) if constraint == Sqlite::UNSUPPORTED => {
                Reason::Unsupported.clean().into()
            }
            (State::Ask, Answer::Error(Some(constraint))) if constraint == Sqlite::DEADLOCK => {
                Reason::Deadlock.clean().into()
            }
            // Whatever was granted has been given up by its number.
            (State::Ask, Answer::Error(_)) => Reason::Database.clean().into(),
            (State::Ask, _) => {
                self.state = State::GiveBack;
                Step::Query(sql::release(self.key))
            }
            (State::GiveBack, Answer::Value(Some(0 | 1))) => Reason::Database.clean().into(),
            (State::GiveBack, _) => Reason::Database.broken().into(),
            (State::Sleep, _) => self.ask(elapsed),
        }
    }

    /// Nothing: the request is given up by its number.
    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
