use std::time::Duration;

use super::{
    Abandoned, Aftermath, Answer, Ask, Cause, ErrorFields, Failure, Machine, Reason, Rows,
    Statement, Step,
};
use crate::holder::ServerKind;
use crate::{Holder, LockKey};

/// Asks one thing, of a statement or of several: each tells less than the one before and needs fewer privileges. The
/// first answer that [`read`](Self::new) accepts counts.
#[derive(Debug)]
pub(crate) struct Question<T> {
    statements: std::vec::IntoIter<Statement>,
    read: fn(Rows) -> Read<T>,
    /// What to answer if no answer was accepted, but one of them was an answer.
    fallback: Option<T>,
    abandoned: Abandoned,
    first_error: Option<ErrorFields>,
}

/// What an answer is worth.
#[derive(Debug)]
pub(crate) enum Read<T> {
    /// It counts.
    Accept(T),
    /// It counts only if no other statement tells more.
    Fallback(T),
    /// It is the answer to an earlier question.
    OutOfStep,
}

impl<T> Question<T> {
    pub(crate) fn new(
        statements: Vec<Statement>,
        read: fn(Rows) -> Read<T>,
        abandoned: Abandoned,
    ) -> Self {
        Self {
            statements: statements.into_iter(),
            read,
            fallback: None,
            abandoned,
            first_error: None,
        }
    }

    fn ask(&mut self) -> Step<T> {
        match (self.statements.next(), self.fallback.take()) {
            (Some(statement), fallback) => {
                self.fallback = fallback;
                Step::Query(statement)
            }
            (None, Some(value)) => Step::Done(Ok(value)),
            (None, None) => {
                let cause = self.first_error.take().map(|error| error.cause);
                let failure = Reason::Database.clean(cause.unwrap_or_default());
                Step::failed(Failure {
                    // Where unread answers shift, nobody knows whose the error was.
                    aftermath: match self.abandoned.broken {
                        true => Aftermath::MarkBroken,
                        false => Aftermath::Clean,
                    },
                    ..failure
                })
            }
        }
    }
}

impl Question<Vec<Holder>> {
    /// Who holds a lock of MySQL, which has one holder, or waits for it. A server that does not collect what the first
    /// statement asks for answers without rows. While a lock changes hands the server may list both holders: then the
    /// next statement counts, which asks for one.
    pub(crate) fn holders(statements: Vec<Statement>, abandoned: Abandoned) -> Self {
        let read = |rows| match listed(rows) {
            Read::Accept(holders) if holders.iter().filter(|holder| holder.granted).count() > 1 => {
                Read::Fallback(holders)
            }
            read => read,
        };
        Self::new(statements, read, abandoned)
    }

    /// The same for the slots of a semaphore, which has many holders.
    pub(crate) fn slot_holders(statements: Vec<Statement>, abandoned: Abandoned) -> Self {
        Self::new(statements, listed, abandoned)
    }
}

fn listed(rows: Rows) -> Read<Vec<Holder>> {
    match rows {
        Rows::Holders(holders) if !holders.is_empty() => {
            let of_server = |holder: Holder| holder.on(ServerKind::Mysql);
            Read::Accept(holders.into_iter().map(of_server).collect())
        }
        _ => Read::Fallback(Vec::new()),
    }
}

impl<T: Send> Machine for Question<T> {
    type Output = T;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<T> {
        self.ask()
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<T> {
        match answer {
            Answer::Rows(rows) => match (self.read)(rows) {
                Read::Accept(value) => return Step::Done(Ok(value)),
                Read::Fallback(value) => self.fallback = Some(value),
                Read::OutOfStep => {
                    return Step::failed(Failure::out_of_step());
                }
            },
            Answer::Error(error) if error.lost => {
                return Step::failed(Failure::lost(error.cause));
            }
            Answer::Error(error) => {
                self.first_error.get_or_insert(error);
            }
            Answer::Done => {}
        }
        self.ask()
    }

    fn abandon(&self) -> Abandoned {
        self.abandoned.clone()
    }
}

/// Asks for the holders of the lock that is acquired.
type AskHolders<A> = fn(&A) -> Question<Vec<Holder>>;

/// Acquires a lock. If the limit passes and the caller wants to know, it asks who has the lock. If the caller wants to
/// know that while it waits, it asks once between two turns. That nobody can tell is no error.
#[derive(Debug)]
pub(crate) struct NameHolders<A> {
    acquire: A,
    state: State,
    ask_holders: AskHolders<A>,
    at_timeout: bool,
    /// Not yet.
    while_waiting: bool,
    since: Duration,
    /// Of several locks: the one that was taken.
    taken: fn(&A) -> Option<Box<LockKey>>,
}

#[derive(Debug)]
enum State {
    Acquire,
    /// What comes between two turns, and what it holds up.
    Look {
        holders: Box<Question<Vec<Holder>>>,
        next: Box<Statement>,
    },
    Tell {
        next: Box<Statement>,
    },
    Ask {
        holders: Box<Question<Vec<Holder>>>,
        waited: Duration,
        key: Option<Box<LockKey>>,
    },
}

impl<A> NameHolders<A> {
    /// A limit up to this is short.
    const SHORT: Duration = Duration::from_secs(2);

    pub(crate) fn new(acquire: A, ask: &Ask, ask_holders: AskHolders<A>) -> Self {
        let is_long = ask.wait.limit.is_none_or(|limit| limit > Self::SHORT);
        Self {
            acquire,
            state: State::Acquire,
            ask_holders,
            at_timeout: ask.name_holders,
            while_waiting: ask.tell_holders && ask.is_one() && is_long,
            since: Duration::ZERO,
            taken: |_| None,
        }
    }

    /// The timeout names the lock that was taken.
    pub(crate) fn of_several(self, taken: fn(&A) -> Option<Box<LockKey>>) -> Self {
        Self { taken, ..self }
    }

    fn acquiring<T>(&mut self, step: Step<Option<T>>, now: Duration) -> Step<Option<T>> {
        match step {
            Step::Done(Ok(None)) if self.at_timeout => {
                let waited = now.saturating_sub(self.since);
                let mut holders = Box::new((self.ask_holders)(&self.acquire));
                let key = (self.taken)(&self.acquire);
                let step = holders.start(now);
                self.state = State::Ask {
                    holders,
                    waited,
                    key: key.clone(),
                };
                named(step, waited, key)
            }
            Step::Query(next) if self.while_waiting && next.between_turns => {
                self.while_waiting = false;
                let mut holders = Box::new((self.ask_holders)(&self.acquire));
                let step = holders.start(now);
                self.looking(step, holders, next.into())
            }
            step => step,
        }
    }

    fn looking<T>(
        &mut self,
        step: Step<Vec<Holder>>,
        holders: Box<Question<Vec<Holder>>>,
        next: Box<Statement>,
    ) -> Step<Option<T>> {
        match step {
            Step::Done(Ok(holders)) if !holders.is_empty() => {
                self.state = State::Tell { next };
                Step::Tell(holders)
            }
            Step::Done(Err(failure)) if failure.reason == Reason::Lost => Step::failed(failure),
            Step::Done(_) => {
                self.state = State::Acquire;
                Step::Query(*next)
            }
            step => {
                self.state = State::Look { holders, next };
                step.map(|_| unreachable!("BUG: it is not done"))
            }
        }
    }
}

fn named<T>(
    step: Step<Vec<Holder>>,
    waited: Duration,
    key: Option<Box<LockKey>>,
) -> Step<Option<T>> {
    step.map(|holders| {
        let (holders, aftermath) = match holders {
            Ok(holders) => (holders, Aftermath::Clean),
            Err(failure) => (Vec::new(), failure.aftermath),
        };
        let timeout = Reason::Timeout { waited, holders };
        Step::failed(Failure {
            aftermath,
            key,
            ..timeout.clean(Cause::default())
        })
    })
}

impl<A: Machine<Output = Option<T>>, T> Machine for NameHolders<A> {
    type Output = Option<T>;

    fn start(&mut self, now: Duration) -> Step<Option<T>> {
        self.since = now;
        let step = self.acquire.start(now);
        self.acquiring(step, now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<Option<T>> {
        match std::mem::replace(&mut self.state, State::Acquire) {
            State::Acquire => {
                let step = self.acquire.next(answer, now);
                self.acquiring(step, now)
            }
            State::Look { mut holders, next } => {
                let step = holders.next(answer, now);
                self.looking(step, holders, next)
            }
            State::Tell { next } => Step::Query(*next),
            State::Ask {
                mut holders,
                waited,
                key,
            } => {
                let step = holders.next(answer, now);
                self.state = State::Ask {
                    holders,
                    waited,
                    key: key.clone(),
                };
                named(step, waited, key)
            }
        }
    }

    fn abandon(&self) -> Abandoned {
        match &self.state {
            // Between two turns only PostgreSQL is asked, whose answers stay in step.
            State::Acquire | State::Look { .. } | State::Tell { .. } => self.acquire.abandon(),
            State::Ask { holders, .. } => holders.abandon(),
        }
    }
}
