use std::time::Duration;

use super::attempt::{Attempt, Attempted};
use super::fault::{Failed, Fault, aborted, unknown};
use super::sql::{self, Lift, Scope};
use super::turns::{Next, QuietTurn, Turn, Turns};
use crate::proto::{
    Abandoned, Answer, Cause, Failure, Machine, Reason, Rows, Savepoint, Session, Step, Wait,
};
use crate::{Mode, PostgresKey};

/// Acquires a lock that ends with the open transaction.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Try` | tries, without a savepoint | 1 | granted |
/// | | | 0 | `Wait`, `Sleep` (polling), or gives up |
/// | | | 3: it is a standby | fails; the transaction goes on |
/// | | | an error | fails; the transaction is aborted |
/// | `Wait` | an [`Attempt`]: waits for a turn | done | granted |
/// | | | undone: the limit passed | the next turn, or gives up |
/// | | | undone: any other error | fails, nothing is held |
/// | | | stuck | fails; the transaction is aborted |
/// | `Turn` | a [`QuietTurn`] | granted | granted |
/// | | | over | the next turn, or gives up |
/// | | | unavailable, failed | `Wait`, undoing it |
/// | `Sleep` | | | `Try` |
#[derive(Debug)]
pub(super) struct AcquireInTransaction {
    key: PostgresKey,
    mode: Mode,
    test_transaction: bool,
    savepoint: Option<Savepoint>,
    turns: Turns,
    state: State,
}

#[derive(Debug)]
enum State {
    Try,
    Wait { attempt: Attempt, millis: u32 },
    Turn(QuietTurn),
    Sleep,
}

type Acquired = Step<Option<()>>;

const BEHIND: &str = "BUG: it waits behind a savepoint";

impl AcquireInTransaction {
    pub(super) fn new(key: PostgresKey, mode: Mode, wait: Wait, session: Session) -> Self {
        Self {
            key,
            mode,
            test_transaction: session.test_transaction,
            savepoint: None,
            turns: Turns::new(wait),
            state: State::Try,
        }
    }

    pub(super) fn key(&self) -> PostgresKey {
        self.key
    }

    fn ask(&mut self) -> Acquired {
        self.state = State::Try;
        Step::Query(sql::try_in_transaction(self.key, self.mode))
    }

    /// What waits, behind a savepoint that is released if it succeeds.
    fn behind_savepoint(&mut self, millis: u32, wait: &str) -> String {
        let savepoint = self
            .savepoint
            .get_or_insert_with(|| Savepoint::new(self.test_transaction));
        format!(
            "SAVEPOINT {savepoint}; {}; RELEASE SAVEPOINT {savepoint}",
            sql::without_limits(millis, Lift::Statement, wait)
        )
    }

    fn wait(&mut self, millis: u32, now: Duration) -> Acquired {
        let wait = sql::wait(self.key, self.mode, Scope::Transaction);
        let message = self.behind_savepoint(millis, &wait);
        self.state = State::Wait {
            attempt: Attempt::sent(now),
            millis,
        };
        Step::Batch(message.into())
    }

    fn taken(&mut self, now: Duration) -> Acquired {
        match self.turns.next(now) {
            Next::GiveUp => self.done(None),
            Next::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            Next::First(millis) => self.wait(millis, now),
            Next::Quiet { rest, long } => {
                let wait = sql::turn(self.key, self.mode, Scope::Transaction);
                let message = self.behind_savepoint(rest, &wait);
                let (turn, first) = QuietTurn::start(self.key, self.mode, (rest, long), message);
                self.state = State::Turn(turn);
                self.follow_turn(first, now)
            }
        }
    }

    fn follow_turn(&mut self, turn: Turn, now: Duration) -> Acquired {
        match turn.step() {
            Ok(step) => step,
            Err(Turn::Granted(_)) => self.done(Some(())),
            Err(Turn::Unavailable { millis }) => self.wait(millis, now),
            Err(Turn::Failed {
                error,
                waited: true,
            }) => {
                let savepoint = self.savepoint.as_ref().expect(BEHIND);
                let (attempt, step) = Attempt::undo(savepoint, error, Duration::ZERO);
                // The block catches the end of its turn, so the error is another one.
                self.state = State::Wait { attempt, millis: 0 };
                self.follow_wait(step, 0, now)
            }
            // Not behind a savepoint: the transaction is aborted now.
            Err(Turn::Failed { error, .. }) => Step::failed(aborted(error)),
            Err(Turn::Strange) => Step::failed(Reason::Database.broken(Cause::default())),
            Err(_) => self.ended(now),
        }
    }

    fn follow_wait(&mut self, attempted: Attempted, millis: u32, now: Duration) -> Acquired {
        match attempted.step() {
            Ok(step) => step,
            Err(Attempted::Undone { error, passed }) => {
                match Fault::inside(error, Failed::after(millis, Duration::ZERO, passed)) {
                    Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
                    Fault::Refused(reason, cause) => self.fail(reason, cause),
                    // Whatever it was, the transaction's lock was undone with it.
                    Fault::Other(failed) if failed.is_timeout() => self.ended(now),
                    Fault::Detail(_, failed) | Fault::Other(failed) => {
                        self.fail(failed.reason, failed.cause)
                    }
                }
            }
            Err(Attempted::Stuck(error)) => Step::failed(aborted(error)),
            Err(_) => self.done(Some(())),
        }
    }

    fn ended(&mut self, now: Duration) -> Acquired {
        self.turns.ended();
        self.taken(now)
    }

    /// The transaction goes on, without the savepoint.
    fn done(&mut self, granted: Option<()>) -> Acquired {
        self.savepoint.take().into_iter().for_each(Savepoint::gone);
        Step::Done(Ok(granted))
    }

    fn fail(&mut self, reason: Reason, cause: Cause) -> Acquired {
        self.savepoint.take().into_iter().for_each(Savepoint::gone);
        Step::failed(reason.clean(cause))
    }
}

impl Machine for AcquireInTransaction {
    type Output = Option<()>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.turns.start(now);
        self.ask()
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (&mut self.state, answer) {
            (State::Try, Answer::Rows(Rows::Number(Some(1)))) => self.done(Some(())),
            (State::Try, Answer::Rows(Rows::Number(Some(0)))) => self.taken(now),
            (State::Try, Answer::Rows(Rows::Number(Some(sql::STANDBY)))) => {
                self.fail(Reason::Standby, Cause::default())
            }
            // Its rollback releases the lock, if there is one.
            (State::Try, Answer::Error(error)) => Step::failed(aborted(error)),
            (State::Try, answer) => Step::failed(unknown(answer)),
            (State::Wait { attempt, millis }, answer) => {
                let millis = *millis;
                let savepoint = self.savepoint.as_ref().expect(BEHIND);
                let attempted = attempt.next(savepoint, answer, now);
                self.follow_wait(attempted, millis, now)
            }
            (State::Turn(turn), answer) => {
                let turn = turn.next(answer);
                self.follow_turn(turn, now)
            }
            (State::Sleep, _) => self.ask(),
        }
    }

    fn abandon(&self) -> Abandoned {
        match &self.state {
            // If it was granted, it ends with the transaction.
            State::Sleep | State::Try => Abandoned::default(),
            // Nobody knows whether the savepoint was released, so the transaction cannot be mended.
            State::Wait { attempt, .. } => Abandoned {
                cancel: attempt.is_sent(),
                ..Abandoned::broken()
            },
            State::Turn(turn) => Abandoned {
                cancel: turn.waits(),
                ..Abandoned::broken()
            },
        }
    }
}
