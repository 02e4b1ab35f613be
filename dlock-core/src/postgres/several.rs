//! Several locks of PostgreSQL as one.

mod attempt;
mod begin;
mod inside;
mod keys;
mod release;
mod transaction;

use std::ops::Range;

use attempt::TryAll;
pub(super) use begin::BeginSeveral;
pub(super) use inside::{InsideSteps, release};
pub(super) use keys::Keys;
use release::ReleaseAll;
pub(super) use transaction::SeveralInTransaction;

use super::session::AcquireSession;
use super::sql;
use crate::proto::{Abandoned, Hold, OpenTransaction, Several, Steps, Wait};
use crate::{LockKey, PostgresKey};

/// Takes several locks of a session outside a transaction.
#[derive(Debug)]
pub(super) struct SessionSteps {
    keys: Keys,
    droppable: bool,
}

impl SessionSteps {
    pub(super) fn several(keys: Keys, wait: Wait, droppable: bool) -> Several<Self> {
        Several::new(Self { keys, droppable }, wait)
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
        let release = sql::release_all_unread(&keys, mode, OpenTransaction::None);
        at_work.messages.push(release.into());
        at_work
    }
}
