//! Every future is `Send`, and runs on every kind of runtime.

use std::time::Duration;

use diesel::QueryResult;
use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{
    AdvisoryLock, AdvisoryLockExt, AdvisoryLockGuard, Error, Holder, LockConnection, Mode,
};
use dlock_tests::{
    Server, on_every_network_server_async, on_postgres_async, run_on_every_network_server_async,
    unique_key,
};
use tokio::runtime::{Builder, Runtime};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

/// All that this crate does with a free lock. Generic code can prove that it is `Send`, too.
async fn everything<C: LockTest>(mut conn: C, key: String) -> C {
    let mut lock = conn
        .advisory_lock(&key)
        .acquire()
        .await
        .expect("a free lock");
    assert!(lock.is_held().await.expect("an answer"));
    let holders: Vec<Holder> = lock.holders().await.expect("holders");
    assert_eq!(holders[0].mode, Mode::Exclusive);
    let inner = lock
        .advisory_lock(&key)
        .timeout(LONG)
        .acquire()
        .await
        .expect("held already");
    inner.release().await.expect("a release");
    lock.release().await.expect("a release");

    let lock = conn
        .advisory_lock(&key)
        .poll_every(SHORT)
        .try_acquire()
        .await
        .expect("a try");
    lock.expect("a free lock")
        .release()
        .await
        .expect("a release");
    let cancellation = conn.cancellation();
    let lock = conn
        .advisory_lock(&key)
        .cancel_with(cancellation)
        .acquire()
        .await
        .expect("a free lock");
    lock.release().await.expect("a release");

    let moved = key.clone();
    let run = conn.advisory_lock(&key).run(async move |conn| {
        conn.batch_execute("SELECT 1").await?;
        QueryResult::Ok(moved)
    });
    let moved = run.await.expect("a free lock");
    let length = conn
        .advisory_lock(&key)
        .transaction(async |conn| {
            conn.batch_execute("SELECT 1").await?;
            Ok::<_, AppError>(moved.len())
        })
        .await
        .expect("a free lock");
    assert_eq!(length, key.len());
    conn.transaction(async |conn| {
        let lock = conn
            .advisory_lock(&key)
            .inside_transaction()
            .acquire()
            .await?;
        lock.release().await?;
        QueryResult::Ok(())
    })
    .await
    .expect("a free lock");

    let owned = AdvisoryLock::new(Box::new(conn), &key)
        .acquire()
        .await
        .expect("a free lock");
    *owned.release().await.expect("a release")
}

/// Waits, and is granted the lock; waits, and is not.
async fn waits<C: LockTest>(mut conn: C, key: String) {
    let lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
    lock.release().await.expect("a release");
    let error = conn.advisory_lock("").acquire().await.map(drop);
    assert!(matches!(error, Err(Error::InvalidKey(_))));
}

fn everything_on<C: LockTest>(server: &Server, runtime: &Runtime) {
    let key = unique_key("async_runtime");
    let mut observer = C::observer(server);
    // Spawned, and on the thread that blocks.
    let mut conn = runtime.block_on(async {
        let conn = C::open(server).await;
        let spawned = tokio::spawn(everything(conn, key.clone()));
        let conn = spawned.await.expect("the task's assertions");
        everything(conn, key.clone()).await
    });
    assert_free(&mut observer, &key);
    runtime.block_on(assert_clean(&mut conn, &mut observer));

    // Many tasks, of which each waits for its turn in the queue, on as few threads as there are.
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for _ in 0..6 {
            tasks.push(tokio::spawn(waits(C::open(server).await, key.clone())));
        }
        for task in tasks {
            task.await.expect("the task's assertions");
        }
    });
    assert_free(&mut observer, &key);
}

#[test]
fn everything_works_and_is_send_on_a_multi_thread_runtime() {
    fn test<C: LockTest>(server: &'static Server) {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(3).enable_all().build();
        everything_on::<C>(server, &runtime.expect("a runtime"));
    }
    run_on_every_network_server_async(test::<AsyncPgConnection>, test::<AsyncMysqlConnection>);
}

#[test]
fn everything_works_on_a_current_thread_runtime() {
    fn test<C: LockTest>(server: &'static Server) {
        let runtime = Builder::new_current_thread().enable_all().build();
        everything_on::<C>(server, &runtime.expect("a runtime"));
    }
    run_on_every_network_server_async(test::<AsyncPgConnection>, test::<AsyncMysqlConnection>);
}

#[test]
fn tasks_of_one_thread_contend_for_a_key() {
    fn test<C: LockTest>(server: &'static Server) {
        const TASKS: i64 = 4;
        const ROUNDS: i64 = 5;
        let key = unique_key("async_one_thread");
        let table = Table::counter(server);
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut tasks = Vec::new();
            for _ in 0..TASKS {
                let (mut conn, key, table) = (C::open(server).await, key.clone(), table.clone());
                tasks.push(tokio::spawn(async move {
                    for _ in 0..ROUNDS {
                        let mut lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
                        table.increment(&mut *lock).await.expect("an update");
                        lock.release().await.expect("a release");
                    }
                }));
            }
            for task in tasks {
                task.await.expect("the task's assertions");
            }
        });
        let mut observer = C::observer(server);
        assert_eq!(table.value(&mut observer), TASKS * ROUNDS);
        assert_free(&mut observer, &key);
    }
    run_on_every_network_server_async(test::<AsyncPgConnection>, test::<AsyncMysqlConnection>);
}

on_every_network_server_async! {
    async fn locks_and_guards_are_send_and_sync_where_their_connection_is<C: LockTest>(server: &Server) {
        fn is_send<T: Send>(value: T) -> T {
            value
        }
        let key = unique_key("async_send");
        let mut conn = is_send(C::open(server).await);
        let lock = is_send(conn.advisory_lock(&key));
        let lock: AdvisoryLockGuard<&mut C> = is_send(lock.acquire()).await.expect("a free lock");
        let lock = is_send(lock);
        is_send(lock.release()).await.expect("a release");
        // What takes any connection can spawn it.
        fn spawn<C: LockConnection + 'static>(mut conn: C, key: String) -> tokio::task::JoinHandle<()> {
            tokio::spawn(async move {
                let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
                lock.release().await.expect("a release");
                conn.advisory_lock(&key).run(async |_| Ok::<_, Error>(())).await.expect("a free lock");
                conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("a free lock");
            })
        }
        spawn(conn, key.clone()).await.expect("the task's assertions");
        wait_until_free(&mut C::observer(server), &key);
    }
}

on_postgres_async! {
    async fn a_transactions_lock_is_send(server: &Server) {
        use dlock_tests::AsyncTestConnection;
        let key = unique_key("async_xact_send");
        let mut conn = AsyncPgConnection::open(server).await;
        tokio::spawn(async move {
            conn.transaction(async |conn| {
                assert!(conn.advisory_xact_lock(&key).shared().try_acquire().await?);
                conn.advisory_xact_lock(&key).timeout(LONG).acquire().await?;
                assert_eq!(conn.advisory_xact_lock(&key).holders().await?.len(), 2);
                conn.advisory_lock(&key).shared().transaction(async |_| Ok::<_, Error>(())).await
            })
            .await
            .expect("a commit");
        })
        .await
        .expect("the task's assertions");
    }
}
