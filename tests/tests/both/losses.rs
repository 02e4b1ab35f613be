//! A session that the server has ended is one kind of error, with the key in it, whatever is asked next.

use diesel::QueryResult;
use dlock_core::LockKey;
use dlock_tests::{Server, unique_key};

use crate::flavor::*;
use crate::support::*;

#[track_caller]
fn assert_lost<T: std::fmt::Debug>(result: Result<T, Error>, key: &str) {
    match result {
        Err(Error::Lost { key: lost, .. }) => assert_eq!(lost, LockKey::from(key)),
        other => panic!("{other:?}"),
    }
}

/// Somebody ends the session.
#[both]
async fn end<C: LockTest>(conn: &mut C, observer: &mut impl TestConnection) {
    let id = conn.backend_id().await;
    kill(observer, id);
}

#[both]
on_every_network_server! {
    async fn an_acquire_on_a_session_that_was_ended_is_lost<C: LockTest>(server: &Server) {
        let key = unique_key("lost_acquire");
        let mut observer = C::observer(server);
        for way in 0..5 {
            // Once with statements that are prepared, once without.
            for prepared in [false, true] {
                let mut conn = C::open(server).await;
                if prepared {
                    conn.advisory_lock(&key).acquire().await.expect("a free lock").release().await.expect("a release");
                }
                end(&mut conn, &mut observer).await;
                let lock = conn.advisory_lock(&key);
                match way {
                    0 => assert_lost(lock.acquire().await.map(drop), &key),
                    1 => assert_lost(lock.try_acquire().await.map(drop), &key),
                    2 => assert_lost(lock.timeout(std::time::Duration::from_secs(60)).acquire().await.map(drop), &key),
                    3 => assert_lost(lock.run(async |_conn| Ok::<(), Error>(())).await, &key),
                    _ => {
                        let result = lock.transaction(async |_conn| Ok::<(), Error>(())).await;
                        assert_lost(result, &key);
                    }
                }
                assert!(is_broken(&mut conn));
                assert_free(&mut observer, &key);
            }
        }
    }

    async fn what_a_guard_is_asked_after_its_session_was_ended_is_lost<C: LockTest>(server: &Server) {
        let key = unique_key("lost_guard");
        let mut observer = C::observer(server);
        for with_query in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            assert!(lock.is_held().await.expect("an answer"));
            end(&mut *lock, &mut observer).await;
            if with_query {
                let result: QueryResult<()> = lock.batch_execute("SELECT 1").await;
                result.expect_err("the session is gone");
            }
            assert_lost(lock.is_held().await, &key);
            assert_lost(lock.is_held().await, &key);
            assert_lost(lock.release().await.map(drop), &key);
            assert!(is_broken(&mut conn));
            assert_free(&mut observer, &key);
        }
    }

    async fn a_query_under_a_guard_of_an_ended_session_and_then_the_release<C: LockTest>(server: &Server) {
        let key = unique_key("lost_query");
        let mut observer = C::observer(server);
        for in_transaction in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            end(&mut *lock, &mut observer).await;
            if in_transaction {
                let result = lock.transaction(async |conn| conn.batch_execute("SELECT 1").await).await;
                result.expect_err("the session is gone");
            } else {
                lock.batch_execute("SELECT 1").await.expect_err("the session is gone");
            }
            assert_lost(lock.release().await.map(drop), &key);
            assert!(is_broken(&mut conn));
        }
    }

    async fn a_run_whose_session_is_ended_in_its_body_is_lost<C: LockTest>(server: &Server) {
        let key = unique_key("lost_run");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let ran = conn.advisory_lock(&key).run(async |_conn| {
            kill(&mut observer, id);
            Ok::<(), Error>(())
        });
        assert_lost(ran.await, &key);
        assert!(is_broken(&mut conn));
    }
}

#[both]
on_postgres! {
    async fn a_lock_inside_a_transaction_of_an_ended_session_is_lost(server: &Server) {
        let key = unique_key("lost_inside");
        let mut observer = PgConnection::observer(server);
        for way in 0..3 {
            let mut conn = PgConnection::open(server).await;
            let result = conn.transaction(async |conn| {
                let id = conn.backend_id().await;
                kill(&mut observer, id);
                match way {
                    0 => conn.advisory_xact_lock(&key).acquire().await,
                    1 => conn.advisory_lock(&key).inside_transaction().acquire().await.map(drop),
                    _ => conn.advisory_lock(&key).transaction(async |_conn| Ok::<(), Error>(())).await,
                }
            });
            match result.await {
                Err(Error::Lost { key: lost, .. }) if way < 2 => assert_eq!(lost, LockKey::from(&key)),
                // Diesel's own savepoint comes first.
                Err(Error::Lost { .. } | Error::Database(_)) if way == 2 => {}
                other => panic!("{way}: {other:?}"),
            }
            assert!(is_broken(&mut conn));
            assert_free(&mut observer, &key);
        }
    }
}
