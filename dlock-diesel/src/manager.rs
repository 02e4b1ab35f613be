pub mod desk;
mod guard;
mod lock;
mod semaphore;
mod slot;
mod worker;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::Ask;
use dlock_core::proto::manager::{Config, Manager};
pub use guard::ManagedLockGuard;
pub use lock::ManagedLock;
pub use semaphore::{ManagedSemaphore, ManagedSemaphoreGuard};
use worker::{Inner, Open};

use crate::LockConnection;

/// Any number of locks over a few connections of its own.
///
/// A lock of a `LockManager` needs no connection of yours, and its guard is not a connection. Thousands of locks can be
/// held and waited for at once, and a holder hears at once when its lock is lost. It brings threads of its own: one for
/// each connection, one for the time, and one for the callbacks of each loss.
///
/// It does not replace [`AdvisoryLock::transaction`](crate::AdvisoryLock::transaction): the work under a managed lock
/// runs on other connections, and so it can outlive the lock. `docs/guide/managed.md` in the repository says which form
/// to use when.
///
/// Clones are handles of the same manager. Dropping the last one closes it: all locks are freed, also those whose
/// guards live.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel::pg::PgConnection;
/// use dlock_diesel::LockManager;
///
/// # fn work(_: impl Fn() -> bool) {}
/// let locks = LockManager::<PgConnection>::at("postgres://localhost/app").build();
///
/// let held = locks.lock(("billing", "user/001")).timeout(Duration::from_secs(1)).acquire()?;
/// work(|| held.is_lost()); // stops when another process may have the lock
/// held.release()?;
/// # Ok::<(), dlock_diesel::Error>(())
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
    /// use diesel::prelude::*;
    /// use dlock_diesel::LockManager;
    ///
    /// let url = std::env::var("DATABASE_URL").unwrap_or_default();
    /// let locks = LockManager::builder(move || PgConnection::establish(&url)).build();
    /// ```
    pub fn builder<F, E>(open: F) -> LockManagerBuilder<C>
    where
        F: Fn() -> Result<C, E> + Send + Sync + 'static,
        E: StdError + Send + Sync + 'static,
    {
        LockManagerBuilder {
            open: Box::new(move || open().map_err(|error| desk::not_opened(error.into()))),
            connections: desk::CONNECTIONS,
            lease: desk::LEASE,
        }
    }

    /// A manager whose connections are established to this database URL.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use diesel::pg::PgConnection;
    /// use dlock_diesel::LockManager;
    ///
    /// let locks = LockManager::<PgConnection>::at("postgres://localhost/app").connections(2).build();
    /// ```
    pub fn at(url: impl Into<String>) -> LockManagerBuilder<C> {
        let url = url.into();
        Self::builder(move || C::establish(&url))
    }

    /// A lock that is not held yet.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let held = locks.lock(("billing", "user/001")).acquire()?;
    /// held.release()?;
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let both = locks.locks([("bank", "account/1"), ("bank", "account/2")]).acquire()?;
    /// both.release()?;
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
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) -> Result<(), Error> {
    /// let inside = locks.semaphore(("render", "gpu"), 4).acquire()?;
    /// println!("on device {}", inside.slot());
    /// inside.release()?;
    /// # Ok(()) }
    /// ```
    pub fn semaphore(&self, key: impl Into<LockKey>, permits: u32) -> ManagedSemaphore<C> {
        let ask = Ask::new(key.into());
        ManagedSemaphore::new(Arc::clone(&self.owner.0), ask, permits)
    }

    /// Closes the manager, and returns when all its connections are closed and its threads have ended. Threads that
    /// wait for a lock get [`Error::ManagerClosed`](crate::Error::ManagerClosed). Locks that are held are lost, and
    /// their holders are told.
    ///
    /// A thread that waits in the server's queue ends with its current statement: after 2 seconds at most on MySQL,
    /// MariaDB and SQLite, and 0.9 seconds on PostgreSQL (up to a minute behind readers). A thread whose network is
    /// down ends when the driver gives up.
    ///
    /// Called in a callback of [`on_lost`](ManagedLockGuard::on_lost), it does not wait for the threads. Do not call it
    /// in the closure that opens connections: it would wait for that closure to return.
    ///
    /// # Examples
    ///
    /// ```
    /// # use dlock_diesel::*; use diesel::pg::PgConnection;
    /// # fn f(locks: LockManager<PgConnection>) {
    /// locks.close();
    /// # }
    /// ```
    pub fn close(&self) {
        let inner = &self.owner.0;
        inner.tell(Manager::close);
        let (waker, mut waiter) = (worker::waker(), inner.desk.closed.waiter());
        while waiter.poll_ended(&waker) == Poll::Pending {
            thread::park();
        }
        inner.join();
    }
}

/// Sets up a [`LockManager`]. The defaults need no thought.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use diesel::pg::PgConnection;
/// use dlock_diesel::LockManager;
///
/// let locks = LockManager::<PgConnection>::at("postgres://localhost/app")
///     .connections(4)
///     .lease(Duration::from_secs(30))
///     .build();
/// ```
#[must_use = "nothing is managed until it is built"]
pub struct LockManagerBuilder<C> {
    open: Open<C>,
    connections: usize,
    lease: Duration,
}

impl<C> fmt::Debug for LockManagerBuilder<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManagerBuilder")
            .field("connections", &self.connections)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

impl<C: LockConnection + 'static> LockManagerBuilder<C> {
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
    /// More than 24 days count as 24 days. MySQL and MariaDB round it up to seconds, SQLite needs none.
    ///
    /// The server ends a session that has been idle for so long (PostgreSQL `idle_session_timeout`, MySQL and MariaDB
    /// `wait_timeout`, which the manager sets in its own sessions). The manager asks each session that holds something
    /// four times in a lease, and at least each 0.75 seconds, whether it is there. If no answer comes, a lock counts as
    /// lost after nine tenths of the lease, counted from when the last answered statement was sent. So the holder knows
    /// before another process can have the lock, if both clocks run at the same rate to within that tenth, and if the
    /// process runs. For a process that was stopped there are fencing tokens. A connection that takes longer than the
    /// lease to open counts as none: [`Error::NotConnected`](crate::Error::NotConnected).
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
