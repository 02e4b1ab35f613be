//! VACUUM and CREATE INDEX CONCURRENTLY wait for the snapshots of their database. They wait for a session that waits for
//! a lock no longer than a turn, whatever the lock is about.

use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use diesel::PgConnection;
use diesel_async::AsyncPgConnection;
use dlock_diesel_async::AdvisoryLockExt as _;
use dlock_tests::{AsyncTestConnection, Server, TestConnection, block_on, unique_key};

use crate::support::*;

const WAITING: usize = 20;

/// What others do meanwhile.
#[derive(Clone, Copy, Debug)]
enum Work {
    Vacuum,
    /// CREATE INDEX CONCURRENTLY.
    Index,
    /// The same in the session that holds the lock, as a migration does. It waits for the waiting sessions, and they for
    /// it: a deadlock that ends with a turn.
    IndexByHolder,
}

impl Work {
    /// How long it took.
    fn time(self, worker: &mut PgConnection, holder: &mut PgConnection) -> Duration {
        match self {
            Work::Vacuum => vacuum(worker),
            Work::Index => index(worker),
            Work::IndexByHolder => index(holder),
        }
    }
}

/// Deletes rows and has VACUUM remove them: it cuts off the pages at the end of a table that are empty.
fn vacuum(conn: &mut PgConnection) -> Duration {
    conn.execute_sql("INSERT INTO dead SELECT generate_series(1, 3000); DELETE FROM dead");
    let size = "SELECT pg_relation_size('dead')";
    assert!(conn.number(size) > Some(0), "there are dead rows");
    let started = Instant::now();
    loop {
        conn.execute_sql("VACUUM dead");
        if conn.number(size) == Some(0) {
            return started.elapsed();
        }
        let passed = started.elapsed();
        assert!(passed < GIVE_UP, "VACUUM removed nothing in {passed:?}");
        sleep(Duration::from_millis(20));
    }
}

fn index(conn: &mut PgConnection) -> Duration {
    let limit = GIVE_UP.as_millis();
    conn.execute_sql(&format!("SET statement_timeout = {limit}"));
    let started = Instant::now();
    conn.execute_sql("CREATE INDEX CONCURRENTLY indexed_n ON indexed (n)");
    let took = started.elapsed();
    let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'indexed_n'::regclass";
    assert_eq!(conn.number(valid), Some(1));
    conn.execute_sql("DROP INDEX indexed_n; RESET statement_timeout");
    took
}

const GIVE_UP: Duration = Duration::from_secs(10);

/// While 20 sessions wait, all works are done within a turn each, twice: the first of them in the first turn.
fn while_twenty_wait(server: &Server, way: Way, works: &[Work]) {
    let key = unique_key("breathing");
    let mut observer = PgConnection::open(server);
    observer.execute_sql("CREATE TABLE dead (n int); CREATE TABLE indexed AS SELECT 1 AS n");
    let mut worker = PgConnection::open(server);
    let mut holder = holder(server, &key);
    let waiting: Vec<_> = (0..WAITING)
        .map(|number| {
            let limit = (number % 2 == 0).then_some(LONG);
            let key = key.clone();
            in_background(way.open(server), move |mut conn| {
                // A session that holds another lock has longer turns, in which it finds a deadlock.
                if number % 4 > 1 {
                    conn.execute_sql(&format!("SELECT pg_advisory_lock(0, {number})"));
                }
                way.with(&mut conn, &key, limit, |_| ())
            })
        })
        .collect();
    let wait_asynchronously = (way == Way::Acquire).then(|| {
        let (server, key) = (server.clone(), key.clone());
        thread::spawn(move || {
            block_on(async {
                let mut conn = AsyncPgConnection::open(&server).await;
                let lock = conn.advisory_lock(&key).acquire().await;
                lock.expect("the lock").release().await.expect("a release");
            });
        })
    });
    let first: Vec<_> = waiting
        .iter()
        .map(|session| session.waits(&mut observer))
        .collect();

    for (number, work) in works.iter().chain(works).enumerate() {
        // A busy machine is late at times, but not each time.
        let mut times = Vec::new();
        while times.last().is_none_or(|time| *time > ABOUT_A_TURN) {
            assert!(times.len() < 3, "{work:?} {number} took {times:?}");
            times.push(work.time(&mut worker, &mut holder));
        }
        eprintln!(
            "{}: 20 wait by {way:?}: {work:?} took {times:.1?}",
            server.name
        );
    }

    for (session, first) in waiting.iter().zip(first) {
        session.waits_after(&mut observer, first);
    }
    drop(holder);
    for session in waiting {
        session.join().expect("the lock");
    }
    if let Some(thread) = wait_asynchronously {
        thread.join().expect("the lock");
    }
}

#[test]
fn vacuum_cleans_and_an_index_is_built_within_a_turn_while_twenty_sessions_wait() {
    on_each_server(110, |server| {
        let ways = [
            Way::Acquire,
            Way::Shared,
            Way::Transaction,
            Way::IsolatedTransaction,
        ];
        for_each_way(server, &ways, |server, way| {
            let works = match way {
                Way::Acquire | Way::IsolatedTransaction => {
                    [Work::IndexByHolder, Work::Vacuum, Work::Index]
                }
                _ => [Work::Vacuum, Work::Index, Work::IndexByHolder],
            };
            while_twenty_wait(server, way, &works);
        });
    });
}

/// At READ COMMITTED, as long as the transaction has written nothing. CREATE INDEX CONCURRENTLY is not helped: it waits
/// for the whole transaction of each session that had a snapshot when it asked.
#[test]
fn vacuum_cleans_within_a_turn_while_twenty_sessions_wait_in_their_transactions() {
    on_each_server(60, |server| {
        let ways = [Way::InTransaction, Way::InsideTransaction];
        for_each_way(server, &ways, |server, way| {
            while_twenty_wait(server, way, &[Work::Vacuum]);
        });
    });
}
