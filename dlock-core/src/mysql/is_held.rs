use std::time::Duration;

use super::sql;
use super::tag::Tag;
use crate::proto::{
    Abandoned, Aftermath, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows,
    Statement, Step,
};

/// Asks whether the session holds the lock.
#[derive(Debug)]
pub(super) struct IsHeld {
    tag: Tag,
    droppable: bool,
    statement: Statement,
    /// The question has failed.
    failed: Option<Cause>,
}

impl IsHeld {
    pub(super) fn new(hold: &Hold<String>) -> Self {
        let tag = Tag::new();
        Self {
            tag,
            droppable: hold.droppable,
            statement: sql::is_held(tag, &hold.key, hold.droppable),
            failed: None,
        }
    }
}

impl Machine for IsHeld {
    type Output = bool;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<bool> {
        Step::Query(self.statement.clone())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<bool> {
        if let Some(cause) = self.failed.take() {
            return Step::failed(match answer {
                Answer::Error(_) => Failure::lost(cause),
                // Where an answer nobody read is given to the next query, nobody knows whose the error was.
                _ => Failure {
                    aftermath: match self.droppable {
                        true => Aftermath::MarkBroken,
                        false => Aftermath::Clean,
                    },
                    ..Reason::Database.clean(cause)
                },
            });
        }
        Step::Done(match answer {
            Answer::Rows(Rows::Number(number)) => {
                sql::read(number, self.tag, self.droppable).map(|held| held == 1)
            }
            Answer::Error(ErrorFields {
                lost: true, cause, ..
            }) => Err(Failure::lost(cause)),
            Answer::Error(error) => {
                self.failed = Some(error.cause);
                return Step::Batch(sql::ARE_YOU_THERE.into());
            }
            _ => Err(Reason::Database.clean(Cause::default())),
        })
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
