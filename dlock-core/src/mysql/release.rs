use std::time::Duration;

use super::sql::{self, Ask};
use crate::{Abandoned, Answer, Machine, Outcome, Reason, Step};

/// Releases one hold of a named lock.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Machine, Mode, Mysql, Step};
///
/// let key = Mysql::key(&"report".into())?;
/// let Step::Query(statement) = Mysql::release(&key, Mode::Exclusive, None).start() else { panic!() };
/// assert!(statement.text().contains("RELEASE_LOCK(CONVERT(? USING utf8mb4))"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Debug)]
pub struct MysqlRelease {
    key: String,
    /// It may be [abandoned](Machine::abandon).
    abandonable: bool,
}

impl MysqlRelease {
    pub(super) fn new(key: String) -> Self {
        Self {
            key,
            abandonable: false,
        }
    }

    pub(super) fn abandonable(mut self) -> Self {
        self.abandonable = true;
        self
    }
}

impl Machine for MysqlRelease {
    fn start(&mut self) -> Step {
        Step::Query(if self.abandonable {
            sql::try_or_release(Ask::Release, &self.key)
        } else {
            sql::release(&self.key)
        })
    }

    fn next(&mut self, answer: Answer, _elapsed: Duration) -> Step {
        match answer {
            Answer::Value(Some(1)) => Outcome::Success.into(),
            // Another session's, or nobody's.
            Answer::Value(Some(0) | None) => Reason::NotHeld.clean().into(),
            _ => Reason::Database.broken().into(),
        }
    }

    fn abandon(&self) -> Abandoned {
        // The connection is out of step. Whether it was released nobody knows, and to release it once more could take an
        // outer guard's hold.
        Abandoned {
            broken: true,
            ..Abandoned::default()
        }
    }
}
