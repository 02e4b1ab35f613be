use std::time::Duration;

use super::sql;
use crate::proto::{AfterBusy, Answer, ErrorFields, Rows, Statement, Step, Wait, Waiting};
use crate::{Mode, PostgresKey};

/// A wait that breathes: it is cut into turns.
///
/// A session that waits in the queue holds a snapshot. The snapshot stops VACUUM from cleaning and `CREATE INDEX
/// CONCURRENTLY` from finishing, in the whole database. Between two turns there is none. The place in the queue is gone
/// as well: a writer behind readers that hold longer than a turn would wait for ever, so there turns grow. How long a
/// turn is otherwise, [`sql::prepare_turn`] says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turns {
    waiting: Waiting,
    /// Of a turn behind readers, in milliseconds.
    long: u32,
}

/// What to do about a lock that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The limit has passed.
    GiveUp,
    /// Polling: sleep, then ask again.
    Sleep(Duration),
    /// The first turn, of so many milliseconds. If it ends without a grant, that is an error, which the server logs.
    First(u32),
    /// A [`QuietTurn`], of `rest` milliseconds at most, and `long` behind readers.
    Quiet { rest: u32, long: u32 },
}

impl Turns {
    const FIRST: u32 = sql::FIRST_TURN;
    const LONGEST: u32 = 60_000;

    pub(super) fn new(wait: Wait) -> Self {
        Self {
            waiting: wait.since(Duration::ZERO),
            long: Self::FIRST,
        }
    }

    pub(super) fn start(&mut self, now: Duration) {
        self.waiting.start(now);
    }

    /// How long the first statement may wait, in milliseconds. 0 only tries.
    pub(super) fn first(&self, now: Duration) -> u32 {
        self.waiting
            .first(now)
            .map_or(Self::FIRST, |millis| millis.min(Self::FIRST))
    }

    pub(super) fn next(&self, now: Duration) -> Next {
        match self.waiting.after_busy(now) {
            AfterBusy::GiveUp => Next::GiveUp,
            AfterBusy::Sleep(interval) => Next::Sleep(interval),
            AfterBusy::Queue(millis) => {
                let rest = millis.unwrap_or(Self::LONGEST).min(Self::LONGEST);
                match self.have_passed() {
                    false => Next::First(rest.min(Self::FIRST)),
                    true => Next::Quiet {
                        rest,
                        long: self.long,
                    },
                }
            }
        }
    }

    /// A turn ended without a grant.
    pub(super) fn ended(&mut self) {
        self.long = (2 * self.long).min(Self::LONGEST);
    }

    /// Whether a turn has passed: then the session waited, so it did not hold the lock before.
    pub(super) fn have_passed(&self) -> bool {
        self.long > Self::FIRST
    }
}

/// One turn that writes nothing into the server's log: three messages, of which the second waits.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Prepare` | key and limit, as settings | milliseconds | `Wait` |
/// | | | negative | ends: `Unavailable` |
/// | `Wait` | a block that waits and catches the end of the turn | done | `Read` |
/// | `Read` | does the session hold the lock? | 0 | ends: `Over` |
/// | | | a greater number | ends: `Granted` |
/// | each | | an error | ends: `Failed` |
#[derive(Debug)]
pub(super) struct QuietTurn {
    /// The message of `Wait`.
    message: String,
    /// The question of `Read`.
    read: Statement,
    /// The greatest answer to it.
    most: u32,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Prepare,
    Wait,
    Read,
}

/// How a [`QuietTurn`] goes on.
#[derive(Debug)]
pub(super) enum Turn {
    Query(Box<Statement>),
    Batch(String),
    /// 1, or for a semaphore 1 and the number of the slot.
    Granted(u32),
    Over,
    /// This role may not use PL/pgSQL. So long would the turn have been.
    Unavailable {
        millis: u32,
    },
    /// The wait has failed, or a question before or after it.
    Failed {
        error: ErrorFields,
        waited: bool,
    },
    /// An answer of another kind.
    Strange,
}

impl Turn {
    /// No transaction is open before this turn.
    pub(super) fn outside_a_transaction(self) -> Self {
        match self {
            Turn::Query(statement) => Turn::Query(Box::new(statement.between_turns())),
            turn => turn,
        }
    }

    /// The step to take, if the turn is not over.
    pub(super) fn step<T>(self) -> Result<Step<T>, Turn> {
        match self {
            Turn::Query(statement) => Ok(Step::Query(*statement)),
            Turn::Batch(sql) => Ok(Step::Batch(sql.into())),
            end => Err(end),
        }
    }
}

impl QuietTurn {
    /// `message` is what waits: [`sql::turn`] and what stands around it.
    pub(super) fn start(
        key: PostgresKey,
        mode: Mode,
        (rest, long): (u32, u32),
        message: String,
    ) -> (Self, Turn) {
        let prepare = sql::prepare_turn(key, rest, long).never_kept();
        Self::asking(prepare, message, (sql::is_held(key, mode).never_kept(), 1))
    }

    /// Another `message` that waits, and what tells whether it was granted, by a number up to `most`.
    pub(super) fn asking(
        prepare: Statement,
        message: String,
        (read, most): (Statement, u32),
    ) -> (Self, Turn) {
        let turn = Self {
            message,
            read,
            most,
            state: State::Prepare,
        };
        (turn, Turn::Query(Box::new(prepare)))
    }

    /// Whether its message waits in the queue now.
    pub(super) fn waits(&self) -> bool {
        matches!(self.state, State::Wait)
    }

    /// Whether a lock may be there that was not there before.
    pub(super) fn may_be_granted(&self) -> bool {
        !matches!(self.state, State::Prepare)
    }

    pub(super) fn next(&mut self, answer: Answer) -> Turn {
        match (self.state, answer) {
            (State::Prepare, Answer::Rows(Rows::Number(Some(millis)))) => {
                if millis < 0 {
                    let millis = millis.unsigned_abs().try_into().unwrap_or(u32::MAX);
                    return Turn::Unavailable { millis };
                }
                self.state = State::Wait;
                Turn::Batch(self.message.replace(sql::MILLIS, &millis.to_string()))
            }
            (State::Wait, Answer::Done) => {
                self.state = State::Read;
                Turn::Query(Box::new(self.read.clone()))
            }
            (State::Read, Answer::Rows(Rows::Number(Some(0)))) => Turn::Over,
            (State::Read, Answer::Rows(Rows::Number(Some(granted))))
                if (1..=i64::from(self.most)).contains(&granted) =>
            {
                Turn::Granted(granted as u32)
            }
            (state, Answer::Error(error)) => Turn::Failed {
                error,
                waited: matches!(state, State::Wait),
            },
            _ => Turn::Strange,
        }
    }
}
