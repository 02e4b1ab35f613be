//! The statements that are sent most.

use super::parts::{form, has_own_locks, key_binds, push_key};
use crate::postgres::mark::Mark;
use crate::proto::{Bind, Binds, Columns, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// The answers of the statements below. One that takes a lock, or releases it, answers without a row.
pub(in crate::postgres) const GRANTED: i64 = 1;
/// The lock is taken, and the statement did not wait: it was only to try, or [`acquire`] cannot wait in this session.
pub(in crate::postgres) const TAKEN: i64 = 0;
/// To [`probe`](super::probe): `statement_timeout` has cut the wait short.
pub(in crate::postgres) const CUT_SHORT: i64 = 2;
/// The server has locks of its own, as a standby has: see `has_own_locks!`. Nothing was asked for, or released.
pub(in crate::postgres) const STANDBY: i64 = 3;

/// What a statement starts with that answers without a row if the condition behind it holds.
///
/// The condition takes the lock, and after that nothing looks for interrupts. Writing a setting does not. If there
/// were a row, the executor would look for them once more after it has sent the row, and a cancel at that moment
/// would make the statement fail and leave the lock: about 1 in 1,000 that were aimed there.
///
/// Nobody reads the row, and it has no columns: libpq would read what they are called for each answer, which takes the
/// client longer than all that dlock does for a lock.
macro_rules! no_row_if {
    ($condition:expr) => {
        concat!("SELECT WHERE NOT ", $condition)
    };
}

/// [`no_row_if!`], with a row that says [`TAKEN`] or [`STANDBY`].
macro_rules! no_row_or_why_if {
    ($condition:expr) => {
        concat!(
            "SELECT CASE WHEN ",
            has_own_locks!(),
            " THEN 3::bigint ELSE 0 END WHERE NOT ",
            $condition
        )
    };
}

/// What follows a try that found the lock taken: it waits.
///
/// - The lock is waited for as one of the transaction, and only then taken as one of the session, which does not wait
///   any more. If the server granted a session's lock just as `lock_timeout` or a cancel fires, the statement would
///   fail and the lock stay. A transaction's lock goes with the transaction.
/// - `pg_sleep(0)` looks for interrupts. A timeout that fires during the grant is raised there, before the session's
///   lock is taken.
/// - The statement does not look at `statement_timeout`. If that cuts the wait short, [`probe`](super::probe) tells.
macro_rules! or_wait {
    ($lock:literal, $key:literal, $millis:literal) => {
        concat!(
            transaction_timeout_is_set!(),
            " THEN false ELSE ",
            wait_and_put_limit_back!($millis, $lock, $key),
            " IS NOT NULL AND pg_catalog.pg_advisory_",
            $lock,
            "(",
            $key,
            ") IS NOT NULL END"
        )
    };
}

/// PostgreSQL 16 and older do not know the setting: then it is not set.
macro_rules! transaction_timeout_is_set {
    () => {
        "pg_catalog.textne(pg_catalog.current_setting('transaction_timeout', true), '0')"
    };
}
pub(super) use transaction_timeout_is_set;

/// `format` prints only its first argument, and evaluates all of them in order: the old limit, the new one, the wait.
/// So `lock_timeout` is put back in the same statement, in case a transaction is open that Diesel does not know of.
macro_rules! wait_and_put_limit_back {
    ($millis:literal, $lock:literal, $key:literal) => {
        concat!(
            "pg_catalog.set_config('lock_timeout', pg_catalog.format('%s', \
             pg_catalog.current_setting('lock_timeout'), pg_catalog.set_config('lock_timeout', ",
            $millis,
            ", true), pg_catalog.pg_advisory_xact_",
            $lock,
            "(",
            $key,
            "), pg_catalog.pg_sleep(0)), true)"
        )
    };
}

/// What stands in front of the key.
macro_rules! acquire {
    ($lock:literal) => {
        no_row_if!(concat!(
            "CASE WHEN ",
            has_own_locks!(),
            " THEN false WHEN pg_catalog.pg_try_advisory_",
            $lock,
            "("
        ))
    };
}

/// What stands behind it, for a turn of [`FIRST_TURN`], which costs no bind. The binds are named by their numbers.
macro_rules! or_wait_first {
    ($lock:literal, $key:literal) => {
        concat!(") THEN true WHEN ", or_wait!($lock, $key, "'900'"))
    };
}

/// What stands between the key and the milliseconds, which are text.
const OR_UNLESS: &str = ") THEN true WHEN ";

/// What stands behind the milliseconds. They are never NULL: the question costs nothing, and makes this piece one that
/// no other text has.
macro_rules! or_wait_limited {
    ($lock:literal, $key:literal, $millis:literal) => {
        concat!(" IS NULL OR ", or_wait!($lock, $key, $millis))
    };
}

/// The first turn of a wait, in milliseconds: less than the server's `deadlock_timeout`, which is 1 second unless it is
/// changed. See [`prepare_turn`](super::prepare_turn).
pub(in crate::postgres) const FIRST_TURN: u32 = 900;

const _: () = assert!(FIRST_TURN == 900, "as the texts say");

/// Takes a session's lock and waits where it must, at most so many milliseconds, at least 1: [`GRANTED`], or [`TAKEN`],
/// which also stands for a standby.
pub(in crate::postgres) fn acquire(key: PostgresKey, mode: Mode, millis: u32) -> Statement {
    const LOCK: &str = acquire!("lock");
    const SHARED: &str = acquire!("lock_shared");
    const FIRST: [&[&str]; 4] = [
        &[LOCK, or_wait_first!("lock", "$1")],
        &[SHARED, or_wait_first!("lock_shared", "$1")],
        &[LOCK, ", ", or_wait_first!("lock", "$1, $2")],
        &[SHARED, ", ", or_wait_first!("lock_shared", "$1, $2")],
    ];
    const LIMITED: [&[&str]; 4] = [
        &[LOCK, OR_UNLESS, or_wait_limited!("lock", "$1", "$2")],
        &[
            SHARED,
            OR_UNLESS,
            or_wait_limited!("lock_shared", "$1", "$2"),
        ],
        &[
            LOCK,
            ", ",
            OR_UNLESS,
            or_wait_limited!("lock", "$1, $2", "$3"),
        ],
        &[
            SHARED,
            ", ",
            OR_UNLESS,
            or_wait_limited!("lock_shared", "$1, $2", "$3"),
        ],
    ];
    use Prepared::*;
    debug_assert!(millis > 0, "BUG: 0 would be no limit");
    let form = form(key, mode);
    let mut binds = key_binds(key);
    let (name, sql) = if millis == FIRST_TURN {
        let names = [
            PostgresFirst,
            PostgresFirstShared,
            PostgresFirstPair,
            PostgresFirstPairShared,
        ];
        (names[form], FIRST[form])
    } else {
        binds.push(Bind::Text(millis.to_string()));
        let names = [
            PostgresLimited,
            PostgresLimitedShared,
            PostgresLimitedPair,
            PostgresLimitedPairShared,
        ];
        (names[form], LIMITED[form])
    };
    Statement::number(name, sql, binds).columns(Columns::AnyRow)
}

/// Tries to take a session's lock: [`GRANTED`], [`TAKEN`] or [`STANDBY`].
pub(in crate::postgres) fn try_acquire(key: PostgresKey, mode: Mode) -> Statement {
    // The placeholders come first, so that the last piece is in no other text: see `verify`.
    const HEAD: &str = no_row_or_why_if!("CASE WHEN ");
    macro_rules! tail {
        ($lock:literal, $key:literal) => {
            concat!(
                " IS NULL OR ",
                has_own_locks!(),
                " THEN false ELSE pg_catalog.pg_try_advisory_",
                $lock,
                "(",
                $key,
                ") END"
            )
        };
    }
    const OR: &str = " IS NULL OR ";
    const TRY: [&[&str]; 4] = [
        &[HEAD, tail!("lock", "$1")],
        &[HEAD, tail!("lock_shared", "$1")],
        &[HEAD, OR, tail!("lock", "$1, $2")],
        &[HEAD, OR, tail!("lock_shared", "$1, $2")],
    ];
    use Prepared::*;
    let names = [
        PostgresTry,
        PostgresTryShared,
        PostgresTryPair,
        PostgresTryPairShared,
    ];
    let form = form(key, mode);
    Statement::number(names[form], TRY[form], key_binds(key)).columns(Columns::NoRow)
}

/// In front of the mark and of the key: without a mark, the lock is released.
const MARKED: &str = no_row_or_why_if!("CASE WHEN ");
const RELEASED: &str = " IS NULL THEN pg_catalog.pg_advisory_unlock(";
const RELEASED_SHARED: &str = " IS NULL THEN pg_catalog.pg_advisory_unlock_shared(";

/// What stands behind the key; it leaves the mark in the session. The mark is also the limit of the wait, and begins
/// with a zero where the statement does not wait.
macro_rules! droppable {
    ($lock:literal, $key:literal) => {
        concat!(
            ") WHEN ",
            has_own_locks!(),
            " THEN false WHEN CASE WHEN pg_catalog.pg_try_advisory_",
            $lock,
            "(",
            $key,
            ") THEN true WHEN pg_catalog.starts_with($1, '0') OR ",
            or_wait!($lock, $key, "$1"),
            " THEN pg_catalog.set_config('dlock.granted', $1, false) IS NOT NULL ELSE false END"
        )
    };
}

/// [`acquire`] or [`try_acquire`] that leaves the mark in the session if it was granted. Without a mark it is
/// [`unlock`].
///
/// One text does all, so that the driver has prepared it when a release is to be sent. Then the release is one message,
/// and the server obeys it even if the future that sent it is dropped.
pub(in crate::postgres) fn droppable(
    key: PostgresKey,
    mode: Mode,
    mark: Option<(Mark, u32)>,
) -> Statement {
    const DROPPABLE: [&[&str]; 4] = [
        &[MARKED, RELEASED, droppable!("lock", "$2")],
        &[MARKED, RELEASED_SHARED, droppable!("lock_shared", "$2")],
        &[MARKED, RELEASED, ", ", droppable!("lock", "$2, $3")],
        &[
            MARKED,
            RELEASED_SHARED,
            ", ",
            droppable!("lock_shared", "$2, $3"),
        ],
    ];
    use Prepared::*;
    let names = [
        PostgresDroppable,
        PostgresDroppableShared,
        PostgresDroppablePair,
        PostgresDroppablePairShared,
    ];
    let form = form(key, mode);
    let mut binds = Binds::default();
    binds.push(mark.map_or(Bind::NoText, |(mark, millis)| Bind::Text(mark.with(millis))));
    push_key(&mut binds, key);
    let columns = match mark {
        Some((_, 0)) => Columns::NoRow,
        _ => Columns::AnyRow,
    };
    Statement::number(names[form], DROPPABLE[form], binds).columns(columns)
}

/// Releases a session's lock: 1, or 0 if it was not held. It answers without a row if it has released, for the reason
/// given at `no_row_if!`.
pub(in crate::postgres) fn unlock(key: PostgresKey, mode: Mode) -> Statement {
    const EXCLUSIVE: &str = "SELECT WHERE NOT pg_catalog.pg_advisory_unlock(";
    const SHARED: &str = "SELECT WHERE NOT pg_catalog.pg_advisory_unlock_shared(";
    const UNLOCK: [&[&str]; 4] = [
        &[EXCLUSIVE, ")"],
        &[SHARED, ")"],
        &[EXCLUSIVE, ", ", ")"],
        &[SHARED, ", ", ")"],
    ];
    use Prepared::*;
    let names = [
        PostgresUnlock,
        PostgresUnlockShared,
        PostgresUnlockPair,
        PostgresUnlockPairShared,
    ];
    let form = form(key, mode);
    Statement::number(names[form], UNLOCK[form], key_binds(key)).columns(Columns::AnyRow)
}

/// Tries to take a lock of the open transaction: 1, 0 or [`STANDBY`].
pub(in crate::postgres) fn try_in_transaction(key: PostgresKey, mode: Mode) -> Statement {
    const EXCLUSIVE: &str = concat!(
        "SELECT (CASE WHEN ",
        has_own_locks!(),
        " THEN 3 ELSE pg_catalog.pg_try_advisory_xact_lock("
    );
    const SHARED: &str = concat!(
        "SELECT (CASE WHEN ",
        has_own_locks!(),
        " THEN 3 ELSE pg_catalog.pg_try_advisory_xact_lock_shared("
    );
    const END: &str = ")::int END)::bigint";
    const TRY: [&[&str]; 4] = [
        &[EXCLUSIVE, END],
        &[SHARED, END],
        &[EXCLUSIVE, ", ", END],
        &[SHARED, ", ", END],
    ];
    Statement::number(Prepared::ByText, TRY[form(key, mode)], key_binds(key))
}
