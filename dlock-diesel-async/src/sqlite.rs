//! What async connections to SQLite need. Its locks live in this process, so a dropped future gives them up without
//! waiting.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use diesel::QueryResult;
use diesel::sqlite::SqliteConnection;
use diesel_async::TransactionManager;
use diesel_async::sync_connection_wrapper::{SpawnBlocking, SyncConnectionWrapper};
use dlock_core::proto::Request;
use dlock_diesel::shared::{forget, give_up};

use crate::backend::{AsyncLockBackend, LockConnection};
use crate::{Error, session};

/// Makes async SQLite connections ready for locks: see [`dlock_diesel::SqliteLocksExt`] for the lock file and its
/// limits.
///
/// Call [`enable_advisory_locks`](Self::enable_advisory_locks) on each connection once, right after opening it. Without
/// it, the first lock fails with [`Error::Unsupported`], which names this call.
///
/// # Examples
///
/// ```
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use diesel::sqlite::SqliteConnection;
/// use diesel_async::AsyncConnection;
/// use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
/// use dlock_diesel_async::{AdvisoryLockExt, SqliteLocksExt};
///
/// let mut conn = SyncConnectionWrapper::<SqliteConnection>::establish(":memory:").await?;
/// conn.enable_advisory_locks().await?;
/// let lock = conn.advisory_lock(("billing", "report")).acquire().await?;
/// lock.release().await?;
/// # Ok(()) }
/// ```
///
/// In a pool:
///
/// ```
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use diesel::{ConnectionError, sqlite::SqliteConnection};
/// use diesel_async::AsyncConnection;
/// use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, bb8::Pool};
/// use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
/// use dlock_diesel_async::{AdvisoryLock, SqliteLocksExt};
///
/// let mut config = ManagerConfig::<SyncConnectionWrapper<SqliteConnection>>::default();
/// config.custom_setup = Box::new(|url| {
///     Box::pin(async move {
///         let mut conn = SyncConnectionWrapper::establish(url).await?;
///         let enabled = conn.enable_advisory_locks().await;
///         enabled.map_err(|error| ConnectionError::BadConnection(error.to_string()))?;
///         Ok(conn)
///     })
/// });
/// let manager = AsyncDieselConnectionManager::new_with_config(":memory:", config);
/// let pool = Pool::builder().build(manager).await?;
/// AdvisoryLock::new(pool.get().await?, ("billing", "report")).acquire().await?.release().await?;
/// # Ok(()) }
/// ```
///
/// # A wait occupies a thread
///
/// diesel-async runs SQLite on tokio's blocking threads, of which there are 512 unless you configure another number. A
/// wait occupies one until it ends. If as many sessions wait as there are threads, the holder cannot go on. Keep pools
/// smaller than that, or [poll](crate::AdvisoryLock::poll_every), which occupies no thread between tries.
pub trait SqliteLocksExt {
    /// Makes this connection ready for locks. A second call does nothing.
    ///
    /// # Examples
    ///
    /// See [`SqliteLocksExt`].
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if a statement on the connection fails, its file is gone, or another version of this crate
    /// has made it ready.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the connection may be ready or not. It stays fit for use.
    fn enable_advisory_locks(&mut self) -> impl Future<Output = Result<(), Error>> + Send;
}

impl<S: SpawnBlocking + Send> SqliteLocksExt for SyncConnectionWrapper<SqliteConnection, S> {
    async fn enable_advisory_locks(&mut self) -> Result<(), Error> {
        use dlock_diesel::SqliteLocksExt;
        let enabled = self.spawn_blocking(|conn| Ok(conn.enable_advisory_locks()?));
        Ok(Running::new(enabled, None).await?)
    }
}

/// A statement that runs on a blocking thread. If it is dropped, it first gives up its request, and then waits for the
/// end of the statement.
///
/// diesel-async also waits for the end, but before anybody could give up the request, and it panics on a runtime with
/// one thread.
pub(crate) struct Running<'f, T> {
    future: Pin<Box<dyn Future<Output = T> + Send + 'f>>,
    request: Option<Request>,
    /// It has been polled and has not ended yet.
    armed: bool,
}

impl<'f, T> Running<'f, T> {
    pub(crate) fn new(
        future: impl Future<Output = T> + Send + 'f,
        request: Option<Request>,
    ) -> Self {
        Self {
            // Without tokio's budget, so that a poll goes as far as it can.
            future: Box::pin(tokio::task::unconstrained(future)),
            request,
            armed: false,
        }
    }

    /// Blocks this thread until the statement has ended.
    pub(crate) fn finish(&mut self) -> T {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(output) = self.future.as_mut().poll(&mut context) {
                self.armed = false;
                return output;
            }
            thread::park();
        }
    }
}

impl<T> Future for Running<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let poll = self.future.as_mut().poll(context);
        self.armed = poll.is_pending();
        poll
    }
}

impl<T> Drop for Running<'_, T> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(request) = self.request {
            give_up(request);
        }
        self.finish();
        if let Some(request) = self.request {
            forget(request);
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Begins a transaction that writes from the start, or a savepoint if a transaction is open.
pub(crate) async fn begin_immediate<C: LockConnection>(conn: &mut C) -> QueryResult<()> {
    if session::session(conn)?.depth.is_some() {
        return C::TransactionManager::begin_transaction(conn).await;
    }
    let mut beginning = Beginning { conn, armed: true };
    let began = Running::new(beginning.conn.batch_execute("BEGIN IMMEDIATE"), None).await;
    beginning.armed = false;
    began?;
    session::began_transaction(beginning.conn)
}

/// A transaction that is beginning. If it is dropped, nobody knows whether the transaction has begun, so it is rolled
/// back.
struct Beginning<'c, C: LockConnection> {
    conn: &'c mut C,
    armed: bool,
}

impl<C: LockConnection> Drop for Beginning<'_, C> {
    fn drop(&mut self) {
        if self.armed {
            C::Backend::send_unread(self.conn, "ROLLBACK");
            session::mark_broken(self.conn);
        }
    }
}
