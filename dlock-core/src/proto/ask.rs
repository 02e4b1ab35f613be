use std::num::NonZeroU32;

use super::{Cause, Failure, Reason, Wait};
use crate::{LockKey, Mode};

/// What is asked for: a lock, and how.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The lock.
    pub key: LockKey,
    /// Alone or together with other readers.
    pub mode: Mode,
    /// How long to wait, and where.
    pub wait: Wait,
    /// Whether a session's lock is allowed while a transaction is open.
    pub inside_transaction: bool,
    /// Whether the caller may [abandon](super::Machine::abandon) the conversation.
    pub droppable: bool,
    /// Whether the caller can then cancel the statement from another connection, and will if the machine says so.
    pub cancellable: bool,
    /// Whether a timeout is to say who has the lock. Otherwise it is no failure.
    pub name_holders: bool,
}

impl Ask {
    /// Asks for an exclusive lock of the session and waits without a limit.
    pub fn new(key: LockKey) -> Self {
        Self {
            key,
            mode: Mode::Exclusive,
            wait: Wait::default(),
            inside_transaction: false,
            droppable: false,
            cancellable: false,
            name_holders: true,
        }
    }

    /// The same, but a lock that is taken is no failure. Without a limit it does not wait.
    pub fn as_try(mut self) -> Self {
        self.wait.limit.get_or_insert_default();
        self.name_holders = false;
        self
    }

    /// Refuses a session's lock while a transaction is open: the lock would be free before COMMIT.
    pub(crate) fn check_session(&self, session: Session) -> Result<(), Failure> {
        if session.depth.is_some() && !self.inside_transaction && !session.test_transaction {
            return Err(Reason::InTransaction.clean(Cause::default()));
        }
        Ok(())
    }
}

/// How many transactions and savepoints are open. A raw `BEGIN` does not count.
pub type Depth = Option<NonZeroU32>;

/// What the driver knows of the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// How many transactions and savepoints are open.
    pub depth: Depth,
    /// Whether the open transaction is the one of `begin_test_transaction`, and none was begun in it.
    pub test_transaction: bool,
}
