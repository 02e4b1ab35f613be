//! The user's settings, and the transaction in which the lock is waited for, are the same after a wait of several turns,
//! whatever came of it; and a wait that fails leaves nothing.

use std::time::Duration;

use diesel::{Connection, PgConnection};
use dlock_diesel::Error;
use dlock_tests::{Server, TestConnection, unique_key};

use crate::support::*;

const NAMES: [&str; 3] = [
    "lock_timeout",
    "statement_timeout",
    "client_connection_check_interval",
];

/// The first is shorter than a turn.
const SESSION: [&str; 3] = ["700ms", "91s", "3s"];
const TRANSACTION: [&str; 3] = ["701ms", "92s", "4s"];

fn set(conn: &mut PgConnection, set: &str, values: [&str; 3]) {
    for (name, value) in NAMES.into_iter().zip(values) {
        conn.execute_sql(&format!("{set} {name} = '{value}'"));
    }
}

#[track_caller]
fn assert_settings(conn: &mut PgConnection, expected: [&str; 3], when: &str) {
    for (name, expected) in NAMES.into_iter().zip(expected) {
        let value = conn.text(&format!("SELECT current_setting('{name}')"));
        assert_eq!(value.as_deref(), Some(expected), "{name} {when}");
    }
}

/// Waits for the lock, and looks at the settings under it and afterwards.
fn wait(
    server: &Server,
    way: Way,
    key: &str,
    limit: Option<Duration>,
) -> Session<Result<(), Error>> {
    let key = key.to_owned();
    let mut observer = PgConnection::open(server);
    in_background(way.open(server), move |mut conn| {
        let id = conn.backend_id();
        set(&mut conn, "SET", SESSION);
        let mut ask = |conn: &mut PgConnection, settings| {
            let result = way.within(conn, &key, limit, |conn| {
                assert_settings(conn, settings, "under the lock");
            });
            if result.is_err() {
                assert_eq!(locks_of(&mut observer, id), 0, "locks after {result:?}");
            }
            assert_settings(conn, settings, &format!("after {result:?}"));
            result
        };
        let result = if way.is_in_open_transaction() {
            let transaction = conn.transaction(|conn| {
                set(conn, "SET LOCAL", TRANSACTION);
                let current = "SELECT pg_current_xact_id()";
                let before = conn.text(current);
                let result = ask(conn, TRANSACTION);
                assert_eq!(conn.text(current), before, "the transaction goes on");
                Ok::<_, Error>(result)
            });
            transaction.expect("it commits")
        } else {
            ask(&mut conn, SESSION)
        };
        assert_settings(&mut conn, SESSION, &format!("after {result:?}"));
        result
    })
}

#[test]
fn a_wait_of_several_turns_that_is_granted_or_times_out_changes_no_setting() {
    on_each_server(65, |server| {
        for_each_way(server, &Way::ALL, |server, way| {
            let key = unique_key("settings");
            let mut observer = PgConnection::open(server);
            let holder = holder(server, &key);
            let granted = [None, Some(LONG)].map(|limit| wait(server, way, &key, limit));
            let first = granted
                .each_ref()
                .map(|session| session.waits(&mut observer));
            for limit in [100, 2_500] {
                let result = wait(server, way, &key, Some(Duration::from_millis(limit))).join();
                assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            }
            for (session, first) in granted.iter().zip(first) {
                session.waits_after(&mut observer, first);
            }
            drop(holder);
            for session in granted {
                session.join().expect("the lock");
            }
        });
    });
}

#[test]
fn a_cancelled_wait_leaves_nothing_in_the_first_turn_or_a_later_one() {
    on_each_server(45, |server| {
        for_each_way(server, &Way::ALL, |server, way| {
            let key = unique_key("cancel");
            let mut observer = PgConnection::open(server);
            let _holder = holder(server, &key);
            let [first, later] = [(); 2].map(|()| wait(server, way, &key, None));
            first.waits(&mut observer);
            observer.cancel(first.id);
            let turn = later.waits(&mut observer);
            later.waits_after(&mut observer, turn);
            observer.cancel(later.id);
            for session in [first, later] {
                let result = session.join();
                assert!(
                    matches!(result, Err(Error::Interrupted { .. })),
                    "{result:?}"
                );
            }
        });
    });
}
