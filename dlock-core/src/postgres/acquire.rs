use std::time::Duration;

use super::{Mark, Scope, sql};
use crate::wait::AfterBusy;
use crate::{Abandoned, Answer, Machine, Mode, Outcome, PostgresKey, Reason, Step, Wait};

/// Acquires an advisory lock: asks for it, and where it is taken waits in the server's queue or polls.
///
/// [`Machine`] has an example.
#[derive(Debug)]
pub struct PostgresAcquire {
    key: PostgresKey,
    mode: Mode,
    scope: Scope,
    wait: Wait,
    in_transaction: bool,
    /// The server has told that this session does not hold the lock (in this mode), so that a hold which is there
    /// after a failure is a stray one, and not that of an outer guard.
    not_held_before: bool,
    /// With it, whether the request was granted can be told in a message that is sent behind it.
    mark: Option<Mark>,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Asked without waiting.
    Try,
    /// The try failed in a way that no lock explains: asked whether it was granted all the same.
    Check,
    /// In the server's queue.
    Wait,
    /// In a transaction: undoing a failed wait.
    Undo(Code),
    /// The wait failed: releasing what it may have left.
    Reclaim(Reason),
    /// The wait failed, and an outer guard may hold the lock too: asked whether anybody does.
    Audit(Reason),
    Sleep,
}

/// The SQLSTATE of a failed wait, as far as it matters.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    LockNotAvailable,
    Known(Reason),
    /// The lock may have been granted.
    Unclear(Reason),
}

impl Code {
    pub(super) fn new(sqlstate: Option<&str>) -> Self {
        match sqlstate {
            Some("55P03") => Code::LockNotAvailable,
            Some("40P01") => Code::Known(Reason::Deadlock),
            Some("53200") => Code::Known(Reason::TooManyLocks),
            // Undefined function, feature not supported.
            Some("42883" | "0A000") => Code::Known(Reason::Unsupported),
            Some("57014") => Code::Unclear(Reason::Interrupted),
            _ => Code::Unclear(Reason::Database),
        }
    }
}

impl PostgresAcquire {
    pub(super) fn new(
        key: PostgresKey,
        mode: Mode,
        scope: Scope,
        wait: Wait,
        in_transaction: bool,
    ) -> Self {
        Self {
            key,
            mode,
            scope,
            wait,
            in_transaction,
            not_held_before: false,
            mark: None,
            state: State::Try,
        }
    }

    pub(super) fn marked(mut self) -> Self {
        self.mark = Some(Mark::new());
        self
    }

    fn ask(&mut self) -> Step {
        if self.scope == Scope::Session && self.in_transaction {
            // A failing statement would abort the transaction, so all is done behind a savepoint, in one message.
            return self.enqueue(Some(1));
        }
        self.state = State::Try;
        Step::Query(match self.mark {
            Some(mark) if self.scope == Scope::Session => {
                sql::try_lock_marked(self.key, self.mode, mark)
            }
            _ => sql::try_lock(self.key, self.mode, self.scope),
        })
    }

    fn enqueue(&mut self, millis: Option<u32>) -> Step {
        self.state = State::Wait;
        let text = sql::wait(
            self.key,
            self.mode,
            self.scope,
            self.in_transaction,
            millis,
            self.mark,
        );
        Step::Batch(text.into())
    }

    fn busy(&mut self, elapsed: Duration) -> Step {
        match self.wait.after_busy(elapsed) {
            AfterBusy::GiveUp => Outcome::TimedOut.into(),
            AfterBusy::Sleep(interval) => {
                self.state = State::Sleep;
                Step::Sleep(interval)
            }
            AfterBusy::Queue(millis) => self.enqueue(millis),
        }
    }

    fn settle(&mut self, code: Code, elapsed: Duration) -> Step {
        match code {
            Code::LockNotAvailable => self.busy(elapsed),
            Code::Known(reason) => reason.clean().into(),
            // A transaction's lock was undone together with the statement.
            Code::Unclear(reason) if self.scope == Scope::Transaction => reason.clean().into(),
            Code::Unclear(reason) if self.not_held_before => {
                self.state = State::Reclaim(reason);
                Step::Query(sql::reclaim(self.key, self.mode))
            }
            Code::Unclear(reason) => {
                self.state = State::Audit(reason);
                Step::Query(sql::is_held(self.key, self.mode))
            }
        }
    }
}

impl Machine for PostgresAcquire {
    fn start(&mut self) -> Step {
        if self.scope == Scope::Session && self.in_transaction {
            // One message for the try and the wait.
            return match self.wait.after_busy(Duration::ZERO) {
                AfterBusy::Queue(millis) => self.enqueue(millis),
                AfterBusy::GiveUp | AfterBusy::Sleep(_) => self.ask(),
            };
        }
        self.ask()
    }

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Try, Answer::Value(Some(1))) => Outcome::Success.into(),
            (State::Try, Answer::Value(Some(0))) => {
                self.not_held_before = true;
                self.busy(elapsed)
            }
            // In a transaction, which is aborted now: its rollback releases the lock if there is one.
            (State::Try, _) if self.scope == Scope::Transaction => Reason::Database.clean().into(),
            (State::Try, _) => {
                self.state = State::Check;
                Step::Query(sql::is_held(self.key, self.mode))
            }

            (State::Check, Answer::Value(Some(0))) => {
                // Once more, in the form that tells what is wrong. One millisecond is the shortest wait.
                self.not_held_before = true;
                self.enqueue(Some(1))
            }
            // By this try or by an outer guard: nobody can know.
            (State::Check, _) => Reason::Database.broken().into(),

            (State::Wait, Answer::Done) => Outcome::Success.into(),
            (State::Wait, Answer::Value(_)) => self.settle(Code::new(None), elapsed),
            (State::Wait, Answer::Error(sqlstate)) => {
                let code = Code::new(sqlstate.as_deref());
                if self.in_transaction {
                    self.state = State::Undo(code);
                    Step::Batch(sql::UNDO.into())
                } else {
                    self.settle(code, elapsed)
                }
            }

            (State::Undo(code), Answer::Done) => self.settle(code, elapsed),
            // There was no savepoint to go back to: the transaction was aborted before, and nothing was asked for. Or
            // the connection is gone, and with it all that the session held.
            (State::Undo(Code::Unclear(reason) | Code::Known(reason)), _) => reason.clean().into(),
            (State::Undo(Code::LockNotAvailable), _) => Reason::Database.broken().into(),

            (State::Reclaim(reason), Answer::Value(None | Some(1))) => reason.clean().into(),
            (State::Reclaim(reason), _) => reason.broken().into(),

            (State::Audit(reason), Answer::Value(Some(0))) => reason.clean().into(),
            (State::Audit(reason), _) => reason.broken().into(),

            (State::Sleep, _) => self.ask(),
        }
    }

    fn abandon(&self) -> Abandoned {
        let release = self
            .mark
            .map(|mark| sql::release_if_granted(self.key, self.mode, mark).into());
        match (self.state, self.scope) {
            (State::Sleep, _) => Abandoned::default(),
            // If it was granted it ends with the transaction.
            (State::Try, Scope::Transaction) => Abandoned::default(),
            // Whether it has released its savepoint nobody knows, so the transaction cannot be mended.
            (_, Scope::Transaction) => Abandoned {
                broken: true,
                waiting: matches!(self.state, State::Wait),
                ..Abandoned::default()
            },
            (State::Try, Scope::Session) => Abandoned {
                broken: release.is_none(),
                messages: release.into_iter().collect(),
                waiting: false,
            },
            (State::Wait | State::Reclaim(_), Scope::Session) if self.not_held_before => {
                Abandoned {
                    messages: vec![sql::reclaim(self.key, self.mode).inlined().into()],
                    broken: matches!(self.state, State::Wait),
                    waiting: matches!(self.state, State::Wait),
                }
            }
            // The first message fails if the wait did; the second one undoes either.
            (State::Wait, Scope::Session) => Abandoned {
                messages: release.into_iter().chain([sql::UNDO.into()]).collect(),
                broken: true,
                waiting: true,
            },
            (_, Scope::Session) => Abandoned {
                broken: true,
                ..Abandoned::default()
            },
        }
    }
}
