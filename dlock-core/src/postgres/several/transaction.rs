mod steps;

use std::time::Duration;

pub(super) use steps::TransactionSteps;

use super::Keys;
use crate::PostgresKey;
use crate::postgres::attempt::{Attempt, Attempted};
use crate::postgres::fault::{Failed, Fault, aborted, unknown};
use crate::postgres::sql::{self, Lift};
use crate::postgres::turns::Turns;
use crate::proto::{
    Abandoned, Answer, Ask, Cause, ErrorFields, Failure, Hold, Machine, Reason, Savepoint, Session,
    Several, Step, Wait,
};

/// Acquires several locks that end with the open transaction. All stand behind one savepoint, so that a failure leaves
/// none of them and the transaction goes on.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Before` (not always) | anything, to learn whether the transaction is aborted | rows | `Attempt` |
/// | | | an error | fails: it had been aborted |
/// | `Attempt` | an [`Attempt`]: takes all, and waits for a turn at most | done | granted |
/// | | | undone: the turn is over, or one is taken | `Mark`, or gives up |
/// | | | undone: any other error | fails, nothing is held |
/// | | | stuck | fails; the transaction is aborted |
/// | `Mark` | the savepoint | done | `Each` |
/// | `Each` | [`Several`], one by one where they are taken | granted | `Keep` |
/// | | | gives up, or fails | `Undo` |
/// | `Keep` | drops the savepoint | done | granted |
/// | `Undo` | back to the savepoint, without it | done | gives up, or fails |
/// | `Mark`, `Keep`, `Undo` | | an error | fails; the transaction is aborted |
#[derive(Debug)]
pub(in crate::postgres) struct SeveralInTransaction {
    keys: Keys,
    wait: Wait,
    session: Session,
    /// Whether the caller wants to know which of them is taken.
    tell: bool,
    savepoint: Option<Savepoint>,
    turns: Turns,
    started: Duration,
    at: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Start,
    Before,
    Attempt { attempt: Attempt, millis: u32 },
    Mark,
    Each(Box<Several<TransactionSteps>>),
    Keep,
    Undo(Attempt, Result<(), Failure>),
}

type Acquired = Step<Option<()>>;

impl SeveralInTransaction {
    pub(in crate::postgres) fn new(keys: Keys, ask: &Ask, session: Session) -> Self {
        Self {
            keys,
            wait: ask.wait,
            session,
            tell: ask.name_holders,
            savepoint: Some(Savepoint::new(session.test_transaction)),
            turns: Turns::new(ask.wait),
            started: Duration::ZERO,
            at: 0,
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

    fn savepoint(&self) -> &Savepoint {
        let savepoint = self.savepoint.as_ref();
        savepoint.expect("BUG: the savepoint is there until the end")
    }

    fn attempt(&mut self, now: Duration) -> Acquired {
        let millis = self.turns.first(now);
        let wait = sql::wait_all(self.keys.all(), self.keys.mode, millis);
        let wait = sql::without_limits(millis, Lift::Statement, &wait);
        let savepoint = self.savepoint();
        let message = format!("SAVEPOINT {savepoint}; {wait}; RELEASE SAVEPOINT {savepoint}");
        self.state = State::Attempt {
            attempt: Attempt::sent(now),
            millis,
        };
        Step::Batch(message.into())
    }

    fn follow_attempt(&mut self, attempted: Attempted, millis: u32) -> Acquired {
        match attempted.step() {
            Ok(step) => step,
            Err(Attempted::Undone { error, passed }) => {
                let failed = Failed::after(millis, Duration::ZERO, passed);
                match Fault::inside(error, failed) {
                    Fault::Lost(cause) => Step::failed(Failure::lost(cause)),
                    Fault::Refused(reason, cause) => self.fail(reason, cause),
                    Fault::Detail(detail, _) if detail.contains(sql::TOKEN_TAKEN) => {
                        self.not_at_once()
                    }
                    Fault::Other(failed) if failed.is_timeout() => self.not_at_once(),
                    Fault::Detail(_, failed) | Fault::Other(failed) => {
                        self.fail(failed.reason, failed.cause)
                    }
                }
            }
            Err(Attempted::Stuck(error)) => self.stuck(error),
            Err(_) => self.granted(),
        }
    }

    /// One of them is taken.
    fn not_at_once(&mut self) -> Acquired {
        if !self.tell && self.wait.limit == Some(Duration::ZERO) {
            self.gone();
            return Step::Done(Ok(None));
        }
        self.state = State::Mark;
        Step::Batch(format!("SAVEPOINT {}", self.savepoint()).into())
    }

    fn each(&mut self, now: Duration) -> Acquired {
        let limit = self.wait.remaining(now.saturating_sub(self.started));
        let wait = Wait { limit, ..self.wait };
        let mut several = TransactionSteps::several(self.keys.clone(), wait, self.session);
        let step = several.start(now);
        self.state = State::Each(Box::new(several));
        self.follow_each(step)
    }

    fn follow_each(&mut self, step: Step<Option<Hold<PostgresKey>>>) -> Acquired {
        step.map(|result| {
            if let State::Each(several) = &self.state {
                self.at = several.at();
            }
            let then = match result {
                Ok(Some(_)) => {
                    self.state = State::Keep;
                    return Step::Batch(format!("RELEASE SAVEPOINT {}", self.savepoint()).into());
                }
                Ok(None) => Ok(()),
                Err(failure) if failure.reason == Reason::Lost => return Step::failed(failure),
                Err(failure) => Err(failure),
            };
            let error = ErrorFields::default();
            let (attempt, attempted) = Attempt::undo(self.savepoint(), error, Duration::ZERO);
            self.state = State::Undo(attempt, then);
            match attempted.step() {
                Ok(step) => step,
                Err(_) => unreachable!("BUG: the session is not lost"),
            }
        })
    }

    /// The savepoint is not there any more.
    fn gone(&mut self) {
        self.savepoint.take().into_iter().for_each(Savepoint::gone);
    }

    fn granted(&mut self) -> Acquired {
        self.gone();
        Step::Done(Ok(Some(())))
    }

    fn fail(&mut self, reason: Reason, cause: Cause) -> Acquired {
        self.gone();
        Step::failed(reason.clean(cause))
    }

    /// The transaction is aborted. The savepoint may be there, or not.
    fn stuck(&mut self, error: ErrorFields) -> Acquired {
        self.savepoint = None;
        Step::failed(aborted(error))
    }
}

impl Machine for SeveralInTransaction {
    type Output = Option<()>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.started = now;
        self.turns.start(now);
        // In an aborted transaction there may be a savepoint of this name to go back to, which would revive it.
        if self.savepoint().may_be_there() {
            self.state = State::Before;
            return Step::Query(sql::all_held(self.keys.all(), self.keys.mode));
        }
        self.attempt(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (std::mem::replace(&mut self.state, State::Start), answer) {
            (State::Before, Answer::Error(error)) => {
                self.gone();
                Step::failed(aborted(error))
            }
            (State::Before, _) => self.attempt(now),
            (
                State::Attempt {
                    mut attempt,
                    millis,
                },
                answer,
            ) => {
                let attempted = attempt.next(self.savepoint(), answer, now);
                self.state = State::Attempt { attempt, millis };
                self.follow_attempt(attempted, millis)
            }
            (State::Mark, Answer::Done) => self.each(now),
            (State::Each(mut several), answer) => {
                let step = several.next(answer, now);
                self.state = State::Each(several);
                self.follow_each(step)
            }
            (State::Keep, Answer::Done) => self.granted(),
            (State::Mark | State::Keep, Answer::Error(error)) => self.stuck(error),
            (State::Undo(mut attempt, then), answer) => {
                match attempt.next(self.savepoint(), answer, now).step() {
                    Ok(step) => {
                        self.state = State::Undo(attempt, then);
                        step
                    }
                    Err(Attempted::Undone { .. }) => {
                        self.gone();
                        Step::Done(then.map(|()| None))
                    }
                    Err(Attempted::Stuck(error)) => match then {
                        Err(failure) if error.lost => Step::failed(failure.lost_meanwhile()),
                        // The transaction is aborted, and what it holds goes with it.
                        Err(failure) => {
                            self.savepoint = None;
                            Step::failed(failure)
                        }
                        Ok(()) => self.stuck(error),
                    },
                    Err(_) => Step::failed(Reason::Database.broken(Cause::default())),
                }
            }
            (_, answer) => {
                self.savepoint = None;
                Step::failed(unknown(answer))
            }
        }
    }

    fn abandon(&self) -> Abandoned {
        match &self.state {
            State::Start | State::Before => Abandoned::default(),
            // Nobody knows whether the savepoint is there, so the transaction cannot be mended.
            State::Attempt { attempt, millis } => Abandoned {
                cancel: attempt.is_sent() && *millis > 0,
                ..Abandoned::broken()
            },
            State::Each(several) => Abandoned {
                broken: true,
                ..several.abandon()
            },
            State::Mark | State::Keep | State::Undo(..) => Abandoned::broken(),
        }
    }
}
