//! PostgreSQL's advisory locks.

mod acquire;
mod begin;
mod release;
mod sql;

use std::num::NonZeroI64;

pub use acquire::PostgresAcquire;
pub use begin::PostgresBegin;
pub use release::PostgresRelease;

use crate::fence;
use crate::{
    Dialect, Fence, InvalidKey, LockKey, Mode, OpenTransaction, PostgresKey, Statement,
    TransactionDialect, Wait,
};

/// What PostgreSQL wants to be sent, version 14 and later.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Mode, Postgres};
///
/// let key = Postgres::key(&(1, 2).into())?;
/// assert!(Postgres::is_held(&key, Mode::Shared).text().contains("pg_locks"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Postgres;

/// A number that no other request of this process has: a session remembers the last request that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark(NonZeroI64);

impl Mark {
    fn new() -> Self {
        // Zero is one of them.
        NonZeroI64::new(fence::unique() as i64).map_or_else(Self::new, Self)
    }
}

/// How long a lock lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Session,
    Transaction,
}

impl Dialect for Postgres {
    type Key = PostgresKey;
    type Acquire = PostgresAcquire;
    type Release = PostgresRelease;

    // The transaction may be aborted, and then nothing but ROLLBACK is obeyed. A role that was taken on (SET ROLE) may
    // not end a session of the role that logged in.
    const END_SESSION: &'static str = "ROLLBACK; RESET SESSION AUTHORIZATION; SET ROLE NONE; \
        SELECT pg_advisory_unlock_all(); SELECT pg_terminate_backend(pg_backend_pid())";
    const SKIPS_UNREAD_ANSWERS: bool = true;

    fn key(key: &LockKey) -> Result<PostgresKey, InvalidKey> {
        key.to_postgres()
    }

    fn acquire(key: &PostgresKey, mode: Mode, wait: Wait, fence: Option<Fence>) -> PostgresAcquire {
        PostgresAcquire::new(*key, mode, Scope::Session, wait, fence)
    }

    fn release(key: &PostgresKey, mode: Mode, fence: Option<Fence>) -> PostgresRelease {
        PostgresRelease::new(*key, mode, fence)
    }

    fn release_abandonable(key: &PostgresKey, mode: Mode, fence: Option<Fence>) -> PostgresRelease {
        Self::release(key, mode, fence).abandonable()
    }

    fn acquire_abandonable(
        key: &PostgresKey,
        mode: Mode,
        wait: Wait,
        fence: Option<Fence>,
    ) -> PostgresAcquire {
        Self::acquire(key, mode, wait, fence).marked()
    }

    fn release_unread(
        key: &PostgresKey,
        mode: Mode,
        transaction: OpenTransaction,
    ) -> Option<String> {
        Some(sql::release_unread(*key, mode, transaction))
    }

    fn is_held(key: &PostgresKey, mode: Mode) -> Statement {
        sql::is_held(*key, mode)
    }

    fn holders(key: &PostgresKey) -> Vec<Statement> {
        vec![sql::holders(*key)]
    }
}

impl TransactionDialect for Postgres {
    type AcquireInTransaction = PostgresAcquire;
    type Begin = PostgresBegin;

    fn acquire_in_transaction(
        key: &PostgresKey,
        mode: Mode,
        wait: Wait,
        fence: Fence,
    ) -> PostgresAcquire {
        PostgresAcquire::new(*key, mode, Scope::Transaction, wait, Some(fence))
    }

    fn begin(key: &PostgresKey, mode: Mode, wait: Wait) -> PostgresBegin {
        PostgresBegin::new(*key, mode, wait)
    }
}
