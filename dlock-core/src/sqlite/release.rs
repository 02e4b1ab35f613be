use std::time::Duration;

use super::{SqliteKey, sql};
use crate::{Abandoned, Answer, Machine, Outcome, Reason, Step};

/// Releases one hold.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Sqlite, Step};
///
/// let key = Sqlite::key(&"report".into())?;
/// let Step::Query(statement) = Sqlite::release(&key, Mode::Exclusive, None).start() else { panic!() };
/// assert!(statement.text().contains("dlock_release(?, ?)"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct SqliteRelease {
    key: SqliteKey,
}

impl SqliteRelease {
    pub(super) fn new(key: SqliteKey) -> Self {
        Self { key }
    }
}

impl Machine for SqliteRelease {
    fn start(&mut self) -> Step {
        Step::Query(sql::release(self.key))
    }

    fn next(&mut self, answer: Answer, _elapsed: Duration) -> Step {
        match answer {
            Answer::Value(Some(1)) => Outcome::Success.into(),
            Answer::Value(Some(0)) => Reason::NotHeld.clean().into(),
            _ => Reason::Database.broken().into(),
        }
    }

    /// Nothing: the request is given up by its number.
    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
