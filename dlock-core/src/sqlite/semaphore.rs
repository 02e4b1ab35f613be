use std::time::Duration;

use super::acquire::failed;
use super::key::SqliteKey;
use super::sql;
use crate::Mode;
use crate::proto::{
    Abandoned, AfterBusy, Answer, Ask, Cause, Depth, Hold, Machine, Reason, Request, Rows, Session,
    Step, Wait, Waiting,
};

/// Acquires a slot of a semaphore.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | the request, which waits at the gate, then looks for a slot | a slot | granted |
/// | | | none | `Ask`, `Sleep` (polling), or gives up |
/// | | | given up | fails, nothing is held |
/// | | | an error | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
/// | `Sleep` | | | `Ask` |
///
/// After an error nothing is held, because the driver has given the request up by its number.
#[derive(Debug)]
pub(super) struct AcquireSlot {
    gate: u64,
    permits: u32,
    /// The session has slots already, and wants another one.
    another: bool,
    request: Request,
    depth: Depth,
    droppable: bool,
    pub(super) wait: Wait,
    waiting: Waiting,
}

type Acquired = Step<Option<Hold<SqliteKey>>>;

impl AcquireSlot {
    pub(super) fn new(
        gate: u64,
        permits: u32,
        request: Request,
        ask: &Ask,
        session: Session,
    ) -> Self {
        Self {
            gate,
            permits,
            another: !ask.except.is_empty(),
            request,
            depth: session.depth,
            droppable: ask.droppable,
            wait: ask.wait,
            waiting: ask.wait.since(Duration::ZERO),
        }
    }

    /// The key of the gate and the number of slots.
    pub(super) fn semaphore(&self) -> (u64, u32) {
        (self.gate, self.permits)
    }

    fn ask(&mut self, now: Duration) -> Acquired {
        let gate = SqliteKey {
            key: self.gate,
            request: self.request,
        };
        let millis = self.waiting.first(now);
        let which = (self.permits, self.another);
        Step::Query(sql::acquire_slot(gate, which, millis))
    }

    fn granted(&self, slot: u32) -> Acquired {
        Step::Done(Ok(Some(Hold {
            slot: Some(slot),
            ..Hold::new(
                SqliteKey {
                    key: self.gate + 1 + u64::from(slot),
                    request: self.request,
                },
                Mode::Exclusive,
                self.depth,
                self.droppable,
            )
        })))
    }

    fn taken(&mut self, now: Duration) -> Acquired {
        match self.waiting.after_busy(now) {
            AfterBusy::GiveUp => Step::Done(Ok(None)),
            AfterBusy::Sleep(interval) => Step::Sleep(interval),
            AfterBusy::Queue(_) => self.ask(now),
        }
    }
}

impl Machine for AcquireSlot {
    type Output = Option<Hold<SqliteKey>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.waiting = self.wait.since(now);
        self.ask(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match answer {
            Answer::Rows(Rows::Number(Some(sql::NO_SLOT))) => self.taken(now),
            Answer::Rows(Rows::Number(Some(sql::GIVEN_UP))) => {
                Step::failed(Reason::Interrupted.clean(Cause::default()))
            }
            Answer::Rows(Rows::Number(Some(slot)))
                if (0..i64::from(self.permits)).contains(&slot) =>
            {
                self.granted(slot as u32)
            }
            Answer::Rows(_) => Step::failed(Reason::Database.broken(Cause::default())),
            Answer::Error(error) => Step::failed(failed(error)),
            // The sleep is over.
            Answer::Done => self.ask(now),
        }
    }

    /// The driver gives the request up by its number.
    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
