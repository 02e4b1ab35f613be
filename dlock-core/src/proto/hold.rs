use super::{Depth, Savepoint, Session};
use crate::{LockKey, Mode};

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
    /// The other locks that were taken together with it, behind it in the order of the server.
    pub(crate) more: Vec<Hold<K>>,
    /// Of several locks: the key, as it was named.
    pub(crate) name: Option<Box<LockKey>>,
    /// The slot, if this is one of a semaphore. The key is the slot's.
    pub(crate) slot: Option<u32>,
    /// MySQL: a slot that was taken without the question whether the server is a node of a cluster.
    pub(crate) unchecked: bool,
}

impl<K> Hold<K> {
    /// The transactions that were open when the lock was acquired. Those that were begun since are rolled back before
    /// the lock is released: to commit them without the lock would break exclusion.
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// A hold of one lock.
    pub(crate) fn new(key: K, mode: Mode, depth: Depth, droppable: bool) -> Self {
        Self {
            key,
            mode,
            depth,
            savepoint: None,
            droppable,
            more: Vec::new(),
            name: None,
            slot: None,
            unchecked: false,
        }
    }

    /// This one and all that were taken together with it.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.more)
    }

    /// The same, apart.
    pub(crate) fn into_all(mut self) -> Vec<Self> {
        let mut all = std::mem::take(&mut self.more);
        all.insert(0, self);
        all
    }

    /// One hold of all of them, which are in the order of the server.
    pub(crate) fn together(holds: Vec<Self>) -> Option<Self> {
        let mut holds = holds.into_iter();
        let mut first = holds.next()?;
        first.more = holds.collect();
        Some(first)
    }

    /// How the lock is held.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The slot of a semaphore.
    pub fn slot(&self) -> Option<u32> {
        self.slot
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
    /// The requests of the other locks that were taken together with it.
    pub more_requests: Vec<Request>,
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
