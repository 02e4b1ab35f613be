use std::fmt;
use std::ops::{Deref, DerefMut};

use diesel_async::AsyncConnectionCore;
use dlock_core::proto::{Ask, Dialect, Hold, Parting};
use dlock_core::{FencingToken, Holder, LockKey};
use dlock_diesel::shared::trace::{self, Releasing};
use dlock_diesel::{Held, LockBackend, shared};
use tokio::task::unconstrained;

use crate::backend::{AsyncLockBackend, DialectOf, KeyOf, LockConnection};
use crate::cancel::{self, OnDrop};
use crate::run::{self, ask, run};
use crate::{Error, holders, session};

/// A lock that is held: the async form of [`dlock_diesel::AdvisoryLockGuard`]. It is itself an
/// [`AsyncConnection`](diesel_async::AsyncConnection), so the session that holds the lock does the work.
///
/// # Examples
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use diesel::prelude::*;
/// use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
/// use dlock_diesel_async::AdvisoryLockExt;
///
/// # diesel::table! { users { id -> Integer, name -> Text } }
/// let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
/// let mut lock = conn.advisory_lock(("billing", "report")).acquire().await?;
/// let names: Vec<String> = users::table.select(users::name).load(&mut lock).await?;
/// lock.release().await?;
/// # Ok(()) }
/// ```
///
/// # Release it, do not drop it
///
/// [`release`](Self::release) waits until the lock is free, and reports whether the session held it to the end. A guard
/// that is dropped cannot wait. It sends the unlock and leaves:
///
/// - PostgreSQL: the lock is free when the server reads the unlock. A transaction that was begun under the lock is
///   rolled back first, and then the connection is marked broken. If the guard was acquired inside a transaction, the
///   connection is marked broken, and after an error in that transaction the lock stays until the session ends. In a
///   test transaction the connection stays fit for use. dlock does not know of a transaction that a raw `BEGIN` has
///   begun: after an error in it the lock also stays, and nothing marks the connection.
/// - MySQL and MariaDB: the same, but the connection is always marked broken. **Do not use it any more:** diesel-async
///   would give the answer of the unlock to the next query. If it was broken before, nothing is sent, and the lock is
///   free when the connection is closed. bb8 closes it at once, deadpool at the next `get()` that meets it.
/// - SQLite: the lock is free at once. An open transaction is rolled back first, which blocks the thread.
///
/// The server reads a message, or notices that a connection is closed, only after it has finished the current
/// statement: [`cancel_with`](Self::cancel_with) cancels that. On a single-threaded runtime nothing is sent or closed
/// until the runtime is polled again or dropped.
///
/// If you leak a guard or a future of this crate ([`std::mem::forget`]), the connection keeps the lock until it is
/// closed. On MySQL and MariaDB, a leaked future also leaves the connection out of step, and nothing reports that.
#[must_use = "if unused, the lock is released immediately"]
pub struct AdvisoryLockGuard<M: DerefMut<Target: LockConnection>> {
    /// `None` only during the release.
    conn: Option<M>,
    /// `None` once the release has begun: from then on the conversation is responsible.
    hold: Option<Hold<KeyOf<M::Target>>>,
    key: LockKey,
    /// The other locks that were taken together with it.
    more: Vec<LockKey>,
    /// `None` also once the release has begun.
    pub(crate) cancel: Option<OnDrop>,
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLockGuard<M> {
    pub(crate) fn new(conn: M, ask: Ask, hold: Hold<KeyOf<M::Target>>) -> Self {
        Self {
            conn: Some(conn),
            hold: Some(hold),
            key: ask.key,
            more: ask.more,
            cancel: None,
        }
    }

    /// Sets what cancels the statement that runs on the connection, from another connection, if the guard is dropped:
    /// usually the driver's cancel token, as in [`AdvisoryLock::cancel_with`](crate::AdvisoryLock::cancel_with). It is
    /// spawned on the runtime then, and the connection is marked broken.
    ///
    /// Without it, a statement that was under way goes on, and the lock stays until it has ended. `run` and
    /// `transaction` use the future that the lock was given.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let token = conn.cancel_token();
    /// let lock = conn.advisory_lock(("billing", "report")).acquire().await?;
    /// let lock = lock.cancel_with(async move { token.cancel_query(tokio_postgres::NoTls).await });
    /// # Ok(()) }
    /// ```
    pub fn cancel_with<F>(mut self, cancel: F) -> Self
    where
        F: Future + Send + 'static,
    {
        self.cancel = Some(OnDrop::new(cancel::boxed(cancel)));
        self
    }

    /// The key of the lock. Of several, the one that was named first.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// println!("working under {}", conn.advisory_lock(("billing", "report")).acquire().await?.key());
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// The keys of all locks that were taken together, as they were named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let lock = conn.advisory_locks([("bank", "account/1"), ("bank", "account/2")]).acquire().await?;
    /// assert_eq!(lock.keys().count(), 2);
    /// # Ok(()) }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = &LockKey> {
        std::iter::once(&self.key).chain(&self.more)
    }

    /// Asks the server whether the session still holds the lock: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLockGuard::is_held). It takes 1 round trip, once prepared.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire().await?;
    /// assert!(lock.is_held().await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Nothing happens to the lock. On MySQL and MariaDB the connection is marked broken.
    pub async fn is_held(&mut self) -> Result<bool, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        let hold = self.hold.as_ref().expect(RELEASED);
        let held = ask(conn, DialectOf::<M::Target>::is_held(hold), &self.key).await;
        trace::is_held(held, &self.key)
    }

    /// Draws a fencing token: see [`dlock_diesel`](dlock_diesel::AdvisoryLockGuard::fencing_token). If the future is
    /// dropped, a number may be skipped. Otherwise cancel safety is that of [`is_held`](Self::is_held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, diesel_async::RunQueryDsl, dlock_diesel_async::*};
    /// # diesel::table! { reports { id -> Integer, body -> Text, fence -> BigInt } }
    /// # use reports::{body, fence};
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> QueryResult<()> {
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire().await?;
    /// let token = i64::from(lock.fencing_token().await?);
    /// let written = diesel::update(reports::table.find(1).filter(fence.lt(token)))
    ///     .set((body.eq("new"), fence.eq(token)))
    ///     .execute(&mut lock)
    ///     .await?;
    /// assert_eq!(written, 1, "a later holder was here");
    /// # Ok(()) }
    /// ```
    pub async fn fencing_token(&mut self) -> Result<FencingToken, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        let hold = self.hold.as_ref().expect(RELEASED);
        let machine = DialectOf::<M::Target>::fencing_token(hold);
        trace::kept(ask(conn, machine, &self.key).await)
    }

    /// A condition that is true only in the session that holds the lock, for the WHERE of your own statements: see
    /// [`dlock_diesel`](dlock_diesel::AdvisoryLockGuard::held). It sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// # use {diesel::prelude::*, diesel_async::RunQueryDsl, dlock_diesel_async::*};
    /// # diesel::table! { accounts { id -> Integer, balance -> Integer } }
    /// # use accounts::balance;
    /// # async fn f(conn: &mut diesel_async::AsyncPgConnection) -> QueryResult<()> {
    /// let mut lock = conn.advisory_lock(("bank", "account/1")).acquire().await?;
    /// let account = accounts::table.find(1).filter(lock.held());
    /// let changed = diesel::update(account).set(balance.eq(0)).execute(&mut lock).await?;
    /// assert_eq!(changed, 1, "the lock was lost");
    /// # Ok(()) }
    /// ```
    pub fn held(&self) -> Held<<M::Target as AsyncConnectionCore>::Backend> {
        let hold = self.hold.as_ref().expect(RELEASED);
        shared::held(DialectOf::<M::Target>::held(hold))
    }

    /// Lists the sessions that hold the lock or wait for it: see [`dlock_diesel`](dlock_diesel::AdvisoryLock::holders).
    /// It takes 1 round trip on PostgreSQL, once prepared, and 2 or 4 on MySQL and MariaDB. Cancel safety is that of
    /// [`is_held`](Self::is_held).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let mut lock = conn.advisory_lock(("billing", "report")).acquire().await?;
    /// let waiting = lock.holders().await?.iter().filter(|holder| !holder.granted).count();
    /// # Ok(()) }
    /// ```
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        trace::kept(holders::of_locks(conn, &self.key, &self.more).await)
    }

    /// Releases the lock and returns the connection: see [`dlock_diesel`](dlock_diesel::AdvisoryLockGuard::release).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; async fn f(conn: &mut diesel_async::AsyncPgConnection) -> Result<(), Error> {
    /// let lock = conn.advisory_lock(("billing", "report")).acquire().await?;
    /// match lock.release().await {
    ///     Err(Error::NotHeld { .. }) => println!("another holder may have worked at the same time"),
    ///     result => drop(result?),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`dlock_diesel`](dlock_diesel::AdvisoryLockGuard::release), with these differences:
    ///
    /// - [`Error::TransactionLeftOpen`]: the rollback and the unlock are sent without waiting, as by a drop of the
    ///   guard. If a dropped COMMIT left the transaction open, the COMMIT may have come through.
    /// - [`Error::Lost`] if the connection was marked broken before, for example by a dropped wait: the release does
    ///   what a drop of the guard does.
    ///
    /// # Round trips
    ///
    /// 1, once prepared. 2 for a lock that was acquired inside a PostgreSQL transaction. Dropping the guard waits for
    /// none.
    ///
    /// # Cancel safety
    ///
    /// The server still releases the lock, and the connection is marked broken. In these cases the lock stays until the
    /// connection is closed: on PostgreSQL, it was acquired inside a transaction that is over or aborted; the
    /// connection keeps no prepared statements ([`CacheSize::Disabled`](diesel::connection::CacheSize::Disabled)); or,
    /// on MySQL and MariaDB, this is the first release on the connection, and all waits on it so far had limits of less
    /// than a second, or MariaDB was built without Galera.
    pub async fn release(mut self) -> Result<M, Error> {
        self.undo().await?;
        Ok(self.conn.take().expect(RELEASED))
    }

    /// Releases the lock. After an error, the drop gives up what may still be held.
    pub(crate) async fn undo(&mut self) -> Result<(), Error> {
        let releasing = Releasing::of(&self.key);
        releasing.during(self.give_back()).await
    }

    async fn give_back(&mut self) -> Result<(), Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        let base = self.hold.as_ref().expect(RELEASED).depth();
        // A broken connection may not answer soon.
        let session = run::session(conn, &self.key)?;
        // The drop rolls back. diesel-async (0.9) panics when asked to roll back after its COMMIT was dropped.
        if session.depth > base {
            return Err(shared::left_open(&self.key));
        }
        // From here on the conversation is responsible, even if it is dropped.
        self.cancel = None;
        let hold = self.hold.take().expect(RELEASED);
        let machine = DialectOf::<M::Target>::release(hold, session);
        // Without tokio's budget: a task that has used up its budget would not even send the release in this poll.
        unconstrained(run(conn, machine, &self.key, None)).await
    }
}

const RELEASED: &str = "BUG: the connection is there until the guard is released";

/// Gives up a hold without waiting.
fn part<C: LockConnection>(conn: &mut C, hold: &Hold<KeyOf<C>>) {
    let session = session::parting_session(conn);
    let Parting {
        message,
        broken,
        request,
        more_requests,
    } = DialectOf::<C>::part(hold, session);
    let failed = message.is_some_and(|message| !C::Backend::send_unread(conn, &message));
    if broken {
        session::mark_broken(conn);
    }
    if !failed {
        let requests = request.into_iter().chain(more_requests);
        requests.for_each(<C::Backend as LockBackend>::give_up);
    }
}

impl<M: DerefMut<Target: LockConnection>> Deref for AdvisoryLockGuard<M> {
    type Target = M::Target;

    fn deref(&self) -> &M::Target {
        self.conn.as_deref().expect(RELEASED)
    }
}

impl<M: DerefMut<Target: LockConnection>> DerefMut for AdvisoryLockGuard<M> {
    fn deref_mut(&mut self) -> &mut M::Target {
        self.conn.as_deref_mut().expect(RELEASED)
    }
}

impl<M: DerefMut<Target: LockConnection>> Drop for AdvisoryLockGuard<M> {
    fn drop(&mut self) {
        if let (Some(hold), Some(conn)) = (&self.hold, self.conn.as_deref_mut()) {
            Releasing::of(&self.key).drop(|| {
                part(conn, hold);
                if let Some(cancel) = &mut self.cancel {
                    session::mark_broken(conn);
                    cancel.cancel();
                }
            });
        }
    }
}

impl<M: DerefMut<Target: LockConnection>> fmt::Debug for AdvisoryLockGuard<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLockGuard")
            .field("key", &self.key)
            .field("mode", &self.hold.as_ref().map(Hold::mode))
            .finish_non_exhaustive()
    }
}
