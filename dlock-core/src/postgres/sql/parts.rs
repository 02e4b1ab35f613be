//! What several texts are made of.

use crate::proto::{Bind, Binds};
use crate::{Mode, PostgresKey};

/// Whether this server's locks exclude nobody on the others:
///
/// - a standby has locks of its own;
/// - each node of a YugabyteDB up to 2024 has locks of its own, and says so by an error. With this setting it does not.
///
/// The setting is NULL elsewhere. PostgreSQL 18 needs 0.9 microseconds for both, of 22 for a lock and its release.
macro_rules! has_own_locks {
    () => {
        "(pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting(\
         'yb_silence_advisory_locks_not_supported_error', true), 'on'))"
    };
}
pub(super) use has_own_locks;

/// [`has_own_locks!`], for where the text is put together.
pub(super) const HAS_OWN_LOCKS: &str = has_own_locks!();

/// How long a lock lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::postgres) enum Scope {
    Session,
    Transaction,
}

/// The rows of `pg_locks l` that belong to a key, in any database.
/// <https://www.postgresql.org/docs/current/view-pg-locks.html>
pub(super) fn lock_row(key: PostgresKey) -> [Bind; 3] {
    let (high, low) = high_and_low(key);
    let subid = match key {
        PostgresKey::BigInt(_) => 1,
        PostgresKey::Pair(..) => 2,
    };
    [
        Bind::BigInt(high.into()),
        Bind::BigInt(low.into()),
        Bind::Integer(subid),
    ]
}

pub(super) fn high_and_low(key: PostgresKey) -> (u32, u32) {
    match key {
        PostgresKey::BigInt(key) => ((key >> 32) as u32, key as u32),
        PostgresKey::Pair(first, second) => (first as u32, second as u32),
    }
}

pub(super) fn unlock_text(key: PostgresKey, mode: Mode) -> String {
    format!(
        "pg_catalog.pg_advisory_unlock{}({})",
        shared(mode),
        literal(key)
    )
}

/// How pg_locks names the mode.
pub(super) fn hold_mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Exclusive => "ExclusiveLock",
        Mode::Shared => "ShareLock",
    }
}

pub(super) fn shared(mode: Mode) -> &'static str {
    match mode {
        Mode::Exclusive => "",
        Mode::Shared => "_shared",
    }
}

/// Quoted and cast, since a bare -9223372036854775808 is a numeric to PostgreSQL.
pub(super) fn literal(key: PostgresKey) -> String {
    match key {
        PostgresKey::BigInt(key) => format!("'{key}'::bigint"),
        PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
    }
}

/// Which of four texts.
pub(super) fn form(key: PostgresKey, mode: Mode) -> usize {
    match (key, mode) {
        (PostgresKey::BigInt(_), Mode::Exclusive) => 0,
        (PostgresKey::BigInt(_), Mode::Shared) => 1,
        (PostgresKey::Pair(..), Mode::Exclusive) => 2,
        (PostgresKey::Pair(..), Mode::Shared) => 3,
    }
}

pub(super) fn key_binds(key: PostgresKey) -> Binds {
    let mut binds = Binds::default();
    push_key(&mut binds, key);
    binds
}

pub(super) fn push_key(binds: &mut Binds, key: PostgresKey) {
    match key {
        PostgresKey::BigInt(key) => binds.push(Bind::BigInt(key)),
        PostgresKey::Pair(first, second) => {
            binds.push(Bind::Integer(first));
            binds.push(Bind::Integer(second));
        }
    }
}
