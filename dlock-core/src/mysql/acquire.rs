use std::borrow::Cow;
use std::time::Duration;

use super::sql::{self, Ask};
use crate::wait::AfterBusy;
use crate::{Abandoned, Answer, Machine, Outcome, Reason, Step, Wait};

/// Acquires a named lock: asks for it, and where it is taken waits in the server's queue or polls.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Mysql, Step, Wait};
///
/// let key = Mysql::key(&"report".into())?;
/// let mut machine = Mysql::acquire(&key, Mode::Exclusive, Wait::default(), None);
/// let Step::Query(statement) = machine.start() else { panic!() };
/// assert!(statement.text().contains("GET_LOCK(CONVERT(? USING utf8mb4), 0)"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct MysqlAcquire {
    key: String,
    wait: Wait,
    /// Another session had the lock, so this one did not: a hold which is there after a failure is a stray one, and
    /// not that of an outer guard.
    not_held_before: bool,
    /// The statement to come was asked for without MariaDB's `max_statement_time`, which has to be put back.
    uncapped: bool,
    /// The statement that failed was a wait, and not a try.
    waited: bool,
    /// It may be [abandoned](Machine::abandon), and so may the release that follows.
    abandonable: bool,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Asked without waiting.
    Try,
    /// Taking off MariaDB's `max_statement_time`, to wait that many milliseconds.
    Uncap(Option<u32>),
    /// In the server's queue.
    Wait,
    /// An error: keeping its number.
    KeepErrno,
    /// An error: reading its number.
    ReadErrno,
    /// Putting MariaDB's `max_statement_time` back.
    Recap(Result),
    /// It failed: asking whether the session holds the lock all the same.
    Verify(Unclear),
    /// It does: giving the stray hold back.
    GiveBack(Reason),
    Sleep,
}

/// What came of asking for the lock.
#[derive(Clone, Copy, Debug)]
enum Result {
    Granted,
    Taken,
    Unclear(Unclear),
}

/// A failure, which may have come just after the grant.
#[derive(Clone, Copy, Debug)]
enum Unclear {
    /// The statement's own limit passed.
    TimedOut,
    Failed(Reason),
}

impl Unclear {
    /// <https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html>,
    /// <https://mariadb.com/kb/en/mariadb-error-code-reference/>
    fn from_errno(errno: Option<i64>) -> Self {
        Unclear::Failed(match errno {
            // ER_QUERY_TIMEOUT; ER_STATEMENT_TIMEOUT is MariaDB's.
            Some(3024 | 1969) => return Unclear::TimedOut,
            // ER_USER_LOCK_DEADLOCK; ER_LOCK_DEADLOCK is MariaDB's.
            Some(3058 | 1213) => Reason::Deadlock,
            // ER_SP_DOES_NOT_EXIST: no function GET_LOCK.
            Some(1305) => Reason::Unsupported,
            // ER_QUERY_INTERRUPTED
            Some(1317) => Reason::Interrupted,
            _ => Reason::Database,
        })
    }
}

impl MysqlAcquire {
    pub(super) fn new(key: String, wait: Wait) -> Self {
        Self {
            key,
            wait,
            not_held_before: false,
            uncapped: false,
            waited: false,
            abandonable: false,
            state: State::Try,
        }
    }

    pub(super) fn abandonable(mut self) -> Self {
        self.abandonable = true;
        self
    }

    fn ask(&mut self) -> Step {
        self.state = State::Try;
        Step::Query(if self.abandonable {
            sql::try_or_release(Ask::Try, &self.key)
        } else {
            sql::try_lock(&self.key)
        })
    }

    fn busy(&mut self, capped: bool, elapsed: Duration) -> Step {
        match self.wait.after_busy(elapsed) {
            AfterBusy::GiveUp => Outcome::TimedOut.into(),
            AfterBusy::Sleep(interval) => self.sleep(interval),
            AfterBusy::Queue(millis) if capped => {
                self.state = State::Uncap(millis);
                Step::Batch(sql::UNCAP.into())
            }
            AfterBusy::Queue(millis) => self.enqueue(millis),
        }
    }

    fn sleep(&mut self, interval: Duration) -> Step {
        self.state = State::Sleep;
        Step::Sleep(interval)
    }

    fn enqueue(&mut self, millis: Option<u32>) -> Step {
        self.state = State::Wait;
        Step::Query(sql::wait(&self.key, millis))
    }

    /// Puts the user's setting back before anything else.
    fn recap(&mut self, result: Result, elapsed: Duration) -> Step {
        if !self.uncapped {
            return self.settle(result, elapsed);
        }
        self.uncapped = false;
        self.state = State::Recap(result);
        Step::Batch(sql::RECAP.into())
    }

    fn settle(&mut self, result: Result, elapsed: Duration) -> Step {
        match result {
            Result::Granted => Outcome::Success.into(),
            Result::Taken => match self.wait.after_busy(elapsed) {
                AfterBusy::GiveUp => Outcome::TimedOut.into(),
                AfterBusy::Sleep(interval) => self.sleep(interval),
                // Asked again. Not at once, for a server that does not wait is not to be asked without a pause.
                AfterBusy::Queue(_) => self.sleep(Wait::PAUSE),
            },
            Result::Unclear(unclear) => {
                self.state = State::Verify(unclear);
                Step::Query(sql::is_held(&self.key))
            }
        }
    }

    fn keep_errno(&mut self) -> Step {
        self.waited = matches!(self.state, State::Wait);
        self.state = State::KeepErrno;
        Step::Batch(sql::KEEP_ERRNO.into())
    }
}

impl Machine for MysqlAcquire {
    fn start(&mut self) -> Step {
        self.ask()
    }

    fn next(&mut self, answer: Answer, elapsed: Duration) -> Step {
        // MariaDB answers NULL, without an error, when the statement was killed.
        const KILLED: Result = Result::Unclear(Unclear::Failed(Reason::Interrupted));
        const UNKNOWN: Result = Result::Unclear(Unclear::Failed(Reason::Database));
        match (self.state, answer) {
            (_, Answer::OutOfStep) => Reason::Database.broken().into(),

            (State::Try, Answer::Value(Some(1))) => Outcome::Success.into(),
            (State::Try, Answer::Value(Some(busy @ (0 | sql::CAPPED)))) => {
                self.not_held_before = true;
                self.busy(busy == sql::CAPPED, elapsed)
            }
            (State::Wait, Answer::Value(Some(1))) => self.recap(Result::Granted, elapsed),
            (State::Wait, Answer::Value(Some(0))) => self.recap(Result::Taken, elapsed),
            (State::Try | State::Wait, Answer::Value(None)) => self.recap(KILLED, elapsed),
            (State::Try | State::Wait, Answer::Error(_)) => self.keep_errno(),
            (State::Try | State::Wait, _) => self.recap(UNKNOWN, elapsed),

            (State::KeepErrno, Answer::Done) => {
                self.state = State::ReadErrno;
                Step::Query(sql::errno())
            }
            (State::ReadErrno, Answer::Value(errno)) => {
                let unclear = match Unclear::from_errno(errno) {
                    // A try has no limit of its own.
                    Unclear::TimedOut if !self.waited => Unclear::Failed(Reason::Database),
                    unclear => unclear,
                };
                self.recap(Result::Unclear(unclear), elapsed)
            }
            (State::KeepErrno | State::ReadErrno, _) => self.recap(UNKNOWN, elapsed),

            (State::Uncap(millis), Answer::Done) => {
                self.uncapped = true;
                self.enqueue(millis)
            }
            (State::Uncap(_), _) => Reason::Database.clean().into(),

            (State::Recap(result), Answer::Done) => self.settle(result, elapsed),
            // The session may hold the lock, and its setting is not the user's.
            (State::Recap(_), _) => Reason::Database.broken().into(),

            (State::Verify(Unclear::TimedOut), Answer::Value(Some(0))) => {
                self.settle(Result::Taken, elapsed)
            }
            (State::Verify(Unclear::Failed(reason)), Answer::Value(Some(0))) => {
                reason.clean().into()
            }
            (State::Verify(unclear), Answer::Value(Some(1))) if self.not_held_before => {
                match unclear {
                    // The grant came first, by a hair.
                    Unclear::TimedOut => Outcome::Success.into(),
                    Unclear::Failed(reason) => {
                        self.state = State::GiveBack(reason);
                        Step::Query(sql::release(&self.key))
                    }
                }
            }
            // By this request or by an outer guard: nobody can know.
            (State::Verify(Unclear::TimedOut), _) => Reason::Database.broken().into(),
            (State::Verify(Unclear::Failed(reason)), _) => reason.broken().into(),

            (State::GiveBack(reason), Answer::Value(Some(1))) => reason.clean().into(),
            (State::GiveBack(reason), _) => reason.broken().into(),

            (State::Sleep, _) => self.ask(),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self.state {
            State::Sleep => Abandoned::default(),
            // The connection is out of step.
            _ => Abandoned {
                messages: self.reclaim_unread(),
                broken: true,
                waiting: matches!(self.state, State::Wait),
            },
        }
    }
}

impl MysqlAcquire {
    /// Messages that release what a wait may have left; none where an outer guard may hold the lock, too: then it is free
    /// when the connection is closed.
    fn reclaim_unread(&self) -> Vec<Cow<'static, str>> {
        if !self.not_held_before {
            return Vec::new();
        }
        Abandoned::twice(sql::reclaim_unread(&self.key))
    }
}
