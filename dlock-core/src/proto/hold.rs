use super::{Depth, Savepoint, Session};
use crate::Mode;

/// What a session holds, and all that is needed to give it back.
#[derive(Debug)]
pub struct Hold<K> {
    pub(crate) key: K,
    pub(crate) mode: Mode,
    /// The transactions that were open when the lock was acquired.
    pub(crate) depth: Depth,
    /// The savepoint in front of the lock, where it was acquired inside a PostgreSQL transaction.
    pub(crate) savepoint: Option<Savepoint>,
    /// Whether the release may be abandoned.
    pub(crate) droppable: bool,
}

impl<K> Hold<K> {
    /// The transactions that were open when the lock was acquired. Those that were begun since are rolled back before
    /// the lock is released: to commit them without the lock would break exclusion.
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// How the lock is held.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What happens to the open transaction when the guard of this hold is dropped. `session` is `None` if the driver
    /// does not know whether one is open.
    pub(crate) fn open_transaction(&self, session: Option<Session>) -> OpenTransaction {
        match (self.depth, session.map(|session| session.depth)) {
            (_, Some(None)) => OpenTransaction::None,
            (None, _) => OpenTransaction::RollBack,
            (Some(_), _) => OpenTransaction::Keep,
        }
    }
}

/// What the caller does about a hold that it gives up without waiting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parting {
    /// The message to send. Nobody reads its answer.
    pub message: Option<String>,
    /// Whether the connection is no longer fit for others.
    pub broken: bool,
    /// SQLite: the request to give up, unless the message certainly failed.
    pub request: Option<Request>,
}

/// The number of a request for a SQLite lock: no other one in this process has the same. Its hold, or its place in the
/// queue, is given up by that number, also where the connection cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request(pub i64);

/// The transaction that is open when a hold is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenTransaction {
    /// There is none.
    None,
    /// It was begun under the lock, or may have been: it is rolled back first.
    RollBack,
    /// The lock was acquired in it.
    Keep,
}
