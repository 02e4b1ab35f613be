use std::num::NonZeroU32;

use super::{Cause, Failure, Reason, Wait};
use crate::{LockKey, Mode};

/// What is asked for: a lock, and how.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The lock. If there are several, the first that was named.
    pub key: LockKey,
    /// The other locks that are taken together with it, in whatever order.
    pub more: Vec<LockKey>,
    /// Nothing was named: [`key`](Self::key) stands for nothing and is refused.
    pub nothing: bool,
    /// Of a semaphore: the slots that the session has already. They are not granted to it once more.
    pub except: Vec<u32>,
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
    /// Whether to say once, while it waits, who has the lock. It takes a round trip, so it is not done for short
    /// limits, and where a wait has no turns it costs the place in the queue. PostgreSQL: only outside a transaction,
    /// and not for polling.
    pub tell_holders: bool,
}

impl Ask {
    /// Asks for an exclusive lock of the session and waits without a limit.
    pub fn new(key: LockKey) -> Self {
        Self {
            key,
            more: Vec::new(),
            nothing: false,
            except: Vec::new(),
            mode: Mode::Exclusive,
            wait: Wait::default(),
            inside_transaction: false,
            droppable: false,
            cancellable: false,
            name_holders: true,
            tell_holders: false,
        }
    }

    /// Asks for all of these locks as one.
    pub fn all(keys: impl IntoIterator<Item = LockKey>) -> Self {
        let mut keys = keys.into_iter();
        let first = keys.next();
        Self {
            nothing: first.is_none(),
            more: keys.collect(),
            ..Self::new(first.unwrap_or_else(|| "".into()))
        }
    }

    /// The keys, as they were named.
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        let first = (!self.nothing).then_some(&self.key);
        first.into_iter().chain(&self.more)
    }

    /// Whether one key was named.
    pub(crate) fn is_one(&self) -> bool {
        self.more.is_empty() && !self.nothing
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
