//! PostgreSQL's `pg_stat_statements`.

use std::collections::BTreeSet;
use std::env;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use diesel::PgConnection;
use diesel_async::AsyncPgConnection;
use dlock_diesel_async::AdvisoryLockExt as _;
use dlock_tests::{
    AsyncTestConnection, Kind, Server, TestConnection, block_on, servers, start_extra_postgres,
    wait_for,
};
use tokio::time::timeout;

use crate::fresh_database::FreshDatabase;
use crate::other::{Other, make, make_async};
use crate::plan::{Call, Holder, Locks, Way, calls};
use crate::{asynchronous, sync};

/// Every statement is counted, also those that statements send, and those that set something.
const OPTIONS: &str = "-c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.track=all \
    -c pg_stat_statements.track_utility=on";

/// Each call has a key of its own.
const CALLS: usize = 1_000;

/// One server for this test, and the PostgreSQL servers of `TEST_URLS` that count all statements.
pub(crate) fn counting_servers() -> Vec<&'static Server> {
    static OWN: OnceLock<Server> = OnceLock::new();
    let own = OWN.get_or_init(|| start_extra_postgres(OPTIONS));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(".env");
    let named = env::var_os("TEST_URLS").is_some() || file.exists();
    let named = if named { servers() } else { &[] };
    let counts = |server: &&Server| {
        let sql = "SELECT coalesce(current_setting('pg_stat_statements.track', true) = 'all' \
             AND current_setting('pg_stat_statements.track_utility', true) = 'on', false)";
        let counts = PgConnection::open(server).number(sql) == Some(1);
        if !counts {
            eprintln!("{server} does not count all statements. Start it with: {OPTIONS}");
        }
        counts
    };
    let postgres = named.iter().filter(|server| server.kind == Kind::Postgres);
    postgres.filter(counts).chain([own]).collect()
}

/// The texts that were seen in a database.
pub(crate) fn texts(server: &Server, database: &str) -> Vec<String> {
    let mut conn = PgConnection::open(server);
    conn.execute_sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements");
    // What the test itself sends is not counted.
    let sql = format!(
        "SELECT string_agg(query, chr(1) ORDER BY query) FROM pg_stat_statements \
         WHERE dbid = (SELECT oid FROM pg_database WHERE datname = '{database}') \
         AND query NOT LIKE '%default_transaction_isolation%' AND query NOT LIKE 'SELECT value::text FROM %'"
    );
    let texts = conn.text(&sql).expect("statements were counted");
    texts.split('\u{1}').map(str::to_owned).collect()
}

/// How many texts there are with and without the name of a savepoint. PostgreSQL 17 and later replace the name.
fn savepoints(texts: &[String]) -> (usize, usize) {
    let is_savepoint = |text: &&String| text.contains("SAVEPOINT ");
    let savepoints: BTreeSet<_> = texts.iter().filter(is_savepoint).collect();
    (savepoints.len(), texts.len() - savepoints.len())
}

const SHORT: Duration = Duration::from_millis(5);
/// Longer than the first turn.
const LONG: Duration = Duration::from_millis(2_500);

/// A number of calls that is not one of [`CALLS`].
const MORE: usize = 2 * CALLS;

/// Calls that wait several turns, two for each way and kind of lock, of which one gets the lock.
fn long_waits(locks: Locks) -> impl Iterator<Item = Call> {
    const WAYS: &[Way] = &[
        Way::Release,
        Way::Transaction,
        Way::IsolatedTransaction,
        Way::InTransaction,
        Way::InsideTransaction,
    ];
    let number = match locks {
        Locks::Usual => 15,
        Locks::All => 90,
    };
    calls(MORE..MORE + number, locks, WAYS)
        .filter(|call| call.holder != Holder::Nobody)
        .map(|call| Call {
            limit: LONG + 31 * call.limit,
            ..call
        })
}

/// How many savepoints of this process are there at the same time, at most. Each has a name of its own, and three texts.
fn savepoints_at_once() -> usize {
    let in_transaction =
        |call: &Call| matches!(call.way, Way::InTransaction | Way::InsideTransaction);
    // One for each test, which may all run at the same time.
    let tests = [Locks::Usual, Locks::Usual, Locks::All];
    let at_once = |locks| 2 + long_waits(locks).filter(in_transaction).count();
    tests.into_iter().map(at_once).sum()
}

/// Waits that are given up.
async fn give_up(server: &Server, locks: Locks) {
    let mut observer = PgConnection::open(server);
    let mut other = Other::<PgConnection>::open(server);
    for (number, call) in calls(2 * MORE..2 * MORE + 24, locks, &[Way::Release]).enumerate() {
        let call = Call {
            holder: Holder::Stays,
            ..call
        };
        other = other.hold(&call, SHORT);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        let cancel = conn.cancellation();
        let lock = conn.advisory_lock(&call.key);
        let lock = if call.shared { lock.shared() } else { lock };
        let lock = match number % 2 {
            0 => lock.cancel_with(cancel),
            _ => lock,
        };
        let waited = timeout(Duration::from_millis(30), lock.acquire());
        assert!(waited.await.is_err(), "the lock is taken");
        other = other.release();
        drop(conn);
        wait_for("the end of the session", || !observer.is_connected(id));
    }
}

/// Which crates are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crates {
    Sync,
    Async,
    Both,
}

/// Makes many calls and counts the texts that the server has seen.
fn assert_texts(locks: Locks, crates: Crates, most: usize) {
    thread::scope(|scope| {
        for server in counting_servers() {
            scope.spawn(move || {
                let fresh = FreshDatabase::<PgConnection>::create(server);
                let here = &fresh.server;
                let first = match crates {
                    Crates::Sync => CALLS,
                    Crates::Async => 0,
                    Crates::Both => CALLS / 2,
                };
                thread::scope(|scope| {
                    if first > 0 {
                        let calls = calls(0..first, locks, Way::ON_POSTGRES);
                        scope.spawn(|| make(here, calls, SHORT, sync::ask_postgres));
                    }
                    if first < CALLS {
                        let calls = calls(first..CALLS, locks, Way::ON_POSTGRES);
                        scope.spawn(|| {
                            block_on(make_async(here, calls, SHORT, asynchronous::ask_postgres))
                        });
                        scope.spawn(|| block_on(give_up(here, locks)));
                    }
                    for (number, call) in long_waits(locks).enumerate() {
                        let is_sync = match crates {
                            Crates::Sync => true,
                            Crates::Async => false,
                            Crates::Both => number / 2 % 2 == 0,
                        };
                        let call = [call].into_iter();
                        scope.spawn(move || match is_sync {
                            true => make(here, call, LONG, sync::ask_postgres),
                            false => {
                                block_on(make_async(here, call, LONG, asynchronous::ask_postgres))
                            }
                        });
                    }
                });
                let database = here.url.rsplit('/').next().expect("a database");
                let texts = texts(server, database);
                let (savepoints, others) = savepoints(&texts);
                eprintln!(
                    "{}: {locks:?}, {crates:?}: {others} texts, and {savepoints} of savepoints",
                    server.name
                );
                assert!(others <= most, "{server}:\n{}", texts.join("\n"));
                assert!(
                    savepoints <= 3 * savepoints_at_once(),
                    "{server}:\n{}",
                    texts.join("\n")
                );
            });
        }
    });
}

/// No key, no limit and no counter stands in a text. There are some for each kind of lock: those of shared locks and of
/// pairs of numbers have other functions.
#[test]
fn a_thousand_locks_add_at_most_40_entries_to_pg_stat_statements() {
    assert_texts(Locks::Usual, Crates::Sync, 40);
}

#[test]
fn a_thousand_async_locks_add_at_most_40_entries_to_pg_stat_statements() {
    assert_texts(Locks::Usual, Crates::Async, 40);
}

#[test]
fn a_thousand_locks_of_all_kinds_add_at_most_100_entries_to_pg_stat_statements() {
    assert_texts(Locks::All, Crates::Both, 100);
}
