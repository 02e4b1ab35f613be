mod guard;
mod lock;
mod semaphore;
mod worker;

use std::error::Error as StdError;
use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::{Config, Manager};
use dlock_diesel::shared::desk;
pub use guard::ManagedLockGuard;
pub use lock::ManagedLock;
pub use semaphore::{ManagedSemaphore, ManagedSemaphoreGuard};
use worker::{Inner, Open};

use crate::LockConnection;

/// Any number of locks over a few connections of its own: the async form of [`dlock_diesel::LockManager`].
///
/// A lock of a `LockManager` needs no connection of yours, and its guard is not a connection. Thousands of locks can be
/// held and waited for at once, and a holder hears at once when its lock is lost.
///
/// It does not replace [`AdvisoryLock::transaction`](crate::AdvisoryLock::transaction): the work under a managed lock
/// runs on other connections, and so it can outlive the lock. `docs/guide/managed.md` in the repository says which form
/// to use when.
///
/// Clones are handles of the same manager. Dropping the last one closes it: all locks are freed, also those whose
/// guards live. A manager lives on the tokio runtime that first used it.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel_async::AsyncPgConnection;
/// use dlock_diesel_async::LockManager;
///
/// # async fn work() {}
/// # #[tokio::main] async fn main() -> Result<(), dlock_diesel_async::Error> {
/// let locks = LockManager::<AsyncPgConnection>::at("postgres://localhost/app").build();
///
/// let held = locks.lock(("billing", "user/001")).timeout(Duration::from_secs(1)).acquire().await?;
/// tokio::select! {
///     () = work() => held.release().await?,
///     () = held.lost() => println!("stop: another process may have the lock"),
/// }
/// # Ok(()) }
/// ```
pub struct LockManager<C: LockConnection + 'static> {
    owner: Arc<Owner<C>>,
}

/// The last handle closes the manager.
struct Owner<C: LockConnection + 'static>(Arc<Inner<C>>);

impl<C: LockConnection + 'static> Drop for Owner<C> {
    fn drop(&mut self) {
        self.0.tell(Manager::close);
    }
}

impl<C: LockConnection + 'static> Clone for LockManager<C> {
    fn clone(&self) -> Self {
        Self {
            owner: Arc::clone(&self.owner),
        }
    }
}

impl<C: LockConnection + 'static> fmt::Debug for LockManager<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManager").finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> LockManager<C> {
    /// A manager that opens its connections with `open`, when it needs them.
    ///
    /// Its sessions are its own: it sets their idle limit, and closes them as it likes. So do not take them from a
    /// pool.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use diesel_async::{AsyncConnection, AsyncPgConnection};
    /// use dlock_diesel_async::LockManager;
    ///
    /// let url = std::env::var("DATABASE_URL").unwrap_or_default();
    /// let locks = LockManager::builder(move || {
    ///     let url = url.clone();
    ///     async move { AsyncPgConnection::establish(&url).await }
    /// })
    /// .build();
    /// ```
    pub fn builder<F, Fut, E>(open: F) -> LockManagerBuilder<C>
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<C, E>> + Send + 'static,
        E: StdError + Send + Sync + 'static,
    {
        let open = Arc::new(open);
        LockManagerBuilder::new(Box::new(move || {
            let open = Arc::clone(&open);
            Box::pin(async move { open().await.map_err(|error| desk::not_opened(error.into())) })
        }))
    }

    /// A manager whose connections are established to this database URL.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use diesel_async::AsyncPgConnection;
    /// use dlock_diesel_async::LockManager;
    ///
    /// let locks = LockManager::<AsyncPgConnection>::at("postgres://localhost/app").connections(2).build();
    /// ```
    pub fn at(url: impl Into<String>) -> LockManagerBuilder<C> {
        let url: Arc<str> = url.into().into();
        Self::builder(move || {
            let url = Arc::clone(&url);
            async move { C::establish(&url).await }
        })
    }

    /// A lock that is not held yet.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "user/001")).acquire().await?;
    /// held.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn lock(&self, key: impl Into<LockKey>) -> ManagedLock<C> {
        ManagedLock::new(Arc::clone(&self.owner.0), Ask::new(key.into()))
    }

    /// Several locks that are taken and released as one: see
    /// [`AdvisoryLockExt::advisory_locks`](crate::AdvisoryLockExt::advisory_locks). After a failure or a timeout none
    /// of them is held. The loss of one is the loss of all.
    ///
    /// They are taken one after the other, in the order in which everybody takes them, so two callers cannot deadlock.
    /// That is 1 round trip for each that is free, where on a connection it is 1 for all.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let both = locks.locks([("bank", "account/1"), ("bank", "account/2")]).acquire().await?;
    /// both.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn locks(&self, keys: impl IntoIterator<Item: Into<LockKey>>) -> ManagedLock<C> {
        let ask = Ask::all(keys.into_iter().map(Into::into));
        ManagedLock::new(Arc::clone(&self.owner.0), ask)
    }

    /// A semaphore that is not held yet: at most `permits` hold it at once, over all processes and hosts. It is the
    /// same one as [`AdvisoryLockExt::advisory_semaphore`](crate::AdvisoryLockExt::advisory_semaphore).
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire().await?;
    /// println!("on device {}", inside.slot());
    /// inside.release().await?;
    /// # Ok(()) }
    /// ```
    pub fn semaphore(&self, key: impl Into<LockKey>, permits: u32) -> ManagedSemaphore<C> {
        let ask = Ask::new(key.into());
        ManagedSemaphore::new(Arc::clone(&self.owner.0), ask, permits)
    }

    /// Closes the manager, and returns when all its connections are closed. Tasks that wait for a lock get
    /// [`Error::ManagerClosed`](crate::Error::ManagerClosed). Locks that are held are lost, and their holders are told.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel_async::*; use diesel_async::AsyncPgConnection;
    /// # async fn f(locks: LockManager<AsyncPgConnection>) {
    /// locks.close().await;
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// The manager closes also if the future is dropped after its first poll.
    pub async fn close(&self) {
        let inner = &self.owner.0;
        inner.tell(Manager::close);
        let mut waiter = inner.desk.closed.waiter();
        poll_fn(|cx| waiter.poll_ended(cx.waker())).await;
    }
}

/// Sets up a [`LockManager`]. The defaults need no thought.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel_async::AsyncPgConnection;
/// use dlock_diesel_async::LockManager;
///
/// let locks = LockManager::<AsyncPgConnection>::at("postgres://localhost/app")
///     .connections(4)
///     .lease(Duration::from_secs(30))
///     .build();
/// ```
#[must_use = "nothing is managed until it is built"]
pub struct LockManagerBuilder<C: LockConnection + 'static> {
    open: Open<C>,
    connections: usize,
    lease: Duration,
    conn: PhantomData<fn() -> C>,
}

impl<C: LockConnection + 'static> fmt::Debug for LockManagerBuilder<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManagerBuilder")
            .field("connections", &self.connections)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> LockManagerBuilder<C> {
    fn new(open: Open<C>) -> Self {
        Self {
            open,
            connections: desk::CONNECTIONS,
            lease: desk::LEASE,
            conn: PhantomData,
        }
    }

    /// At most so many connections are open at once; 4 unless set. Held locks share them. A wait for a lock that
    /// another process has needs one that holds nothing, and one connection never waits. Where there is none, the lock
    /// is tried again and again, at most 40 times a second and at least once.
    ///
    /// # Panics
    ///
    /// If it is 0.
    pub fn connections(mut self, connections: usize) -> Self {
        assert!(connections > 0, "a lock manager needs a connection");
        self.connections = connections;
        self
    }

    /// How long the server keeps the locks of a process that is cut off; 30 seconds unless set, at least 1 second.
    /// More than 24 days count as 24 days. MySQL and MariaDB round it up to seconds, SQLite needs none. See
    /// [`dlock_diesel`](dlock_diesel::LockManagerBuilder::lease).
    ///
    /// # Panics
    ///
    /// If it is less than a second.
    pub fn lease(mut self, lease: Duration) -> Self {
        assert!(
            lease >= desk::SHORTEST_LEASE,
            "a lease lasts at least a second"
        );
        self.lease = lease.min(Config::LONGEST_LEASE);
        self
    }

    /// Makes the manager. It connects to nothing until it is asked for a lock.
    pub fn build(self) -> LockManager<C> {
        LockManager {
            owner: Arc::new(Owner(Inner::new(self.connections, self.lease, self.open))),
        }
    }
}
