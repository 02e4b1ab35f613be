//! Sync connections, and threads that wait for locks.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use diesel::connection::TransactionManager;
use diesel::dsl::sql;
use diesel::r2d2::{self, CustomizeConnection, NopConnectionCustomizer, R2D2Connection};
use diesel::sql_types::BigInt;
use diesel::{MysqlConnection, PgConnection, QueryResult, RunQueryDsl, SqliteConnection};
use dlock_core::proto::Dialect;
use dlock_diesel::{EnableAdvisoryLocks, LockBackend, LockConnection};
use dlock_tests::{PATIENCE, Server, TestConnection, wait_for};

pub(crate) use crate::both::app_error::{AppError, panic_quietly};
pub(crate) use crate::both::connection::*;
pub(crate) use crate::both::observe::*;
pub(crate) use crate::both::table::Table;
pub(crate) use crate::both::user::TestUser;

/// A connection that can take locks, be looked at, and be pooled.
pub(crate) trait LockTest:
    TestConnection + LockConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>> + R2D2Connection
{
    /// Frees every lock of this session, behind the back of its guards.
    const RELEASE_ALL: &str = release_all(Self::KIND);

    /// A connection that looks at the others.
    #[track_caller]
    fn observer(server: &Server) -> Self {
        Self::open(server)
    }

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

/// Whether a pool would discard the connection.
pub(crate) fn is_broken<C: diesel::Connection>(conn: &mut C) -> bool {
    C::TransactionManager::is_broken_transaction_manager(conn)
}

/// Gives others a chance to come in between.
pub(crate) fn yield_now() {
    thread::yield_now();
}

/// Runs `work` in another thread.
pub(crate) fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    join(thread::spawn(work))
}

/// What the thread returns.
#[track_caller]
fn join<T>(thread: JoinHandle<T>) -> T {
    wait_for("the end of the thread", || thread.is_finished());
    match thread.join() {
        Ok(value) => value,
        Err(panic) => resume_unwind(panic),
    }
}

/// What happens on another connection, in a thread of its own.
pub(crate) struct Background<T> {
    pub(crate) id: i64,
    thread: JoinHandle<T>,
    said: Receiver<String>,
    told: Sender<()>,
}

/// The thread's end of [`Background`].
pub(crate) struct Stage {
    say: Sender<String>,
    go_on: Receiver<()>,
}

impl Stage {
    /// Tells the test how far it has come.
    pub(crate) fn say(&self, what: impl Into<String>) {
        // A test that has failed does not listen any more.
        let _ = self.say.send(what.into());
    }

    /// Waits until the test says that it may go on.
    pub(crate) fn pause(&self) {
        let go_on = self.go_on.recv_timeout(PATIENCE);
        go_on.expect("the test goes on in time");
    }
}

/// Runs `work` with a connection of its own.
pub(crate) fn in_background<C: LockTest, T: Send + 'static>(
    server: &Server,
    work: impl FnOnce(C, Stage) -> T + Send + 'static,
) -> Background<T> {
    on_connection(C::open(server), work)
}

/// Runs `work` with this connection.
pub(crate) fn on_connection<C: LockTest, T: Send + 'static>(
    mut conn: C,
    work: impl FnOnce(C, Stage) -> T + Send + 'static,
) -> Background<T> {
    let id = conn.backend_id();
    let (say, said) = channel();
    let (told, go_on) = channel();
    Background {
        id,
        thread: thread::spawn(move || work(conn, Stage { say, go_on })),
        said,
        told,
    }
}

impl<T> Background<T> {
    /// Waits until the thread says `expected`.
    #[track_caller]
    pub(crate) fn says(&self, expected: &str) {
        assert_eq!(self.said.recv_timeout(PATIENCE).as_deref(), Ok(expected));
    }

    /// Whether the next thing that the thread has said already is `expected`. What it says else is dropped.
    pub(crate) fn has_said(&self, expected: &str) -> bool {
        self.said.try_recv().is_ok_and(|said| said == expected)
    }

    /// The next thing that the thread says.
    #[track_caller]
    pub(crate) fn hear(&self) -> String {
        self.said.recv_timeout(PATIENCE).expect("the thread speaks")
    }

    /// Lets the thread go on.
    pub(crate) fn go_on(&self) {
        self.told.send(()).expect("the thread is there");
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// What the thread returns.
    #[track_caller]
    pub(crate) fn join(self) -> T {
        join(self.thread)
    }
}
