use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;

use dlock_core::proto::manager::{News, Ticket};
use dlock_core::{FencingToken, LockKey};
use dlock_diesel::shared::desk::{self, Slot, Waiter};

use super::worker::Inner;
use crate::{Error, LockConnection};

/// A lock of a [`LockManager`](crate::LockManager) that is held: the async form of
/// [`dlock_diesel::ManagedLockGuard`]. It is not a connection.
///
/// Dropped, it gives the lock back without waiting, on every server. [`release`](Self::release) also waits, and reports
/// a loss.
///
/// # Examples
///
/// ```
/// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
/// # async fn work() {}
/// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
/// let held = locks.lock(("billing", "leader")).acquire().await?;
/// tokio::select! {
///     () = work() => held.release().await?,
///     () = held.lost() => println!("another process may lead by now"),
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released immediately"]
pub struct ManagedLockGuard<C: LockConnection + 'static> {
    inner: Arc<Inner<C>>,
    /// `None` once it is given back.
    ticket: Option<Ticket>,
    slot: Arc<Slot>,
    key: LockKey,
}

impl<C: LockConnection + 'static> ManagedLockGuard<C> {
    pub(super) fn new(inner: Arc<Inner<C>>, ticket: Ticket, slot: Arc<Slot>, key: LockKey) -> Self {
        Self {
            inner,
            ticket: Some(ticket),
            slot,
            key,
        }
    }

    /// The key of the lock. Of several, the first that was named.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # fn f(held: ManagedLockGuard<AsyncPgConnection>) {
    /// println!("working under {}", held.key());
    /// # }
    /// ```
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    /// Whether the lock may be another's by now: see [`dlock_diesel`](dlock_diesel::ManagedLockGuard::is_lost). It
    /// looks at the clock and asks nobody.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # fn f(held: ManagedLockGuard<AsyncPgConnection>) {
    /// if held.is_lost() {
    ///     println!("stop");
    /// }
    /// # }
    /// ```
    pub fn is_lost(&self) -> bool {
        self.ticket
            .is_none_or(|ticket| self.inner.desk.is_lost(ticket))
    }

    /// Waits until the lock is lost, for whatever cause: see
    /// [`dlock_diesel`](dlock_diesel::ManagedLockGuard::on_lost) for how soon. Any number of tasks can wait.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn work() {}
    /// # async fn f(held: ManagedLockGuard<AsyncPgConnection>) {
    /// tokio::select! {
    ///     () = work() => {}
    ///     () = held.lost() => {}
    /// }
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Nothing happens if it is dropped.
    pub async fn lost(&self) {
        let mut loss = self.loss();
        poll_fn(|cx| loss.poll_ended(cx.waker())).await;
    }

    /// Its end is the loss: the guard is there, so nothing has released it.
    pub(super) fn loss(&self) -> Waiter<'_> {
        self.slot.waiter()
    }

    /// Draws a fencing token: see [`dlock_diesel`](dlock_diesel::ManagedLockGuard::fencing_token).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn write(_: i64) {}
    /// # async fn f(held: ManagedLockGuard<AsyncPgConnection>) -> Result<(), Error> {
    /// write(held.fencing_token().await?.into()).await; // UPDATE .. WHERE fence < token
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`dlock_diesel`](dlock_diesel::ManagedLockGuard::fencing_token).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, a number may be skipped. The lock stays held.
    ///
    /// # Round trips
    ///
    /// 1, once prepared, on the connection that holds the lock. Others that use it come first.
    pub async fn fencing_token(&self) -> Result<FencingToken, Error> {
        let Some(ticket) = self.ticket else {
            return Err(desk::lost(&self.key));
        };
        let (drawing, todo) = self.inner.desk.draw_token(ticket);
        self.inner.act(todo);
        let answer = poll_fn(|cx| drawing.poll(cx.waker())).await;
        answer.map_err(|failure| desk::failed(failure, &self.key))
    }

    /// Gives the lock back, and waits until the server has released it or another task of this process has it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(held: ManagedLockGuard<AsyncPgConnection>) -> Result<(), Error> {
    /// held.release().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] or [`Error::NotHeld`]: another process may have worked at the same time.
    ///
    /// # Cancel safety
    ///
    /// The lock is released also if the future is dropped, as by a drop of the guard.
    ///
    /// # Round trips
    ///
    /// 1, or none if another task of this process gets the lock.
    pub async fn release(mut self) -> Result<(), Error> {
        let Some(ticket) = self.ticket.take() else {
            return Err(desk::lost(&self.key));
        };
        self.inner.tell(|manager, now| manager.release(ticket, now));
        let mut waiter = self.slot.waiter();
        match poll_fn(|cx| waiter.poll_ended(cx.waker())).await {
            News::Released => Ok(()),
            news => Err(desk::error(news, &self.key)),
        }
    }
}

impl<C: LockConnection + 'static> Drop for ManagedLockGuard<C> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let todo = self.inner.desk.cancel(ticket);
            self.inner.act(todo);
        }
    }
}

impl<C: LockConnection + 'static> fmt::Debug for ManagedLockGuard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagedLockGuard")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}
