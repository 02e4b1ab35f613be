//! What is asked for.

use std::ops::Range;
use std::time::Duration;

use dlock_diesel::LockKey;

/// A call, made of a number. Each has another key and, to some milliseconds, another limit.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) key: LockKey,
    pub(crate) way: Way,
    pub(crate) shared: bool,
    pub(crate) holder: Holder,
    pub(crate) limit: Duration,
}

/// Whether another session holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    /// Longer than the limit.
    Stays,
    /// It releases the lock soon.
    Releases,
}

/// Which locks are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locks {
    /// Exclusive ones, with texts as keys.
    Usual,
    /// Shared ones as well, with keys of all kinds.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Release,
    Drop,
    Try,
    Poll,
    Transaction,
    // The others are PostgreSQL's.
    IsolatedTransaction,
    InTransaction,
    InsideTransaction,
    /// The transaction fails before the lock is released.
    InsideFailedTransaction,
}

impl Way {
    pub(crate) const ON_MYSQL: &[Way] = &[
        Way::Release,
        Way::Drop,
        Way::Try,
        Way::Poll,
        Way::Transaction,
    ];

    /// A dropped guard costs the connection.
    pub(crate) const ON_ASYNC_MYSQL: &[Way] =
        &[Way::Release, Way::Try, Way::Poll, Way::Transaction];

    pub(crate) const ON_POSTGRES: &[Way] = &[
        Way::Release,
        Way::Drop,
        Way::Try,
        Way::Poll,
        Way::Transaction,
        Way::IsolatedTransaction,
        Way::InTransaction,
        Way::InsideTransaction,
        Way::InsideFailedTransaction,
    ];
}

/// One call for each number, in all these ways, of locks that are free and of such that are taken.
pub(crate) fn calls(
    numbers: Range<usize>,
    locks: Locks,
    ways: &[Way],
) -> impl Iterator<Item = Call> {
    numbers.map(move |number| {
        let mut rest = number;
        let mut next = |choices| {
            let choice = rest % choices;
            rest /= choices;
            choice
        };
        let way = ways[next(ways.len())];
        let holder = [Holder::Nobody, Holder::Stays, Holder::Releases][next(3)];
        let [kind, mode] = match locks {
            Locks::Usual => [0, 0],
            Locks::All => [next(3), next(2)],
        };
        let integer = i32::try_from(number).expect("it is small");
        Call {
            key: match kind {
                0 => format!("statements/{number}").into(),
                1 => (i64::from(integer) << 31).into(),
                _ => (integer, -integer).into(),
            },
            way,
            shared: mode == 1,
            holder,
            limit: Duration::from_millis(1 + u64::from(integer.unsigned_abs()) % 23),
        }
    })
}
