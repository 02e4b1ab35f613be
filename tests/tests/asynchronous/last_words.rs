//! A session that the server ends while a question to it is under way is lost.
//!
//! Then the answer is why the session has ended, and to diesel-async it is an error like any other.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use diesel_async::{AsyncConnection, AsyncPgConnection, TransactionManager};
use dlock_diesel_async::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    AsyncTestConnection, Proxy, Server, on_every_network_server_async, on_postgres_async,
    unique_key,
};

use crate::support::*;

const LONG: Duration = Duration::from_secs(60);

/// Several locks.
fn keys(key: &str) -> [LockKey; 2] {
    [key.into(), LockKey::namespaced(key, 2)]
}

/// Ends the session, and holds its last words back.
async fn end<C: LockTest>(conn: &mut C, observer: &mut C::Observer, proxy: &Proxy) {
    let id = conn.backend_id().await;
    proxy.silence();
    kill(observer, id);
}

/// What is asked is sent before the last words come.
async fn hear<T>(proxy: &Proxy, question: impl Future<Output = T>) -> T {
    let mut question = pin!(question);
    loop {
        tokio::select! {
            answer = &mut question => return answer,
            () = tokio::time::sleep(Duration::from_millis(1)) => {
                if proxy.is_asked() {
                    proxy.resume();
                }
            }
        }
    }
}

#[track_caller]
fn assert_lost<T: Debug>(result: Result<T, Error>, key: &str, way: usize) {
    match result {
        Err(Error::Lost { key: lost, .. }) if keys(key).contains(&lost) => {}
        other => panic!("{way}: {other:?}"),
    }
}

/// Asks in one of several ways. `None`: there are no more.
async fn acquire<C: LockTest>(conn: &mut C, key: &str, way: usize) -> Option<Result<(), Error>> {
    Some(match way {
        0 => conn.advisory_lock(key).acquire().await.map(drop),
        1 => conn.advisory_lock(key).try_acquire().await.map(drop),
        2 => conn
            .advisory_lock(key)
            .timeout(LONG)
            .acquire()
            .await
            .map(drop),
        3 => {
            conn.advisory_lock(key)
                .run(async |_| Ok::<_, Error>(()))
                .await
        }
        4 => {
            conn.advisory_lock(key)
                .transaction(async |_| Ok::<_, Error>(()))
                .await
        }
        5 => conn.advisory_locks(keys(key)).acquire().await.map(drop),
        6 => conn.advisory_locks(keys(key)).try_acquire().await.map(drop),
        7 => conn.advisory_semaphore(key, 3).acquire().await.map(drop),
        8 => conn
            .advisory_semaphore(key, 3)
            .try_acquire()
            .await
            .map(drop),
        _ => return None,
    })
}

/// The same inside a transaction.
async fn acquire_inside(
    conn: &mut AsyncPgConnection,
    key: &str,
    way: usize,
) -> Option<Result<(), Error>> {
    Some(match way {
        0 => conn
            .advisory_lock(key)
            .inside_transaction()
            .acquire()
            .await
            .map(drop),
        1 => conn
            .advisory_lock(key)
            .inside_transaction()
            .try_acquire()
            .await
            .map(drop),
        2 => conn
            .advisory_locks(keys(key))
            .inside_transaction()
            .acquire()
            .await
            .map(drop),
        3 => conn
            .advisory_semaphore(key, 3)
            .inside_transaction()
            .acquire()
            .await
            .map(drop),
        4 => conn.advisory_xact_lock(key).acquire().await,
        5 => conn.advisory_xact_lock(key).try_acquire().await.map(drop),
        6 => conn.advisory_xact_lock(key).timeout(LONG).acquire().await,
        7 => conn.advisory_xact_locks(keys(key)).acquire().await,
        8 => conn
            .advisory_xact_locks(keys(key))
            .try_acquire()
            .await
            .map(drop),
        9 => conn.advisory_xact_lock(key).fencing_token().await.map(drop),
        10 => conn.advisory_xact_lock(key).holders().await.map(drop),
        _ => return None,
    })
}

on_every_network_server_async! {
    async fn whoever_asks_for_a_lock_is_told_that_the_session_is_lost<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut observer = C::observer(server);
        for way in 0.. {
            // Once with statements that the driver has prepared.
            for prepared in [false, true] {
                let key = unique_key("last_words");
                let mut conn = C::open_url(proxy.url()).await;
                if prepared {
                    let lock = conn.advisory_lock(&key).acquire().await;
                    lock.expect("a free lock").release().await.expect("a release");
                }
                end(&mut conn, &mut observer, &proxy).await;
                match hear(&proxy, acquire(&mut conn, &key, way)).await {
                    Some(result) => assert_lost(result, &key, way),
                    None => return,
                }
                assert!(is_broken(&mut conn));
            }
        }
    }

    async fn whoever_asks_a_guard_is_told_so_too<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut observer = C::observer(server);
        for way in 0..4 {
            let key = unique_key("last_words");
            for several in [false, true] {
                let mut conn = C::open_url(proxy.url()).await;
                let lock = match several {
                    false => conn.advisory_lock(&key),
                    true => conn.advisory_locks(keys(&key)),
                };
                let mut lock = lock.acquire().await.expect("a free lock");
                end(&mut *lock, &mut observer, &proxy).await;
                match way {
                    0 => assert_lost(hear(&proxy, lock.is_held()).await, &key, way),
                    1 => assert_lost(hear(&proxy, lock.holders()).await, &key, way),
                    2 => assert_lost(hear(&proxy, lock.fencing_token()).await, &key, way),
                    _ => assert_lost(hear(&proxy, lock.release()).await.map(drop), &key, way),
                }
            }

            let mut conn = C::open_url(proxy.url()).await;
            let slot = conn.advisory_semaphore(&key, 3).acquire().await;
            let mut slot = slot.expect("a free slot");
            end(&mut *slot, &mut observer, &proxy).await;
            match way {
                0 => assert_lost(hear(&proxy, slot.is_held()).await, &key, way),
                1 => assert_lost(hear(&proxy, slot.holders()).await, &key, way),
                2 => assert_lost(hear(&proxy, slot.fencing_token()).await, &key, way),
                _ => assert_lost(hear(&proxy, slot.release()).await.map(drop), &key, way),
            }
        }
    }
}

on_postgres_async! {
    async fn whoever_asks_inside_a_transaction_is_told_so_too(server: &Server) {
        type Transactions = <AsyncPgConnection as AsyncConnection>::TransactionManager;
        let proxy = Proxy::start(server);
        let mut observer = AsyncPgConnection::observer(server);
        for way in 0.. {
            let key = unique_key("last_words");
            let mut conn = AsyncPgConnection::open_url(proxy.url()).await;
            Transactions::begin_transaction(&mut conn).await.expect("a transaction");
            end(&mut conn, &mut observer, &proxy).await;
            match hear(&proxy, acquire_inside(&mut conn, &key, way)).await {
                Some(result) => assert_lost(result, &key, way),
                None => return,
            }
            assert!(is_broken(&mut conn));
        }
    }
}
