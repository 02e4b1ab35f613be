//! What runs under a lock is dropped in the middle of a statement.

use std::time::Duration;

use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server_async, unique_key, wait_for,
};
use tokio::time::timeout;

use crate::support::*;

fn sleep(kind: Kind, seconds: u32) -> String {
    match kind {
        Kind::Postgres => format!("SELECT pg_sleep({seconds})"),
        _ => format!("SELECT SLEEP({seconds})"),
    }
}

/// Whether the session sleeps.
fn sleeps(observer: &mut impl TestConnection, kind: Kind, id: i64) -> bool {
    let found = match kind {
        Kind::Postgres => observer.number(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {id} AND wait_event = 'PgSleep'"
        )),
        _ => observer.number(&format!(
            "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE ID = {id} AND STATE = 'User sleep'"
        )),
    };
    found == Some(1)
}

on_every_network_server_async! {
    async fn with_cancel_with_the_statement_ends_and_the_lock_is_free<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        for way in 0..4 {
            let key = unique_key("body_cancelled");
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let cancel = conn.cancellation();
            let work = sleep(C::KIND, 3600);
            {
                let body = async {
                    let lock = conn.advisory_lock(&key);
                    match way {
                        0 => {
                            let mut lock = lock.acquire().await?.cancel_with(cancel);
                            lock.batch_execute(&work).await.map_err(Error::from)
                        }
                        1 => lock.cancel_with(cancel).run(async |conn| conn.batch_execute(&work).await).await
                            .map_err(Error::from),
                        2 => lock.cancel_with(cancel).transaction(async |conn| conn.batch_execute(&work).await).await
                            .map_err(Error::from),
                        // It waited before.
                        _ => lock.cancel_with(cancel).timeout(Duration::from_secs(600))
                            .transaction(async |conn| conn.batch_execute(&work).await).await.map_err(Error::from),
                    }
                };
                let mut body = std::pin::pin!(body);
                // Driven until the statement runs.
                loop {
                    let step = timeout(Duration::from_millis(20), body.as_mut()).await;
                    assert!(step.is_err(), "{step:?}");
                    if sleeps(&mut observer, C::KIND, id) {
                        break;
                    }
                }
                assert_held_by(&mut observer, &key, id);
            }
            assert!(is_broken(&mut conn), "a late cancel could hit the next user");
            // The statement has ended, though it had an hour to go.
            drive_until(|| !sleeps(&mut observer, C::KIND, id)).await;
            drop(conn);
            let mut observer = C::observer(server);
            drive_until(|| holders(&mut observer, &key).is_empty()).await;
        }
    }

    async fn without_it_the_lock_is_free_when_the_statement_has_ended<C: LockTest>(server: &Server) {
        let key = unique_key("body_dropped");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let work = sleep(C::KIND, 1);
        {
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            let mut body = std::pin::pin!(lock.batch_execute(&work));
            while !sleeps(&mut observer, C::KIND, id) {
                let _ = timeout(Duration::from_millis(20), body.as_mut()).await;
            }
        }
        drive_until(|| holders(&mut observer, &key).is_empty()).await;
        wait_for("the end of the statement", || !sleeps(&mut observer, C::KIND, id));
    }

    async fn a_guard_that_is_released_cancels_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("body_released");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let never = async { panic!("nothing is to be cancelled") };
        let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock").cancel_with(never);
        lock.release().await.expect("it is held");
        let never = async { panic!("nothing is to be cancelled") };
        let ran = conn.advisory_lock(&key).cancel_with(never).run(async |_conn| Ok::<(), Error>(()));
        ran.await.expect("a free lock");
        let never = async { panic!("nothing is to be cancelled") };
        let failed = conn.advisory_lock(&key).cancel_with(never).transaction(async |_conn| {
            Err::<(), _>(Error::from(diesel::result::Error::NotFound))
        });
        failed.await.expect_err("the body's own");
        tokio::task::yield_now().await;
        assert_clean(&mut conn, &mut observer).await;
        assert_free(&mut observer, &key);
    }
}

/// Lets spawned tasks run until it is so.
async fn drive_until(mut is_so: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !is_so() {
        assert!(
            begin.elapsed() < dlock_tests::PATIENCE,
            "it does not come to be"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
