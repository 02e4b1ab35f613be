use std::sync::Arc;
use std::time::Duration;

use super::slab::Id;
use crate::proto::{Aftermath, Ask, Failure, Reason, Wait};
use crate::{FencingToken, Holder, LockKey, Mode, PostgresKey};

/// A request for a lock, from the call on until its end is told, or until it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub(super) Of);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Of {
    One(Id),
    Several(Id),
}

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnId(pub(super) Id);

/// What a connection acquires, holds or releases. The driver keeps the [`Hold`](crate::proto::Hold) under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HoldId(pub(super) Id);

/// A question about a hold, from the call on until its answer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuestionId(pub(super) Id);

/// What the server locks. Two keys can be one lock to it. Two locks with one identity wait for each other, whether the
/// server tells them apart or not.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A number.
    Number(i64),
    /// A pair of numbers.
    Pair(i32, i32),
    /// A name.
    Name(Arc<str>),
    /// The slots of a semaphore, by its gate.
    Semaphore(Box<Identity>),
}

impl From<PostgresKey> for Identity {
    fn from(key: PostgresKey) -> Self {
        match key {
            PostgresKey::BigInt(number) => Identity::Number(number),
            PostgresKey::Pair(first, second) => Identity::Pair(first, second),
        }
    }
}

/// A lock that is wanted. The conversation about it is not the manager's business.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The lock.
    pub key: LockKey,
    /// Alone or together with other readers.
    pub mode: Mode,
    /// Of a semaphore: how many slots it has.
    pub permits: Option<u32>,
}

impl Wanted {
    /// What a conversation asks for.
    pub fn ask(&self, how: How, droppable: bool) -> Ask {
        let wait = Wait {
            limit: how.limit,
            poll: None,
        };
        Ask {
            more: how.more,
            mode: self.mode,
            except: how.except,
            wait,
            droppable,
            name_holders: how.name_holders,
            ..Ask::new(self.key.clone())
        }
    }
}

/// How a conversation asks for a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct How {
    /// How long to wait; `None` waits without a limit, zero tries once.
    pub limit: Option<Duration>,
    /// Whether somebody wants to know who has the lock if it does not get it.
    pub name_holders: bool,
    /// Of a semaphore: the slots that the connection has already.
    pub except: Vec<u32>,
    /// Other names of one request that the same identity has. The conversation takes all of them.
    pub more: Vec<LockKey>,
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Open a connection. The answer is [`opened`](super::Manager::opened) or
    /// [`open_failed`](super::Manager::open_failed).
    Open(ConnId),
    /// Acquire a lock. The answer is [`done`](super::Manager::done), for this action and the next three.
    Acquire {
        /// On this connection.
        conn: ConnId,
        /// Keep what it ends with under this number.
        hold: HoldId,
        /// The lock.
        what: Arc<Wanted>,
        /// How long to wait, and the like.
        how: How,
    },
    /// Release a hold.
    Release {
        /// On this connection.
        conn: ConnId,
        /// What it holds.
        hold: HoldId,
    },
    /// Draw a fencing token, if the session still has the hold.
    DrawToken {
        /// On this connection.
        conn: ConnId,
        /// What it holds.
        hold: HoldId,
    },
    /// Ask whether the session is still there.
    KeepAlive(ConnId),
    /// Close the connection at once, also in the middle of a conversation, and answer
    /// [`closed`](super::Manager::closed).
    Close(ConnId),
    /// Tell somebody.
    Tell(Ticket, News),
    /// Tell somebody who waits who has the lock, once.
    TellHolders(Ticket, Arc<[Holder]>),
    /// Answer a question. This is its end.
    Answer(QuestionId, Result<FencingToken, Failure>),
    /// All connections are closed after [`close`](super::Manager::close).
    Closed,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// The lock is held.
    Granted {
        /// Of a semaphore: which slot.
        slot: Option<u32>,
    },
    /// The limit has passed, or it was a try. This is the end of the request.
    Taken {
        /// How long it has waited.
        waited: Duration,
        /// Who has the lock, as far as known.
        holders: Vec<Holder>,
        /// Of several locks, the one that was taken.
        about: Option<LockKey>,
    },
    /// It cannot be had. This is the end of the request.
    Failed(Failure),
    /// The manager is closed. This is the end of the request.
    Closed,
    /// The lock was held, and may be another's any time now. This is the end of the request.
    Lost,
    /// It is released.
    Released,
    /// It could not be released: it was lost before.
    NotReleased(Failure),
}

/// How a conversation ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The lock is held.
    Granted {
        /// Of a semaphore: which slot.
        slot: Option<u32>,
    },
    /// Another session holds it.
    Taken {
        /// Who, as far as known.
        holders: Vec<Holder>,
    },
    /// It is released.
    Released,
    /// A fencing token was drawn.
    Drawn(FencingToken),
    /// The session is there.
    Alive,
    /// It failed. If the failure leaves the connection unfit for use, the driver has closed it.
    Failed(Failure),
}

/// A limit that has passed is no failure.
impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure {
                reason: Reason::Timeout { holders, .. },
                aftermath: Aftermath::Clean,
                ..
            } => Outcome::Taken { holders },
            failure => Outcome::Failed(failure),
        }
    }
}
