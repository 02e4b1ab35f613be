use std::time::Duration;

use super::attempt::{Attempt, Attempted};
use super::fault::{Failed, Fault, aborted, unknown};
use super::mark::Mark;
use super::sql::{self, Lift};
use super::turns::{Next, QuietTurn, Turn, Turns};
use crate::proto::{
    Abandoned, Answer, Ask, ErrorFields, Failure, Hold, Machine, Reason, Rows, Savepoint, Session,
    Statement, Step,
};
use crate::{Mode, PostgresKey};

/// Acquires a slot of a semaphore.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Mark` (inside a transaction) | the savepoint | done | `Try` |
/// | | | an error | fails: the transaction had been aborted |
/// | `Try` | one statement that tries all slots | a slot | granted |
/// | | | none | `Turn`; `Sleep` (polling); `Undo`, or gives up |
/// | | | an error | `Verify`, inside a transaction `Undo` |
/// | | | it is a standby | `Verify`, inside a transaction `Undo`; fails |
/// | `Turn` | a [`QuietTurn`] at the gate and in front of the slots | granted | granted |
/// | | | over | the next turn, or gives up |
/// | | | unavailable | `Sleep`, and from then on it polls |
/// | | | an error: a deadlock, a standby, or the session is gone | fails, nothing is held |
/// | | | any other error | `Verify` |
/// | `Verify` | does it have a slot, and the prepared statement? | 0 | fails, nothing is held |
/// | | | 2: there is no prepared statement | `Try`, unprepared, once |
/// | | | anything else | fails, the session is ended |
/// | `Undo` (inside a transaction) | an [`Attempt`] to go back to the savepoint | undone | fails, or gives up |
/// | | | stuck | fails, the session is ended |
/// | `Sleep` | | | `Try` |
///
/// A wait inside a transaction polls: the gate would be kept until the transaction ends.
///
/// After an error that a grant may have preceded, a slot that the session has is this request's or an outer guard's.
/// Nobody can know whose it is, and so the session is ended. The block of a turn leaves no such slot behind.
#[derive(Debug)]
pub(super) struct AcquireSlot {
    gate: i64,
    permits: u32,
    except: Vec<u32>,
    mark: Mark,
    session: Session,
    droppable: bool,
    /// Only inside a transaction. It stays, so that the slot can be released if the transaction is aborted later.
    savepoint: Option<Savepoint>,
    turns: Turns,
    /// There is no queue for this session.
    polls: bool,
    /// The session has forgotten the prepared statement (`DEALLOCATE ALL`).
    unprepared: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Mark,
    Try,
    Turn(QuietTurn),
    Verify {
        failed: Failed,
        tried: bool,
    },
    /// `None`: the limit has passed.
    Undo(Attempt, Option<Reason>),
    Sleep,
}

type Acquired = Step<Option<Hold<PostgresKey>>>;

impl AcquireSlot {
    /// Between two tries, where nothing else was asked for.
    const PAUSE: Duration = Duration::from_millis(10);

    pub(super) fn new(gate: i64, permits: u32, ask: &Ask, session: Session) -> Self {
        Self {
            gate,
            permits,
            except: ask.except.clone(),
            mark: Mark::new(),
            session,
            droppable: ask.droppable,
            savepoint: None,
            turns: Turns::new(ask.wait),
            polls: session.depth.is_some(),
            unprepared: false,
            state: State::Sleep,
        }
    }

    /// The key of the gate and the number of slots.
    pub(super) fn semaphore(&self) -> (i64, u32) {
        (self.gate, self.permits)
    }

    fn begin(&mut self) -> Acquired {
        if self.session.depth.is_none() {
            return self.try_all();
        }
        let savepoint = Savepoint::new(self.session.test_transaction);
        let mark = Step::Batch(format!("SAVEPOINT {savepoint}").into());
        self.savepoint = Some(savepoint);
        self.state = State::Mark;
        mark
    }

    fn try_all(&mut self) -> Acquired {
        self.state = State::Try;
        Step::Query(self.kept(self.take()))
    }

    fn take(&self) -> Statement {
        match &self.except[..] {
            [] => sql::take_slot(self.mark, self.gate, self.permits),
            except => sql::take_another_slot(self.mark, self.gate, self.permits, except),
        }
    }

    /// The statement as the session may know it.
    fn kept(&self, statement: Statement) -> Statement {
        match self.unprepared {
            true => statement.never_kept(),
            false => statement,
        }
    }

    fn turn(&mut self, rest: u32, now: Duration) -> Acquired {
        let wait = sql::turn_for_slot(self.mark, self.permits);
        let message = sql::without_limits(rest, Lift::StatementAndTransaction, &wait);
        // Nobody shares the gate but for a moment, so there are no long turns.
        let prepare = sql::prepare_turn(PostgresKey::BigInt(self.gate), rest, 1);
        let (prepare, read) = (self.kept(prepare), self.kept(sql::granted_slot()));
        let (turn, first) = QuietTurn::asking(prepare, message, (read, self.permits));
        self.state = State::Turn(turn);
        // There are no turns inside a transaction.
        let first = match self.turns.have_passed() {
            true => first.outside_a_transaction(),
            false => first,
        };
        self.follow(first, now)
    }

    fn follow(&mut self, turn: Turn, now: Duration) -> Acquired {
        match turn.step() {
            Ok(step) => step,
            Err(Turn::Granted(granted)) => self.granted(granted - 1),
            Err(Turn::Unavailable { .. }) => {
                self.polls = true;
                self.taken(now)
            }
            // The block catches the end of its turn, so the error is another one.
            Err(Turn::Failed { error, waited }) if waited || error.lost => {
                self.settle(error, false)
            }
            Err(Turn::Failed { error, .. }) => {
                let cause = error.cause;
                let failed = Failed::strange();
                self.verify(Failed { cause, ..failed }, false)
            }
            Err(Turn::Strange) => self.verify(Failed::strange(), false),
            Err(_) => {
                self.turns.ended();
                self.taken(now)
            }
        }
    }

    fn granted(&mut self, slot: u32) -> Acquired {
        Step::Done(Ok(Some(Hold {
            savepoint: self.savepoint.take(),
            slot: Some(slot),
            ..Hold::new(
                PostgresKey::BigInt(self.gate + 1 + i64::from(slot)),
                Mode::Exclusive,
                self.session.depth,
                self.droppable,
            )
        })))
    }

    fn taken(&mut self, now: Duration) -> Acquired {
        let pause = |left: u32| Self::PAUSE.min(Duration::from_millis(left.into()));
        match self.turns.next(now) {
            Next::GiveUp => self.undo(ErrorFields::default(), None),
            Next::Sleep(interval) => self.sleep(interval),
            Next::First(rest) | Next::Quiet { rest, .. } if self.polls => self.sleep(pause(rest)),
            Next::First(rest) | Next::Quiet { rest, .. } => self.turn(rest, now),
        }
    }

    fn sleep(&mut self, interval: Duration) -> Acquired {
        self.state = State::Sleep;
        Step::Sleep(interval)
    }

    /// Takes the savepoint away, where there is one, and ends.
    fn undo(&mut self, error: ErrorFields, reason: Option<Reason>) -> Acquired {
        let Some(savepoint) = &self.savepoint else {
            return self.undone(error, reason);
        };
        let (attempt, step) = Attempt::undo(savepoint, error, Duration::ZERO);
        self.state = State::Undo(attempt, reason.clone());
        self.follow_undo(step, reason)
    }

    fn follow_undo(&mut self, step: Attempted, reason: Option<Reason>) -> Acquired {
        match step.step() {
            Ok(step) => step,
            Err(Attempted::Undone { error, .. }) => {
                self.savepoint.take().into_iter().for_each(Savepoint::gone);
                self.undone(error, reason)
            }
            Err(Attempted::Stuck(error)) => Step::failed(unknown(Answer::Error(error))),
            Err(_) => Step::failed(unknown(Answer::Done)),
        }
    }

    fn undone(&mut self, error: ErrorFields, reason: Option<Reason>) -> Acquired {
        match reason {
            None => Step::Done(Ok(None)),
            // Inside a transaction the slot may have been granted before the error.
            Some(reason) => {
                let failed = Failed {
                    reason,
                    cause: error.cause,
                    ..Failed::unlimited()
                };
                self.verify(failed, true)
            }
        }
    }

    fn settle(&mut self, error: ErrorFields, tried: bool) -> Acquired {
        if tried && self.savepoint.is_some() && !error.lost {
            let Failure { reason, .. } = aborted(error.clone());
            return self.undo(error, Some(reason));
        }
        match Fault::new(error, Failed::unlimited()) {
            Fault::Refused(reason, cause) => Step::failed(reason.clean(cause)),
            Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
            Fault::Detail(_, failed) | Fault::Other(failed) => self.verify(failed, tried),
        }
    }

    fn verify(&mut self, failed: Failed, tried: bool) -> Acquired {
        self.state = State::Verify { failed, tried };
        let text = self.take().sql.first().copied().unwrap_or_default();
        Step::Query(sql::verify_slots(
            self.gate,
            self.permits,
            &self.except,
            text,
        ))
    }
}

impl Machine for AcquireSlot {
    type Output = Option<Hold<PostgresKey>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.turns.start(now);
        self.begin()
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (std::mem::replace(&mut self.state, State::Sleep), answer) {
            (State::Mark, Answer::Done) => self.try_all(),
            (State::Mark, Answer::Error(error)) => Step::failed(aborted(error)),
            (State::Mark, answer) => Step::failed(unknown(answer)),

            (State::Try, Answer::Rows(Rows::Number(Some(sql::NO_SLOT)))) => self.taken(now),
            (State::Try, Answer::Rows(Rows::Number(Some(sql::NO_SLOT_ON_STANDBY)))) => {
                self.undo(ErrorFields::default(), Some(Reason::Standby))
            }
            (State::Try, Answer::Rows(Rows::Number(Some(slot))))
                if (0..i64::from(self.permits)).contains(&slot) =>
            {
                self.granted(slot as u32)
            }
            (State::Try, Answer::Error(error)) => self.settle(error, true),
            (State::Try, _) => self.verify(Failed::strange(), false),

            (State::Turn(mut turn), answer) => {
                let next = turn.next(answer);
                self.state = State::Turn(turn);
                self.follow(next, now)
            }

            (
                State::Verify { tried: true, .. },
                Answer::Rows(Rows::Number(Some(sql::UNPREPARED))),
            ) if !self.unprepared => {
                self.unprepared = true;
                self.begin()
            }
            (
                State::Verify { failed, .. },
                Answer::Rows(Rows::Number(Some(0 | sql::UNPREPARED))),
            ) => Step::failed(failed.reason().clean(failed.cause)),
            (State::Verify { .. }, Answer::Error(error)) if error.lost => {
                Step::failed(Failure::lost(error.cause))
            }
            (State::Verify { failed, .. }, _) => Step::failed(failed.reason().broken(failed.cause)),

            (State::Undo(mut attempt, reason), answer) => {
                let savepoint = self.savepoint.as_ref().expect("BUG: it is undone");
                let step = attempt.next(savepoint, answer, now);
                self.state = State::Undo(attempt, reason.clone());
                self.follow_undo(step, reason)
            }

            (State::Sleep, _) => self.try_all(),
        }
    }

    fn abandon(&self) -> Abandoned {
        let release = || Abandoned::twice(sql::release_slot_if_granted(self.gate, self.mark));
        match &self.state {
            _ if !self.droppable => Abandoned::broken(),
            // The savepoint may stay: its name is not used again in this transaction.
            State::Sleep => Abandoned::default(),
            State::Try => Abandoned {
                messages: release(),
                ..Abandoned::broken()
            },
            State::Turn(turn) if turn.may_be_granted() => Abandoned {
                messages: release(),
                broken: true,
                cancel: turn.waits(),
                ..Abandoned::default()
            },
            State::Mark | State::Turn(_) | State::Verify { .. } | State::Undo(..) => {
                Abandoned::broken()
            }
        }
    }
}
