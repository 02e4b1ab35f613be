use std::fmt;
use std::ops::DerefMut;
use std::time::Duration;

use diesel::result::Error as DieselError;
use dlock_core::proto::{Ask, Hold};
use dlock_core::{Holder, LockKey};
use dlock_diesel::shared::trace;

use crate::backend::{AsyncFunc, BoxFuture, Cancel, KeyOf, LockConnection};
use crate::{AdvisorySemaphoreGuard, Error, acquire, body, cancel, holders, transaction};

/// A semaphore that is not held yet, and how to ask for it: the async form of [`dlock_diesel::AdvisorySemaphore`],
/// whose page says what its slots are, what happens with different numbers of permits, and who is next.
///
/// [`AdvisoryLockExt::advisory_semaphore`](crate::AdvisoryLockExt::advisory_semaphore) makes one that borrows the
/// connection, [`new`](Self::new) one that owns it: a pooled connection, a `Box`.
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
/// let inside = conn.advisory_semaphore(("billing", "mail"), 10).acquire().await?;
/// inside.release().await?; // until here, at most 9 others send mail
/// # Ok(()) }
/// ```
#[must_use = "a semaphore does nothing until it is acquired"]
pub struct AdvisorySemaphore<M> {
    conn: M,
    ask: Ask,
    permits: u32,
    cancel: Option<Cancel>,
}

impl<M> fmt::Debug for AdvisorySemaphore<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisorySemaphore")
            .field("ask", &self.ask)
            .field("permits", &self.permits)
            .finish_non_exhaustive()
    }
}

impl<M: DerefMut<Target: LockConnection> + Send> AdvisorySemaphore<M> {
    /// A semaphore on a connection that it owns, so that you can store it or move it to a task.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = AdvisorySemaphore::new(Box::new(conn), ("render", "gpu"), 4).acquire().await?;
    /// tokio::spawn(async move { inside.release().await.map(drop) });
    /// # Ok(()) }
    /// ```
    pub fn new(conn: M, key: impl Into<LockKey>, permits: u32) -> Self {
        let mut ask = trace::asking(Ask::new(key.into()));
        ask.droppable = true;
        Self {
            conn,
            ask,
            permits,
            cancel: None,
        }
    }

    /// Limits the wait: see [`AdvisoryLock::timeout`](crate::AdvisoryLock::timeout).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let limit = std::time::Duration::from_secs(1);
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).timeout(limit).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.ask.wait.limit = Some(limit);
        self
    }

    /// Tries at this interval and sleeps in between, instead of waiting in the queue: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::poll_every).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let interval = std::time::Duration::from_secs(1);
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).poll_every(interval).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.ask.wait.poll = Some(interval);
        self
    }

    /// Allows a permit of the session while a transaction is open: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::inside_transaction). Release the guard, do not drop it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_semaphore(("billing", "service"), 4).inside_transaction().acquire().await?.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn inside_transaction(mut self) -> Self {
        self.ask.inside_transaction = true;
        self
    }

    /// Sets what cancels the wait, from another connection, if its future is dropped: see
    /// [`AdvisoryLock::cancel_with`](crate::AdvisoryLock::cancel_with). Without it, the session of a dropped wait may
    /// take a slot, and keep it until the connection is closed.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let token = conn.cancel_token();
    /// let cancel = async move { token.cancel_query(tokio_postgres::NoTls).await };
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).cancel_with(cancel).acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn cancel_with<F>(mut self, cancel: F) -> Self
    where
        F: Future + Send + 'static,
    {
        self.ask.cancellable = true;
        self.cancel = Some(cancel::boxed(cancel));
        self
    }

    /// The key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// assert_eq!(conn.advisory_semaphore(("render", "gpu"), 4).key(), &LockKey::from(("render", "gpu")));
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.ask.key
    }

    /// Acquires a permit. Waits until a slot is free: see [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("billing", "import"), 3).acquire().await?;
    /// inside.release().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// That of [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire): no slot stays behind, and the gate is free for
    /// others when the statement has ended or the connection is closed.
    pub async fn acquire(mut self) -> Result<AdvisorySemaphoreGuard<M>, Error> {
        let hold =
            acquire::permit(&mut *self.conn, &self.ask, self.permits, &mut self.cancel).await?;
        let hold = hold.expect("BUG: a limit that passes is an error");
        Ok(self.guard(hold))
    }

    fn guard(self, hold: Hold<KeyOf<M::Target>>) -> AdvisorySemaphoreGuard<M> {
        AdvisorySemaphoreGuard::new(self.conn, self.ask, self.permits, hold)
    }

    /// Acquires a permit if a slot is free and nobody waits for one, otherwise returns `None`: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::try_acquire). Cancel safety is that of
    /// [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside = conn.advisory_semaphore(("render", "gpu"), 4).try_acquire().await?; // Some(guard) or None
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(self) -> Result<Option<AdvisorySemaphoreGuard<M>>, Error> {
        Ok(self.try_acquire_or_return().await?.ok())
    }

    /// As [`try_acquire`](Self::try_acquire), but returns the connection if no slot is free.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let inside_or_conn = AdvisorySemaphore::new(conn, ("render", "gpu"), 4).try_acquire_or_return().await?;
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_or_return(
        mut self,
    ) -> Result<Result<AdvisorySemaphoreGuard<M>, M>, Error> {
        self.ask = self.ask.as_try();
        let hold =
            acquire::permit(&mut *self.conn, &self.ask, self.permits, &mut self.cancel).await?;
        Ok(match hold {
            Some(hold) => Ok(self.guard(hold)),
            None => Err(self.conn),
        })
    }

    /// Acquires a permit, runs `f` and releases the permit, also after an error or a panic of `f`. Dropping the future
    /// drops that of `f`, and then the guard: see [`AdvisoryLockGuard`](crate::AdvisoryLockGuard).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_semaphore(("billing", "import"), 3).run(async |_conn| Ok::<(), Error>(())).await?;
    /// # Ok(()) }
    /// ```
    pub async fn run<'a, F, T, E>(mut self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        M: 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        let cancel = self.cancel.take();
        // Boxed: see `AsyncLockBackend::transaction`.
        let running: BoxFuture<'_, _> = Box::pin(run_on(
            &mut *self.conn,
            self.ask,
            self.permits,
            cancel,
            false,
            f,
        ));
        running.await
    }

    /// Acquires a permit, runs `f` in a transaction, and releases the permit after COMMIT or ROLLBACK: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::transaction). Cancel safety is that of
    /// [`AdvisoryLock::transaction`](crate::AdvisoryLock::transaction).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// conn.advisory_semaphore(("billing", "import"), 3).transaction(async |_conn| Ok::<(), Error>(())).await?;
    /// # Ok(()) }
    /// ```
    pub async fn transaction<'a, F, T, E>(mut self, f: F) -> Result<T, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        M: 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a,
    {
        // The permit would be free before the outer COMMIT.
        self.ask.inside_transaction = false;
        let cancel = self.cancel.take();
        let running: BoxFuture<'_, _> = Box::pin(run_on(
            &mut *self.conn,
            self.ask,
            self.permits,
            cancel,
            true,
            f,
        ));
        running.await
    }

    /// Lists the sessions that hold a slot or wait for one: see
    /// [`dlock_diesel`](dlock_diesel::AdvisorySemaphore::holders). Cancel safety is that of
    /// [`AdvisoryLockGuard::is_held`](crate::AdvisoryLockGuard::is_held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let holders = conn.advisory_semaphore(("render", "gpu"), 4).holders().await?;
    /// # Ok(()) }
    /// ```
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        holders::of_semaphore(&mut *self.conn, &self.ask.key, self.permits).await
    }
}

/// Runs `f` with a permit, in a transaction or not.
async fn run_on<'a, C, F, T, E>(
    conn: &mut C,
    ask: Ask,
    permits: u32,
    mut cancel: Option<Cancel>,
    in_transaction: bool,
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
    let hold = acquire::permit(conn, &ask, permits, &mut cancel)
        .await
        .map_err(DieselError::from)?;
    let mut guard = body::guard(conn, ask, hold, cancel);
    let result = match in_transaction {
        true => {
            let key = guard.key().clone();
            transaction::under_lock(&mut *guard, &key, false, f).await
        }
        false => f(&mut *guard).await,
    };
    body::release_after(guard, result).await
}
