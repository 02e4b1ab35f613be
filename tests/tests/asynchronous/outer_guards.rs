//! What a future that is dropped leaves to the guards around it, and to whoever has the connection next.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use diesel::connection::InstrumentationEvent;
use diesel::dsl::sql;
use diesel::sql_types::BigInt;
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, bb8};
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
    TransactionManager,
};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, Kind, Proxy, Server, TestConnection, async_servers,
    on_every_network_server_async, on_mysql_async, on_postgres_async, unique_key, wait_for,
};
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};

use crate::cancellation::{CancelTest, FREE_IN_STEP, free_once_closed, timed};
use crate::support::*;

const SHORT: Duration = Duration::from_millis(100);

/// Before a test that hangs is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// The output, unless it is not there after so many polls; then it is dropped.
async fn within_polls<F: Future>(future: F, mut polls: u32) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|context| {
        polls -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polls == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Drops a wait for a lock that is taken, once it is in the queue.
async fn drop_a_wait<C: LockTest>(conn: &mut C, key: &str, observer: &mut C::Observer) {
    let id = conn.backend_id().await;
    tokio::select! {
        acquired = conn.advisory_lock(key).inside_transaction().acquire() => {
            panic!("the lock is taken: {:?}", acquired.map(drop));
        }
        () = async {
            while !observer.is_waiting(id) {
                sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
}

/// Drops a future that waits for an answer, which the proxy keeps for itself meanwhile.
async fn drop_in_flight(proxy: &Proxy, future: impl Future) {
    proxy.pause();
    let done = within_polls(future, 1).await.is_some();
    proxy.resume();
    assert!(!done, "it waits for an answer");
}

/// Becomes true when the future is dropped that waits for the hand-over: the next message comes before its answer.
fn watch_hand_over(conn: &mut AsyncPgConnection) -> Arc<AtomicBool> {
    let dropped = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&dropped);
    let mut handing_over = false;
    conn.set_instrumentation(move |event: InstrumentationEvent<'_>| match event {
        InstrumentationEvent::StartQuery { query, .. } => {
            seen.fetch_or(handing_over, Ordering::SeqCst);
            handing_over = query.to_string().contains("COMMIT AND CHAIN");
        }
        InstrumentationEvent::FinishQuery { .. } => handing_over = false,
        _ => {}
    });
    dropped
}

on_every_network_server_async! {
    /// The connection is still waiting, and answers nothing.
    async fn a_guard_around_a_dropped_wait_is_released_without_waiting_for_it<C: CancelTest>(server: &Server) {
        let (outer, inner) = (unique_key("outer_release"), unique_key("outer_release_inner"));
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &inner));
        let mut conn = C::open(server).await;
        let mut guard = conn.advisory_lock(&outer).acquire().await.expect("a free lock");
        drop_a_wait(&mut *guard, &inner, &mut observer).await;
        let released = timeout(PATIENCE, guard.release()).await.expect("it does not wait");
        assert!(matches!(released.map(drop), Err(Error::Lost { .. })));

        let run = conn.advisory_lock(&outer).run(async |_| Ok::<_, Error>(()));
        let error = timeout(PATIENCE, run).await.expect("it does not wait");
        assert!(matches!(error, Err(Error::Lost { .. })), "a broken connection is refused");
        drop(conn);
        timed(free_once_closed(C::KIND), "the outer lock", || holders(&mut observer, &outer).is_empty());
        unlock(&mut observer, &inner);
    }

    async fn run_around_a_dropped_wait_does_not_wait_for_it<C: CancelTest>(server: &Server) {
        let (outer, inner) = (unique_key("outer_run"), unique_key("outer_run_inner"));
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &inner));
        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&outer).run(async |conn| {
            drop_a_wait(conn, &inner, &mut observer).await;
            Ok::<_, Error>(())
        });
        let result = timeout(PATIENCE, run).await.expect("it does not wait");
        assert!(matches!(result, Err(Error::Lost { .. })), "{result:?}");
        assert!(is_broken(&mut conn));
        drop(conn);
        timed(free_once_closed(C::KIND), "the outer lock", || holders(&mut observer, &outer).is_empty());
        unlock(&mut observer, &inner);
    }

    async fn a_transaction_around_a_dropped_wait_does_not_wait_for_it<C: CancelTest>(server: &Server) {
        let (outer, inner) = (unique_key("outer_transaction"), unique_key("outer_transaction_inner"));
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &inner));
        let mut conn = C::open(server).await;
        let transaction = conn.advisory_lock(&outer).transaction(async |conn| {
            drop_a_wait(conn, &inner, &mut observer).await;
            Ok::<_, Error>(())
        });
        let result = timeout(PATIENCE, transaction).await.expect("it does not wait");
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        assert!(is_broken(&mut conn));
        drop(conn);
        timed(free_once_closed(C::KIND), "the outer lock", || holders(&mut observer, &outer).is_empty());
        unlock(&mut observer, &inner);
    }

    async fn the_outermost_hold_survives_the_release_of_a_guard_around_a_dropped_wait<C: CancelTest>(server: &Server) {
        let [outermost, middle, inner] = ["outermost", "middle", "inner"].map(unique_key);
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &inner));
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let cancel = conn.cancellation();
        let mut guard = conn.advisory_lock(&outermost).acquire().await.expect("a free lock");
        let mut second = guard.advisory_lock(&middle).acquire().await.expect("a free lock");
        let wait = second.advisory_lock(&inner).cancel_with(cancel).acquire();
        timeout(SHORT, wait).await.map(drop).expect_err("the lock is taken");
        wait_for("the cancel", || !observer.is_waiting(id));
        let released = second.release().await.map(drop);
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        if C::KIND == Kind::Postgres {
            timed(FREE_IN_STEP, "the lock in the middle", || holders(&mut observer, &middle).is_empty());
        }
        assert_held_by(&mut observer, &outermost, id);
        drop(guard);
        drop(conn);
        for key in [&outermost, &middle] {
            timed(free_once_closed(C::KIND), "what a closed connection held", || holders(&mut observer, key).is_empty());
        }
        unlock(&mut observer, &inner);
    }

    /// Nobody knows whether it was committed.
    async fn a_guard_around_a_dropped_commit_is_released_and_the_connection_is_broken<C: CancelTest>(server: &Server) {
        for released in [true, false] {
            let key = unique_key("outer_commit");
            let mut observer = C::observer(server);
            let proxy = Proxy::start(server);
            let mut conn = C::open(&proxy.server(server)).await;
            let mut guard = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            begin(&mut *guard).await;
            drop_in_flight(&proxy, C::TransactionManager::commit_transaction(&mut *guard)).await;
            if released {
                let error = guard.release().await.map(drop);
                assert!(matches!(error, Err(Error::TransactionLeftOpen { .. })), "{error:?}");
            } else {
                drop(guard);
            }
            assert!(is_broken(&mut conn));
            timed(FREE_IN_STEP, "the lock", || holders(&mut observer, &key).is_empty());
            let error = conn.advisory_lock(&key).acquire().await.map(drop);
            assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        }
    }

    /// Nobody knows whether one is open.
    async fn after_a_dropped_begin_locks_are_refused<C: CancelTest>(server: &Server) {
        let key = unique_key("dropped_begin");
        let proxy = Proxy::start(server);
        let mut conn = C::open(&proxy.server(server)).await;
        drop_in_flight(&proxy, C::TransactionManager::begin_transaction(&mut conn)).await;
        let error = conn.advisory_lock(&key).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        let error = conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await;
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        assert!(is_broken(&mut conn));
    }

    /// It may be closed only when it is met again.
    async fn what_a_pool_keeps_although_it_is_broken_holds_nothing<C: CancelTest>(server: &Server) {
        let key = unique_key("kept_broken");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        drop(conn.advisory_lock(&key).acquire().await.expect("a free lock"));
        timed(FREE_IN_STEP, "the lock of a dropped guard", || holders(&mut observer, &key).is_empty());

        // The first release of a connection, which has yet to prepare what it prepares.
        let proxy = Proxy::start(server);
        let mut conn = C::open(&proxy.server(server)).await;
        let guard = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        drop_in_flight(&proxy, guard.release()).await;
        timed(FREE_IN_STEP, "the lock of a dropped release", || holders(&mut observer, &key).is_empty());
        assert!(is_broken(&mut conn));
    }
}

on_mysql_async! {
    /// diesel-async gives the answer that a dropped query did not read to the next one, and a pool's ping the same.
    async fn a_stale_answer_is_not_taken_for_a_grant(server: &Server) {
        let key = unique_key("stale");
        let mut observer = <AsyncMysqlConnection as AsyncTestConnection>::Observer::open(server);
        let mut conn = AsyncMysqlConnection::open(server).await;
        let slow = || diesel::select(sql::<BigInt>("1 + 0 * SLEEP(0.2)"));
        slow().get_result::<i64>(&mut conn).await.expect("an answer");
        for _ in 0..2 {
            let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        }
        let dropped = timeout(SHORT, slow().get_result::<i64>(&mut conn)).await;
        dropped.expect_err("it takes longer");

        assert!(try_lock(&mut observer, &key));
        let acquire = conn.advisory_lock(&key).acquire();
        let error = timeout(PATIENCE, acquire).await.expect("it does not wait for the lock").map(drop);
        let Err(Error::Database(error)) = error else { panic!("{error:?}") };
        assert!(error.to_string().contains("answer to an earlier query"), "{error}");
        assert!(is_broken(&mut conn));
        let observer_id = observer.backend_id();
        assert_eq!(holders(&mut observer, &key), [observer_id]);
        unlock(&mut observer, &key);
        // Although the connection stays open.
        wait_until_free(&mut observer, &key);
        drop(conn);
    }

    async fn a_stale_answer_of_a_pools_ping_is_not_taken_for_a_grant(server: &Server) {
        type Pool = bb8::Pool<AsyncMysqlConnection>;
        let key = unique_key("stale_ping");
        let mut observer = <AsyncMysqlConnection as AsyncTestConnection>::Observer::open(server);
        let url = AsyncMysqlConnection::direct_url(&server.url);
        let pool = Pool::builder().max_size(1).build(AsyncDieselConnectionManager::new(url)).await;
        let pool = pool.expect("the server answers");
        for _ in 0..2 {
            let mut conn = pool.get().await.expect("a connection");
            let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        }
        assert!(try_lock(&mut observer, &key));
        // While it asks whether the connection is alive.
        wait_for("a ping that is dropped", || {
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(timeout(Duration::ZERO, pool.get())).is_err()
            })
        });
        let mut conn = pool.get().await.expect("a connection");
        let lock = conn.advisory_lock(&key).try_acquire().await;
        assert!(!matches!(lock, Ok(Some(_))), "another session has it");
        drop(lock);
        let observer_id = observer.backend_id();
        assert_eq!(holders(&mut observer, &key), [observer_id]);
        unlock(&mut observer, &key);
    }

    async fn a_question_on_a_connection_that_is_out_of_step_is_refused(server: &Server) {
        let key = unique_key("stale_question");
        let proxy = Proxy::start(server);
        let mut conn = AsyncMysqlConnection::open(&proxy.server(server)).await;
        let mut guard = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(guard.is_held().await.expect("an answer"));
        drop_in_flight(&proxy, guard.batch_execute("DO 1")).await;
        let error = guard.is_held().await;
        assert!(matches!(error, Err(Error::Database(_))), "{error:?}");
        assert!(is_broken(&mut *guard));
        let error = guard.is_held().await;
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        let error = guard.holders().await;
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
    }
}

on_postgres_async! {
    /// At this level the session's lock is acquired and handed over to the transaction.
    async fn an_outer_hold_survives_a_transaction_that_is_dropped_at_any_poll(server: &Server) {
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        let mut hand_overs = 0;
        // How many polls it takes is not always the same.
        for _ in 0..20 {
            for polls in 1..100 {
                let (outer, inner) = (unique_key("handed_over"), unique_key("handed_over_inner"));
                let mut conn = AsyncPgConnection::open(server).await;
                let id = conn.backend_id().await;
                conn.execute_sql("SET default_transaction_isolation = 'repeatable read'").await;
                let dropped = watch_hand_over(&mut conn);
                let mut guard = conn.advisory_lock(&outer).acquire().await.expect("a free lock");
                let transaction = guard.advisory_lock(&inner).transaction(async |_| Ok::<_, Error>(()));
                let done = within_polls(transaction, polls).await.is_some();
                hand_overs += u32::from(AtomicBool::load(&dropped, Ordering::SeqCst));
                timed(FREE_IN_STEP, "the inner lock", || holders(&mut observer, &inner).is_empty());
                assert_held_by(&mut observer, &outer, id);
                if done {
                    break;
                }
            }
            if hand_overs > 0 {
                return;
            }
        }
        panic!("it was never dropped in the hand-over");
    }

    async fn a_dropped_wait_for_a_lock_of_the_transaction_can_be_cancelled(server: &'static Server) {
        let key = unique_key("cancel_xact");
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        assert!(try_lock(&mut observer, &key));
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        let cancel = conn.cancellation();
        let result = conn.transaction(async |conn| {
            let wait = conn.advisory_xact_lock(&key).cancel_with(cancel).acquire();
            timeout(SHORT, wait).await.expect_err("the lock is taken");
            Ok::<_, Error>(())
        });
        assert!(matches!(result.await, Err(Error::Database(_))));
        timed(FREE_IN_STEP, "the cancel", || !observer.is_waiting(id));
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        assert!(is_broken(&mut conn));
    }
}

/// Polled in the runtime, as futures are, and dropped where there is none.
#[test]
fn a_wait_that_is_dropped_outside_of_the_runtime_is_cancelled() {
    for server in async_servers() {
        let (cancelled, shown) = std::sync::mpsc::channel();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        let key = unique_key("cancel_outside");
        match server.kind {
            Kind::Postgres => wait_and_drop::<AsyncPgConnection>(server, &runtime, &key, cancelled),
            Kind::Mysql => wait_and_drop::<AsyncMysqlConnection>(server, &runtime, &key, cancelled),
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        }
        shown.recv_timeout(PATIENCE).expect("it is cancelled");
    }
}

fn wait_and_drop<C: LockTest>(
    server: &Server,
    runtime: &tokio::runtime::Runtime,
    key: &str,
    cancelled: std::sync::mpsc::Sender<()>,
) {
    let mut observer = C::observer(server);
    assert!(try_lock(&mut observer, key));
    let conn = Box::new(runtime.block_on(C::open(server)));
    let cancel = async move { cancelled.send(()) };
    let wait = AdvisoryLock::new(conn, key).cancel_with(cancel).acquire();
    let mut wait = Box::pin(wait);
    let result = runtime.block_on(async { timeout(SHORT, &mut wait).await.map(drop) });
    result.expect_err("the lock is taken");
    thread::spawn(move || drop(wait))
        .join()
        .expect("it is dropped");
}
