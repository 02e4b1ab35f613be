use std::fmt;
use std::ops::{Deref, DerefMut};

use dlock_core::{Dialect, Fence, Holder, LockKey, Mode, OpenTransaction};
use dlock_diesel::{LockBackend, glue};
use tokio::task::unconstrained;

use crate::backend::{DialectOf, KeyOf, LockConnection};
use crate::session::Depth;
use crate::{Error, drive, session};

/// A lock that is held. It is itself an [`AsyncConnection`](diesel_async::AsyncConnection), so that the session that
/// holds the lock is the one that works.
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
/// let mut lock = conn.advisory_lock("report").acquire().await?;
/// let names: Vec<String> = users::table.select(users::name).load(&mut lock).await?;
/// lock.release().await?;
/// # Ok(()) }
/// ```
///
/// # Release on drop is not the same everywhere!
///
/// [`release`](Self::release) waits until the lock is free, and tells whether it had been held to the end. A guard that
/// is dropped cannot wait, be it by `?`, in a panic, in a task that is aborted or after the runtime has gone:
///
/// - PostgreSQL: the unlock is handed to the driver's task, and the lock is free as soon as the server reads it. A
///   transaction that was begun under the lock and is still open is rolled back first; then the connection counts as
///   broken. If the guard itself was acquired inside a transaction that an error has aborted, the server does not obey,
///   and the lock stays until the session ends; so the connection counts as broken there, except in a test transaction.
/// - MySQL and MariaDB: the same, and the connection always counts as broken, for it is out of step: diesel-async would
///   give the answer to that message to the next query. If it was broken before, nothing is sent, and the lock is free
///   when the connection is closed: bb8 does so at once; deadpool at the next `get()` that meets it; a connection of
///   your own when you drop it.
/// - SQLite: the lock is free at once, also without a runtime. A transaction that was begun under the lock and is still
///   open is rolled back first, which blocks the thread for as long as that takes; then the connection counts as broken.
///   (Without a runtime it cannot be rolled back, and the lock is free when the connection is closed.)
///
/// "Reads" and "closed" take until the server is through with what it was doing: if a query was dropped, that is when the
/// query ends. On a runtime of one thread, PostgreSQL's message is not sent, and a connection not closed, before somebody
/// drives the runtime again, or drops it.
///
/// A guard that is leaked ([`std::mem::forget`]) holds its lock until the connection is closed. So does a future of this
/// crate that is leaked, and on MySQL and MariaDB the connection is out of step then and nothing tells.
///
/// # The lock can be lost
///
/// The server frees the lock when the session ends: a restart, a failover, an idle timeout, an administrator. The
/// connection is dead then, and the next statement on it fails. [`is_held`](Self::is_held) asks.
#[must_use = "if unused, the lock is released immediately"]
pub struct AdvisoryLockGuard<M: DerefMut<Target: LockConnection>> {
    /// `None` only while it is released.
    conn: Option<M>,
    key: LockKey,
    hold: Hold<M::Target>,
    held: bool,
}

/// One hold of a lock by a session.
pub(crate) struct Hold<C: LockConnection> {
    pub(crate) server_key: KeyOf<C>,
    pub(crate) mode: Mode,
    /// The transaction that it was acquired in.
    pub(crate) depth: Depth,
    pub(crate) fence: Option<Fence>,
}

impl<M: DerefMut<Target: LockConnection>> AdvisoryLockGuard<M> {
    pub(crate) fn new(conn: M, key: LockKey, hold: Hold<M::Target>) -> Self {
        Self {
            conn: Some(conn),
            key,
            hold,
            held: true,
        }
    }

    /// The key.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let lock = conn.advisory_lock("report").acquire().await?;
    /// println!("working under {}", lock.key());
    /// # Ok(()) }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Asks the server whether the session still holds the lock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let mut lock = conn.advisory_lock("report").acquire().await?;
    /// assert!(lock.is_held().await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Database`], also if the connection is gone, and the lock with it.
    ///
    /// # Cancel safety
    ///
    /// On PostgreSQL nothing happens. On MySQL and MariaDB the connection is marked broken: see
    /// [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire).
    ///
    /// # Round trips
    ///
    /// 1, once prepared.
    pub async fn is_held(&mut self) -> Result<bool, Error> {
        let statement = DialectOf::<M::Target>::is_held(&self.hold.server_key, self.hold.mode);
        drive::is_held(&mut **self, statement).await
    }

    /// Who holds the lock or waits for it now: see [`AdvisoryLock::holders`](crate::AdvisoryLock::holders).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::AdvisoryLockExt;
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let mut lock = conn.advisory_lock("report").acquire().await?;
    /// let waiting = lock.holders().await?.iter().filter(|holder| !holder.granted).count();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// That of [`is_held`](Self::is_held).
    ///
    /// # Round trips
    ///
    /// 1, once prepared; on MySQL and MariaDB up to 2.
    pub async fn holders(&mut self) -> Result<Vec<Holder>, Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        drive::holders(conn, &self.hold.server_key).await
    }

    /// Releases the lock and gives the connection back. Other holds of it on the same connection stay.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// # use dlock_diesel_async::{AdvisoryLockExt, Error};
    /// # let mut conn = AsyncPgConnection::establish("").await?;
    /// let lock = conn.advisory_lock("report").acquire().await?;
    /// match lock.release().await {
    ///     Err(Error::NotHeld { .. }) => println!("somebody else may have been at it, too"),
    ///     result => drop(result?),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`] if the lock had been lost. The connection counts as broken then, as it is not what it was.
    /// - [`Error::InTransaction`] if a transaction that was begun under the lock is still open: it is rolled back (unless
    ///   it is its COMMIT that was dropped, which may have come through), for to commit it without the lock would break
    ///   exclusion. What is left is done by [the drop](AdvisoryLockGuard).
    /// - [`Error::Database`] if the server could not be asked, and its session is ended; or if the connection is broken,
    ///   for instance since a wait was dropped on it, and then the drop does what is left.
    ///   Also if the server has forgotten the connection's prepared statements (`DEALLOCATE ALL`), and for a lock taken in
    ///   one transaction (with
    ///   [`inside_transaction`](crate::AdvisoryLock::inside_transaction), on PostgreSQL) and released in the next.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the server releases the lock all the same, and the connection counts as broken. Held
    /// until the connection is closed may only be
    ///
    /// - the lock of a transaction that an error has aborted, or one that was acquired inside a transaction and is
    ///   released after it (PostgreSQL);
    /// - any lock where that statement is not prepared, because the connection keeps none
    ///   ([`CacheSize::Disabled`](diesel::connection::CacheSize::Disabled)) or the acquire failed to prepare it: else it is
    ///   the one that has acquired the lock, and goes out in one message.
    ///
    /// # Round trips
    ///
    /// 1; 2 for a lock that was acquired inside a PostgreSQL transaction.
    pub async fn release(mut self) -> Result<M, Error> {
        self.undo().await?;
        Ok(self.conn.take().expect(RELEASED))
    }

    /// On an error the drop gives up what may still be held.
    pub(crate) async fn undo(&mut self) -> Result<(), Error> {
        let conn = self.conn.as_deref_mut().expect(RELEASED);
        // A broken connection may not answer soon.
        let depth = session::depth(conn)?;
        let base = self.hold.depth;
        if depth > base {
            return Err(glue::in_transaction(&self.key));
        }
        // The savepoint went with the transaction if that has ended.
        let fence = self.hold.fence.filter(|_| depth == base);
        let server_key = &self.hold.server_key;
        let machine =
            DialectOf::<M::Target>::release_abandonable(server_key, self.hold.mode, fence);
        // From here on the conversation sees to it, also if it is dropped.
        self.held = false;
        // Without a budget, for a task that has used its own up would not even send it in this poll.
        let released = unconstrained(drive::drive(conn, machine, &self.key, None)).await;
        if let Err(Error::NotHeld { .. }) = released {
            // Nothing is held, but this is not the session that it was.
            session::mark_broken(conn);
        }
        released.map(drop)
    }
}

const RELEASED: &str = "BUG: the connection is there until the guard is released";

/// Gives a hold up without waiting.
fn give_up<C: LockConnection>(conn: &mut C, hold: &Hold<C>) {
    let depth = session::depth(conn).ok();
    let transaction = match (hold.depth, depth) {
        (_, Some(None)) => OpenTransaction::None,
        (None, _) => OpenTransaction::RollBack,
        (Some(_), _) => OpenTransaction::Keep,
    };
    let message = DialectOf::<C>::release_unread(&hold.server_key, hold.mode, transaction)
        // A wait may have been dropped, which must end when the connection is closed.
        .filter(|_| depth.is_some() || !DialectOf::<C>::UNREAD_MESSAGES_HIDE_A_CLOSE);
    let sent = message
        .as_ref()
        .is_some_and(|message| session::send_unread(conn, message));
    if let Some(give_up) = C::Backend::GIVE_UP {
        if message.is_some() {
            // Rolled back, of which Diesel does not know.
            session::mark_broken(conn);
        }
        if sent || message.is_none() {
            give_up(&hold.server_key);
        }
        return;
    }
    // In an aborted transaction the unlock fails, and nobody would know.
    let unsure = depth != Some(None) && !session::in_test_transaction(conn);
    if unsure || message.is_none() || !DialectOf::<C>::SKIPS_UNREAD_ANSWERS {
        session::mark_broken(conn);
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
        if let (true, Some(conn)) = (self.held, self.conn.as_deref_mut()) {
            give_up(conn, &self.hold);
        }
    }
}

impl<M: DerefMut<Target: LockConnection>> fmt::Debug for AdvisoryLockGuard<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLockGuard")
            .field("key", &self.key)
            .field("mode", &self.hold.mode)
            .finish_non_exhaustive()
    }
}
