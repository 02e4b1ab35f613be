use crate::proto::{Ask, Failure, Hold, in_order};
use crate::{LockKey, Mode, PostgresKey};

/// Locks that are taken together, in the order in which everybody takes them: numbers before pairs, each in ascending
/// order.
#[derive(Clone, Debug)]
pub(in crate::postgres) struct Keys {
    pub(super) keys: Vec<PostgresKey>,
    pub(super) names: Vec<LockKey>,
    pub(in crate::postgres) mode: Mode,
}

impl Keys {
    pub(in crate::postgres) fn new(ask: &Ask) -> Result<Self, Failure> {
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
    pub(in crate::postgres) fn only(&self) -> Option<PostgresKey> {
        match *self.keys {
            [key] => Some(key),
            _ => None,
        }
    }

    pub(in crate::postgres) fn get(&self, index: usize) -> PostgresKey {
        self.keys[index]
    }

    pub(in crate::postgres) fn name(&self, index: usize) -> &LockKey {
        &self.names[index]
    }

    pub(in crate::postgres) fn all(&self) -> &[PostgresKey] {
        &self.keys
    }

    pub(super) fn of(holds: &[Hold<PostgresKey>]) -> Vec<PostgresKey> {
        holds.iter().map(|hold| hold.key).collect()
    }
}
