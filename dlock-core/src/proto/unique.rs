use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroI64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// A number that no other request has. Each copy of this crate counts up from a random number: a proxy may give one
/// session to several processes in turn, and a program may contain two versions of this crate.
pub(crate) fn unique() -> u64 {
    static NEXT: LazyLock<AtomicU64> =
        LazyLock::new(|| AtomicU64::new(RandomState::new().build_hasher().finish()));
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A [`unique`] number that is not zero.
pub(crate) fn unique_nonzero() -> NonZeroI64 {
    NonZeroI64::new(unique() as i64).unwrap_or_else(unique_nonzero)
}

/// The name of a savepoint that no other open savepoint of dlock has, in this process.
///
/// In an open transaction the savepoint stands in front of what is sent for a lock: if that fails, the transaction goes
/// on as before; if the transaction is aborted later, the lock can be released nevertheless. If an inner and an outer
/// lock used one name, undoing the inner one could go back to the outer one's savepoint and lose work.
///
/// A name is used again, so that the names are few: to PostgreSQL 16 and older each is a statement of its own in
/// pg_stat_statements. Where a savepoint of that name [may be there](Self::may_be_there), it is one of an aborted
/// transaction.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Savepoint {
    number: usize,
    may_be_there: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Free,
    Used,
    /// It was used in a transaction that was aborted, and may be there still.
    Stale,
}

static NAMES: Mutex<Vec<Name>> = Mutex::new(Vec::new());

fn names() -> MutexGuard<'static, Vec<Name>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Savepoint {
    /// A guard that is dropped in a test transaction leaves its savepoint there, and the transaction goes on: there
    /// only a name is used of which no savepoint is left anywhere.
    pub(crate) fn new(test_transaction: bool) -> Self {
        let mut names = names();
        let find = |wanted| names.iter().position(|name| *name == wanted);
        let stale = || find(Name::Stale).filter(|_| !test_transaction);
        let number = find(Name::Free).or_else(stale);
        let number = number.unwrap_or_else(|| {
            names.push(Name::Free);
            names.len() - 1
        });
        let may_be_there = names[number] == Name::Stale;
        names[number] = Name::Used;
        Self {
            number,
            may_be_there,
        }
    }

    /// Whether a savepoint of this name may be there, if the transaction is aborted.
    pub(crate) fn may_be_there(&self) -> bool {
        self.may_be_there
    }

    /// The savepoint is certainly not there any more. An older one of this name may still be, in another transaction.
    pub(crate) fn gone(self) {
        names()[self.number] = match self.may_be_there {
            true => Name::Stale,
            false => Name::Free,
        };
        std::mem::forget(self);
    }
}

impl Drop for Savepoint {
    fn drop(&mut self) {
        names()[self.number] = Name::Stale;
    }
}

impl fmt::Display for Savepoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dlock_{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_whose_savepoint_may_be_there_says_so_when_it_is_used_again() {
        // Other tests of this process may take and give names at the same time.
        let warned = (0..1000).any(|_| {
            drop(Savepoint::new(false));
            let again = Savepoint::new(false);
            let warned = again.may_be_there();
            again.gone();
            warned
        });
        assert!(warned);
    }

    #[test]
    fn open_savepoints_have_different_names_and_a_name_comes_back_when_its_savepoint_is_gone() {
        let names: Vec<_> = (0..3).map(|_| Savepoint::new(false)).collect();
        let texts: Vec<_> = names.iter().map(Savepoint::to_string).collect();
        assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
        for name in names {
            name.gone();
        }
        let again: Vec<_> = (0..1000)
            .map(|_| {
                let name = Savepoint::new(false);
                let text = name.to_string();
                name.gone();
                text
            })
            .collect();
        // Other tests of this process may have some open.
        assert!(
            again
                .iter()
                .collect::<std::collections::BTreeSet<_>>()
                .len()
                < 20
        );
    }
}
