//! A guard that is dropped cannot wait: when the lock is free then, and what becomes of the connection.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt};
use dlock_tests::{
    AsyncTestConnection, Kind, PATIENCE, Server, TestConnection, on_every_network_server_async,
    on_mysql_async, on_postgres_async, unique_key, wait_for,
};
use tokio::sync::{Mutex, oneshot};
use tokio::task::coop;

use crate::cancellation::{
    CancelTest, FREE_IN_STEP, assert_in_step, assert_next_user_is_clean, free_once_closed, pool,
    timed,
};
use crate::support::*;

/// After the drop of a guard the lock is free at once, although the connection is open; with MySQL and MariaDB it is out
/// of step then.
#[track_caller]
fn free_at_once<C: CancelTest>(conn: &mut C, observer: &mut C::Observer, key: &str) {
    timed(FREE_IN_STEP, "the lock of a dropped guard", || {
        holders(observer, key).is_empty()
    });
    assert_free(observer, key);
    if C::KIND == Kind::Mysql {
        assert!(is_broken(conn), "an answer is not read");
    }
}

/// Closes the connection, which frees what it holds.
#[track_caller]
fn close<C: CancelTest>(conn: C, observer: &mut C::Observer, key: &str) {
    drop(conn);
    timed(
        free_once_closed(C::KIND),
        "the lock of a closed connection",
        || holders(observer, key).is_empty(),
    );
    assert_free(observer, key);
}

on_every_network_server_async! {
    async fn a_borrowed_guard<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_borrowed");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        free_at_once(&mut conn, &mut observer, &key);
        if C::KIND == Kind::Postgres {
            assert_clean(&mut conn, &mut observer).await;
        }
        close(conn, &mut observer, &key);
    }

    /// tokio lets a task that has done much wait at its next await, also where it could go on.
    async fn a_guard_of_a_task_that_has_used_up_its_budget<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_budget");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
        while coop::has_budget_remaining() {
            coop::consume_budget().await;
        }
        drop(guard);
        free_at_once(&mut conn, &mut observer, &key);
        close(conn, &mut observer, &key);
    }

    async fn a_guard_that_owns_its_connection_closes_it<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_owned");
        let mut observer = C::observer(server);
        let mut conn = Box::new(C::open(server).await);
        let id = conn.backend_id().await;
        let guard = AdvisoryLock::new(conn, &key).acquire().await.expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        timed(free_once_closed(C::KIND), "the lock of an owned guard", || holders(&mut observer, &key).is_empty());
        assert_free(&mut observer, &key);
        wait_for("the end of the session", || !observer.is_connected(id));
    }

    async fn a_guard_that_owns_a_pooled_connection_leaves_the_next_user_nothing<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_pooled");
        let mut observer = C::observer(server);
        let pool = pool::<C>(&server.url).await;
        for _ in 0..3 {
            let mut conn = pool.get_owned().await.expect("a connection");
            let id = conn.backend_id().await;
            let guard = AdvisoryLock::new(conn, &key).acquire().await.expect("the lock is free");
            assert_held_by(&mut observer, &key, id);
            drop(guard);
            timed(free_once_closed(C::KIND), "the lock of a pooled guard", || holders(&mut observer, &key).is_empty());
            let mut next = pool.get().await.expect("a connection");
            // Only a connection that could not release is replaced.
            assert_eq!(next.backend_id().await == id, C::KIND == Kind::Postgres);
            drop(next);
            assert_next_user_is_clean::<C>(&pool, &mut observer).await;
            assert_free(&mut observer, &key);
        }
    }

    async fn a_transaction_begun_under_the_lock_is_rolled_back_first<C: CancelTest>(server: &Server) {
        for depth in 1..=2 {
            for aborted in [false, true] {
                let key = unique_key("drop_open");
                let table = Table::new(server);
                let mut observer = C::observer(server);
                let mut conn = C::open(server).await;
                let id = conn.backend_id().await;
                let mut guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
                for n in 0..depth {
                    begin(&mut *guard).await;
                    guard.execute_sql(&table.insert(n)).await;
                }
                if aborted {
                    guard.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
                }
                drop(guard);
                assert!(is_broken(&mut conn));
                free_at_once(&mut conn, &mut observer, &key);
                if C::KIND == Kind::Postgres {
                    assert_in_step(&mut conn, &mut observer).await;
                }
                close(conn, &mut observer, &key);
                wait_for("the end of the session", || !observer.is_connected(id));
                assert_eq!(table.rows(&mut observer), 0);
            }
        }
    }

    async fn a_guard_acquired_inside_a_transaction<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_inside");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        begin(&mut conn).await;
        let guard = conn.advisory_lock(&key).inside_transaction().acquire().await.expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        free_at_once(&mut conn, &mut observer, &key);
        assert!(is_broken(&mut conn));
        close(conn, &mut observer, &key);
    }

    async fn a_task_that_is_aborted<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_aborted_task");
        let mut observer = C::observer(server);
        let conn = Arc::new(Mutex::new(C::open(server).await));
        let id = conn.lock().await.backend_id().await;
        // The lock owns the connection for a while, and the connection outlives it.
        let borrowed = Arc::clone(&conn).lock_owned().await;
        let (acquired, acquires) = oneshot::channel();
        let task = tokio::spawn({
            let key = key.clone();
            async move {
                let _guard = AdvisoryLock::new(borrowed, &key).acquire().await.expect("the lock is free");
                acquired.send(()).expect("the test waits");
                std::future::pending::<()>().await;
            }
        });
        acquires.await.expect("the task has the guard");
        assert_held_by(&mut observer, &key, id);
        task.abort();
        assert!(task.await.expect_err("aborted").is_cancelled());
        free_at_once(&mut *conn.lock().await, &mut observer, &key);
        if C::KIND == Kind::Postgres {
            assert_clean(&mut *conn.lock().await, &mut observer).await;
        }
        let conn = Arc::into_inner(conn).expect("the task is gone").into_inner();
        close(conn, &mut observer, &key);
    }

    async fn a_task_that_is_aborted_with_its_connection<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_aborted_connection");
        let mut observer = C::observer(server);
        let task = in_background(server, |mut conn: C, _stage| {
            let key = key.clone();
            async move {
                let _guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
                std::future::pending::<()>().await;
            }
        });
        let task = task.await;
        task.holds(&mut observer, &key);
        task.abort().await;
        timed(free_once_closed(C::KIND), "the lock of an aborted task", || holders(&mut observer, &key).is_empty());
        assert_free(&mut observer, &key);
    }

    async fn a_panic<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_panic");
        let mut observer = C::observer(server);
        let conn = Arc::new(Mutex::new(C::open(server).await));
        let id = conn.lock().await.backend_id().await;
        let borrowed = Arc::clone(&conn).lock_owned().await;
        let task = tokio::spawn({
            let (key, url) = (key.clone(), server.url.clone());
            async move {
                let _guard = AdvisoryLock::new(borrowed, &key).acquire().await.expect("the lock is free");
                assert_held_by(&mut C::Observer::open_url(&url), &key, id);
                panic_quietly();
            }
        });
        assert!(task.await.expect_err("it panics").is_panic());
        free_at_once(&mut *conn.lock().await, &mut observer, &key);
        if C::KIND == Kind::Postgres {
            assert_clean(&mut *conn.lock().await, &mut observer).await;
        }
        let conn = Arc::into_inner(conn).expect("the task is gone").into_inner();
        close(conn, &mut observer, &key);
    }

    async fn a_panic_with_a_pooled_connection<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_panic_pooled");
        let mut observer = C::observer(server);
        let pool = pool::<C>(&server.url).await;
        let conn = pool.get_owned().await.expect("a connection");
        let task = tokio::spawn({
            let key = key.clone();
            async move {
                let _guard = AdvisoryLock::new(conn, &key).acquire().await.expect("the lock is free");
                panic_quietly();
            }
        });
        assert!(task.await.expect_err("it panics").is_panic());
        timed(free_once_closed(C::KIND), "the lock after a panic", || holders(&mut observer, &key).is_empty());
        assert_next_user_is_clean::<C>(&pool, &mut observer).await;
        assert_free(&mut observer, &key);
    }

    async fn a_runtime_that_has_been_shut_down<C: CancelTest>(server: &'static Server) {
        for owned in [false, true] {
            let key = unique_key("drop_shut_down");
            // Not in this test's runtime, in which no other can be shut down.
            let thread = thread::spawn({
                let key = key.clone();
                move || {
                    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
                    let runtime = runtime.expect("a runtime");
                    let mut conn = runtime.block_on(C::open(server));
                    let mut observer = C::observer(server);
                    let id = runtime.block_on(conn.backend_id());
                    if owned {
                        let guard = runtime.block_on(AdvisoryLock::new(Box::new(conn), &key).acquire());
                        let guard = guard.expect("the lock is free");
                        assert_held_by(&mut observer, &key, id);
                        runtime.shutdown_timeout(PATIENCE);
                        drop(guard);
                    } else {
                        let guard = runtime.block_on(conn.advisory_lock(&key).acquire());
                        let guard = guard.expect("the lock is free");
                        assert_held_by(&mut observer, &key, id);
                        runtime.shutdown_timeout(PATIENCE);
                        drop(guard);
                        if C::KIND == Kind::Mysql {
                            assert!(is_broken(&mut conn));
                        }
                    }
                }
            });
            thread.join().expect("nothing panics");
            let mut observer = C::observer(server);
            timed(free_once_closed(C::KIND), "the lock after the runtime", || holders(&mut observer, &key).is_empty());
            assert_free(&mut observer, &key);
        }
    }

    async fn a_thread_without_a_runtime<C: CancelTest>(server: &Server) {
        let key = unique_key("drop_thread");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
        thread::scope(|scope| {
            scope.spawn(move || drop(guard));
        });
        free_at_once(&mut conn, &mut observer, &key);
        if C::KIND == Kind::Postgres {
            assert_clean(&mut conn, &mut observer).await;
        }
        close(conn, &mut observer, &key);

        let mut conn = Box::new(C::open(server).await);
        let id = conn.backend_id().await;
        let guard = AdvisoryLock::new(conn, &key).acquire().await.expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        let thread = thread::spawn(move || drop(guard));
        thread.join().expect("nothing panics");
        timed(free_once_closed(C::KIND), "the lock of a thread", || holders(&mut observer, &key).is_empty());
        assert_free(&mut observer, &key);
    }

    async fn a_guard_under_another_guard_frees_its_own_hold<C: CancelTest>(server: &Server) {
        for same in [false, true] {
            let key = unique_key("drop_outer");
            let inner_key = if same { key.clone() } else { unique_key("drop_inner") };
            let mut observer = C::observer(server);
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let mut outer = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
            drop(outer.advisory_lock(&inner_key).acquire().await.expect("re-entrant, or free"));
            if C::KIND == Kind::Postgres {
                if !same {
                    wait_until_free(&mut observer, &inner_key);
                }
                assert!(outer.is_held().await.expect("an answer"));
                assert_held_by(&mut observer, &key, id);
                outer.release().await.expect("held once");
                assert_clean(&mut conn, &mut observer).await;
            } else {
                if !same {
                    wait_until_free(&mut observer, &inner_key);
                }
                assert_held_by(&mut observer, &key, id);
                drop(outer);
                // It is out of step since the first drop, so that it has to be closed.
                assert!(is_broken(&mut conn));
                assert_held_by(&mut observer, &key, id);
            }
            close(conn, &mut observer, &key);
            wait_until_free(&mut observer, &inner_key);
        }
    }
}

on_postgres_async! {
    /// The server obeys nothing there but the end of the transaction.
    async fn a_guard_acquired_inside_a_transaction_that_is_aborted_keeps_the_lock_until_the_session_ends(server: &Server) {
        let key = unique_key("drop_aborted");
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        for test_transaction in [false, true] {
            let mut conn = AsyncPgConnection::open(server).await;
            let id = conn.backend_id().await;
            if test_transaction {
                use diesel_async::AsyncConnection;
                conn.begin_test_transaction().await.expect("a transaction begins");
            } else {
                begin(&mut conn).await;
            }
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire().await.expect("the lock is free");
            guard.batch_execute("SELECT 1 / 0").await.expect_err("division by zero");
            drop(guard);
            // So that what was sent has been refused.
            conn.batch_execute("SELECT 1").await.expect_err("the transaction is aborted");
            assert_held_by(&mut observer, &key, id);
            assert_eq!(is_broken(&mut conn), !test_transaction);
            close(conn, &mut observer, &key);
        }
    }

    async fn a_guard_in_a_test_transaction_leaves_the_connection_fit_for_use(server: &Server) {
        use diesel_async::AsyncConnection;
        let key = unique_key("drop_test_transaction");
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        conn.begin_test_transaction().await.expect("a transaction begins");
        drop(conn.advisory_lock(&key).acquire().await.expect("the lock is free"));
        timed(FREE_IN_STEP, "the lock in a test transaction", || holders(&mut observer, &key).is_empty());
        assert!(!is_broken(&mut conn));
        conn.advisory_lock(&key).acquire().await.expect("free again").release().await.expect("held");
    }

    /// Nothing waits: what is sent goes out while the server still works on something else.
    async fn a_guard_whose_query_was_dropped_frees_its_lock_behind_it(server: &Server) {
        let key = unique_key("drop_behind");
        let mut observer = <AsyncPgConnection as AsyncTestConnection>::Observer::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        let mut guard = conn.advisory_lock(&key).acquire().await.expect("the lock is free");
        let timer = Duration::from_millis(50);
        let slow = guard.batch_execute("SELECT pg_sleep(0.3)");
        tokio::time::timeout(timer, slow).await.expect_err("slow");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        timed(FREE_IN_STEP, "the lock behind a slow query", || holders(&mut observer, &key).is_empty());
        assert_clean(&mut conn, &mut observer).await;
    }
}

on_mysql_async! {
    async fn a_guard_on_mysql_is_free_as_soon_as_the_connection_is_closed(server: &Server) {
        use diesel_async::AsyncMysqlConnection;
        let mut observer = <AsyncMysqlConnection as AsyncTestConnection>::Observer::open(server);
        for _ in 0..20 {
            let key = unique_key("drop_close");
            let mut conn = AsyncMysqlConnection::open(server).await;
            drop(conn.advisory_lock(&key).acquire().await.expect("the lock is free"));
            assert!(is_broken(&mut conn));
            close(conn, &mut observer, &key);
        }
    }
}
