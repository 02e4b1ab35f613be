//! `AdvisoryLock::transaction`, in its two forms.

use std::ops::DerefMut;
use std::time::Instant;

use diesel::connection::TransactionManager;
use diesel::prelude::*;
use dlock_core::{Dialect, Fence, LockKey, Mode, TransactionDialect};

use crate::backend::{DialectOf, LockConnection, TransactionLocks};
use crate::session::Depth;
use crate::{AdvisoryLock, Error, drive, session};

/// The transaction holds the lock.
pub(crate) fn with_lock_inside<M, T, E>(
    mut lock: AdvisoryLock<M>,
    f: impl FnOnce(&mut M::Target) -> Result<T, E>,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection<Backend: TransactionLocks>>,
    E: From<Error>,
{
    let conn = &mut *lock.conn;
    let outside = session::depth(conn).map_err(Error::from)?;
    if outside.is_none() {
        begin(&mut lock)?;
        return finish(&mut *lock.conn, outside, &lock.key, f);
    }
    <M::Target as Connection>::TransactionManager::begin_transaction(conn).map_err(Error::from)?;
    finish(conn, outside, &lock.key, |conn| {
        let started = Instant::now();
        let server_key = DialectOf::<M::Target>::key(&lock.key).map_err(Error::from)?;
        let machine = DialectOf::<M::Target>::acquire_in_transaction(
            &server_key,
            lock.mode,
            lock.wait,
            Fence::new(),
        );
        if !drive::drive(conn, machine, &lock.key)? {
            let key = lock.key.clone();
            return Err(drive::timeout(conn, key, &server_key, started.elapsed()).into());
        }
        f(conn)
    })
}

/// Begins the transaction together with the lock.
fn begin<M>(lock: &mut AdvisoryLock<M>) -> Result<(), Error>
where
    M: DerefMut<Target: LockConnection<Backend: TransactionLocks>>,
{
    let started = Instant::now();
    let conn = &mut *lock.conn;
    let server_key = DialectOf::<M::Target>::key(&lock.key)?;
    let machine = DialectOf::<M::Target>::begin(&server_key, lock.mode, lock.wait);
    if !drive::drive(conn, machine, &lock.key)? {
        let key = lock.key.clone();
        return Err(drive::timeout(conn, key, &server_key, started.elapsed()));
    }
    Ok(session::began_transaction(conn)?)
}

/// The lock is the session's, held from before BEGIN until after COMMIT.
pub(crate) fn with_lock_around<M, T, E>(
    lock: AdvisoryLock<M>,
    f: impl FnOnce(&mut M::Target) -> Result<T, E>,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection>,
    E: From<Error>,
{
    around(
        lock,
        <M::Target as Connection>::TransactionManager::begin_transaction,
        f,
    )
}

/// As [`with_lock_around`], and who holds the lock alone begins to write at once. On SQLite a transaction that reads
/// first and finds that another has written since can never write, and no `busy_timeout` helps.
#[cfg(feature = "sqlite")]
pub(crate) fn with_lock_around_writers<M, T, E>(
    lock: AdvisoryLock<M>,
    f: impl FnOnce(&mut M::Target) -> Result<T, E>,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection>,
    E: From<Error>,
{
    match lock.mode {
        Mode::Exclusive => around(lock, session::begin_immediate, f),
        Mode::Shared => with_lock_around(lock, f),
    }
}

fn around<M, T, E>(
    lock: AdvisoryLock<M>,
    begin: impl FnOnce(&mut M::Target) -> QueryResult<()>,
    f: impl FnOnce(&mut M::Target) -> Result<T, E>,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection>,
    E: From<Error>,
{
    let key = lock.key.clone();
    // Not even where `inside_transaction` allows the lock, for it would be free before the outer COMMIT.
    lock.refusing_transactions().run(|conn| {
        let outside = session::depth(conn).map_err(Error::from)?;
        begin(conn).map_err(Error::from)?;
        finish(conn, outside, &key, f)
    })
}

/// Runs `f` in the transaction that has begun, then commits or rolls back.
fn finish<C, T, E>(
    conn: &mut C,
    outside: Depth,
    key: &LockKey,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<Error>,
{
    let open = OpenTransaction { conn, outside };
    let value = f(open.conn)?; // an error rolls back, as a panic does
    C::TransactionManager::commit_transaction(open.conn).map_err(Error::from)?;
    if session::depth(open.conn).map_err(Error::from)? > outside {
        // `f` has begun one more and left it open: what was committed is that one.
        return Err(Error::InTransaction { key: key.clone() }.into());
    }
    Ok(value)
}

/// Rolls back what is still open when it is dropped.
struct OpenTransaction<'c, C: LockConnection> {
    conn: &'c mut C,
    outside: Depth,
}

impl<C: LockConnection> Drop for OpenTransaction<'_, C> {
    fn drop(&mut self) {
        if session::roll_back_to(self.conn, self.outside).is_err() {
            session::end(self.conn);
        }
    }
}
