//! What async connections to SQLite need. Its locks live in this process, so a dropped future gives them up without
//! waiting.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use diesel::result::Error as DieselError;
use diesel::sql_types::BigInt;
use diesel::sqlite::{Sqlite, SqliteConnection};
use diesel::{QueryResult, QueryableByName};
use diesel_async::sync_connection_wrapper::{SpawnBlocking, SyncConnectionWrapper};
use diesel_async::{AsyncConnection, RunQueryDsl, TransactionManager};
use dlock_core::proto::Request;
use dlock_diesel::shared::{forget, give_up};
use tokio::runtime::{Handle, RuntimeFlavor};

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

/// A call of diesel-async's transaction manager that ends even if it is dropped.
///
/// diesel-async itself waits for the end of a statement that is dropped, and lets the other tasks of the thread go on
/// elsewhere. On a runtime with one thread it panics instead, and so it does in a `LocalSet`.
pub(crate) async fn to_the_end<T>(future: impl Future<Output = T> + Send) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::CurrentThread) => Running::new(future, None).await,
        _ => future.await,
    }
}

/// How long one statement waits for another writer. If the future is dropped meanwhile, this is how long the drop
/// blocks its thread, on which the other writer may have to go on.
const SLICE_MILLIS: i64 = 20;

/// Begins a transaction that writes from the start, or a savepoint if a transaction is open. It waits as long as the
/// connection's `busy_timeout` says.
pub(crate) async fn begin_immediate<C>(conn: &mut C) -> QueryResult<()>
where
    C: AsyncConnection<Backend = Sqlite>,
{
    if session::session(conn)?.depth.is_some() {
        return to_the_end(C::TransactionManager::begin_transaction(conn)).await;
    }
    let asked = diesel::sql_query("PRAGMA busy_timeout").get_result(conn);
    let BusyTimeout { timeout } = Running::new(asked, None).await?;
    let mut beginning = Beginning {
        conn,
        busy_timeout: timeout,
        armed: true,
    };
    beginning.wait().await?;
    session::began_transaction(beginning.conn)
}

#[derive(QueryableByName)]
struct BusyTimeout {
    /// In milliseconds.
    #[diesel(sql_type = BigInt)]
    timeout: i64,
}

/// A transaction that is beginning. If it is dropped, or fails with something left to undo, nobody knows whether the
/// transaction has begun, so it is rolled back.
struct Beginning<'c, C: LockConnection> {
    conn: &'c mut C,
    /// The user's, in milliseconds. Until the transaction has begun, that of a slice takes its place.
    busy_timeout: i64,
    armed: bool,
}

impl<C: LockConnection> Beginning<'_, C> {
    async fn wait(&mut self) -> QueryResult<()> {
        let begin = Instant::now();
        let limit = Duration::from_millis(self.busy_timeout.try_into().unwrap_or(0));
        let (set, put_back) = match self.is_sliced() {
            true => (busy_timeout(SLICE_MILLIS), busy_timeout(self.busy_timeout)),
            false => (String::new(), String::new()),
        };
        let again = format!("BEGIN IMMEDIATE; {put_back}");
        let mut began = self.run(&format!("{set}; {again}")).await;
        while let Err(error) = began {
            let is_busy = is_busy(&error);
            if is_busy && begin.elapsed() < limit {
                began = self.run(&again).await;
                continue;
            }
            if !is_busy {
                // Where it has begun. Otherwise this is an error, too.
                let _ = self.run("ROLLBACK").await;
            }
            self.run(&put_back).await?;
            self.armed = false;
            return Err(error);
        }
        self.armed = false;
        Ok(())
    }

    /// Otherwise the user's is as short as a slice, and stays.
    fn is_sliced(&self) -> bool {
        self.busy_timeout > SLICE_MILLIS
    }

    async fn run(&mut self, sql: &str) -> QueryResult<()> {
        Running::new(self.conn.batch_execute(sql), None).await
    }
}

impl<C: LockConnection> Drop for Beginning<'_, C> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        C::Backend::send_unread(self.conn, "ROLLBACK");
        if self.is_sliced() {
            C::Backend::send_unread(self.conn, &busy_timeout(self.busy_timeout));
        }
        session::mark_broken(self.conn);
    }
}

fn busy_timeout(millis: i64) -> String {
    format!("PRAGMA busy_timeout = {millis}")
}

/// Diesel has no kind for it. The text is SQLite's for SQLITE_BUSY, whatever the language; SQLITE_LOCKED has another.
fn is_busy(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(_, told) if told.message() == "database is locked")
}
