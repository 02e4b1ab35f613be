//! What the tests ask of a server, from another connection and in plain SQL: the code under test has no say in it.

use std::any::Any;
use std::panic::resume_unwind;
use std::thread::{self, JoinHandle};

use diesel::connection::TransactionManager;
use diesel::dsl::sql;
use diesel::r2d2::{self, CustomizeConnection, NopConnectionCustomizer, R2D2Connection};
use diesel::sql_types::BigInt;
use diesel::{MysqlConnection, PgConnection, QueryResult, RunQueryDsl, SqliteConnection};
use dlock_core::PostgresKey;
use dlock_diesel::{EnableAdvisoryLocks, Error, LockConnection, LockKey};
use dlock_tests::{Kind, Server, TestConnection, unique_key, wait_for};

use crate::observe::sqlite_holder_ids;

/// A connection that can take locks, be looked at, and be pooled.
pub(crate) trait LockTest: TestConnection + LockConnection + R2D2Connection {
    /// As [`number`](TestConnection::number), but returns the error.
    fn try_number(&mut self, query: &str) -> QueryResult<i64>;

    /// What a pool does with new connections.
    fn customizer() -> Box<dyn CustomizeConnection<Self, r2d2::Error>> {
        Box::new(NopConnectionCustomizer)
    }
}

impl LockTest for PgConnection {
    fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self)
    }
}

impl LockTest for MysqlConnection {
    fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self)
    }
}

impl LockTest for SqliteConnection {
    fn try_number(&mut self, query: &str) -> QueryResult<i64> {
        sql::<BigInt>(query).get_result(self)
    }

    fn customizer() -> Box<dyn CustomizeConnection<Self, r2d2::Error>> {
        Box::new(ReadyForLocks)
    }
}

/// Locks, and patience with who writes.
#[derive(Debug)]
struct ReadyForLocks;

impl CustomizeConnection<SqliteConnection, r2d2::Error> for ReadyForLocks {
    fn on_acquire(&self, conn: &mut SqliteConnection) -> Result<(), r2d2::Error> {
        conn.execute_sql("PRAGMA busy_timeout = 20000");
        EnableAdvisoryLocks.on_acquire(conn)
    }
}

/// The key as SQLite's number, PostgreSQL's `bigint`, or MySQL's quoted name.
fn literal(kind: Kind, key: &str) -> String {
    let key = LockKey::from(key);
    match kind {
        Kind::Postgres => match key.to_postgres().expect("a valid key") {
            PostgresKey::BigInt(number) => format!("'{number}'::bigint"),
            other => panic!("text becomes a bigint, not {other:?}"),
        },
        Kind::Mysql => format!("'{}'", key.to_mysql().expect("a valid key")),
        Kind::Sqlite => key.to_sqlite().expect("a valid key").to_string(),
    }
}

/// The sessions that hold the lock, in whatever mode.
pub(crate) fn holders<C: TestConnection>(observer: &mut C, key: &str) -> Vec<i64> {
    if C::KIND == Kind::Sqlite {
        let observer = (observer as &mut dyn Any).downcast_mut();
        return sqlite_holder_ids(observer.expect("BUG: its kind is SQLite"), &key.into());
    }
    let key = literal(C::KIND, key);
    let ids = match C::KIND {
        Kind::Postgres => observer.text(&format!(
            "SELECT string_agg(pid::text, ' ' ORDER BY pid) FROM pg_locks \
             WHERE locktype = 'advisory' AND objsubid = 1 AND granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND ((classid::bigint << 32) | objid::bigint) = {key}"
        )),
        Kind::Mysql => observer.text(&format!("SELECT CAST(IS_USED_LOCK({key}) AS CHAR)")),
        Kind::Sqlite => unreachable!("BUG: asked above"),
    };
    let ids = ids.unwrap_or_default();
    let parse = |id: &str| id.parse().expect("a number");
    ids.split_whitespace().map(parse).collect()
}

/// Takes the lock with plain SQL, if it is free.
pub(crate) fn try_lock<C: TestConnection>(conn: &mut C, key: &str) -> bool {
    let key = literal(C::KIND, key);
    let sql = match C::KIND {
        Kind::Postgres => format!("SELECT pg_try_advisory_lock({key})"),
        Kind::Mysql => format!("SELECT GET_LOCK({key}, 0)"),
        // Under a number that dlock never gives to a request.
        Kind::Sqlite => format!("SELECT dlock_acquire({key}, 1, 0, -{key})"),
    };
    conn.number(&sql) == Some(1)
}

/// Releases with plain SQL what [`try_lock`] took.
#[track_caller]
pub(crate) fn unlock<C: TestConnection>(conn: &mut C, key: &str) {
    let key = literal(C::KIND, key);
    let sql = match C::KIND {
        Kind::Postgres => format!("SELECT pg_advisory_unlock({key})"),
        Kind::Mysql => format!("SELECT RELEASE_LOCK({key})"),
        Kind::Sqlite => format!("SELECT dlock_release({key}, -{key})"),
    };
    assert_eq!(conn.number(&sql), Some(1), "the lock was held");
}

/// Another session holds the lock, alone, and the observer cannot have it.
#[track_caller]
pub(crate) fn assert_held_by<C: TestConnection>(observer: &mut C, key: &str, backend_id: i64) {
    assert_ne!(observer.backend_id(), backend_id, "ask another connection");
    assert_eq!(holders(observer, key), [backend_id], "holders of {key}");
    assert!(!try_lock(observer, key), "{key} is held");
}

const NOBODY: [i64; 0] = [];

/// Nobody holds the lock, and the observer can have it.
#[track_caller]
pub(crate) fn assert_free<C: TestConnection>(observer: &mut C, key: &str) {
    assert_eq!(holders(observer, key), NOBODY, "holders of {key}");
    assert!(try_lock(observer, key), "{key} is free");
    unlock(observer, key);
}

/// The lock becomes free: a server needs a moment to notice that a session has ended.
#[track_caller]
pub(crate) fn wait_until_free<C: TestConnection>(observer: &mut C, key: &str) {
    wait_for(format!("{key} to be free"), || {
        holders(observer, key).is_empty()
    });
    assert_free(observer, key);
}

/// The session holds no lock at all.
#[track_caller]
pub(crate) fn assert_holds_nothing<C: TestConnection>(conn: &mut C, observer: &mut C) {
    let backend_id = conn.backend_id();
    assert_ne!(observer.backend_id(), backend_id, "ask another connection");
    let held = match C::KIND {
        Kind::Postgres => observer.number(&format!(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {backend_id}"
        )),
        // How many there were.
        Kind::Mysql => conn.number("SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)"),
        Kind::Sqlite => conn.number("SELECT dlock_release_all()"),
    };
    assert_eq!(held, Some(0), "locks that session {backend_id} holds");
}

/// Whether a transaction is open on the server, aborted or not.
pub(crate) fn in_transaction<C: TestConnection>(conn: &mut C, observer: &mut C) -> bool {
    match C::KIND {
        Kind::Postgres => {
            let id = conn.backend_id();
            let sql = format!("SELECT state FROM pg_stat_activity WHERE pid = {id}");
            observer.text(&sql).as_deref() != Some("idle")
        }
        // Refused in a transaction, with error 1568.
        Kind::Mysql => conn.batch_execute("SET TRANSACTION READ WRITE").is_err(),
        // Refused in a transaction.
        Kind::Sqlite => conn.batch_execute("BEGIN; ROLLBACK").is_err(),
    }
}

/// The session works, in no transaction, and holds no lock; Diesel thinks so, too.
#[track_caller]
pub(crate) fn assert_clean<C: TestConnection>(conn: &mut C, observer: &mut C) {
    // First, for on PostgreSQL the next query mends what Diesel thinks.
    assert!(!is_broken(conn), "the connection counts as broken");
    assert_eq!(depth(conn), 0, "Diesel's transactions");
    assert_eq!(conn.number("SELECT 1"), Some(1), "the connection works");
    assert!(!in_transaction(conn, observer), "a transaction is open");
    assert_holds_nothing(conn, observer);
}

/// Whether a pool would discard the connection.
pub(crate) fn is_broken<C: diesel::Connection>(conn: &mut C) -> bool {
    C::TransactionManager::is_broken_transaction_manager(conn)
}

/// How many transactions Diesel thinks are open.
#[track_caller]
pub(crate) fn depth<C: diesel::Connection>(conn: &mut C) -> u32 {
    C::TransactionManager::transaction_manager_status_mut(conn)
        .transaction_depth()
        .expect("the connection is not broken")
        .map_or(0, u32::from)
}

/// Begins a transaction by hand, in the transaction that is open if there is one.
#[track_caller]
pub(crate) fn begin<C: diesel::Connection>(conn: &mut C) {
    C::TransactionManager::begin_transaction(conn).expect("a transaction begins");
}

/// Commits what [`begin`] began.
#[track_caller]
pub(crate) fn commit<C: diesel::Connection>(conn: &mut C) {
    C::TransactionManager::commit_transaction(conn).expect("the transaction commits");
}

/// Rolls back what [`begin`] began.
#[track_caller]
pub(crate) fn roll_back<C: diesel::Connection>(conn: &mut C) {
    C::TransactionManager::rollback_transaction(conn).expect("the transaction rolls back");
}

/// Runs `f` in a thread, on a connection of its own, and returns when the server shows that it waits for a lock.
#[track_caller]
pub(crate) fn waiting<C: TestConnection, T: Send + 'static>(
    server: &Server,
    observer: &mut C,
    f: impl FnOnce(&mut C) -> T + Send + 'static,
) -> (i64, JoinHandle<T>) {
    let mut conn = C::open(server);
    let backend_id = conn.backend_id();
    let thread = thread::spawn(move || f(&mut conn));
    wait_for("a waiter in the server's queue", || {
        observer.is_waiting(backend_id)
    });
    (backend_id, thread)
}

/// Ends another session, and waits until it is gone.
#[track_caller]
pub(crate) fn kill<C: TestConnection>(observer: &mut C, backend_id: i64) {
    observer.kill(backend_id);
    wait_for("the end of the session", || {
        !observer.is_connected(backend_id)
    });
}

/// Panics, without a message on standard error.
pub(crate) fn panic_quietly() -> ! {
    resume_unwind(Box::new("as asked"))
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
#[derive(Debug)]
pub(crate) struct Table<'s> {
    server: &'s Server,
    name: String,
}

impl<'s> Table<'s> {
    /// An empty one.
    pub(crate) fn new(server: &'s Server) -> Self {
        let name = unique_key("t").replace(['/', '-'], "_");
        let table = Self { server, name };
        let name = &table.name;
        table.prepare(&format!(
            "CREATE TABLE {name} (n BIGINT NOT NULL, UNIQUE (n))"
        ));
        table
    }

    /// One with a single row, to count in.
    pub(crate) fn counter(server: &'s Server) -> Self {
        let table = Self::new(server);
        table.prepare(&table.insert(0));
        table
    }

    fn prepare(&self, sql: &str) {
        match self.server.kind {
            Kind::Postgres => PgConnection::open(self.server).execute_sql(sql),
            Kind::Mysql => MysqlConnection::open(self.server).execute_sql(sql),
            Kind::Sqlite => SqliteConnection::open(self.server).execute_sql(sql),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The statement that inserts a row. It fails if there is such a row, which on PostgreSQL aborts the transaction.
    pub(crate) fn insert(&self, n: i64) -> String {
        format!("INSERT INTO {} (n) VALUES ({n})", self.name)
    }

    /// How many rows `conn` sees.
    #[track_caller]
    pub(crate) fn rows<C: TestConnection>(&self, conn: &mut C) -> i64 {
        let count = conn.number(&format!("SELECT COUNT(*) FROM {}", self.name));
        count.expect("a count")
    }

    /// The value of a [`counter`](Self::counter).
    #[track_caller]
    pub(crate) fn value<C: TestConnection>(&self, conn: &mut C) -> i64 {
        let value = conn.number(&format!("SELECT n FROM {}", self.name));
        value.expect("a value")
    }

    /// Reads a counter, and then writes what it was plus one: if two do that at once, an update is lost.
    pub(crate) fn increment<C: LockTest>(&self, conn: &mut C) -> QueryResult<()> {
        let next = conn.try_number(&format!("SELECT n FROM {}", self.name))? + 1;
        conn.batch_execute(&format!("UPDATE {} SET n = {next}", self.name))
    }
}

impl Drop for Table<'_> {
    fn drop(&mut self) {
        // With a limit, for after a failure somebody may still use it.
        let name = &self.name;
        let _ = match self.server.kind {
            Kind::Postgres => try_execute::<PgConnection>(
                &self.server.url,
                &["SET lock_timeout = '2s'", &format!("DROP TABLE {name}")],
            ),
            Kind::Mysql => try_execute::<MysqlConnection>(
                &self.server.url,
                &["SET lock_wait_timeout = 2", &format!("DROP TABLE {name}")],
            ),
            Kind::Sqlite => try_execute::<SqliteConnection>(
                &self.server.url,
                &["PRAGMA busy_timeout = 2000", &format!("DROP TABLE {name}")],
            ),
        };
    }
}

fn try_execute<C: TestConnection>(url: &str, statements: &[&str]) -> Option<()> {
    let mut conn = C::establish(url).ok()?;
    statements
        .iter()
        .try_for_each(|sql| conn.batch_execute(sql).ok())
}
