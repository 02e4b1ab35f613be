use std::time::Duration;

use super::key::SqliteKey;
use super::sql;
use crate::Mode;
use crate::proto::{
    Abandoned, AfterBusy, Answer, Ask, Cause, Depth, ErrorFields, Failure, Hold, Machine, Reason,
    Rows, Session, Step, Wait, Waiting,
};

/// Acquires a lock.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | the request, which waits in the queue | granted | granted |
/// | | | busy | `Ask`, `Sleep` (polling), or gives up |
/// | | | given up | fails, nothing is held |
/// | | | an error | fails, nothing is held |
/// | | | anything else | `GiveBack` |
/// | `GiveBack` | releases the request | 1, 0, or an error: given up | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
/// | `Sleep` | | | `Ask` |
///
/// After an error nothing is held, because the driver has given the request up by its number.
#[derive(Debug)]
pub(super) struct Acquire {
    key: SqliteKey,
    mode: Mode,
    depth: Depth,
    droppable: bool,
    pub(super) wait: Wait,
    waiting: Waiting,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Ask,
    GiveBack,
    Sleep,
}

type Acquired = Step<Option<Hold<SqliteKey>>>;

impl Acquire {
    pub(super) fn new(key: SqliteKey, ask: &Ask, session: Session) -> Self {
        Self {
            key,
            mode: ask.mode,
            depth: session.depth,
            droppable: ask.droppable,
            wait: ask.wait,
            waiting: ask.wait.since(Duration::ZERO),
            state: State::Sleep,
        }
    }

    pub(super) fn key(&self) -> SqliteKey {
        self.key
    }

    /// There is no way to the functions, so a try costs as much as a wait: the first question may wait.
    fn ask(&mut self, now: Duration) -> Acquired {
        self.state = State::Ask;
        Step::Query(sql::acquire(self.key, self.mode, self.waiting.first(now)))
    }

    fn granted(&self) -> Acquired {
        Step::Done(Ok(Some(Hold::new(
            self.key,
            self.mode,
            self.depth,
            self.droppable,
        ))))
    }

    fn busy(&mut self, now: Duration) -> Acquired {
        match self.waiting.after_busy(now) {
            AfterBusy::GiveUp => Step::Done(Ok(None)),
            AfterBusy::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            AfterBusy::Queue(_) => self.ask(now),
        }
    }
}

pub(super) fn failed(error: ErrorFields) -> Failure {
    let reason = match error.constraint.as_deref() {
        Some(sql::UNSUPPORTED) => Reason::Unsupported,
        Some(sql::DEADLOCK) => Reason::Deadlock,
        _ => Reason::Database,
    };
    reason.clean(error.cause)
}

impl Machine for Acquire {
    type Output = Option<Hold<SqliteKey>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.waiting = self.wait.since(now);
        self.ask(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (self.state, answer) {
            (State::Ask, Answer::Rows(Rows::Number(Some(sql::GRANTED)))) => self.granted(),
            (State::Ask, Answer::Rows(Rows::Number(Some(sql::BUSY)))) => self.busy(now),
            (State::Ask, Answer::Rows(Rows::Number(Some(sql::GIVEN_UP)))) => {
                Step::failed(Reason::Interrupted.clean(Cause::default()))
            }
            (State::Ask, Answer::Error(error)) => Step::failed(failed(error)),
            (State::Ask, _) => {
                self.state = State::GiveBack;
                Step::Query(sql::release(self.key))
            }

            (State::GiveBack, Answer::Rows(Rows::Number(Some(0 | 1))))
            | (State::GiveBack, Answer::Error(ErrorFields { given_up: true, .. })) => {
                Step::failed(Reason::Database.clean(Cause::default()))
            }
            (State::GiveBack, Answer::Error(error)) => {
                Step::failed(Reason::Database.broken(error.cause))
            }
            (State::GiveBack, _) => Step::failed(Reason::Database.broken(Cause::default())),

            (State::Sleep, _) => self.ask(now),
        }
    }

    /// The driver gives the request up by its number.
    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
