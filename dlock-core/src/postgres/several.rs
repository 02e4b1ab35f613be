//! Several locks of PostgreSQL as one.

mod attempt;
mod begin;
mod inside;
mod release;
mod transaction;

use std::ops::Range;

use attempt::TryAll;
pub(super) use begin::BeginSeveral;
pub(super) use inside::{InsideSteps, release};
use release::ReleaseAll;
pub(super) use transaction::SeveralInTransaction;

use super::mark::Mark;
use super::session::AcquireSession;
use super::sql::{self, Scope};
use crate::proto::{Abandoned, Ask, Failure, Hold, Several, Steps, Wait, in_order};
use crate::{LockKey, Mode, PostgresKey};

/// Locks that are taken together, in the order in which everybody takes them: numbers before pairs, each in ascending
/// order.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    keys: Vec<PostgresKey>,
    names: Vec<LockKey>,
    pub(super) mode: Mode,
}

impl Keys {
    pub(super) fn new(ask: &Ask) -> Result<Self, Failure> {
        let order = |key: &PostgresKey| match *key {
            PostgresKey::BigInt(key) => (0, key, 0),
            PostgresKey::Pair(first, second) => (1, first.into(), second),
        };
        let keys = in_order(ask, LockKey::to_postgres, order)?;
        let (keys, names) = keys.into_iter().unzip();
        Ok(Self {
            keys,
            names,
            mode: ask.mode,
        })
    }

    /// The only one, if they are no more.
    pub(super) fn only(&self) -> Option<PostgresKey> {
        match *self.keys {
            [key] => Some(key),
            _ => None,
        }
    }

    pub(super) fn get(&self, index: usize) -> PostgresKey {
        self.keys[index]
    }

    pub(super) fn name(&self, index: usize) -> &LockKey {
        &self.names[index]
    }

    pub(super) fn all(&self) -> &[PostgresKey] {
        &self.keys
    }

    fn of(holds: &[Hold<PostgresKey>]) -> Vec<PostgresKey> {
        holds.iter().map(|hold| hold.key).collect()
    }
}

/// Takes several locks of a session outside a transaction.
#[derive(Debug)]
pub(super) struct SessionSteps {
    keys: Keys,
    droppable: bool,
    /// The release of what an abandoned conversation has taken.
    release: Mark,
}

impl SessionSteps {
    pub(super) fn several(keys: Keys, wait: Wait, droppable: bool) -> Several<Self> {
        let steps = Self {
            keys,
            droppable,
            release: Mark::new(),
        };
        Several::new(steps, wait)
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Steps for SessionSteps {
    type Key = PostgresKey;
    type Try = TryAll;
    type Wait = AcquireSession;
    type Back = ReleaseAll;

    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey> {
        self.keys.names.iter()
    }

    fn try_all(&self, range: Range<usize>) -> Option<TryAll> {
        let keys = self.keys.keys[range].to_vec();
        Some(TryAll::new(keys, self.keys.mode))
    }

    fn wait(&self, index: usize, wait: Wait) -> AcquireSession {
        let key = self.keys.get(index);
        AcquireSession::new(key, self.keys.mode, wait, self.droppable)
    }

    fn hold(&self, index: usize, _tried: &TryAll) -> Hold<PostgresKey> {
        let key = self.keys.get(index);
        Hold {
            name: Some(Box::new(self.keys.name(index).clone())),
            ..Hold::new(key, self.keys.mode, None, self.droppable)
        }
    }

    fn give_back(&self, holds: Vec<Hold<PostgresKey>>) -> ReleaseAll {
        ReleaseAll::new(holds)
    }

    fn abandoned(&self, mut at_work: Abandoned, held: &[Hold<PostgresKey>]) -> Abandoned {
        let (keys, mode) = (Keys::of(held), self.keys.mode);
        let release = sql::release_all_once(&keys, mode, self.release.number(), Scope::Session);
        at_work.messages.extend(Abandoned::twice(release));
        at_work
    }
}
