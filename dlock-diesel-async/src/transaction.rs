//! `AdvisoryLock::transaction`, in its two forms: the transaction holds the lock, or the session holds it around the
//! transaction.

use diesel::QueryResult;
use diesel::result::Error as DieselError;
use diesel_async::TransactionManager;
use dlock_core::LockKey;
#[cfg(feature = "sqlite")]
use dlock_core::Mode;
use dlock_core::proto::{Ask, Depth, Dialect, TransactionDialect};
use dlock_diesel::shared::trace::{Releasing, Waiting};
use dlock_diesel::{TransactionLocks, shared};

use crate::backend::{AsyncFunc, AsyncLockBackend, Cancel, DialectOf, LockConnection};
use crate::cancel::OnDrop;
use crate::run::{self, refused, run_within};
use crate::{Error, body, session};

/// The transaction holds the lock. Inside an open transaction, a savepoint takes its place.
pub(crate) async fn with_lock_inside<'a, C, F, T, E>(
    conn: &'a mut C,
    ask: Ask,
    cancel: Option<Cancel>,
    f: F,
) -> Result<T, E>
where
    C: LockConnection<Backend: TransactionLocks>,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let outside = run::session(conn, &ask.key)
        .map_err(DieselError::from)?
        .depth;
    let open = match outside {
        None => begin(conn, &ask, cancel).await,
        outside => begin_nested(conn, &ask, cancel, outside).await,
    };
    open.map_err(DieselError::from)?.finish(f).await
}

/// Begins the transaction together with the lock.
async fn begin<'c, C>(
    conn: &'c mut C,
    ask: &'c Ask,
    mut cancel: Option<Cancel>,
) -> Result<OpenTransaction<'c, C>, Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    let begin = async {
        let machine = DialectOf::<C>::begin(ask).map_err(|failure| refused(failure, &ask.key))?;
        run_within(&mut *conn, machine, &ask.key, &mut cancel, ask.wait.limit).await
    };
    let waiting = Waiting::of::<DialectOf<C>>(ask, None);
    waiting.during(begin).await?.expect(NAMED);
    session::began_transaction(conn)?;
    Ok(OpenTransaction {
        conn,
        key: &ask.key,
        outside: None,
        cancel: cancel.map(OnDrop::new),
    })
}

/// Without it the lock that was not granted is no error.
const NAMED: &str = "BUG: Ask::name_holders is on";

/// Begins a savepoint in the open transaction and takes the lock in it.
async fn begin_nested<'c, C>(
    conn: &'c mut C,
    ask: &'c Ask,
    cancel: Option<Cancel>,
    outside: Depth,
) -> Result<OpenTransaction<'c, C>, Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    C::Backend::to_the_end(C::TransactionManager::begin_transaction(conn)).await?;
    let mut cancel = cancel;
    let mut open = OpenTransaction {
        conn,
        key: &ask.key,
        outside,
        cancel: None,
    };
    match lock_transaction_keeping(open.conn, ask, &mut cancel).await {
        Ok(granted) => {
            granted.expect(NAMED);
            open.cancel = cancel.map(OnDrop::new);
            Ok(open)
        }
        Err(error) => {
            open.roll_back().await;
            Err(error)
        }
    }
}

/// Takes a lock that ends with the open transaction. `None`: it is taken, and [`Ask::name_holders`] is off.
pub(crate) async fn lock_transaction<C>(
    conn: &mut C,
    ask: &Ask,
    mut cancel: Option<Cancel>,
) -> Result<Option<()>, Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    lock_transaction_keeping(conn, ask, &mut cancel).await
}

async fn lock_transaction_keeping<C>(
    conn: &mut C,
    ask: &Ask,
    cancel: &mut Option<Cancel>,
) -> Result<Option<()>, Error>
where
    C: LockConnection<Backend: TransactionLocks>,
{
    let acquiring = async {
        let session = run::session(conn, &ask.key)?;
        let machine = DialectOf::<C>::acquire_in_transaction(ask, session)
            .map_err(|failure| refused(failure, &ask.key))?;
        run_within(conn, machine, &ask.key, cancel, ask.wait.limit).await
    };
    let waiting = Waiting::of::<DialectOf<C>>(ask, None);
    waiting.during(acquiring).await
}

/// The session holds the lock, from before BEGIN until after COMMIT.
pub(crate) async fn with_lock_around<'a, C, F, T, E>(
    conn: &'a mut C,
    ask: Ask,
    cancel: Option<Cancel>,
    f: F,
) -> Result<T, E>
where
    C: LockConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    around(conn, ask, cancel, false, f).await
}

/// As [`with_lock_around`], but an exclusive holder writes from the start. On SQLite, a transaction that has read
/// before another connection wrote can never write, whatever `busy_timeout` says.
#[cfg(feature = "sqlite")]
pub(crate) async fn with_lock_around_writers<'a, C, F, T, E>(
    conn: &'a mut C,
    ask: Ask,
    cancel: Option<Cancel>,
    f: F,
) -> Result<T, E>
where
    C: LockConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let immediate = ask.mode == Mode::Exclusive;
    around(conn, ask, cancel, immediate, f).await
}

async fn around<'a, C, F, T, E>(
    conn: &'a mut C,
    mut ask: Ask,
    cancel: Option<Cancel>,
    immediate: bool,
    f: F,
) -> Result<T, E>
where
    C: LockConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    // `inside_transaction` does not count here: the lock would be free before the outer COMMIT.
    ask.inside_transaction = false;
    let mut guard = body::lock(conn, ask, cancel).await?;
    let key = guard.key().clone();
    let result = under_lock(&mut *guard, &key, immediate, f).await;
    body::release_after(guard, result).await
}

/// Runs `f` in a transaction of a session that holds the lock.
pub(crate) async fn under_lock<'a, C, F, T, E>(
    conn: &mut C,
    key: &LockKey,
    immediate: bool,
    f: F,
) -> Result<T, E>
where
    C: LockConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let outside = session::session(conn)?.depth;
    begin_writing(conn, immediate).await?;
    // The guard has what cancels a statement.
    let open = OpenTransaction {
        conn,
        key,
        outside,
        cancel: None,
    };
    open.finish(f).await
}

async fn begin_writing<C: LockConnection>(conn: &mut C, immediate: bool) -> QueryResult<()> {
    match immediate {
        true => C::Backend::begin_writing(conn).await,
        false => C::Backend::to_the_end(C::TransactionManager::begin_transaction(conn)).await,
    }
}

/// An open transaction. Dropped, it is rolled back, and the connection is marked broken.
struct OpenTransaction<'c, C: LockConnection> {
    conn: &'c mut C,
    /// The lock that it is under.
    key: &'c LockKey,
    outside: Depth,
    cancel: Option<OnDrop>,
}

impl<C: LockConnection> OpenTransaction<'_, C> {
    /// Runs `f`, then commits or rolls back.
    async fn finish<'a, F, T, E>(self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
            + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        let value = match f(&mut *self.conn).await {
            Ok(value) => value,
            Err(error) => {
                self.roll_back().await;
                return Err(error);
            }
        };
        let committed =
            C::Backend::to_the_end(C::TransactionManager::commit_transaction(&mut *self.conn));
        if let Err(error) = committed.await {
            self.roll_back().await;
            return Err(error.into());
        }
        if session::session(&mut *self.conn)?.depth > self.outside {
            // `f` began one more transaction and left it open, so the COMMIT above was that one's.
            let error = shared::left_open(self.key);
            self.roll_back().await;
            return Err(DieselError::from(error).into());
        }
        Ok(value)
    }

    async fn roll_back(self) {
        let outside = self.outside;
        // A broken connection may not answer soon. The drop does what can be done.
        if session::session(&mut *self.conn).is_err() {
            return;
        }
        if session::roll_back_to(&mut *self.conn, outside)
            .await
            .is_err()
        {
            Releasing::of(self.key)
                .drop_async(session::end(&mut *self.conn))
                .await;
        }
    }

    /// Rolls back without waiting, and marks the connection broken.
    fn give_up(&mut self) {
        // Nobody knows whether the savepoint is there, so it cannot be rolled back. The outer transaction is broken
        // with it.
        if self.outside.is_none() {
            C::Backend::send_unread(self.conn, "ROLLBACK");
            // A late cancel may hit the first.
            if self.cancel.is_some() {
                C::Backend::send_unread(self.conn, "ROLLBACK");
            }
        }
        session::mark_broken(self.conn);
        if let Some(cancel) = &mut self.cancel {
            cancel.cancel();
        }
    }
}

impl<C: LockConnection> Drop for OpenTransaction<'_, C> {
    fn drop(&mut self) {
        if matches!(session::session(self.conn), Ok(session) if session.depth <= self.outside) {
            return;
        }
        // The guard around it rolls back, releases the lock and marks the connection broken, in this order.
        if DialectOf::<C>::UNREAD_ANSWERS_SHIFT {
            return;
        }
        Releasing::of(self.key).drop(|| self.give_up());
    }
}
