//! Everything works for a role that may only connect, whatever `search_path` says, and after the session has forgotten its
//! prepared statements.

use std::time::Duration;

use dlock_core::LockKey;
use dlock_tests::{Server, unique_key, wait_for};

use crate::both::fresh_database::FreshDatabase;
use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);
/// It passes in a turn after the first.
const LATER_TURN: Duration = Duration::from_millis(2_300);
const LONG: Duration = Duration::from_secs(60);

/// How a lock is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Session,
    Shared,
    InsideTransaction,
    Xact,
    Transaction,
    TransactionAtRepeatableRead,
}

const WAYS: [Way; 6] = [
    Way::Session,
    Way::Shared,
    Way::InsideTransaction,
    Way::Xact,
    Way::Transaction,
    Way::TransactionAtRepeatableRead,
];

macro_rules! within {
    ($lock:expr, $limit:expr) => {{
        let lock = $lock;
        match $limit {
            Some(limit) => lock.timeout(limit),
            None => lock,
        }
    }};
}

/// Takes a lock and gives it back.
#[both]
async fn lock(
    conn: &mut PgConnection,
    key: &LockKey,
    way: Way,
    limit: Option<Duration>,
) -> Result<(), Error> {
    lock_all(conn, std::slice::from_ref(key), way, limit).await
}

/// One lock or several.
fn named<'c>(conn: &'c mut PgConnection, keys: &[LockKey]) -> AdvisoryLock<&'c mut PgConnection> {
    match keys {
        [key] => conn.advisory_lock(key),
        keys => conn.advisory_locks(keys),
    }
}

/// Takes one lock or several and gives them back.
#[both]
async fn lock_all(
    conn: &mut PgConnection,
    keys: &[LockKey],
    way: Way,
    limit: Option<Duration>,
) -> Result<(), Error> {
    match way {
        Way::Session => {
            let lock = within!(named(conn, keys), limit);
            lock.acquire().await?.release().await?;
        }
        Way::Shared => {
            let lock = within!(named(conn, keys), limit);
            lock.shared().acquire().await?.release().await?;
        }
        Way::InsideTransaction => {
            begin(conn).await;
            let lock = within!(named(conn, keys).inside_transaction(), limit);
            let result = match lock.acquire().await {
                Ok(lock) => lock.release().await.map(drop),
                Err(error) => Err(error),
            };
            conn.execute_sql("SELECT 1").await;
            commit(conn).await;
            result?;
        }
        Way::Xact => {
            begin(conn).await;
            let locks = match keys {
                [key] => conn.advisory_xact_lock(key),
                keys => conn.advisory_xact_locks(keys),
            };
            let result = within!(locks, limit).acquire().await;
            conn.execute_sql("SELECT 1").await;
            commit(conn).await;
            result?;
        }
        Way::Transaction | Way::TransactionAtRepeatableRead => {
            let lock = within!(named(conn, keys), limit);
            lock.transaction(async |_| Ok::<_, Error>(())).await?;
        }
    }
    Ok(())
}

/// A session whose transactions have the level that `way` asks for.
#[both]
async fn open(url: &str, way: Way) -> PgConnection {
    let mut conn = PgConnection::open_url(url).await;
    if way == Way::TransactionAtRepeatableRead {
        conn.execute_sql("SET default_transaction_isolation = 'repeatable read'")
            .await;
    }
    conn
}

/// What becomes of a wait.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// It is granted in a turn after the first.
    Granted,
    /// Its limit passes in a turn after the first.
    TimedOut,
    /// It is cancelled.
    Cancelled,
}

/// Every kind of lock on a key, to every end, on sessions of `url` that are set up so.
#[both]
async fn everything_works(server: &Server, url: &str, setup: &'static str) {
    let mut observer = PgConnection::observer(server);
    for (way, count) in WAYS.into_iter().flat_map(|way| [(way, 1), (way, 3)]) {
        let keys: Vec<_> = (0..count)
            .map(|_| LockKey::from(unique_key("everything")))
            .collect();
        let key = keys[count / 2].clone();
        let mut conn = open(url, way).await;
        conn.execute_sql(setup).await;
        lock_all(&mut conn, &keys, way, None)
            .await
            .expect("free locks");
        lock_all(&mut conn, &keys, way, Some(Duration::ZERO))
            .await
            .expect("free locks");
        assert!(try_lock(&mut observer, &key));
        for limit in [Duration::ZERO, SHORT] {
            match lock_all(&mut conn, &keys, way, Some(limit)).await {
                Err(Error::Timeout { holders, .. }) => {
                    let ids: Vec<i64> = holders.iter().map(|holder| holder.backend_id).collect();
                    assert_eq!(ids, [observer.backend_id()], "{way:?}");
                }
                other => panic!("{way:?}: {other:?}"),
            }
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        lock_all(&mut conn, &keys, way, Some(LONG))
            .await
            .expect("free locks");
        conn.execute_sql("RESET search_path").await;
        assert_clean(&mut conn, &mut observer).await;
    }
    let mut conn = PgConnection::open_url(url).await;
    conn.execute_sql(setup).await;
    questions_are_answered(&mut conn, &mut observer).await;
    a_lock_is_released_in_an_aborted_transaction(&mut conn, &mut observer).await;
    waits_end(url, setup, &mut observer).await;
}

#[both]
async fn questions_are_answered(conn: &mut PgConnection, observer: &mut impl TestConnection) {
    let key = unique_key("questions");
    let taken = observer.backend_id();
    assert!(try_lock(observer, &key));
    let tried = conn.advisory_lock(&key).try_acquire().await.map(drop);
    tried.expect("a try");
    let holders = conn.advisory_lock(&key).holders().await.expect("holders");
    assert_eq!((holders.len(), holders[0].backend_id), (1, taken));
    unlock(observer, &key);
    let mut lock = conn
        .advisory_lock(&key)
        .acquire()
        .await
        .expect("a free lock");
    assert!(lock.is_held().await.expect("an answer"));
    let token = lock.fencing_token().await.expect("a token");
    assert!(lock.fencing_token().await.expect("a token") > token);
    let held = diesel::select(lock.held());
    assert_eq!(held.get_result(&mut *lock).await, Ok(true));
    assert_eq!(lock.holders().await.expect("holders").len(), 1);
    lock.release().await.expect("a release");
    assert_free(observer, &key);
}

#[both]
async fn a_lock_is_released_in_an_aborted_transaction(
    conn: &mut PgConnection,
    observer: &mut impl TestConnection,
) {
    let key = unique_key("aborted");
    begin(conn).await;
    let mut lock = conn
        .advisory_lock(&key)
        .inside_transaction()
        .acquire()
        .await
        .expect("a free lock");
    lock.batch_execute("SELECT no_such_column")
        .await
        .expect_err("there is none");
    lock.release().await.expect("a release");
    assert_free(observer, &key);
    roll_back(conn).await;
    assert!(!is_broken(conn));
}

/// Of text, numbers and pairs alike, positive and negative: a turn puts the key together from its parts.
fn keys(number: i32) -> [LockKey; 4] {
    [
        LockKey::from(unique_key("waits_end")),
        LockKey::from(i64::MIN + i64::from(number)),
        LockKey::from((i32::MIN + number, -1)),
        LockKey::from((number, i32::MAX)),
    ]
}

#[both]
async fn waits_end(url: &str, setup: &'static str, observer: &mut impl TestConnection) {
    let mut number = 0;
    for end in [End::Granted, End::TimedOut, End::Cancelled] {
        let mut waiters = Vec::new();
        for way in WAYS {
            number += 1;
            let keys = keys(number);
            let few = if end == End::Granted {
                keys.len()
            } else {
                1 + usize::from(way == Way::Xact)
            };
            for (index, key) in keys.into_iter().rev().take(few).enumerate() {
                assert!(try_lock(observer, &key));
                let limit = match end {
                    End::Granted => (index % 2 == 0).then_some(LONG),
                    End::TimedOut => Some(LATER_TURN),
                    End::Cancelled => None,
                };
                let waiter = on_connection(open(url, way).await, {
                    let key = key.clone();
                    async move |mut conn: PgConnection, _| {
                        conn.execute_sql(setup).await;
                        let result = lock(&mut conn, &key, way, limit).await;
                        assert!(!is_broken(&mut conn));
                        result
                    }
                });
                waiters.push((waiter.await, way, key));
            }
        }
        for (waiter, _, key) in &waiters {
            match end {
                End::Granted => {
                    waiter.waits_again(observer);
                    unlock(observer, key);
                }
                End::TimedOut => {}
                End::Cancelled => {
                    waiter.waits(observer);
                    observer.cancel(waiter.id);
                }
            }
        }
        for (waiter, way, key) in waiters {
            match (end, waiter.join().await) {
                (End::Granted, Ok(())) => {}
                (End::TimedOut, Err(Error::Timeout { waited, .. })) => {
                    let late = waited - LATER_TURN;
                    assert!(late < Duration::from_secs(1), "{way:?}: {late:?}");
                    unlock(observer, &key);
                }
                (End::Cancelled, Err(Error::Interrupted { .. })) => unlock(observer, &key),
                (_, result) => panic!("{way:?}, {end:?}: {result:?}"),
            }
            assert_free(observer, &key);
        }
    }
}

/// Functions, operators, types and tables with the names of PostgreSQL's own. The functions fail, nothing has the types,
/// and the tables are empty.
pub(crate) const HOSTILE: &str = r"
    CREATE SCHEMA hostile;
    DO $do$
    DECLARE
        thing record;
        fails text := 'LANGUAGE plpgsql AS $f$ BEGIN RAISE ''hostile''; END $f$';
    BEGIN
        FOR thing IN SELECT proname, pg_get_function_identity_arguments(oid) AS arguments,
            pg_get_function_result(oid) AS result FROM pg_proc
            WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f'
        LOOP
            BEGIN
                EXECUTE format('CREATE FUNCTION hostile.%I(%s) RETURNS %s %s',
                    thing.proname, thing.arguments, thing.result, fails);
            EXCEPTION WHEN OTHERS THEN NULL; -- of pseudo-types
            END;
        END LOOP;
        EXECUTE 'CREATE FUNCTION hostile.format(text, VARIADIC text[]) RETURNS text ' || fails;
        EXECUTE 'CREATE FUNCTION hostile.concat(VARIADIC text[]) RETURNS text ' || fails;
        FOR thing IN SELECT oid, oprname, format_type(oprleft, NULL) AS l, format_type(oprright, NULL) AS r,
            format_type(oprresult, NULL) AS result FROM pg_operator
            WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprkind = 'b'
        LOOP
            BEGIN
                EXECUTE format('CREATE FUNCTION hostile.op_%s(%s, %s) RETURNS %s %s',
                    thing.oid, thing.l, thing.r, thing.result, fails);
                EXECUTE format('CREATE OPERATOR hostile.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = hostile.op_%s)',
                    thing.oprname, thing.l, thing.r, thing.oid);
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END LOOP;
        FOR thing IN SELECT relname FROM pg_class
            WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')
        LOOP
            EXECUTE format('CREATE TABLE hostile.%I ()', thing.relname);
        END LOOP;
        FOR thing IN SELECT typname FROM pg_type
            WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b' AND typelem = 0
        LOOP
            EXECUTE format('CREATE DOMAIN hostile.%I AS pg_catalog.point CHECK (false)', thing.typname);
        END LOOP;
    END $do$";

#[both]
on_postgres! {
    async fn everything_works_for_a_role_that_may_only_connect(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let mut admin = PgConnection::observer(&database.server);
        admin.execute_sql(
            "REVOKE ALL ON LANGUAGE plpgsql FROM PUBLIC; \
             REVOKE ALL ON SCHEMA information_schema, public FROM PUBLIC",
        );
        let user = TestUser::create(PgConnection::observer(server), &database.server, "");
        let mut conn = PgConnection::open_url(user.url()).await;
        conn.batch_execute("DO $$ BEGIN END $$").await.expect_err("no PL/pgSQL");
        conn.batch_execute("TABLE information_schema.tables").await.expect_err("no information_schema");
        everything_works(&database.server, user.url(), "SELECT 1").await;
    }

    async fn without_pg_stat_activity_a_timeout_leaves_the_transaction_as_it_was(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let mut observer = PgConnection::observer(&database.server);
        observer.execute_sql("REVOKE ALL ON pg_catalog.pg_stat_activity FROM PUBLIC");
        let user = TestUser::create(PgConnection::observer(server), &database.server, "");
        for way in WAYS {
            let key = LockKey::from(unique_key("no_activity"));
            let mut conn = open(user.url(), way).await;
            assert!(try_lock(&mut observer, &key));
            for limit in [Duration::ZERO, SHORT] {
                let result = lock(&mut conn, &key, way, Some(limit)).await;
                assert!(matches!(result, Err(Error::Timeout { .. })), "{way:?}: {result:?}");
                assert_clean(&mut conn, &mut observer).await;
            }
            unlock(&mut observer, &key);
            lock(&mut conn, &key, way, Some(LONG)).await.expect("a free lock");
        }
    }

    async fn everything_works_whatever_search_path_says(server: &Server) {
        const HOSTILE_FIRST: &str = "SET search_path = hostile, pg_catalog";
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        PgConnection::observer(&database.server).execute_sql(HOSTILE);
        let mut conn = PgConnection::open(&database.server).await;
        conn.execute_sql(HOSTILE_FIRST).await;
        for hostile in [
            "SELECT current_setting('lock_timeout')",
            "SELECT concat('text'::pg_catalog.text)",
            "SELECT 1 = 1",
            "SELECT pid FROM pg_locks",
            "SELECT 'hostile'::text",
        ] {
            conn.batch_execute(hostile).await.expect_err(hostile);
        }
        everything_works(&database.server, &database.server.url, HOSTILE_FIRST).await;
    }

    async fn a_lock_is_released_after_deallocate_all(server: &Server) {
        let key = unique_key("deallocate");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for drops in [false, true, false] {
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.execute_sql("DEALLOCATE ALL").await;
            assert_held_by(&mut observer, &key, id);
            if drops {
                drop(lock);
                wait_until_free(&mut observer, &key);
            } else {
                lock.release().await.expect("it is held");
                assert_free(&mut observer, &key);
            }
        }
        assert_clean(&mut conn, &mut observer).await;
    }

    /// A failure that leaves it open what the session holds ends it, and so nobody works on under an outer guard that
    /// has lost its lock.
    async fn a_role_that_may_not_end_sessions_ends_its_own(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let mut observer = PgConnection::observer(&database.server);
        observer.execute_sql("REVOKE EXECUTE ON FUNCTION pg_terminate_backend FROM PUBLIC");
        let user = TestUser::create(PgConnection::observer(&database.server), &database.server, "");
        let key = unique_key("may_not_end");
        let mut conn = PgConnection::open_url(user.url()).await;
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        outer.execute_sql("DEALLOCATE ALL").await;
        outer.advisory_lock(&key).acquire().await.map(drop).expect_err("nobody knows whose lock it is");
        wait_for("the end of the session", || !observer.is_connected(id));
        assert!(matches!(outer.is_held().await, Err(Error::Lost { .. })));
    }

    async fn locks_are_taken_tried_and_waited_for_after_deallocate_all(server: &Server) {
        let key = unique_key("deallocated");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for limit in [None, Some(Duration::ZERO), Some(LONG)] {
            let lock = within!(conn.advisory_lock(&key), limit).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        }
        conn.execute_sql("DEALLOCATE ALL").await;
        // Statements that the session knows, and are not those that it is asked for next.
        for limit in [None, Some(Duration::ZERO), Some(LONG)] {
            let lock = within!(conn.advisory_lock(&key).shared(), limit).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        }
        for limit in [None, Some(Duration::ZERO), Some(LONG)] {
            let lock = within!(conn.advisory_lock(&key), limit).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
        }
        assert!(try_lock(&mut observer, &key));
        let result = conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        let waiter = on_connection(conn, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                conn.advisory_lock(&key).acquire().await.expect("the lock").release().await.expect("a release");
                conn
            }
        })
        .await;
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        let mut conn = waiter.join().await;
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn after_discard_all_it_is_not_held(server: &Server) {
        let key = unique_key("discard");
        let mut observer = PgConnection::observer(server);
        for again in [false, true] {
            let mut conn = PgConnection::open(server).await;
            if again {
                // So that the driver takes its release for prepared.
                conn.advisory_lock(&key).acquire().await.expect("a free lock").release().await.expect("a release");
            }
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.execute_sql("DISCARD ALL").await;
            assert_free(&mut observer, &key);
            match lock.release().await.map(drop) {
                Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert!(is_broken(&mut conn), "it is not the session that it was");
        }
    }
}
