//! One session of a server, be its connection sync or async, so that a measurement is written once.

use std::fmt;
use std::time::Duration;

use diesel::{MysqlConnection, PgConnection};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel::Error;
use dlock_tests::{Kind, Server};
use sqlx_core::connection::Connection as _;
use sqlx_postgres::PgAdvisoryLock;
use tokio::runtime::Runtime;

use crate::raw::{AsyncRaw, Raw, RawKey};

/// How a lock is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Raw SQL that does not wait.
    RawTry,
    /// Raw SQL that waits in the server's queue.
    RawWait,
    /// dlock, async, with what cancels the wait if it is dropped.
    Cancellable,
    /// dlock, with a limit and an interval to poll at.
    Dlock {
        limit: Option<Duration>,
        poll: Option<Duration>,
    },
}

impl How {
    pub(crate) const DLOCK: How = How::Dlock {
        limit: None,
        poll: None,
    };
    pub(crate) const LIMITED: How = How::Dlock {
        limit: Some(Duration::from_secs(60)),
        poll: None,
    };

    pub(crate) const fn poll_every(interval: Duration) -> How {
        How::Dlock {
            limit: None,
            poll: Some(interval),
        }
    }
}

/// Who waits in vain, until a limit has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vain {
    /// `acquire`, whose error tells who holds the lock.
    Acquire,
    /// `try_acquire`.
    TryAcquire,
    /// Raw SQL.
    Raw,
}

/// What a transaction is run by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transaction {
    /// `advisory_lock(key).transaction(..)`.
    Dlock,
    /// Raw SQL.
    Raw,
    /// `conn.transaction(..)`, without a lock.
    Plain,
}

/// A session that takes one lock again and again.
pub(crate) trait Locker: Send {
    /// The server's name for it.
    fn id(&mut self) -> i64;
    /// Takes the lock and keeps it.
    fn acquire(&mut self, how: How);
    /// Releases it as it was taken.
    fn release(&mut self);
}

/// What else can be measured on a Diesel connection.
pub(crate) trait Session: Locker {
    /// The least that can be asked.
    fn select_one(&mut self);
    /// Runs an empty transaction.
    fn transaction(&mut self, by: Transaction);
    /// Waits in vain for `limit`.
    fn time_out(&mut self, limit: Duration, by: Vain);
    /// Takes one more lock, and never releases it. `false` if the server has no room.
    fn hold(&mut self, number: i64) -> bool;
    /// The same with raw SQL, which does not expect that there is no room.
    fn hold_raw(&mut self, key: &RawKey);
}

/// Sync or async connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Sync,
    Async,
}

impl Api {
    pub(crate) const BOTH: [Api; 2] = [Api::Sync, Api::Async];

    /// A session on a connection of its own.
    pub(crate) fn open(self, server: &Server, key: &str) -> Box<dyn Session> {
        self.open_url(server.kind, &server.url, key)
    }

    /// A session on a connection to `url`.
    pub(crate) fn open_url(self, kind: Kind, url: &str, key: &str) -> Box<dyn Session> {
        match (self, kind) {
            (Api::Sync, Kind::Postgres) => Box::new(SyncSession::<PgConnection>::open(url, key)),
            (Api::Sync, Kind::Mysql) => Box::new(SyncSession::<MysqlConnection>::open(url, key)),
            (Api::Async, Kind::Postgres) => {
                Box::new(AsyncSession::<AsyncPgConnection>::open(url, key))
            }
            (_, Kind::Sqlite) => unreachable!("BUG: SQLite is no server to measure"),
            (Api::Async, Kind::Mysql) => {
                Box::new(AsyncSession::<AsyncMysqlConnection>::open(url, key))
            }
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Api::Sync => "sync",
            Api::Async => "async",
        })
    }
}

/// The server fails a measurement that could not be made.
fn ok<T, E: fmt::Display>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the server failed in the middle of a measurement: {error}"),
    }
}

const FREE: &str = "BUG: the lock is free";
const HELD: &str = "BUG: the lock is held";

struct SyncSession<C: Raw> {
    key: String,
    raw_key: RawKey,
    begin: String,
    conn: Option<Box<C>>,
    guard: Option<dlock_diesel::AdvisoryLockGuard<Box<C>>>,
}

impl<C: Raw> SyncSession<C> {
    fn open(url: &str, key: &str) -> Self {
        let raw_key = RawKey::new(key);
        Self {
            key: key.to_owned(),
            begin: raw_key.begin(),
            raw_key,
            conn: Some(Box::new(C::open_url(url))),
            guard: None,
        }
    }
}

impl<C: Raw> Locker for SyncSession<C> {
    fn id(&mut self) -> i64 {
        self.conn.as_mut().expect(FREE).backend_id()
    }

    fn acquire(&mut self, how: How) {
        match how {
            How::RawTry => ok(self.conn.as_mut().expect(FREE).raw_try(&self.raw_key)),
            How::RawWait => ok(self.conn.as_mut().expect(FREE).raw_wait(&self.raw_key)),
            How::Cancellable => unreachable!("BUG: a thread that waits cannot be dropped"),
            How::Dlock { limit, poll } => {
                let conn = self.conn.take().expect(FREE);
                let mut lock = dlock_diesel::AdvisoryLock::new(conn, self.key.as_str());
                if let Some(limit) = limit {
                    lock = lock.timeout(limit);
                }
                if let Some(interval) = poll {
                    lock = lock.poll_every(interval);
                }
                self.guard = Some(ok(lock.acquire()));
            }
        }
    }

    fn release(&mut self) {
        match self.guard.take() {
            Some(guard) => self.conn = Some(ok(guard.release())),
            None => ok(self.conn.as_mut().expect(HELD).raw_release(&self.raw_key)),
        }
    }
}

impl<C: Raw> Session for SyncSession<C> {
    fn select_one(&mut self) {
        ok(self.conn.as_mut().expect(FREE).raw_one());
    }

    fn transaction(&mut self, by: Transaction) {
        use dlock_diesel::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        match by {
            Transaction::Dlock => {
                let lock = conn.advisory_lock(self.key.as_str());
                ok(lock.transaction(|_| Ok::<_, Error>(())));
            }
            Transaction::Raw => ok(conn.raw_transaction(&self.raw_key, &self.begin)),
            Transaction::Plain => {
                ok(conn.transaction(|_| Ok::<_, diesel::result::Error>(())));
            }
        }
    }

    fn time_out(&mut self, limit: Duration, by: Vain) {
        use dlock_diesel::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        if by == Vain::Raw {
            return conn.raw_time_out(&self.raw_key.time_out(C::KIND, limit));
        }
        let lock = conn.advisory_lock(self.key.as_str()).timeout(limit);
        if by == Vain::Acquire {
            assert!(matches!(lock.acquire(), Err(Error::Timeout { .. })));
        } else {
            assert!(ok(lock.try_acquire()).is_none());
        }
    }

    fn hold_raw(&mut self, key: &RawKey) {
        ok(self.conn.as_mut().expect(FREE).raw_try(key));
    }

    fn hold(&mut self, number: i64) -> bool {
        use dlock_diesel::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        match conn.advisory_lock(number).acquire() {
            // Leaked: the lock stays until the connection is closed.
            Ok(guard) => std::mem::forget(guard),
            Err(Error::TooManyLocks { .. }) => return false,
            Err(error) => ok(Err(error)),
        }
        true
    }
}

struct AsyncSession<C: AsyncRaw> {
    /// One of its own in this thread, so that no other thread has to be woken on the way.
    runtime: Runtime,
    key: String,
    raw_key: RawKey,
    begin: String,
    conn: Option<Box<C>>,
    guard: Option<dlock_diesel_async::AdvisoryLockGuard<Box<C>>>,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

impl<C: AsyncRaw> AsyncSession<C> {
    fn open(url: &str, key: &str) -> Self {
        let raw_key = RawKey::new(key);
        let runtime = runtime();
        let conn = runtime.block_on(C::open_url(url));
        Self {
            runtime,
            key: key.to_owned(),
            begin: raw_key.begin(),
            raw_key,
            conn: Some(Box::new(conn)),
            guard: None,
        }
    }
}

impl<C: AsyncRaw> Locker for AsyncSession<C> {
    fn id(&mut self) -> i64 {
        let conn = self.conn.as_mut().expect(FREE);
        self.runtime.block_on(conn.backend_id())
    }

    fn acquire(&mut self, how: How) {
        self.runtime.block_on(async {
            match how {
                How::RawTry => ok(self.conn.as_mut().expect(FREE).raw_try(&self.raw_key).await),
                How::RawWait => ok(self
                    .conn
                    .as_mut()
                    .expect(FREE)
                    .raw_wait(&self.raw_key)
                    .await),
                How::Cancellable => unreachable!("BUG: section 4 has tasks of its own"),
                How::Dlock { limit, poll } => {
                    let conn = self.conn.take().expect(FREE);
                    let mut lock = dlock_diesel_async::AdvisoryLock::new(conn, self.key.as_str());
                    if let Some(limit) = limit {
                        lock = lock.timeout(limit);
                    }
                    if let Some(interval) = poll {
                        lock = lock.poll_every(interval);
                    }
                    self.guard = Some(ok(lock.acquire().await));
                }
            }
        });
    }

    fn release(&mut self) {
        self.runtime.block_on(async {
            match self.guard.take() {
                Some(guard) => self.conn = Some(ok(guard.release().await)),
                None => ok(self
                    .conn
                    .as_mut()
                    .expect(HELD)
                    .raw_release(&self.raw_key)
                    .await),
            }
        });
    }
}

impl<C: AsyncRaw> Session for AsyncSession<C> {
    fn select_one(&mut self) {
        let conn = self.conn.as_mut().expect(FREE);
        ok(self.runtime.block_on(conn.raw_one()));
    }

    fn transaction(&mut self, by: Transaction) {
        use dlock_diesel_async::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        self.runtime.block_on(async {
            match by {
                Transaction::Dlock => {
                    let lock = conn.advisory_lock(self.key.as_str());
                    ok(lock.transaction(async |_| Ok::<_, Error>(())).await);
                }
                Transaction::Raw => ok(conn.raw_transaction(&self.raw_key, &self.begin).await),
                Transaction::Plain => {
                    ok(conn
                        .transaction(async |_| Ok::<_, diesel::result::Error>(()))
                        .await);
                }
            }
        });
    }

    fn time_out(&mut self, limit: Duration, by: Vain) {
        use dlock_diesel_async::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        self.runtime.block_on(async {
            if by == Vain::Raw {
                return conn
                    .raw_time_out(&self.raw_key.time_out(C::KIND, limit))
                    .await;
            }
            let lock = conn.advisory_lock(self.key.as_str()).timeout(limit);
            if by == Vain::Acquire {
                assert!(matches!(lock.acquire().await, Err(Error::Timeout { .. })));
            } else {
                assert!(ok(lock.try_acquire().await).is_none());
            }
        });
    }

    fn hold_raw(&mut self, key: &RawKey) {
        let conn = self.conn.as_mut().expect(FREE);
        ok(self.runtime.block_on(conn.raw_try(key)));
    }

    fn hold(&mut self, number: i64) -> bool {
        use dlock_diesel_async::AdvisoryLockExt;

        let conn = &mut **self.conn.as_mut().expect(FREE);
        let acquired = self.runtime.block_on(async {
            match conn.advisory_lock(number).acquire().await {
                Ok(guard) => std::mem::forget(guard),
                Err(error) => return Err(error),
            }
            Ok(())
        });
        match acquired {
            Ok(()) => true,
            Err(Error::TooManyLocks { .. }) => false,
            Err(error) => ok(Err(error)),
        }
    }
}

/// sqlx's lock, on a connection of sqlx. Its key is made before the measurement.
pub(crate) struct Sqlx {
    runtime: Runtime,
    lock: PgAdvisoryLock,
    conn: sqlx_postgres::PgConnection,
}

impl Sqlx {
    pub(crate) fn open(server: &Server, key: &str) -> Self {
        let runtime = runtime();
        let conn = ok(runtime.block_on(sqlx_postgres::PgConnection::connect(&server.url)));
        Self {
            runtime,
            lock: PgAdvisoryLock::new(key),
            conn,
        }
    }
}

impl Locker for Sqlx {
    fn id(&mut self) -> i64 {
        use sqlx_core::query_scalar::query_scalar;

        let id: i32 = ok(self
            .runtime
            .block_on(query_scalar("SELECT pg_backend_pid()").fetch_one(&mut self.conn)));
        id.into()
    }

    fn acquire(&mut self, _how: How) {
        let guard = ok(self.runtime.block_on(self.lock.acquire(&mut self.conn)));
        guard.leak();
    }

    fn release(&mut self) {
        let release = self.lock.force_release(&mut self.conn);
        let (_, released) = ok(self.runtime.block_on(release));
        assert!(released);
    }
}
