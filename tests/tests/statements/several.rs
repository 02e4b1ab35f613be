//! Several locks: there is one text for any number of keys.

use diesel::PgConnection;
use diesel::connection::{Connection, TransactionManager};
use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{Server, TestConnection, start_extra_postgres, unique_key};

/// Every way to take so many locks.
fn take(server: &Server, count: i64) {
    let prefix = unique_key("several_texts");
    let mut keys: Vec<LockKey> = (0..count)
        .map(|n| LockKey::namespaced(&prefix, n))
        .collect();
    keys.push((7, count as i32).into());
    let mut conn = PgConnection::open(server);
    let mut holder = PgConnection::open(server);
    let lock = conn.advisory_locks(&keys).acquire().expect("free locks");
    lock.release().expect("a release");
    drop(
        conn.advisory_locks(&keys)
            .shared()
            .acquire()
            .expect("free locks"),
    );
    let held = holder
        .advisory_lock(&keys[0])
        .acquire()
        .expect("a free lock");
    let limit = std::time::Duration::from_millis(200);
    for level in ["read committed", "repeatable read"] {
        conn.execute_sql(&format!("SET default_transaction_isolation = '{level}'"));
        let locks = conn.advisory_locks(&keys).timeout(limit);
        let result = locks.transaction(|_| Ok::<_, Error>(()));
        assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        let locks = conn.advisory_locks(&keys[1..]);
        locks
            .transaction(|_| Ok::<_, Error>(()))
            .expect("free locks");
    }
    conn.execute_sql("RESET default_transaction_isolation");
    assert!(
        conn.advisory_locks(&keys)
            .try_acquire()
            .expect("a try")
            .is_none()
    );
    <PgConnection as Connection>::TransactionManager::begin_transaction(&mut conn).expect("BEGIN");
    assert!(
        !conn
            .advisory_xact_locks(&keys)
            .try_acquire()
            .expect("a try")
    );
    let result = conn.advisory_xact_locks(&keys).timeout(limit).acquire();
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
    conn.advisory_xact_locks(&keys[1..])
        .acquire()
        .expect("free locks");
    <PgConnection as Connection>::TransactionManager::rollback_transaction(&mut conn)
        .expect("ROLLBACK");
    drop(held);
}

#[test]
fn more_keys_add_no_entry_to_pg_stat_statements() {
    let server = start_extra_postgres(
        "-c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.track=all \
         -c pg_stat_statements.track_utility=on",
    );
    let mut observer = PgConnection::open(&server);
    observer.execute_sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements");
    let mut texts = || {
        let count = "SELECT count(*) FROM pg_stat_statements WHERE query NOT LIKE '%pg_stat_statements%' \
             AND query NOT LIKE '%SAVEPOINT%'";
        observer.number(count).expect("a count")
    };
    take(&server, 2);
    take(&server, 2);
    let few = texts();
    assert!(few > 5, "{few}");
    for count in [3, 4, 17, 100, 200] {
        take(&server, count);
    }
    assert_eq!(texts(), few);
}
