//! What the tests ask of a server, from another connection and in plain SQL, and tasks that wait for locks.

use std::sync::Arc;

use diesel::{Connection, MysqlConnection, PgConnection};
use diesel_async::pooled_connection::PoolableConnection;
use diesel_async::{AsyncConnection, TransactionManager};
use dlock_core::PostgresKey;
use dlock_diesel_async::{Error, LockKey};
use dlock_tests::{
    AsyncTestConnection, Kind, PATIENCE, Proxy, Server, TestConnection, unique_key, wait_for,
};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;

/// An async connection whose observer can take locks of the sync crate.
pub(crate) trait LockTest:
    AsyncTestConnection<Observer: dlock_diesel::LockConnection>
{
    /// Frees every lock of this session, behind the back of its guards.
    const RELEASE_ALL: &str = match Self::KIND {
        Kind::Postgres => "SELECT pg_advisory_unlock_all()",
        Kind::Sqlite => panic!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => "DO RELEASE_ALL_LOCKS()",
    };
}

impl<C: AsyncTestConnection<Observer: dlock_diesel::LockConnection>> LockTest for C {}

/// The key as PostgreSQL's functions take it, or MySQL's quoted name.
fn literal(kind: Kind, key: &LockKey) -> String {
    match kind {
        Kind::Postgres => match key.to_postgres().expect("a valid key") {
            PostgresKey::BigInt(number) => format!("'{number}'::bigint"),
            PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
        },
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => format!("'{}'", key.to_mysql().expect("a valid key")),
    }
}

/// The condition for the rows of a key in `pg_locks`.
pub(crate) fn pg_locks_of(key: &LockKey) -> String {
    let (classid, objid, objsubid) = match key.to_postgres().expect("a valid key") {
        PostgresKey::BigInt(key) => ((key >> 32) as u32, key as u32, 1),
        PostgresKey::Pair(first, second) => (first as u32, second as u32, 2),
    };
    format!(
        "locktype = 'advisory' AND classid = {classid} AND objid = {objid} AND objsubid = {objsubid} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
}

/// The sessions that hold the lock, in whatever mode.
pub(crate) fn holders<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) -> Vec<i64> {
    let key = key.into();
    let ids = match O::KIND {
        Kind::Postgres => observer.text(&format!(
            "SELECT string_agg(DISTINCT pid::text, ' ') FROM pg_locks WHERE granted AND {}",
            pg_locks_of(&key)
        )),
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => observer.text(&format!(
            "SELECT CAST(IS_USED_LOCK({}) AS CHAR)",
            literal(O::KIND, &key)
        )),
    };
    let ids = ids.unwrap_or_default();
    let parse = |id: &str| id.parse().expect("a number");
    let mut ids: Vec<i64> = ids.split_whitespace().map(parse).collect();
    ids.sort_unstable();
    ids
}

/// Takes the lock with plain SQL, if it is free.
pub(crate) fn try_lock<O: TestConnection>(conn: &mut O, key: impl Into<LockKey>) -> bool {
    let key = literal(O::KIND, &key.into());
    let sql = match O::KIND {
        Kind::Postgres => format!("SELECT pg_try_advisory_lock({key})"),
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => format!("SELECT GET_LOCK({key}, 0)"),
    };
    conn.number(&sql) == Some(1)
}

/// Releases with plain SQL what [`try_lock`] took.
#[track_caller]
pub(crate) fn unlock<O: TestConnection>(conn: &mut O, key: impl Into<LockKey>) {
    let key = literal(O::KIND, &key.into());
    let sql = match O::KIND {
        Kind::Postgres => format!("SELECT pg_advisory_unlock({key})"),
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => format!("SELECT RELEASE_LOCK({key})"),
    };
    assert_eq!(conn.number(&sql), Some(1), "the lock was held");
}

/// Another session holds the lock, alone, and the observer cannot have it.
#[track_caller]
pub(crate) fn assert_held_by<O: TestConnection>(
    observer: &mut O,
    key: impl Into<LockKey>,
    backend_id: i64,
) {
    let key = key.into();
    assert_ne!(observer.backend_id(), backend_id, "ask another connection");
    assert_eq!(holders(observer, &key), [backend_id], "holders of {key}");
    assert!(!try_lock(observer, &key), "{key} is held");
}

/// Nobody holds the lock, and the observer can have it.
#[track_caller]
pub(crate) fn assert_free<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) {
    let key = key.into();
    let none: [i64; 0] = [];
    assert_eq!(holders(observer, &key), none, "holders of {key}");
    assert!(try_lock(observer, &key), "{key} is free");
    unlock(observer, &key);
}

/// The lock becomes free: what a drop sends takes a moment, and so does the end of a session.
#[track_caller]
pub(crate) fn wait_until_free<O: TestConnection>(observer: &mut O, key: impl Into<LockKey>) {
    let key = key.into();
    wait_for(format!("{key} to be free"), || {
        holders(observer, &key).is_empty()
    });
    assert_free(observer, &key);
}

/// The session holds no lock at all.
pub(crate) async fn assert_holds_nothing<C: LockTest>(conn: &mut C, observer: &mut C::Observer) {
    let backend_id = conn.backend_id().await;
    let held = match C::KIND {
        Kind::Postgres => observer.number(&format!(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {backend_id}"
        )),
        // How many there were.
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => {
            conn.number("SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)")
                .await
        }
    };
    assert_eq!(held, Some(0), "locks that session {backend_id} holds");
}

/// Whether a transaction is open on the server, aborted or not.
pub(crate) async fn in_transaction<C: LockTest>(conn: &mut C, observer: &mut C::Observer) -> bool {
    match C::KIND {
        Kind::Postgres => {
            let id = conn.backend_id().await;
            let sql = format!("SELECT state FROM pg_stat_activity WHERE pid = {id}");
            observer.text(&sql).as_deref() != Some("idle")
        }
        // Refused in a transaction, with error 1568.
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => conn
            .batch_execute("SET TRANSACTION READ WRITE")
            .await
            .is_err(),
    }
}

/// The session is in step, in no transaction, and holds no lock; Diesel thinks so, too.
pub(crate) async fn assert_clean<C: LockTest>(conn: &mut C, observer: &mut C::Observer) {
    assert!(!is_broken(conn), "the connection counts as broken");
    assert_eq!(depth(conn), 0, "Diesel's transactions");
    for number in [4711, 4712] {
        let answer = conn.number(&format!("SELECT {number}")).await;
        assert_eq!(answer, Some(number), "the connection is in step");
    }
    assert!(
        !in_transaction(conn, observer).await,
        "a transaction is open"
    );
    assert_holds_nothing(conn, observer).await;
}

/// What pools ask of a connection: whether to discard it.
pub(crate) fn is_broken<C: PoolableConnection>(conn: &mut C) -> bool {
    PoolableConnection::is_broken(conn)
}

/// How many transactions Diesel thinks are open.
pub(crate) fn depth<C: AsyncConnection>(conn: &mut C) -> u32 {
    C::TransactionManager::transaction_manager_status_mut(conn)
        .transaction_depth()
        .expect("the connection is not broken")
        .map_or(0, u32::from)
}

/// Begins a transaction by hand, in the transaction that is open if there is one.
pub(crate) async fn begin<C: AsyncConnection>(conn: &mut C) {
    let begun = C::TransactionManager::begin_transaction(conn).await;
    begun.expect("a transaction begins");
}

/// Commits what [`begin`] began.
pub(crate) async fn commit<C: AsyncConnection>(conn: &mut C) {
    let committed = C::TransactionManager::commit_transaction(conn).await;
    committed.expect("the transaction commits");
}

/// Rolls back what [`begin`] began.
pub(crate) async fn roll_back<C: AsyncConnection>(conn: &mut C) {
    let rolled_back = C::TransactionManager::rollback_transaction(conn).await;
    rolled_back.expect("the transaction rolls back");
}

/// A connection by way of a proxy that has counted nothing yet, and counts nothing that has not been asked for.
pub(crate) async fn open_counted<C: LockTest>(server: &Server) -> (C, Proxy) {
    let proxy = Proxy::start(server);
    let mut conn = C::open_url(proxy.url()).await;
    // tokio-postgres may still be closing the statements with which the connection was set up: this comes after them.
    conn.execute_sql("SELECT 1").await;
    proxy.reset();
    (conn, proxy)
}

/// Ends another session, and waits until it is gone.
#[track_caller]
pub(crate) fn kill<O: TestConnection>(observer: &mut O, backend_id: i64) {
    observer.kill(backend_id);
    wait_for("the end of the session", || {
        !observer.is_connected(backend_id)
    });
}

/// A connection that outlives a task that panics.
pub(crate) type Shared<C> = Arc<Mutex<C>>;

/// Shares a connection, and tells its session.
pub(crate) async fn share<C: LockTest>(mut conn: C) -> (Shared<C>, i64) {
    let id = conn.backend_id().await;
    (Arc::new(Mutex::new(conn)), id)
}

/// What happens on another connection, in a task of its own.
pub(crate) struct Task<T> {
    pub(crate) id: i64,
    handle: JoinHandle<T>,
    go_on: Arc<Notify>,
}

/// The task's end of [`Task`].
pub(crate) struct Stage(Arc<Notify>);

impl Stage {
    /// Waits until the test says that it may go on.
    pub(crate) async fn pause(&self) {
        let go_on = tokio::time::timeout(PATIENCE, self.0.notified()).await;
        go_on.expect("the test goes on in time");
    }
}

/// Runs `work` in a task with a connection of its own.
pub(crate) async fn in_task<C, T, F>(server: &Server, work: impl FnOnce(C, Stage) -> F) -> Task<T>
where
    C: LockTest,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    on_connection(C::open(server).await, work).await
}

/// Runs `work` in a task with this connection.
pub(crate) async fn on_connection<C, T, F>(mut conn: C, work: impl FnOnce(C, Stage) -> F) -> Task<T>
where
    C: LockTest,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let id = conn.backend_id().await;
    Task::spawn(id, |stage| work(conn, stage))
}

impl<T: Send + 'static> Task<T> {
    /// Runs `work` on the connection with this session.
    pub(crate) fn spawn<F>(id: i64, work: impl FnOnce(Stage) -> F) -> Self
    where
        F: Future<Output = T> + Send + 'static,
    {
        let go_on = Arc::new(Notify::new());
        Task {
            id,
            handle: tokio::spawn(work(Stage(Arc::clone(&go_on)))),
            go_on,
        }
    }

    /// Waits until the server shows that it waits for a lock.
    #[track_caller]
    pub(crate) fn waits<O: TestConnection>(&self, observer: &mut O) {
        wait_for(format!("session {} to wait for a lock", self.id), || {
            assert!(!self.is_finished(), "session {} does not wait", self.id);
            observer.is_waiting(self.id)
        });
    }

    /// Waits until the server shows that it alone has the lock.
    #[track_caller]
    pub(crate) fn holds<O: TestConnection>(&self, observer: &mut O, key: impl Into<LockKey>) {
        let key = key.into();
        wait_for(format!("session {} to have {key}", self.id), || {
            holders(observer, &key) == [self.id]
        });
        assert_held_by(observer, key, self.id);
    }

    /// Lets the task go on.
    pub(crate) fn go_on(&self) {
        self.go_on.notify_one();
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
        let result = tokio::time::timeout(PATIENCE, self.handle).await;
        match result.expect("the end of the task") {
            Ok(value) => value,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => panic!("{error}"),
            },
        }
    }
}

/// Panics, without a message on standard error.
pub(crate) fn panic_quietly() -> ! {
    std::panic::resume_unwind(Box::new("as asked"))
}

/// The error of an application.
#[derive(Debug)]
pub(crate) enum AppError {
    /// One of its own.
    Own,
    /// The lock's, or the database's.
    Lock(Error),
}

impl From<Error> for AppError {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<diesel::result::Error> for AppError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Lock(error.into())
    }
}

/// A table of the test's own, of different numbers `n`. Dropped with this.
#[derive(Clone, Debug)]
pub(crate) struct Table(Arc<Owner>);

#[derive(Debug)]
struct Owner {
    server: Server,
    name: String,
}

impl Table {
    /// An empty one.
    pub(crate) fn new(server: &Server) -> Self {
        let name = unique_key("t").replace(['/', '-'], "_");
        let table = Self(Arc::new(Owner {
            server: server.clone(),
            name,
        }));
        let name = table.name();
        table.prepare(&format!(
            "CREATE TABLE {name} (n BIGINT NOT NULL, UNIQUE (n))"
        ));
        table
    }

    /// One with a single row, to count in.
    pub(crate) fn counter(server: &Server) -> Self {
        let table = Self::new(server);
        table.prepare(&table.insert(0));
        table
    }

    fn prepare(&self, sql: &str) {
        match self.0.server.kind {
            Kind::Postgres => PgConnection::open(&self.0.server).execute_sql(sql),
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => MysqlConnection::open(&self.0.server).execute_sql(sql),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// The statement that inserts a row. It fails if there is such a row, which on PostgreSQL aborts the transaction.
    pub(crate) fn insert(&self, n: i64) -> String {
        format!("INSERT INTO {} (n) VALUES ({n})", self.name())
    }

    /// How many rows `observer` sees.
    #[track_caller]
    pub(crate) fn rows<O: TestConnection>(&self, observer: &mut O) -> i64 {
        let count = observer.number(&format!("SELECT COUNT(*) FROM {}", self.name()));
        count.expect("a count")
    }

    /// The value of a [`counter`](Self::counter).
    #[track_caller]
    pub(crate) fn value<O: TestConnection>(&self, observer: &mut O) -> i64 {
        let value = observer.number(&format!("SELECT n FROM {}", self.name()));
        value.expect("a value")
    }

    /// Reads a counter, and then writes what it was plus one: if two do that at once, an update is lost.
    pub(crate) async fn increment<C: LockTest>(&self, conn: &mut C) -> diesel::QueryResult<()> {
        let value = conn.number(&format!("SELECT n FROM {}", self.name())).await;
        let next = value.expect("a value") + 1;
        // Gives others a chance to come in between.
        tokio::task::yield_now().await;
        conn.batch_execute(&format!("UPDATE {} SET n = {next}", self.name()))
            .await
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // With a limit, for after a failure somebody may still use it.
        let name = &self.name;
        let url = &self.server.url;
        let drop_table = format!("DROP TABLE {name}");
        let _ = match self.server.kind {
            Kind::Postgres => {
                try_execute::<PgConnection>(url, &["SET lock_timeout = '2s'", &drop_table])
            }
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                try_execute::<MysqlConnection>(url, &["SET lock_wait_timeout = 2", &drop_table])
            }
        };
    }
}

fn try_execute<O: TestConnection + Connection>(url: &str, statements: &[&str]) -> Option<()> {
    let mut conn = O::establish(url).ok()?;
    statements
        .iter()
        .try_for_each(|sql| conn.batch_execute(sql).ok())
}
