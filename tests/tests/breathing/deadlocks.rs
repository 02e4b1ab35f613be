//! Of two sessions that wait for each other, one learns of it within a turn, and the other gets its lock.

use std::sync::{Arc, Barrier};
use std::time::Instant;

use diesel::{Connection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{Server, TestConnection, unique_key, wait_for};

use crate::support::*;

const WAYS: [Way; 5] = [
    Way::Acquire,
    Way::Transaction,
    Way::IsolatedTransaction,
    Way::InTransaction,
    Way::InsideTransaction,
];

/// Holds one lock and, when everybody holds one, waits for another.
fn hold_and_wait(
    server: &Server,
    way: Way,
    held: &str,
    wanted: &str,
    everybody: &Arc<Barrier>,
) -> Session<Result<(), Error>> {
    let (held, wanted) = (held.to_owned(), wanted.to_owned());
    let everybody = Arc::clone(everybody);
    in_background(way.open(server), move |mut conn| {
        conn.advisory_lock(&held).run(|conn| {
            everybody.wait();
            let started = Instant::now();
            let result = way.with(conn, &wanted, None, |_| ());
            let passed = started.elapsed();
            assert!(passed < ABOUT_A_TURN, "it took {passed:?}");
            assert_eq!(conn.number("SELECT 4711"), Some(4711), "it is in step");
            result
        })
    })
}

#[test]
fn a_deadlock_is_found_early_in_a_wait() {
    on_each_server(20, |server| {
        for_each_way(server, &WAYS, |server, way| {
            let (one, two) = (unique_key("one"), unique_key("two"));
            let both = Arc::new(Barrier::new(2));
            let first = hold_and_wait(server, way, &one, &two, &both);
            let second = hold_and_wait(server, way, &two, &one, &both);
            let results = [first.join(), second.join()];
            let victim =
                |result: &&Result<(), Error>| matches!(result, Err(Error::Deadlock { .. }));
            assert_eq!(results.iter().filter(victim).count(), 1, "{results:?}");
            assert_eq!(
                results.iter().filter(|result| result.is_ok()).count(),
                1,
                "{results:?}"
            );
        });
    });
}

/// The other session does not look for one.
#[test]
fn a_deadlock_is_found_in_a_quiet_turn() {
    on_each_server(25, |server| {
        for_each_way(server, &WAYS, |server, way| {
            let (one, two) = (unique_key("one"), unique_key("two"));
            let mut observer = PgConnection::open(server);
            let mut other = holder(server, &two);
            other.execute_sql("SET deadlock_timeout = '1h'");

            let (held, wanted) = (one.clone(), two.clone());
            let session = in_background(way.open(server), move |mut conn| {
                conn.advisory_lock(&held).run(|conn| {
                    let result = way.with(conn, &wanted, None, |_| ());
                    assert_eq!(conn.number("SELECT 4711"), Some(4711), "it is in step");
                    result
                })
            });
            let first = session.waits(&mut observer);
            session.waits_after(&mut observer, first);

            let started = Instant::now();
            let wait = format!("SELECT pg_advisory_lock({})", literal(&one));
            let other = in_background(other, move |mut conn| conn.execute_sql(&wait));
            let result = session.join();
            assert!(matches!(result, Err(Error::Deadlock { .. })), "{result:?}");
            let passed = started.elapsed();
            assert!(passed < ABOUT_A_TURN, "it took {passed:?}");
            other.join();
        });
    });
}

/// CREATE INDEX CONCURRENTLY waits for the whole transaction, so it does not go on when a turn ends.
#[test]
fn a_holder_that_waits_for_the_open_transaction_is_a_deadlock() {
    const WAYS: [Way; 2] = [Way::InTransaction, Way::InsideTransaction];
    const IT_WAITS: &str =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted";
    on_each_server(10, |server| {
        for_each_way(server, &WAYS, |server, way| {
            let key = unique_key("index");
            let mut observer = PgConnection::open(server);
            observer.execute_sql("CREATE TABLE indexed AS SELECT 1 AS n");
            let mut holder = holder(server, &key);
            holder.execute_sql("SET deadlock_timeout = '1h'");
            let mut conn = way.open(server);
            let mut building = None;
            let result = conn.transaction(|conn| {
                conn.execute_sql("INSERT INTO indexed VALUES (2)");
                building = Some(in_background(holder, |mut holder| {
                    holder.execute_sql("CREATE INDEX CONCURRENTLY i ON indexed (n)");
                }));
                wait_for("the index", || observer.number(IT_WAITS) > Some(0));
                let started = Instant::now();
                let result = way.within(conn, &key, Some(LONG), |_| ());
                let passed = started.elapsed();
                assert!(passed < ABOUT_A_TURN, "it took {passed:?}");
                result
            });
            assert!(matches!(result, Err(Error::Deadlock { .. })), "{result:?}");
            building.expect("an index").join();
        });
    });
}
