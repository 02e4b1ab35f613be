use std::time::Duration;

use super::sql;
use super::tag::Tag;
use crate::FencingToken;
use crate::proto::{
    Abandoned, Aftermath, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows,
    Statement, Step, token,
};

/// Asks the session about a lock that it holds.
///
/// | sent | answer | then |
/// |---|---|---|
/// | the question | an answer to it | read |
/// | | the answer to another one | fails, the session is ended |
/// | | the session is lost | fails, lost |
/// | | any other error | fails |
#[derive(Debug)]
pub(super) struct Question<T> {
    tag: Tag,
    droppable: bool,
    /// Whether the connection is no longer fit for others after an error.
    breaks: bool,
    statement: Statement,
    read: fn(Rows, Tag, bool) -> Result<T, Failure>,
}

impl Question<bool> {
    /// Whether the session holds the lock.
    pub(super) fn is_held(hold: &Hold<String>) -> Self {
        let tag = Tag::new();
        Self {
            tag,
            droppable: hold.droppable,
            // An answer that nobody has read is given to the next query: nobody knows whose the error was.
            breaks: hold.droppable,
            statement: match hold.more.is_empty() {
                true => sql::is_held(tag, &hold.key, hold.droppable),
                false => sql::all_held(tag, &sql::List::of(hold.all()), hold.droppable),
            },
            read: |rows, tag, droppable| match rows {
                Rows::Number(number) => sql::read(number, tag, droppable).map(|held| held == 1),
                _ => Err(Reason::Database.clean(Cause::default())),
            },
        }
    }
}

impl Question<FencingToken> {
    /// Draws a fencing token, if the session holds the lock. A number that nobody reads is lost, and does no harm.
    pub(super) fn draw_token(hold: &Hold<String>) -> Self {
        let tag = Tag::new();
        Self {
            tag,
            droppable: hold.droppable,
            // libmariadb (3.3) would hang if it sent the kept statement again, for the reason of `acquire!`.
            breaks: true,
            statement: match hold.more.is_empty() {
                true => sql::draw_token(tag, &hold.key),
                false => sql::draw_token_of_all(tag, &sql::List::of(hold.all())),
            },
            read: |rows, tag, _| match rows {
                Rows::Pair(answer, number) => {
                    tag.remove(answer)?;
                    token(number).ok_or_else(|| Failure::not_held(Cause::default()))
                }
                _ => Err(Reason::Database.clean(Cause::default())),
            },
        }
    }
}

impl<T> Machine for Question<T> {
    type Output = T;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<T> {
        Step::Query(self.statement.clone())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<T> {
        Step::Done(match answer {
            Answer::Rows(rows) => (self.read)(rows, self.tag, self.droppable),
            Answer::Error(ErrorFields {
                lost: true, cause, ..
            }) => Err(Failure::lost(cause)),
            Answer::Error(error) => Err(Failure {
                aftermath: match self.breaks {
                    true => Aftermath::MarkBroken,
                    false => Aftermath::Clean,
                },
                ..Reason::Database.clean(error.cause)
            }),
            Answer::Done => Err(Reason::Database.clean(Cause::default())),
        })
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
