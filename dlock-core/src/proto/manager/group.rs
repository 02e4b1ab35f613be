use std::sync::Arc;
use std::time::Duration;

use super::action::{Identity, Wanted};
use super::slab::Id;
use crate::LockKey;
use crate::proto::Failure;

/// Several locks that are acquired as one: one request after the other, in the order in which everybody takes them. So
/// while it waits for a lock it has those before it, and none behind it, and there is no deadlock.
///
/// | state | its request, or one of those it has | then |
/// |---|---|---|
/// | `Acquires` | granted | asks for the next one, or `Held` |
/// | | taken, failed, closed | gives everything back, and that is told |
/// | | lost | gives everything back, and begins again, a few times |
/// | `Held` | lost | gives the others back, and that is told |
/// | `Releases` | released, not released | the last one: that is told |
///
/// Each lock is where a connection was free: several connections may hold the locks of one group.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) locks: Vec<Lock>,
    /// The requests that have their lock.
    pub(super) held: Vec<Id>,
    pub(super) state: State,
    pub(super) tries: bool,
    /// When its limit passes.
    pub(super) until: Option<Duration>,
    pub(super) since: Duration,
    /// It has heard who has one of the locks.
    pub(super) told: bool,
    /// How often it has lost a lock while it waited for the next.
    pub(super) losses: u32,
}

/// A lock of a group.
#[derive(Clone, Debug)]
pub(super) struct Lock {
    pub(super) identity: Identity,
    pub(super) what: Arc<Wanted>,
    /// The other names with this identity. By a request of its own each would stand behind the group itself.
    pub(super) more: Arc<[LockKey]>,
}

impl Lock {
    /// Those with one identity, which stand side by side, become one.
    pub(super) fn merged(locks: Vec<(Identity, Arc<Wanted>)>) -> Vec<Self> {
        let chunks = locks.chunk_by(|(one, _), (other, _)| one == other);
        let locks = chunks.map(|same| Self {
            identity: same[0].0.clone(),
            what: Arc::clone(&same[0].1),
            more: same[1..].iter().map(|(_, what)| what.key.clone()).collect(),
        });
        locks.collect()
    }
}

#[derive(Debug)]
pub(super) enum State {
    /// By this request.
    Acquires(Id),
    Held,
    /// What went wrong first.
    Releases(Option<Failure>),
}

impl Group {
    /// The name of a lock that it has, or asks for.
    pub(super) fn name(&self, member: Id) -> LockKey {
        let index = self.held.iter().position(|held| *held == member);
        let index = index.unwrap_or(self.held.len()).min(self.locks.len() - 1);
        self.locks[index].what.key.clone()
    }
}
