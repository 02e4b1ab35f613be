//! The locks of a semaphore: one for each slot, and a gate. `docs/keys.md` describes the mapping, and it is frozen.
//!
//! The locks of one semaphore are neighbours, so that a server can compute each from the first.

use siphasher::{sip, sip128};

use super::mapping::{RESERVED, SQLITE_HASHED, STRUCTURED};
use super::{InvalidKey, Leaf, LockKey, SemaphoreLock};

impl SemaphoreLock {
    /// The gate is the first of 1024 neighbours.
    fn number(self) -> u64 {
        match self {
            Self::Gate => 0,
            Self::Slot(slot) => 1 + u64::from(slot),
        }
    }
}

/// A block of locks has so many numbers.
const BLOCK: u64 = 1024;

/// The most slots that a semaphore can have.
const MOST: u32 = 1000;

/// How many of the 32 hexadecimal digits of the hash a name keeps.
const DIGITS: usize = 24;

impl LockKey {
    /// The key of a slot of the semaphore with this key, or of the gate. Not part of the API.
    #[doc(hidden)]
    pub fn semaphore_lock(&self, slot: Option<u32>) -> LockKey {
        let lock = slot.map_or(SemaphoreLock::Gate, SemaphoreLock::Slot);
        LockKey::plain(Leaf::Semaphore(Box::new(self.clone()), lock))
    }

    /// Refuses a number of permits that no semaphore has.
    pub(crate) fn check_permits(&self, permits: u32) -> Result<(), InvalidKey> {
        match permits {
            0 => Err(self.invalid(
                "is asked for as a semaphore with 0 permits, for which everybody would wait for ever: \
                 give it at least 1",
            )),
            1..=MOST => Ok(()),
            _ => Err(self.invalid(format!(
                "is asked for as a semaphore with {permits} permits: give it at most {MOST}"
            ))),
        }
    }

    /// What is hashed for the locks of the semaphore with this key.
    fn semaphore_message(&self) -> Result<Vec<u8>, InvalidKey> {
        if let Leaf::Preset(preset, _) = &self.leaf {
            return Err(self.invalid(format!(
                "is a key of {}, which has no semaphores: use a key without a preset",
                preset.name
            )));
        }
        let mut message = vec![b's'];
        message.extend(self.structured()?);
        Ok(message)
    }

    fn semaphore_block(&self) -> Result<u64, InvalidKey> {
        let hash = sip::SipHasher24::new_with_key(STRUCTURED).hash(&self.semaphore_message()?);
        Ok(hash & !(BLOCK - 1))
    }

    pub(crate) fn semaphore_to_postgres(&self, lock: SemaphoreLock) -> Result<i64, InvalidKey> {
        Ok((self.semaphore_block()? | lock.number()) as i64)
    }

    pub(crate) fn semaphore_to_sqlite(&self, lock: SemaphoreLock) -> Result<u64, InvalidKey> {
        let block = self.semaphore_block()? & (SQLITE_HASHED - 1);
        Ok(SQLITE_HASHED | block | lock.number())
    }

    pub(super) fn semaphore_to_mysql(&self, lock: SemaphoreLock) -> Result<String, InvalidKey> {
        let base = self.semaphore_base_for_mysql()?;
        Ok(match lock {
            SemaphoreLock::Gate => format!("{base}:gate"),
            SemaphoreLock::Slot(slot) => format!("{base}:{slot}"),
        })
    }

    /// What the names of the locks begin with.
    pub(crate) fn semaphore_base_for_mysql(&self) -> Result<String, InvalidKey> {
        let message = self.semaphore_message()?;
        let hash = sip128::SipHasher24::new_with_key(STRUCTURED).hash(&message);
        let hash = format!("{:032x}", u128::from_be_bytes(hash.as_bytes()));
        Ok(format!("{RESERVED}{}:{}", self.readable(), &hash[..DIGITS]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PostgresKey;
    use std::collections::HashSet;

    fn locks() -> impl Iterator<Item = Option<u32>> {
        std::iter::once(None).chain((0..MOST).map(Some))
    }

    #[test]
    fn all_locks_of_a_semaphore_are_different_and_fit() {
        let key = LockKey::namespaced("x".repeat(300), "y");
        let mut postgres = HashSet::new();
        let mut mysql = HashSet::new();
        let mut sqlite = HashSet::new();
        for lock in locks() {
            let key = key.semaphore_lock(lock);
            postgres.insert(key.to_postgres().unwrap());
            let name = key.to_mysql().unwrap();
            assert!(name.len() <= 64, "{name}");
            mysql.insert(name);
            let number = key.to_sqlite().unwrap();
            assert!((1 << 60..1 << 61).contains(&number));
            sqlite.insert(number);
        }
        assert_eq!([postgres.len(), mysql.len(), sqlite.len()], [1001; 3]);
    }

    #[test]
    fn the_slots_follow_the_gate() {
        let key = LockKey::from("gpu");
        let number = |lock| match key.semaphore_lock(lock).to_postgres().unwrap() {
            PostgresKey::BigInt(number) => number,
            PostgresKey::Pair(..) => unreachable!(),
        };
        let gate = number(None);
        assert_eq!(gate % 1024, 0);
        assert_eq!(number(Some(0)), gate + 1);
        assert_eq!(number(Some(999)), gate + 1000);
    }

    #[test]
    fn a_semaphore_is_none_of_the_locks_of_its_key() {
        for key in [LockKey::from("gpu"), 42.into(), (1, 2).into()] {
            for lock in [None, Some(0)] {
                let lock = key.semaphore_lock(lock);
                assert_ne!(key, lock);
                assert_ne!(key.to_mysql().unwrap(), lock.to_mysql().unwrap());
                assert_ne!(key.to_postgres().unwrap(), lock.to_postgres().unwrap());
            }
        }
    }

    #[test]
    fn permits_are_from_1_to_1000() {
        let key = LockKey::from("gpu");
        assert!(key.check_permits(1).is_ok() && key.check_permits(1000).is_ok());
        for wrong in [0, 1001, u32::MAX] {
            assert_eq!(key.check_permits(wrong).unwrap_err().key(), &key);
        }
    }

    #[test]
    fn an_empty_key_and_a_namespace_around_a_slot_are_refused() {
        let slot = |key: LockKey| key.semaphore_lock(Some(0));
        let of_empty = slot("".into());
        assert!(of_empty.to_postgres().is_err() && of_empty.to_mysql().is_err());
        let in_a_namespace = LockKey::namespaced("a", slot("gpu".into()));
        assert!(in_a_namespace.to_postgres().is_err() && in_a_namespace.to_sqlite().is_err());
        assert!(in_a_namespace.to_mysql().is_err());
    }
}
