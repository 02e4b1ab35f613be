//! Several locks for SQLite as one. They are taken one by one: there is no way to the functions that could be saved.

use std::ops::Range;

use super::acquire::Acquire;
use super::key::SqliteKey;
use super::release::Release;
use crate::LockKey;
use crate::proto::{
    Abandoned, Ask, Failure, Hold, NoTry, ReleaseEach, Request, Session, Several, Steps, Wait,
    in_order, unique,
};

/// Locks that are taken together, in the order in which everybody takes them: that of their numbers.
#[derive(Debug)]
pub(super) struct Keys(Vec<(u64, LockKey)>);

impl Keys {
    pub(super) fn new(ask: &Ask) -> Result<Self, Failure> {
        in_order(ask, LockKey::to_sqlite, |key| *key).map(Self)
    }

    /// The only one, if they are no more.
    pub(super) fn only(&self) -> Option<u64> {
        match &*self.0 {
            [(key, _)] => Some(*key),
            _ => None,
        }
    }

    /// Each with its name.
    pub(super) fn into_pairs(self) -> impl Iterator<Item = (u64, LockKey)> {
        self.0.into_iter()
    }

    pub(super) fn get(&self, index: usize) -> &(u64, LockKey) {
        &self.0[index]
    }
}

/// Takes several locks.
#[derive(Debug)]
pub(super) struct FileLocks {
    keys: Keys,
    ask: Ask,
    session: Session,
}

impl FileLocks {
    pub(super) fn several(keys: Keys, ask: &Ask, session: Session) -> Several<Self> {
        let steps = Self {
            keys,
            ask: Ask {
                more: Vec::new(),
                ..ask.clone()
            },
            session,
        };
        Several::new(steps, ask.wait)
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Steps for FileLocks {
    type Key = SqliteKey;
    type Try = NoTry;
    type Wait = Acquire;
    type Back = ReleaseEach<SqliteKey, Release>;

    const OUTLIVE: bool = true;

    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey> {
        self.keys.0.iter().map(|(_, name)| name)
    }

    fn try_all(&self, _range: Range<usize>) -> Option<NoTry> {
        None
    }

    fn wait(&self, index: usize, wait: Wait) -> Acquire {
        let request = Request(unique() as i64);
        let (key, _) = *self.keys.get(index);
        let ask = Ask {
            wait,
            ..self.ask.clone()
        };
        Acquire::new(SqliteKey { key, request }, &ask, self.session)
    }

    fn hold(&self, _index: usize, _tried: &NoTry) -> Hold<SqliteKey> {
        unreachable!("BUG: they are taken one by one")
    }

    fn give_back(&self, holds: Vec<Hold<SqliteKey>>) -> Self::Back {
        release_each(holds, self.session)
    }

    fn abandoned(&self, mut at_work: Abandoned, held: &[Hold<SqliteKey>]) -> Abandoned {
        at_work.requests.extend(requests(held));
        at_work
    }
}

fn requests(holds: &[Hold<SqliteKey>]) -> impl Iterator<Item = Request> {
    holds.iter().map(|hold| hold.key.request)
}

/// A session that cannot be ended keeps what is not given up.
pub(super) fn release_each(
    holds: Vec<Hold<SqliteKey>>,
    session: Session,
) -> ReleaseEach<SqliteKey, Release> {
    let release = |hold: Hold<SqliteKey>, _session| Release::new(hold.key);
    let abandoned = |left: &[Hold<SqliteKey>]| Abandoned {
        requests: requests(left).collect(),
        ..Abandoned::default()
    };
    ReleaseEach::new(holds, session, release, abandoned, true)
}
