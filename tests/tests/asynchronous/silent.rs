//! A network that carries nothing any more, and does not say so.

use std::time::Duration;

use diesel_async::AsyncConnection;
use dlock_core::LockKey;
use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, PATIENCE, Proxy, Server, on_every_network_server_async, on_postgres_async,
    unique_key,
};
use tokio::time::timeout;

use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);

#[track_caller]
fn assert_silent<T: std::fmt::Debug>(result: Result<T, Error>, key: &str) {
    match result {
        Err(Error::Lost {
            key: lost, source, ..
        }) => {
            assert_eq!(lost, LockKey::from(key));
            assert!(
                source.to_string().contains("no answer from the server"),
                "{source}"
            );
        }
        other => panic!("{other:?}"),
    }
}

on_every_network_server_async! {
    async fn a_limited_wait_ends_although_the_network_is_silent<C: LockTest>(server: &Server) {
        for taken in [false, true] {
            for way in 0..4 {
                let key = unique_key("silent");
                let proxy = Proxy::start(server);
                let (mut conn, mut observer) = (C::open_url(proxy.url()).await, C::observer(server));
                if taken {
                    assert!(try_lock(&mut observer, &key));
                }
                proxy.pause();
                let lock = conn.advisory_lock(&key);
                let ended = async {
                    match way {
                        0 => lock.timeout(SHORT).acquire().await.map(drop),
                        1 => lock.try_acquire().await.map(drop),
                        2 => lock.timeout(SHORT).run(async |_conn| Ok::<(), Error>(())).await,
                        _ => lock.timeout(SHORT).transaction(async |_conn| Ok::<(), Error>(())).await,
                    }
                };
                let ended = timeout(PATIENCE, ended).await.expect("it ends by itself");
                assert_silent(ended, &key);
                assert!(is_broken(&mut conn), "a pool would hand it out again");
                // What was granted meanwhile is given back, at the latest when the connection is closed.
                if taken {
                    unlock(&mut observer, &key);
                }
                drop(conn);
                proxy.cut();
                wait_until_free(&mut observer, &key);
            }
        }
    }

    async fn a_limited_wait_for_a_permit_ends_although_the_network_is_silent<C: LockTest>(server: &Server) {
        for way in 0..4 {
            let key = unique_key("silent_permit");
            let proxy = Proxy::start(server);
            let mut conn = C::open_url(proxy.url()).await;
            proxy.pause();
            let permit = conn.advisory_semaphore(&key, 1);
            let ended = async {
                match way {
                    0 => permit.timeout(SHORT).acquire().await.map(drop),
                    1 => permit.try_acquire().await.map(drop),
                    2 => permit.timeout(SHORT).run(async |_conn| Ok::<(), Error>(())).await,
                    _ => permit.timeout(SHORT).transaction(async |_conn| Ok::<(), Error>(())).await,
                }
            };
            let ended = timeout(PATIENCE, ended).await.expect("it ends by itself");
            assert_silent(ended, &key);
            assert!(is_broken(&mut conn), "a pool would hand it out again");
            drop(conn);
            proxy.cut();
            let mut conn = C::open(server).await;
            let permit = conn.advisory_semaphore(&key, 1).timeout(PATIENCE).acquire().await;
            permit.expect("the slot is free").release().await.expect("it is held");
        }
    }

    async fn an_outer_guard_keeps_its_lock_when_an_inner_wait_ends_in_silence<C: LockTest>(server: &Server) {
        let (outer, inner) = (unique_key("silent_outer"), unique_key("silent_inner"));
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()).await, C::observer(server));
        let mut guard = conn.advisory_lock(&outer).acquire().await.expect("a free lock");
        let id = guard.backend_id().await;
        proxy.pause();
        let ended = timeout(PATIENCE, guard.advisory_lock(&inner).timeout(SHORT).acquire()).await;
        assert_silent(ended.expect("it ends by itself").map(drop), &inner);
        assert_held_by(&mut observer, &outer, id);
        drop(guard);
        drop(conn);
        proxy.cut();
        wait_until_free(&mut observer, &outer);
        wait_until_free(&mut observer, &inner);
    }
}

on_postgres_async! {
    async fn a_limited_lock_of_the_transaction_ends_although_the_network_is_silent(server: &Server) {
        let key = unique_key("silent_xact");
        let proxy = Proxy::start(server);
        let mut conn = diesel_async::AsyncPgConnection::open_url(proxy.url()).await;
        let ended = conn.transaction(async |conn| {
            proxy.pause();
            let ended = timeout(PATIENCE, conn.advisory_xact_lock(&key).timeout(SHORT).acquire()).await;
            proxy.cut();
            ended.expect("it ends by itself")
        });
        assert_silent(ended.await, &key);
    }
}
