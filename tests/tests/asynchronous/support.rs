//! Async connections, and tasks that wait for locks.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use diesel::dsl::sql;
use diesel::sql_types::BigInt;
use diesel::{QueryResult, SqliteConnection};
use diesel_async::pooled_connection::PoolableConnection;
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl};
use dlock_tests::{AsyncTestConnection, PATIENCE, Server, TestConnection};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinHandle;

pub(crate) use tokio::task::yield_now;

pub(crate) use crate::both::app_error::{AppError, panic_quietly};
pub(crate) use crate::both::connection::*;
pub(crate) use crate::both::observe::*;
pub(crate) use crate::both::table::Table;
pub(crate) use crate::both::user::TestUser;

/// An async connection whose observer can take locks of the sync crate.
pub(crate) trait LockTest:
    AsyncTestConnection<Observer: dlock_diesel::LockConnection>
{
    /// Frees every lock of this session, behind the back of its guards.
    const RELEASE_ALL: &str = release_all(Self::KIND);

    /// A connection that looks at the others, and blocks the thread meanwhile.
    #[track_caller]
    fn observer(server: &Server) -> Self::Observer {
        Self::Observer::open(server)
    }

    /// What `dlock_diesel_async::Holder` calls the session.
    fn holder_id(backend_id: i64) -> i64 {
        Self::Observer::holder_id(backend_id)
    }

    /// As [`number`](AsyncTestConnection::number), but returns the error.
    fn try_number(&mut self, query: &str) -> impl Future<Output = QueryResult<i64>> + Send;
}

impl LockTest for AsyncPgConnection {
    async fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self).await
    }
}

impl LockTest for AsyncMysqlConnection {
    async fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self).await
    }
}

impl LockTest for SyncConnectionWrapper<SqliteConnection> {
    async fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self).await
    }
}

/// What pools ask of a connection: whether to discard it.
pub(crate) fn is_broken<C: PoolableConnection>(conn: &mut C) -> bool {
    PoolableConnection::is_broken(conn)
}

/// A connection that outlives a task that panics.
pub(crate) type Shared<C> = Arc<Mutex<C>>;

/// Shares a connection, and tells its session.
pub(crate) async fn share<C: LockTest>(mut conn: C) -> (Shared<C>, i64) {
    let id = conn.backend_id().await;
    (Arc::new(Mutex::new(conn)), id)
}

/// Runs `work` in another task.
pub(crate) async fn elsewhere<T, F>(work: impl FnOnce() -> F) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    join(tokio::spawn(work())).await
}

/// What the task returns.
async fn join<T>(task: JoinHandle<T>) -> T {
    let result = tokio::time::timeout(PATIENCE, task).await;
    match result.expect("the end of the task") {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("{error}"),
        },
    }
}

/// What happens on another connection, in a task of its own.
pub(crate) struct Background<T> {
    pub(crate) id: i64,
    handle: JoinHandle<T>,
    // To be looked at in futures that are sent.
    said: std::sync::Mutex<Receiver<String>>,
    told: Arc<Semaphore>,
}

/// The task's end of [`Background`].
pub(crate) struct Stage {
    say: Sender<String>,
    go_on: Arc<Semaphore>,
}

impl Stage {
    /// Tells the test how far it has come.
    pub(crate) fn say(&self, what: impl Into<String>) {
        // A test that has failed does not listen any more.
        let _ = self.say.send(what.into());
    }

    /// Waits until the test says that it may go on.
    pub(crate) async fn pause(&self) {
        let go_on = tokio::time::timeout(PATIENCE, self.go_on.acquire()).await;
        let go_on = go_on.expect("the test goes on in time");
        go_on.expect("BUG: it is never closed").forget();
    }
}

/// Runs `work` with a connection of its own.
pub(crate) async fn in_background<C, T, F>(
    server: &Server,
    work: impl FnOnce(C, Stage) -> F,
) -> Background<T>
where
    C: LockTest,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    on_connection(C::open(server).await, work).await
}

/// Runs `work` with this connection.
pub(crate) async fn on_connection<C, T, F>(
    mut conn: C,
    work: impl FnOnce(C, Stage) -> F,
) -> Background<T>
where
    C: LockTest,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let id = conn.backend_id().await;
    Background::spawn(id, |stage| work(conn, stage))
}

impl<T: Send + 'static> Background<T> {
    /// Runs `work` on the connection with this session.
    pub(crate) fn spawn<F>(id: i64, work: impl FnOnce(Stage) -> F) -> Self
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (say, said) = channel();
        let told = Arc::new(Semaphore::new(0));
        let go_on = Arc::clone(&told);
        Background {
            id,
            handle: tokio::spawn(work(Stage { say, go_on })),
            said: said.into(),
            told,
        }
    }

    /// Waits until the task says `expected`.
    #[track_caller]
    pub(crate) fn says(&self, expected: &str) {
        let said = self.said.lock().expect("no panic while it is locked");
        assert_eq!(said.recv_timeout(PATIENCE).as_deref(), Ok(expected));
    }

    /// Lets the task go on.
    pub(crate) fn go_on(&self) {
        self.told.add_permits(1);
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Aborts the task and waits until it is gone.
    pub(crate) async fn abort(self) {
        self.handle.abort();
        let result = tokio::time::timeout(PATIENCE, self.handle).await;
        let result = result.expect("the end of the task").map(drop);
        assert!(result.expect_err("it is aborted").is_cancelled());
    }

    /// Waits until the task has panicked.
    pub(crate) async fn panics(self) {
        let result = tokio::time::timeout(PATIENCE, self.handle).await;
        let result = result.expect("the end of the task").map(drop);
        assert!(result.expect_err("it panics").is_panic());
    }

    /// What the task returns.
    pub(crate) async fn join(self) -> T {
        join(self.handle).await
    }
}
