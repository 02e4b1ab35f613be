//! The statements that are sent most.

use super::parts::{form, has_own_locks, key_binds, push_key};
use crate::postgres::mark::Mark;
use crate::proto::{Bind, Binds, Columns, Prepared, Statement};
use crate::{Mode, PostgresKey};

/// The answers of [`acquire`], which has none if the lock was granted.
pub(in crate::postgres) const GRANTED: i64 = 1;
/// The lock is taken, and the statement did not wait: nobody asked for it, or the user's `transaction_timeout` might
/// end the session in the middle of the wait.
pub(in crate::postgres) const TAKEN: i64 = 0;
/// To [`probe`](super::probe): `statement_timeout` has cut the wait short.
pub(in crate::postgres) const CUT_SHORT: i64 = 2;
/// The server has locks of its own, as a standby has: see `has_own_locks!`. Nothing was asked for, or released.
pub(in crate::postgres) const STANDBY: i64 = 3;

/// A statement that answers without a row if the condition holds, and otherwise with [`TAKEN`] or [`STANDBY`].
///
/// The condition takes the lock, and is the last that is done. If there were a row, the executor would look for
/// interrupts once more after it has sent the row, and a cancel at that moment would make the statement fail and leave
/// the lock: about 1 in 1,000 that were aimed there.
macro_rules! no_row_if {
    ($condition:expr) => {
        concat!(
            "SELECT (CASE WHEN ",
            has_own_locks!(),
            " THEN 3 ELSE 0 END)::bigint WHERE NOT CASE WHEN ",
            $condition,
            " END /* "
        )
    };
}

/// The first branch of what takes a lock.
macro_rules! unless_standby {
    () => {
        concat!(has_own_locks!(), " THEN false WHEN ")
    };
}

/// What follows a try that found the lock taken: it waits.
///
/// - The wait is a query of its own, in a text that `query_to_xml` executes. The server prepares each function of a
///   statement for each execution, also those of a branch that is not taken; of a text it does so only here. The query
///   has no columns, and no row unless the wait was not begun, so it needs no XML library, and its result is empty.
/// - The lock is waited for as one of the transaction, and only then taken as one of the session, which does not wait
///   any more. If the server granted a session's lock just as `lock_timeout` or a cancel fires, the statement would
///   fail and the lock stay. A transaction's lock goes with the transaction.
/// - The end of the query is an interrupt check. A timeout that fires during the grant is raised there, before the
///   session's lock is taken.
/// - The statement does not look at `statement_timeout`. If that cuts the wait short, [`probe`](super::probe) tells.
macro_rules! or_wait {
    ($lock:literal, $key:literal, $keys:literal, $millis:literal, $arguments:literal, $mark:expr) => {
        concat!(
            " ELSE pg_catalog.texteq(pg_catalog.query_to_xml(pg_catalog.format($dlock$",
            "SELECT WHERE CASE WHEN ",
            transaction_timeout_is_set!(),
            " THEN true ELSE ",
            wait_and_put_limit_back!($millis, $lock, $keys, "%%s"),
            " IS NULL END$dlock$, ",
            $arguments,
            "), true, true, '')::pg_catalog.text, '')",
            $mark,
            " AND pg_catalog.pg_advisory_",
            $lock,
            "(",
            $key,
            ") IS NOT NULL"
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
    ($millis:literal, $lock:literal, $keys:literal, $first:literal) => {
        concat!(
            "pg_catalog.set_config('lock_timeout', pg_catalog.format('",
            $first,
            "', pg_catalog.current_setting('lock_timeout'), pg_catalog.set_config('lock_timeout', '",
            $millis,
            "', true), pg_catalog.pg_advisory_xact_",
            $lock,
            "(",
            $keys,
            ")), true)"
        )
    };
}

/// The binds by their numbers: the key, then milliseconds, if they are not a constant. Diesel writes its own
/// placeholders into the comment, so that the text stays one piece.
macro_rules! acquire {
    ($lock:literal, $key:literal, $keys:literal, $try_only:expr, $millis:literal, $arguments:literal) => {
        no_row_if!(concat!(
            unless_standby!(),
            "pg_catalog.pg_try_advisory_",
            $lock,
            "(",
            $key,
            ") THEN true",
            $try_only,
            or_wait!($lock, $key, $keys, $millis, $arguments, "")
        ))
    };
}

/// A turn of [`FIRST_TURN`], which costs no bind.
macro_rules! acquire_first {
    ($lock:literal, $key:literal, $keys:literal) => {
        acquire!($lock, $key, $keys, "", "900", $key)
    };
}

/// So many milliseconds, or none.
macro_rules! acquire_limited {
    ($lock:literal, $key:literal, $keys:literal, $millis:literal, $arguments:literal) => {
        acquire!(
            $lock,
            $key,
            $keys,
            concat!(" WHEN pg_catalog.int8eq(", $millis, ", 0) THEN false"),
            "%s",
            $arguments
        )
    };
}

/// The first turn of a wait, in milliseconds: less than the server's `deadlock_timeout`, which is 1 second unless it is
/// changed. See [`prepare_turn`](super::prepare_turn).
pub(in crate::postgres) const FIRST_TURN: u32 = 900;

const _: () = assert!(FIRST_TURN == 900, "as the texts say");

/// Tries to take a session's lock and waits where it must, at most so many milliseconds; 0 does not wait.
pub(in crate::postgres) fn acquire(key: PostgresKey, mode: Mode, millis: u32) -> Statement {
    const FIRST: [&[&str]; 4] = [
        &[acquire_first!("lock", "$1", "'%s'"), " */"],
        &[acquire_first!("lock_shared", "$1", "'%s'"), " */"],
        &[acquire_first!("lock", "$1, $2", "'%s', '%s'"), ", ", " */"],
        &[
            acquire_first!("lock_shared", "$1, $2", "'%s', '%s'"),
            ", ",
            " */",
        ],
    ];
    const LIMITED: [&[&str]; 4] = [
        &[
            acquire_limited!("lock", "$1", "'%s'", "$2", "$2, $1"),
            ", ",
            " */",
        ],
        &[
            acquire_limited!("lock_shared", "$1", "'%s'", "$2", "$2, $1"),
            ", ",
            " */",
        ],
        &[
            acquire_limited!("lock", "$1, $2", "'%s', '%s'", "$3", "$3, $1, $2"),
            ", ",
            ", ",
            " */",
        ],
        &[
            acquire_limited!("lock_shared", "$1, $2", "'%s', '%s'", "$3", "$3, $1, $2"),
            ", ",
            ", ",
            " */",
        ],
    ];
    use Prepared::*;
    let form = form(key, mode);
    let mut binds = key_binds(key);
    if millis == FIRST_TURN {
        let names = [
            PostgresFirst,
            PostgresFirstShared,
            PostgresFirstPair,
            PostgresFirstPairShared,
        ];
        return Statement::number(names[form], FIRST[form], binds).columns(Columns::NoRow);
    }
    binds.push(Bind::BigInt(millis.into()));
    let names = [
        PostgresLimited,
        PostgresLimitedShared,
        PostgresLimitedPair,
        PostgresLimitedPairShared,
    ];
    Statement::number(names[form], LIMITED[form], binds).columns(Columns::NoRow)
}

/// Leaves the mark in the session.
macro_rules! marked {
    () => {
        "pg_catalog.set_config('dlock.granted', $1::pg_catalog.text, false) IS NOT NULL"
    };
}

/// The binds by their numbers: the mark with the milliseconds in its last 12 bits, or 0 to release; the key.
macro_rules! droppable {
    ($lock:literal, $key:literal, $keys:literal, $arguments:literal) => {
        no_row_if!(concat!(
            "pg_catalog.int8eq($1, 0) THEN pg_catalog.pg_advisory_un",
            $lock,
            "(",
            $key,
            ") WHEN ",
            unless_standby!(),
            "pg_catalog.pg_try_advisory_",
            $lock,
            "(",
            $key,
            ") THEN ",
            marked!(),
            " WHEN pg_catalog.int8eq(pg_catalog.int8and($1, 4095), 0) THEN false",
            or_wait!(
                $lock,
                $key,
                $keys,
                "%s",
                $arguments,
                concat!(" AND ", marked!())
            )
        ))
    };
}

/// [`acquire`] that leaves the mark in the session if it was granted. Without a mark it is [`unlock`].
///
/// One text does both, so that the driver has prepared it when a release is to be sent. Then the release is one
/// message, and the server obeys it even if the future that sent it is dropped.
pub(in crate::postgres) fn droppable(
    key: PostgresKey,
    mode: Mode,
    mark: Option<Mark>,
) -> Statement {
    const DROPPABLE: [&[&str]; 4] = [
        &[
            droppable!("lock", "$2", "'%s'", "pg_catalog.int8and($1, 4095), $2"),
            ", ",
            " */",
        ],
        &[
            droppable!(
                "lock_shared",
                "$2",
                "'%s'",
                "pg_catalog.int8and($1, 4095), $2"
            ),
            ", ",
            " */",
        ],
        &[
            droppable!(
                "lock",
                "$2, $3",
                "'%s', '%s'",
                "pg_catalog.int8and($1, 4095), $2, $3"
            ),
            ", ",
            ", ",
            " */",
        ],
        &[
            droppable!(
                "lock_shared",
                "$2, $3",
                "'%s', '%s'",
                "pg_catalog.int8and($1, 4095), $2, $3"
            ),
            ", ",
            ", ",
            " */",
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
    binds.push(Bind::BigInt(mark.map_or(0, Mark::number)));
    push_key(&mut binds, key);
    Statement::number(names[form], DROPPABLE[form], binds).columns(Columns::NoRow)
}

/// Releases a session's lock: 1, or 0 if it was not held. It answers without a row if it has released, for the reason
/// given at `no_row_if!`.
pub(in crate::postgres) fn unlock(key: PostgresKey, mode: Mode) -> Statement {
    const EXCLUSIVE: &str = "SELECT 0::bigint WHERE NOT pg_catalog.pg_advisory_unlock(";
    const SHARED: &str = "SELECT 0::bigint WHERE NOT pg_catalog.pg_advisory_unlock_shared(";
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
    Statement::number(names[form], UNLOCK[form], key_binds(key)).columns(Columns::NoRow)
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
