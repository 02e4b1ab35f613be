use std::time::Duration;

use super::{
    Abandoned, Aftermath, Answer, Cause, ErrorFields, Failure, Machine, Reason, Rows, Statement,
    Step,
};
use crate::Holder;
use crate::holder::ServerKind;

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
            (None, None) => self.fail(),
        }
    }

    fn fail(&mut self) -> Step<T> {
        let failure = Reason::Database.clean(self.cause());
        Step::failed(Failure {
            // Where unread answers shift, nobody knows whose the error was.
            aftermath: match self.abandoned.broken {
                true => Aftermath::MarkBroken,
                false => Aftermath::Clean,
            },
            ..failure
        })
    }

    fn cause(&mut self) -> Cause {
        let error = self.first_error.take();
        error.map(|error| error.cause).unwrap_or_default()
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
