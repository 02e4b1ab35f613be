//! `AdvisoryLock::transaction`, in its two forms.

use std::ops::DerefMut;
use std::time::Instant;

use diesel_async::{AsyncConnection, TransactionManager};
use dlock_core::{Dialect, Fence, LockKey, Mode, TransactionDialect};
use dlock_diesel::{TransactionLocks, glue};

use crate::backend::{AsyncFunc, DialectOf, LockConnection};
use crate::session::Depth;
use crate::{AdvisoryLock, Error, drive, session};

/// The transaction holds the lock.
pub(crate) async fn with_lock_inside<'a, M, F, T, E>(
    mut lock: AdvisoryLock<M>,
    f: F,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection<Backend: TransactionLocks>> + Send,
    for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
        + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<Error> + Send + 'a,
{
    let outside = session::depth(&mut *lock.conn).map_err(Error::from)?;
    let key = lock.key.clone();
    let open = if outside.is_none() {
        begin(&mut lock).await?
    } else {
        begin_nested(&mut lock, outside).await?
    };
    open.finish(&key, f).await
}

/// Begins the transaction together with the lock.
async fn begin<M>(lock: &mut AdvisoryLock<M>) -> Result<OpenTransaction<'_, M::Target>, Error>
where
    M: DerefMut<Target: LockConnection<Backend: TransactionLocks>> + Send,
{
    let started = Instant::now();
    let server_key = DialectOf::<M::Target>::key(&lock.key)?;
    let machine = DialectOf::<M::Target>::begin(&server_key, lock.mode, lock.wait);
    let conn = &mut *lock.conn;
    if !drive::drive(conn, machine, &lock.key, lock.cancel.take()).await? {
        let key = lock.key.clone();
        return Err(drive::timeout(conn, key, &server_key, started.elapsed()).await);
    }
    session::began_transaction(conn)?;
    Ok(OpenTransaction {
        conn,
        outside: None,
    })
}

/// Begins a savepoint in the open transaction and takes the lock in it.
async fn begin_nested<M>(
    lock: &mut AdvisoryLock<M>,
    outside: Depth,
) -> Result<OpenTransaction<'_, M::Target>, Error>
where
    M: DerefMut<Target: LockConnection<Backend: TransactionLocks>> + Send,
{
    let started = Instant::now();
    let server_key = DialectOf::<M::Target>::key(&lock.key)?;
    let conn = &mut *lock.conn;
    <M::Target as AsyncConnection>::TransactionManager::begin_transaction(conn).await?;
    let open = OpenTransaction { conn, outside };
    let machine = DialectOf::<M::Target>::acquire_in_transaction(
        &server_key,
        lock.mode,
        lock.wait,
        Fence::new(),
    );
    let error = match drive::drive(open.conn, machine, &lock.key, lock.cancel.take()).await {
        Ok(true) => return Ok(open),
        Ok(false) => {
            let key = lock.key.clone();
            drive::timeout(open.conn, key, &server_key, started.elapsed()).await
        }
        Err(error) => error,
    };
    open.roll_back().await;
    Err(error)
}

/// The lock is the session's, held from before BEGIN until after COMMIT.
pub(crate) async fn with_lock_around<'a, M, F, T, E>(lock: AdvisoryLock<M>, f: F) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection> + Send,
    for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
        + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<Error> + Send + 'a,
{
    around(lock, false, f).await
}

/// As [`with_lock_around`], and who holds the lock alone begins to write at once. On SQLite a transaction that reads
/// first and finds that another has written since can never write, and no `busy_timeout` helps.
#[cfg(feature = "sqlite")]
pub(crate) async fn with_lock_around_writers<'a, M, F, T, E>(
    lock: AdvisoryLock<M>,
    f: F,
) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection> + Send,
    for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
        + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<Error> + Send + 'a,
{
    let immediate = lock.mode == Mode::Exclusive;
    around(lock, immediate, f).await
}

async fn around<'a, M, F, T, E>(lock: AdvisoryLock<M>, immediate: bool, f: F) -> Result<T, E>
where
    M: DerefMut<Target: LockConnection> + Send,
    for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
        + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<Error> + Send + 'a,
{
    // Not even where `inside_transaction` allows the lock, for it would be free before the outer COMMIT.
    let mut guard = lock.refusing_transactions().acquire().await?;
    let key = guard.key().clone();
    let conn = &mut *guard;
    let outside = session::depth(conn).map_err(Error::from)?;
    let begun = match immediate {
        #[cfg(feature = "sqlite")]
        true => crate::sqlite::begin_immediate(conn).await,
        _ => <M::Target as AsyncConnection>::TransactionManager::begin_transaction(conn).await,
    };
    begun.map_err(Error::from)?;
    let result = OpenTransaction { conn, outside }.finish(&key, f).await;
    // An error of the transaction is not hidden by one of the release.
    match (result, guard.undo().await) {
        (Ok(_), Err(error)) => Err(error.into()),
        (result, _) => result,
    }
}

/// A transaction that has begun. If it is dropped, it is rolled back, and the connection marked broken.
struct OpenTransaction<'c, C: LockConnection> {
    conn: &'c mut C,
    outside: Depth,
}

impl<C: LockConnection> OpenTransaction<'_, C> {
    /// Runs `f`, then commits or rolls back.
    async fn finish<'a, F, T, E>(self, key: &LockKey, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
            + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<Error> + Send + 'a,
    {
        let value = match f(&mut *self.conn).await {
            Ok(value) => value,
            Err(error) => {
                self.roll_back().await;
                return Err(error);
            }
        };
        if let Err(error) = C::TransactionManager::commit_transaction(&mut *self.conn).await {
            self.roll_back().await;
            return Err(Error::from(error).into());
        }
        if session::depth(&mut *self.conn).map_err(Error::from)? > self.outside {
            // `f` has begun one more and left it open: what was committed is that one.
            self.roll_back().await;
            return Err(glue::in_transaction(key).into());
        }
        Ok(value)
    }

    async fn roll_back(self) {
        let outside = self.outside;
        // A broken connection may not answer soon: the drop does what can be done.
        if session::depth(&mut *self.conn).is_err() {
            return;
        }
        if session::roll_back_to(&mut *self.conn, outside)
            .await
            .is_err()
        {
            session::end(&mut *self.conn).await;
        }
    }
}

impl<C: LockConnection> Drop for OpenTransaction<'_, C> {
    fn drop(&mut self) {
        if matches!(session::depth(self.conn), Ok(depth) if depth <= self.outside) {
            return;
        }
        // A savepoint cannot be rolled back without knowing what was sent, so the outer transaction is broken with it.
        if self.outside.is_none() && DialectOf::<C>::SKIPS_UNREAD_ANSWERS {
            session::send_unread(self.conn, "ROLLBACK");
        }
        session::mark_broken(self.conn);
    }
}
