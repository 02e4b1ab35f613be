use std::borrow::Cow;
use std::time::Duration;

use super::{Mark, Scope, sql};
use crate::wait::AfterBusy;
use crate::{Abandoned, Answer, Fence, Machine, Mode, Outcome, PostgresKey, Reason, Step, Wait};

/// Acquires an advisory lock: asks for it, and where it is taken waits in the server's queue or polls.
///
/// [`Machine`] has an example.
#[derive(Debug)]
pub struct PostgresAcquire {
    key: PostgresKey,
    mode: Mode,
    scope: Scope,
    wait: Wait,
    /// In an open transaction.
    fence: Option<Fence>,
    /// The server has told that this session does not hold the lock (in this mode), so that a hold which is there
    /// after a failure is a stray one, and not that of an outer guard.
    not_held_before: bool,
    /// It may be [abandoned](Machine::abandon): then a message that is sent behind the try can tell by this mark whether
    /// it was granted.
    mark: Option<Mark>,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// In a transaction, where the wait is the first that is asked for, and may be abandoned: asked whether the session
    /// holds the lock before.
    Before,
    /// Asked without waiting.
    Try,
    /// The try failed in a way that no lock explains: asked whether it was granted all the same.
    Check,
    /// In the server's queue.
    Wait,
    /// In a transaction: undoing a failed wait.
    Undo(Code),
    /// That failed, too, in a way that a cancel may explain: once more.
    UndoAgain,
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
    /// Nothing was granted: the limit passed.
    LockNotAvailable,
    /// Nothing was granted.
    Known(Reason),
    /// The lock may have been granted.
    Unclear(Reason),
    /// None: it did not come out of our block, which may not have been reached.
    Missing,
}

impl Code {
    pub(super) fn new(sqlstate: Option<&str>) -> Self {
        match sqlstate {
            Some("55P03") => Code::LockNotAvailable,
            Some("40P01") => Code::Known(Reason::Deadlock),
            Some(sql::NOT_NEW) => Code::Known(Reason::InTransaction),
            // Undefined function, feature not supported.
            Some("42883" | "0A000") => Code::Known(Reason::Unsupported),
            // Also what the server says when its memory is full, which may come after the grant.
            Some("53200") => Code::Unclear(Reason::TooManyLocks),
            Some("57014") => Code::Unclear(Reason::Interrupted),
            Some(_) => Code::Unclear(Reason::Database),
            None => Code::Missing,
        }
    }

    pub(super) fn reason(self) -> Reason {
        match self {
            Code::Known(reason) | Code::Unclear(reason) => reason,
            Code::LockNotAvailable | Code::Missing => Reason::Database,
        }
    }
}

impl PostgresAcquire {
    pub(super) fn new(
        key: PostgresKey,
        mode: Mode,
        scope: Scope,
        wait: Wait,
        fence: Option<Fence>,
    ) -> Self {
        Self {
            key,
            mode,
            scope,
            wait,
            fence,
            not_held_before: false,
            mark: None,
            state: State::Try,
        }
    }

    pub(super) fn marked(mut self) -> Self {
        self.mark = Some(Mark::new());
        self
    }

    fn ask(&mut self, elapsed: Duration) -> Step {
        if let (Scope::Session, Some(_)) = (self.scope, self.fence) {
            if self.mark.is_some() && !self.not_held_before {
                self.state = State::Before;
                return Step::Query(sql::is_held(self.key, self.mode));
            }
            // A failing statement would abort the transaction, so all is done behind a savepoint, in one message: the try
            // and the wait are one.
            return self.enqueue_untried(elapsed);
        }
        self.state = State::Try;
        Step::Query(match self.mark {
            mark @ Some(_) if self.scope == Scope::Session => {
                sql::try_or_unlock(self.key, self.mode, mark)
            }
            _ => sql::try_lock(self.key, self.mode, self.scope),
        })
    }

    /// The server has told that an outer guard holds the lock: it was [asked before](State::Before).
    fn held_before(&self) -> bool {
        self.mark.is_some() && self.fence.is_some() && !self.not_held_before
    }

    /// Waits where there was no try.
    fn enqueue_untried(&mut self, elapsed: Duration) -> Step {
        let millis = self.wait.untried(elapsed);
        self.enqueue(millis)
    }

    fn enqueue(&mut self, millis: Option<u32>) -> Step {
        self.state = State::Wait;
        Step::Batch(
            match (self.scope, self.fence) {
                (Scope::Session, None) => sql::wait(self.key, self.mode, millis),
                (Scope::Session, Some(fence)) => {
                    sql::wait_fenced(self.key, self.mode, millis, fence)
                }
                (Scope::Transaction, fence) => {
                    let fence = fence.expect("BUG: a transaction's lock is asked for in one");
                    sql::wait_for_transaction(self.key, self.mode, millis, fence)
                }
            }
            .into(),
        )
    }

    /// After a try.
    fn busy(&mut self, elapsed: Duration) -> Step {
        match self.wait.after_busy(elapsed) {
            AfterBusy::GiveUp => Outcome::TimedOut.into(),
            AfterBusy::Sleep(interval) => self.sleep(interval),
            AfterBusy::Queue(millis) => self.enqueue(millis),
        }
    }

    fn sleep(&mut self, interval: Duration) -> Step {
        self.state = State::Sleep;
        Step::Sleep(interval)
    }

    /// Messages that release what a wait may have left.
    fn reclaim_unread(&self) -> Vec<Cow<'static, str>> {
        let reclaim = sql::reclaim(self.key, self.mode).inlined();
        let message = match (self.fence, self.state) {
            (None, _) => sql::unread(&reclaim),
            // Back to before a failed wait, where the server obeys.
            (Some(fence), State::Wait) => sql::back_to(fence, &reclaim),
            // The savepoint has gone already.
            (Some(_), _) => reclaim,
        };
        Abandoned::twice(message)
    }

    fn settle(&mut self, code: Code, elapsed: Duration) -> Step {
        // What the session holds it need not wait for.
        if code == Code::LockNotAvailable && !self.held_before() {
            self.not_held_before = true;
            return match self.wait.after_busy(elapsed) {
                AfterBusy::GiveUp => Outcome::TimedOut.into(),
                AfterBusy::Sleep(interval) => self.sleep(interval),
                // Asked again. Not at once, for a server that does not wait is not to be asked without a pause.
                AfterBusy::Queue(_) => self.sleep(Wait::PAUSE),
            };
        }
        let reason = code.reason();
        // A transaction's lock was undone together with the statement.
        if matches!(code, Code::Known(_)) || self.scope == Scope::Transaction {
            return reason.clean().into();
        }
        if self.held_before() {
            // By this request, too, or by the outer guard alone: nobody can know.
            return reason.broken().into();
        }
        Step::Query(if self.not_held_before {
            self.state = State::Reclaim(reason);
            sql::reclaim(self.key, self.mode)
        } else {
            self.state = State::Audit(reason);
            sql::is_held(self.key, self.mode)
        })
    }
}

impl Machine for PostgresAcquire {
    fn start(&mut self) -> Step {
        self.ask(Duration::ZERO)
    }

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        match (self.state, answer) {
            (State::Before, Answer::Value(Some(held @ (0 | 1)))) => {
                self.not_held_before = held == 0;
                self.enqueue_untried(elapsed)
            }
            // The transaction had been aborted, and nothing was asked for.
            (State::Before, _) => Reason::Database.clean().into(),

            (State::Try, Answer::Value(Some(1))) => Outcome::Success.into(),
            (State::Try, Answer::Value(Some(0))) => {
                self.not_held_before = true;
                self.busy(elapsed)
            }
            // In a transaction, which is aborted now: its rollback releases the lock if there is one.
            (State::Try, Answer::Error(_)) if self.scope == Scope::Transaction => {
                Reason::Database.clean().into()
            }
            (State::Try, _) if self.scope == Scope::Transaction => Reason::Database.broken().into(),
            (State::Try, _) => {
                self.state = State::Check;
                Step::Query(sql::is_held(self.key, self.mode))
            }

            (State::Check, Answer::Value(Some(0))) => {
                // Once more, in the form that tells what is wrong.
                self.not_held_before = true;
                self.enqueue_untried(elapsed)
            }
            // By this try or by an outer guard: nobody can know.
            (State::Check, _) => Reason::Database.broken().into(),

            (State::Wait, Answer::Done) => Outcome::Success.into(),
            (State::Wait, answer) => {
                let code = match answer {
                    Answer::Error(sqlstate) => Code::new(sqlstate.as_deref()),
                    _ => Code::Unclear(Reason::Database),
                };
                match self.fence {
                    Some(fence) => {
                        self.state = State::Undo(code);
                        Step::Batch(sql::undo(fence).into())
                    }
                    None => self.settle(code, elapsed),
                }
            }

            (State::Undo(code), Answer::Done) => self.settle(code, elapsed),
            (State::UndoAgain, Answer::Done) => self.settle(Code::Missing, elapsed),
            (State::Undo(Code::Missing), Answer::Error(_)) => {
                let fence = self.fence.expect("BUG: there is a savepoint to go back to");
                self.state = State::UndoAgain;
                Step::Batch(sql::undo(fence).into())
            }
            // There was no savepoint to go back to, for the transaction was aborted before and nothing was asked for;
            // or the connection is gone, and with it all that the session held.
            (State::UndoAgain, Answer::Error(_)) => Reason::Database.clean().into(),
            (State::UndoAgain, _) => Reason::Database.broken().into(),
            (State::Undo(code @ Code::Known(_)), _) => code.reason().clean().into(),
            (State::Undo(code), _) if self.scope == Scope::Transaction => {
                code.reason().clean().into()
            }
            (State::Undo(code), _) => code.reason().broken().into(),

            (State::Reclaim(reason), Answer::Value(None | Some(1))) => reason.clean().into(),
            (State::Reclaim(reason), _) => reason.broken().into(),

            (State::Audit(reason), Answer::Value(Some(0))) => reason.clean().into(),
            (State::Audit(reason), _) => reason.broken().into(),

            (State::Sleep, _) => self.ask(elapsed),
        }
    }

    fn abandon(&self) -> Abandoned {
        let broken = Abandoned {
            broken: true,
            waiting: matches!(self.state, State::Wait),
            ..Abandoned::default()
        };
        match (self.state, self.scope) {
            (State::Sleep | State::Before, _) => Abandoned::default(),
            // If it was granted it ends with the transaction.
            (State::Try, Scope::Transaction) => Abandoned::default(),
            // Whether it has released its savepoint nobody knows, so the transaction cannot be mended.
            (_, Scope::Transaction) => broken,
            (State::Try, Scope::Session) => match self.mark {
                // Broken all the same: the mark of a statement that was cancelled after its grant is not there.
                Some(mark) => Abandoned {
                    messages: vec![
                        sql::unread(&sql::release_if_granted(self.key, self.mode, mark)).into(),
                    ],
                    ..broken
                },
                None => broken,
            },
            (State::Wait | State::Undo(_) | State::UndoAgain | State::Reclaim(_), _)
                if self.not_held_before =>
            {
                Abandoned {
                    messages: self.reclaim_unread(),
                    ..broken
                }
            }
            // The session held the lock, so this is granted without a wait. If it failed or was never sent, so does the
            // message fail: there is no savepoint to release.
            (State::Wait, Scope::Session) if self.held_before() => Abandoned {
                messages: self
                    .fence
                    .map(|fence| sql::unlock_fenced(self.key, self.mode, fence).into())
                    .into_iter()
                    .collect(),
                waiting: false,
                ..broken
            },
            (_, Scope::Session) => broken,
        }
    }
}
