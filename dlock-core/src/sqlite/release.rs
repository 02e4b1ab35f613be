use std::time::Duration;

use super::key::SqliteKey;
use super::sql;
use crate::proto::{Abandoned, Answer, Cause, ErrorFields, Failure, Machine, Reason, Rows, Step};

/// Releases one hold.
///
/// | sent | answer | then |
/// |---|---|---|
/// | releases the request | 1, or an error: given up | released |
/// | | 0 | not held |
/// | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(super) struct Release {
    key: SqliteKey,
}

impl Release {
    pub(super) fn new(key: SqliteKey) -> Self {
        Self { key }
    }
}

impl Machine for Release {
    type Output = ();

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(sql::release(self.key))
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        match answer {
            Answer::Rows(Rows::Number(Some(1)))
            | Answer::Error(ErrorFields { given_up: true, .. }) => Step::Done(Ok(())),
            Answer::Rows(Rows::Number(Some(0))) => {
                Step::failed(Failure::not_held(Cause::default()))
            }
            Answer::Error(error) => Step::failed(Reason::Database.broken(error.cause)),
            _ => Step::failed(Reason::Database.broken(Cause::default())),
        }
    }

    /// The driver gives the request up by its number.
    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
