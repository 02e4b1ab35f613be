//! SQLite's part: its locks are in this process, so that what is dropped gives them up without waiting.

use std::ops::DerefMut;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use diesel::QueryResult;
use diesel::sql_types;
use diesel::sqlite::{Sqlite, SqliteConnection};
use diesel_async::sync_connection_wrapper::{SpawnBlocking, SyncConnectionWrapper};
use diesel_async::{AsyncConnection, RunQueryDsl, TransactionManager};
use dlock_core::{Holder, Statement};
use dlock_diesel::glue::sqlite::{Asked, explain, forget, give_up};
use dlock_diesel::glue::{CoreQuery, Value};

use crate::backend::{AsyncFunc, AsyncLockBackend, BoxFuture, LockConnection};
use crate::{AdvisoryLock, Error, session, transaction};

/// Makes async SQLite connections ready for locks.
///
/// SQLite has no locks of its own, so a connection has to be told once, right after it was opened, in a pool where that
/// lets new connections be set up. Without it, the first lock fails with [`Error::Unsupported`], which names this line.
/// `dlock_diesel::SqliteLocksExt` says what appears beside the database, whom a lock keeps apart, and where there are
/// none.
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
/// let lock = conn.advisory_lock("report").acquire().await?;
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
/// AdvisoryLock::new(pool.get().await?, "report").acquire().await?.release().await?;
/// # Ok(()) }
/// ```
///
/// # A wait occupies a thread
///
/// diesel-async runs SQLite on tokio's blocking threads, of which there are 512 unless the runtime is told otherwise. A
/// wait occupies one until it ends. If as many wait as there are threads, the holder cannot go on: keep pools smaller
/// than that, or [poll](AdvisoryLock::poll_every), which occupies none.
pub trait SqliteLocksExt {
    /// Makes this connection ready for locks. Once is enough, and once more does nothing.
    ///
    /// # Examples
    ///
    /// See [`SqliteLocksExt`].
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if the connection cannot be asked, or its file is gone.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the connection may be ready or not; it is fit for use.
    fn enable_advisory_locks(&mut self) -> impl Future<Output = Result<(), Error>> + Send;
}

impl<S: SpawnBlocking + Send> SqliteLocksExt for SyncConnectionWrapper<SqliteConnection, S> {
    async fn enable_advisory_locks(&mut self) -> Result<(), Error> {
        use dlock_diesel::SqliteLocksExt;
        let enabled = self.spawn_blocking(|conn| Ok(conn.enable_advisory_locks()?));
        Ok(Running::new(enabled, None).await?)
    }
}

/// A statement that runs on a blocking thread. If it is dropped, it gives up the request that it is for, and comes to
/// its end.
///
/// diesel-async would wait for the end as well, but before anybody could have given up what is waited for; and it panics
/// on a runtime of one thread.
struct Running<'f, T> {
    future: Pin<Box<dyn Future<Output = T> + Send + 'f>>,
    request: Option<i64>,
    is_polled: bool,
    is_done: bool,
}

impl<'f, T> Running<'f, T> {
    fn new(future: impl Future<Output = T> + Send + 'f, request: Option<i64>) -> Self {
        Self {
            // It is polled to its end in one go, also where it is not its turn.
            future: Box::pin(tokio::task::unconstrained(future)),
            request,
            is_polled: false,
            is_done: false,
        }
    }

    /// Blocks this thread until the statement has ended.
    fn finish(&mut self) -> T {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(output) = self.future.as_mut().poll(&mut context) {
                self.is_done = true;
                return output;
            }
            thread::park();
        }
    }
}

impl<T> Future for Running<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.is_polled = true;
        let poll = self.future.as_mut().poll(context);
        self.is_done = poll.is_ready();
        poll
    }
}

impl<T> Drop for Running<'_, T> {
    fn drop(&mut self) {
        if self.is_done || !self.is_polled {
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

/// Begins a transaction that may write, or a savepoint in the one that is open.
pub(crate) async fn begin_immediate<C: LockConnection>(conn: &mut C) -> QueryResult<()> {
    if session::depth(conn)?.is_some() {
        return C::TransactionManager::begin_transaction(conn).await;
    }
    let mut beginning = Beginning {
        conn,
        has_ended: false,
    };
    let began = Running::new(beginning.conn.batch_execute("BEGIN IMMEDIATE"), None).await;
    beginning.has_ended = true;
    began?;
    session::began_transaction(beginning.conn)
}

/// A transaction that is beginning. If it is dropped, nobody knows whether it has begun: it is rolled back.
struct Beginning<'c, C: LockConnection> {
    conn: &'c mut C,
    has_ended: bool,
}

impl<C: LockConnection> Drop for Beginning<'_, C> {
    fn drop(&mut self) {
        if !self.has_ended {
            session::send_unread(self.conn, "ROLLBACK");
            session::mark_broken(self.conn);
        }
    }
}

impl AsyncLockBackend for Sqlite {
    async fn value<C>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>>
    where
        C: AsyncConnection<Backend = Self>,
    {
        let asked = Asked::new(&statement);
        let query = CoreQuery::<Value>::new(statement);
        asked.settle(Running::new(query.get_result(conn), asked.request()).await)
    }

    async fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Vec<Holder>>
    where
        C: AsyncConnection<Backend = Self>,
    {
        let query = CoreQuery::<sql_types::Text>::new(statement);
        let text: String = Running::new(query.get_result(conn), None)
            .await
            .map_err(explain)?;
        Ok(dlock_core::Sqlite::read_holders(&text))
    }

    /// It blocks this thread for as long as that takes, which is no time for what is sent.
    fn send_unread<C>(conn: &mut C, message: &str) -> bool
    where
        C: AsyncConnection<Backend = Self>,
    {
        Running::new(conn.batch_execute(message), None)
            .finish()
            .is_ok()
    }

    fn transaction<'a, M, F, T, E>(lock: AdvisoryLock<M>, f: F) -> BoxFuture<'a, Result<T, E>>
    where
        M: DerefMut<Target: LockConnection<Backend = Self>> + Send + 'a,
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<Error> + Send + 'a,
    {
        Box::pin(transaction::with_lock_around_writers(lock, f))
    }
}
