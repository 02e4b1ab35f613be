//! Servers, ways to wait, and sessions that wait in threads of their own.

use std::any::Any;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use diesel::{Connection, PgConnection};
use dlock_core::{LockKey, PostgresKey};
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, servers, start_extra_postgres, wait_for, wait_for_within,
};

pub(crate) use crate::fresh_database::FreshDatabase;

/// Where no readers hold the lock and `deadlock_timeout` is 1 second, a turn is at most 1.8 seconds long. This is less than
/// two turns, on a machine that does other things as well.
pub(crate) const ABOUT_A_TURN: Duration = Duration::from_millis(3_000);

/// Long enough for anything here.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// With a log that SQL can read, in which each line begins with the database.
const OPTIONS: &str =
    "-c max_connections=400 -c logging_collector=on -c log_line_prefix=%d| -c autovacuum=off";

/// One server for this file, and the PostgreSQL servers that `TEST_URLS` names.
pub(crate) fn all_servers() -> Vec<&'static Server> {
    static OWN: OnceLock<Server> = OnceLock::new();
    let own = OWN.get_or_init(|| start_extra_postgres(OPTIONS));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(".env");
    let named = env::var_os("TEST_URLS").is_some() || file.exists();
    let named = if named { servers() } else { &[] };
    let postgres = named.iter().filter(|server| server.kind == Kind::Postgres);
    postgres.chain([own]).collect()
}

/// A case, by its name.
pub(crate) type Case<'a> = (String, Box<dyn FnOnce() + Send + 'a>);

/// Names a case.
pub(crate) fn case<'a>(name: impl Into<String>, run: impl FnOnce() + Send + 'a) -> Case<'a> {
    (name.into(), Box::new(run))
}

/// Runs all cases at the same time, and fails if one does.
pub(crate) fn together(cases: Vec<Case<'_>>) {
    let failures: Vec<Box<dyn Any + Send>> = thread::scope(|scope| {
        let threads: Vec<_> = cases
            .into_iter()
            .map(|(name, run)| {
                scope.spawn(move || {
                    catch_unwind(AssertUnwindSafe(run)).inspect_err(|_| eprintln!("^ {name}"))
                })
            })
            .collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results
            .filter_map(|result| result.flatten_panic())
            .collect()
    });
    if let Some(panic) = failures.into_iter().next() {
        resume_unwind(panic);
    }
}

trait FlattenPanic {
    fn flatten_panic(self) -> Option<Box<dyn Any + Send>>;
}

impl FlattenPanic for thread::Result<thread::Result<()>> {
    fn flatten_panic(self) -> Option<Box<dyn Any + Send>> {
        match self {
            Ok(Ok(())) => None,
            Ok(Err(panic)) | Err(panic) => Some(panic),
        }
    }
}

/// How many sessions the tests that run at the same time have on each server, whatever `RUST_TEST_THREADS` says. A
/// server takes 200, and the tests measure turns.
const MOST_SESSIONS: usize = 150;

/// How many they have, and what tells that a test has ended.
static SESSIONS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

pub(crate) struct Running {
    sessions: usize,
}

impl Running {
    pub(crate) fn begin(sessions: usize) -> Self {
        assert!(sessions <= MOST_SESSIONS, "it would wait for ever");
        let (taken, ended) = &SESSIONS;
        let taken = taken.lock().expect("not poisoned");
        let full = |taken: &mut usize| *taken + sessions > MOST_SESSIONS;
        *ended.wait_while(taken, full).expect("not poisoned") += sessions;
        Self { sessions }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (taken, ended) = &SESSIONS;
        *taken.lock().expect("not poisoned") -= self.sessions;
        ended.notify_all();
    }
}

/// Runs `test` on each server at the same time. It has at most so many sessions on one.
pub(crate) fn on_each_server(sessions: usize, test: impl Fn(&Server) + Sync) {
    let _running = Running::begin(sessions);
    let test = &test;
    let on = |server: &'static Server| case(format!("on {server}"), move || test(server));
    together(all_servers().into_iter().map(on).collect());
}

/// Runs `test` for each of the ways, in a database of its own.
pub(crate) fn for_each_way(server: &Server, ways: &[Way], test: impl Fn(&Server, Way) + Sync) {
    let test = &test;
    let run = |&way: &Way| {
        case(format!("{way:?}"), move || {
            let database = FreshDatabase::<PgConnection>::create(server);
            test(&database.server, way);
        })
    };
    together(ways.iter().map(run).collect());
}

/// How a lock is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Acquire,
    Shared,
    Transaction,
    /// At REPEATABLE READ.
    IsolatedTransaction,
    /// A lock of the open transaction.
    InTransaction,
    /// A lock of the session, in an open transaction.
    InsideTransaction,
}

impl Way {
    pub(crate) const ALL: [Way; 6] = [
        Way::Acquire,
        Way::Shared,
        Way::Transaction,
        Way::IsolatedTransaction,
        Way::InTransaction,
        Way::InsideTransaction,
    ];

    /// A connection whose transactions have the isolation level of this way.
    pub(crate) fn open(self, server: &Server) -> PgConnection {
        let mut conn = PgConnection::open(server);
        if self == Way::IsolatedTransaction {
            conn.execute_sql("SET default_transaction_isolation = 'repeatable read'");
        }
        conn
    }

    /// Whether the wait stands in a transaction that was open before.
    pub(crate) fn is_in_open_transaction(self) -> bool {
        matches!(self, Way::InTransaction | Way::InsideTransaction)
    }

    /// Gets the lock, runs `f` under it, and lets go.
    pub(crate) fn with<T>(
        self,
        conn: &mut PgConnection,
        key: &str,
        limit: Option<Duration>,
        f: impl FnOnce(&mut PgConnection) -> T,
    ) -> Result<T, Error> {
        let limited = |lock: AdvisoryLock<_>| match limit {
            Some(limit) => lock.timeout(limit),
            None => lock,
        };
        match self {
            Way::Acquire => limited(conn.advisory_lock(key)).run(|conn| Ok(f(conn))),
            Way::Shared => limited(conn.advisory_lock(key).shared()).run(|conn| Ok(f(conn))),
            Way::Transaction | Way::IsolatedTransaction => {
                limited(conn.advisory_lock(key)).transaction(|conn| Ok(f(conn)))
            }
            Way::InTransaction | Way::InsideTransaction => {
                conn.transaction(|conn| self.within(conn, key, limit, f))
            }
        }
    }

    /// The same, in a transaction that is open where the way asks for one.
    pub(crate) fn within<T>(
        self,
        conn: &mut PgConnection,
        key: &str,
        limit: Option<Duration>,
        f: impl FnOnce(&mut PgConnection) -> T,
    ) -> Result<T, Error> {
        match self {
            Way::InTransaction => {
                let lock = conn.advisory_xact_lock(key);
                match limit {
                    Some(limit) => lock.timeout(limit).acquire()?,
                    None => lock.acquire()?,
                }
                Ok(f(conn))
            }
            Way::InsideTransaction => {
                let lock = conn.advisory_lock(key).inside_transaction();
                match limit {
                    Some(limit) => lock.timeout(limit).run(|conn| Ok(f(conn))),
                    None => lock.run(|conn| Ok(f(conn))),
                }
            }
            _ => self.with(conn, key, limit, f),
        }
    }
}

/// What happens on another connection, in a thread of its own. When its database is dropped, its session ends.
pub(crate) struct Session<T> {
    pub(crate) id: i64,
    thread: JoinHandle<T>,
}

/// Runs `work` in another thread.
pub(crate) fn in_background<T: Send + 'static>(
    mut conn: PgConnection,
    work: impl FnOnce(PgConnection) -> T + Send + 'static,
) -> Session<T> {
    Session {
        id: conn.backend_id(),
        thread: thread::spawn(move || work(conn)),
    }
}

/// Asks for the lock, and lets go of it at once.
pub(crate) fn wait_in_background(
    server: &Server,
    way: Way,
    key: &str,
    limit: Option<Duration>,
) -> Session<Result<(), Error>> {
    let key = key.to_owned();
    in_background(way.open(server), move |mut conn| {
        way.with(&mut conn, &key, limit, |_| ())
    })
}

impl<T> Session<T> {
    pub(crate) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    #[track_caller]
    pub(crate) fn join(self) -> T {
        wait_for_within(LONG, "the end of the thread", || self.is_finished());
        match self.thread.join() {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Waits until it waits for the lock.
    #[track_caller]
    pub(crate) fn waits(&self, observer: &mut PgConnection) -> Turn {
        let mut turn = None;
        wait_for("the session to wait", || {
            assert!(!self.is_finished(), "it does not wait");
            turn = Turn::of(observer, self.id);
            turn.is_some()
        });
        turn.expect("a turn")
    }

    /// Waits until it waits in another turn than this one.
    #[track_caller]
    pub(crate) fn waits_after(&self, observer: &mut PgConnection, turn: Turn) -> Turn {
        let mut later = None;
        wait_for("a later turn", || {
            assert!(!self.is_finished(), "it does not wait");
            later = Turn::of(observer, self.id).filter(|later| *later != turn);
            later.is_some()
        });
        later.expect("a turn")
    }
}

/// A wait for an advisory lock, by the microsecond in which it began. (`pg_stat_activity` is read at another moment than
/// `pg_locks`, so that it may know an earlier message.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn(i64);

impl Turn {
    fn of(observer: &mut PgConnection, id: i64) -> Option<Self> {
        let sql = format!(
            "SELECT (extract(epoch FROM max(waitstart)) * 1000000)::bigint FROM pg_locks \
             WHERE pid = {id} AND locktype = 'advisory' AND NOT granted"
        );
        observer.number(&sql).map(Self)
    }
}

/// A key as PostgreSQL's functions take it.
pub(crate) fn literal(key: &str) -> String {
    match LockKey::from(key).to_postgres().expect("a valid key") {
        PostgresKey::BigInt(number) => format!("'{number}'::bigint"),
        PostgresKey::Pair(first, second) => format!("'{first}'::int, '{second}'::int"),
    }
}

/// A session that holds the lock, taken by plain SQL.
pub(crate) fn holder(server: &Server, key: &str) -> PgConnection {
    let mut conn = PgConnection::open(server);
    let taken = conn.number(&format!("SELECT pg_try_advisory_lock({})", literal(key)));
    assert_eq!(taken, Some(1), "the lock was free");
    conn
}

/// How many locks the session has or waits for.
pub(crate) fn locks_of(observer: &mut PgConnection, id: i64) -> i64 {
    let sql = format!("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {id}");
    observer.number(&sql).expect("a count")
}
