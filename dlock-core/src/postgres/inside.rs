mod abandon;

use std::time::Duration;

use super::attempt::{Attempt, Attempted};
use super::fault::{Failed, Fault, aborted, unknown};
use super::sql;
use super::turns::{Next, QuietTurn, Turn, Turns};
use crate::proto::{
    Abandoned, Answer, Cause, Depth, ErrorFields, Failure, Hold, Machine, Reason, Rows, Savepoint,
    Session, Step, Wait,
};
use crate::{Mode, PostgresKey};

/// Acquires a session's lock inside an open transaction. A failed statement would abort the transaction, so everything
/// stands behind a savepoint, in one message. The savepoint stays, so that the lock can be released if the transaction
/// is aborted later.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Before` (not always) | does the session hold the lock? | 0, 1 | `Wait` |
/// | | | an error | fails: the transaction had been aborted |
/// | `Wait` | an [`Attempt`]: tries, or waits for a turn | done | granted |
/// | | | undone: taken, and no wait was asked for | `Sleep`, or gives up |
/// | | | undone: a deadlock, or a standby | fails, nothing is held |
/// | | | undone: any other error | `Verify` |
/// | | | stuck | fails, nothing is held |
/// | `Turn` | a [`QuietTurn`], without a savepoint in the end | granted | `Mark` |
/// | | | over | the next turn, or gives up |
/// | | | unavailable, failed | `Wait`, undoing it |
/// | `Mark` | the savepoint | done | granted |
/// | | | an error | fails, the session is ended |
/// | `Verify` | does the session hold the lock? | 0, and the limit passed | as `Turn` over |
/// | | | 0, and it may be a cancel | `Probe` |
/// | | | 0 otherwise | fails, nothing is held |
/// | | | 1, and it did not before | `GiveBack` |
/// | | | anything else | fails, the session is ended |
/// | `GiveBack` | releases it | 1 | fails, nothing is held |
/// | `Probe` | an [`Attempt`]: takes a lock that nobody else has | done | fails: it was a cancel |
/// | | | undone | fails: there are no such locks |
/// | | | stuck | fails, nothing is held |
/// | `Sleep` | | | `Wait` |
#[derive(Debug)]
pub(super) struct AcquireInside {
    key: PostgresKey,
    mode: Mode,
    depth: Depth,
    droppable: bool,
    /// `None` when it has gone, or may never have been.
    savepoint: Option<Savepoint>,
    held_before: HeldBefore,
    turns: Turns,
    state: State,
}

/// Whether an outer guard holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeldBefore {
    Unknown,
    No,
    Yes,
}

#[derive(Debug)]
enum State {
    Before,
    Wait { attempt: Attempt, millis: u32 },
    Turn(QuietTurn),
    Mark,
    Verify(Failed),
    GiveBack(Failed),
    Probe(Attempt, Failed),
    Sleep,
}

type Acquired = Step<Option<Hold<PostgresKey>>>;

impl AcquireInside {
    pub(super) fn new(
        key: PostgresKey,
        mode: Mode,
        wait: Wait,
        session: Session,
        droppable: bool,
    ) -> Self {
        Self {
            key,
            mode,
            depth: session.depth,
            droppable,
            savepoint: Some(Savepoint::new(session.test_transaction)),
            held_before: HeldBefore::Unknown,
            turns: Turns::new(wait),
            state: State::Before,
        }
    }

    pub(super) fn key(&self) -> PostgresKey {
        self.key
    }

    fn savepoint(&self) -> &Savepoint {
        self.savepoint
            .as_ref()
            .expect("BUG: the savepoint is there until the end")
    }

    fn wait(&mut self, millis: u32, now: Duration) -> Acquired {
        let attempt = Attempt::sent(now);
        self.state = State::Wait { attempt, millis };
        Step::Batch(sql::wait_inside(self.savepoint(), self.key, self.mode, millis).into())
    }

    fn turn(&mut self, rest: u32, long: u32, now: Duration) -> Acquired {
        let message = sql::turn_inside(self.savepoint(), self.key, self.mode, rest);
        let (turn, first) = QuietTurn::start(self.key, self.mode, (rest, long), message);
        self.state = State::Turn(turn);
        self.follow_turn(first, now)
    }

    fn follow_turn(&mut self, turn: Turn, now: Duration) -> Acquired {
        match turn.step() {
            Ok(step) => step,
            Err(Turn::Granted(_)) => {
                self.state = State::Mark;
                Step::Batch(format!("SAVEPOINT {}", self.savepoint()).into())
            }
            Err(Turn::Unavailable { millis }) => self.wait(millis, now),
            Err(Turn::Failed {
                error,
                waited: true,
            }) => {
                let (attempt, step) = Attempt::undo(self.savepoint(), error, Duration::ZERO);
                // The block catches the end of its turn, so the error is another one.
                self.state = State::Wait { attempt, millis: 0 };
                self.follow_wait(step, 0, now)
            }
            // The wait was over, and perhaps granted.
            Err(Turn::Failed { error, .. }) if self.may_be_granted() => {
                self.savepoint = None;
                Step::failed(unknown(Answer::Error(error)))
            }
            // Not behind a savepoint: the transaction is aborted now.
            Err(Turn::Failed { error, .. }) => self.stuck(error),
            Err(Turn::Strange) => self.verify(Failed::strange()),
            Err(_) => self.ended(now),
        }
    }

    /// Whether the turn is past its wait.
    fn may_be_granted(&self) -> bool {
        matches!(&self.state, State::Turn(turn) if turn.may_be_granted())
    }

    fn follow_wait(&mut self, attempted: Attempted, millis: u32, now: Duration) -> Acquired {
        match attempted.step() {
            Ok(step) => step,
            Err(Attempted::Undone { error, passed }) => {
                let failed = Failed::after(millis, Duration::ZERO, passed);
                self.settle(Fault::inside(error, failed), now)
            }
            Err(Attempted::Stuck(error)) => self.stuck(error),
            Err(_) => self.granted(),
        }
    }

    /// The transaction is aborted. Its own savepoint may be there, or not: the name is not used again.
    fn stuck(&mut self, error: ErrorFields) -> Acquired {
        self.savepoint = None;
        Step::failed(aborted(error))
    }

    fn settle(&mut self, fault: Fault, now: Duration) -> Acquired {
        match fault {
            Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
            Fault::Refused(reason, cause) => self.fail(reason, cause),
            Fault::Detail(detail, _) if detail.contains(sql::TOKEN_TAKEN) => self.taken(now),
            Fault::Detail(_, failed) | Fault::Other(failed) => self.verify(failed),
        }
    }

    fn verify(&mut self, failed: Failed) -> Acquired {
        // By this request or by the outer guard alone: nobody can know.
        if self.held_before == HeldBefore::Yes {
            return Step::failed(failed.reason().broken(failed.cause));
        }
        self.state = State::Verify(failed);
        Step::Query(sql::is_held(self.key, self.mode))
    }

    /// The session does not hold the lock.
    fn nothing_held(&mut self, failed: Failed, now: Duration) -> Acquired {
        // From now on a hold is this request's.
        self.held_before = HeldBefore::No;
        if failed.is_timeout() {
            return self.ended(now);
        }
        if failed.reason != Reason::Interrupted {
            return self.fail(failed.reason, failed.cause);
        }
        self.state = State::Probe(Attempt::sent(now), failed);
        Step::Batch(sql::probe_inside(self.savepoint()).into())
    }

    /// The savepoint is not there any more.
    fn gone(&mut self) {
        self.savepoint.take().into_iter().for_each(Savepoint::gone);
    }

    /// Nothing is held, and the savepoint has gone.
    fn fail(&mut self, reason: Reason, cause: Cause) -> Acquired {
        self.gone();
        Step::failed(reason.clean(cause))
    }

    fn granted(&mut self) -> Acquired {
        Step::Done(Ok(Some(Hold {
            savepoint: self.savepoint.take(),
            ..Hold::new(self.key, self.mode, self.depth, self.droppable)
        })))
    }

    fn ended(&mut self, now: Duration) -> Acquired {
        self.turns.ended();
        self.taken(now)
    }

    fn taken(&mut self, now: Duration) -> Acquired {
        self.held_before = HeldBefore::No;
        match self.turns.next(now) {
            Next::GiveUp => {
                self.gone();
                Step::Done(Ok(None))
            }
            Next::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            Next::First(millis) => self.wait(millis, now),
            Next::Quiet { rest, long } => self.turn(rest, long, now),
        }
    }
}

impl Machine for AcquireInside {
    type Output = Option<Hold<PostgresKey>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.turns.start(now);
        // In an aborted transaction there may be a savepoint of this name to go back to, which would revive it.
        if self.droppable || self.savepoint().may_be_there() {
            self.state = State::Before;
            return Step::Query(sql::is_held(self.key, self.mode));
        }
        let millis = self.turns.first(now);
        self.wait(millis, now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (std::mem::replace(&mut self.state, State::Sleep), answer) {
            (State::Before, Answer::Rows(Rows::Number(Some(held @ (0 | 1))))) => {
                self.held_before = match held {
                    0 => HeldBefore::No,
                    _ => HeldBefore::Yes,
                };
                let millis = self.turns.first(now);
                self.wait(millis, now)
            }
            // Nothing was asked for.
            (State::Before, Answer::Error(error)) => {
                self.gone();
                Step::failed(aborted(error))
            }
            (State::Before, _) => self.fail(Reason::Database, Cause::default()),

            (
                State::Wait {
                    mut attempt,
                    millis,
                },
                answer,
            ) => {
                let attempted = attempt.next(self.savepoint(), answer, now);
                self.state = State::Wait { attempt, millis };
                self.follow_wait(attempted, millis, now)
            }
            (State::Turn(mut turn), answer) => {
                let next = turn.next(answer);
                self.state = State::Turn(turn);
                self.follow_turn(next, now)
            }
            (State::Mark, Answer::Done) => self.granted(),
            (State::Mark, answer) => {
                self.savepoint = None;
                Step::failed(unknown(answer))
            }

            (State::Verify(failed), Answer::Rows(Rows::Number(Some(0)))) => {
                self.nothing_held(failed, now)
            }
            (State::Verify(failed), Answer::Rows(Rows::Number(Some(1))))
                if self.held_before == HeldBefore::No =>
            {
                self.state = State::GiveBack(failed);
                Step::Query(sql::unlock(self.key, self.mode))
            }
            (State::GiveBack(failed), Answer::Rows(Rows::Number(Some(1)))) => {
                self.fail(failed.reason(), failed.cause)
            }
            (State::Verify(_) | State::GiveBack(_), Answer::Error(error)) if error.lost => {
                Step::failed(Failure::lost(error.cause))
            }
            (State::Verify(failed) | State::GiveBack(failed), _) => {
                Step::failed(failed.reason().broken(failed.cause))
            }

            (State::Probe(mut attempt, failed), answer) => {
                match attempt.next(self.savepoint(), answer, now).step() {
                    Ok(step) => {
                        self.state = State::Probe(attempt, failed);
                        step
                    }
                    Err(Attempted::Undone { error, .. }) => {
                        self.gone();
                        Step::failed(failed.probed(Answer::Error(error)))
                    }
                    Err(Attempted::Stuck(error)) => self.stuck(error),
                    Err(_) => self.fail(Reason::Interrupted, failed.cause),
                }
            }

            (State::Sleep, _) => self.wait(0, now),
        }
    }

    fn abandon(&self) -> Abandoned {
        self.abandoned()
    }
}
