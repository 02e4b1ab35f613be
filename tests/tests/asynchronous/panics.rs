//! A panic in a task frees the lock at once, while the connection is open.

use std::sync::Arc;

use diesel::QueryResult;
use dlock_diesel_async::{AdvisoryLock, Error};
use dlock_tests::{Kind, Server, on_every_network_server_async, unique_key};

use crate::both::transaction::{LEVELS, open_at};
use crate::support::*;

/// A guard of this connection was dropped. On MySQL and MariaDB the connection is out of step then.
async fn assert_given_up<C: LockTest>(conn: Shared<C>, observer: &mut C::Observer, key: &str) {
    wait_until_free(observer, key);
    let mut conn = conn.lock().await;
    match C::KIND {
        Kind::Postgres => assert_clean(&mut *conn, observer).await,
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => assert!(is_broken(&mut *conn)),
    }
}

on_every_network_server_async! {
    async fn a_panic_in_run_in_a_task_frees_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_run_panic");
        let mut observer = C::observer(server);
        let (conn, id) = share(C::open(server).await).await;
        let task = Background::spawn(id, {
            let (conn, key) = (Arc::clone(&conn), key.clone());
            async move |stage: Stage| {
                let lock = AdvisoryLock::new(conn.lock_owned().await, &key);
                let run = lock.run(async |_| -> Result<(), Error> {
                    stage.pause().await;
                    panic_quietly()
                });
                run.await
            }
        });
        task.holds(&mut observer, &key);
        task.go_on();
        task.panics().await;
        assert_given_up(conn, &mut observer, &key).await;
    }

    async fn a_panic_with_a_live_guard_in_a_task_frees_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_guard_panic");
        let mut observer = C::observer(server);
        let (conn, id) = share(C::open(server).await).await;
        let task: Background<()> = Background::spawn(id, {
            let (conn, key) = (Arc::clone(&conn), key.clone());
            async move |stage: Stage| {
                let lock = AdvisoryLock::new(conn.lock_owned().await, &key);
                let _lock = lock.acquire().await.expect("a free lock");
                stage.pause().await;
                panic_quietly()
            }
        });
        task.holds(&mut observer, &key);
        task.go_on();
        task.panics().await;
        assert_given_up(conn, &mut observer, &key).await;
    }

    async fn a_panic_in_a_task_rolls_back_and_frees_the_lock<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_panic");
            let table = Table::new(server);
            let mut observer = C::observer(server);
            let (conn, id) = share(open_at::<C>(server, level).await).await;
            let task = Background::spawn(id, {
                let (conn, key, table) = (Arc::clone(&conn), key.clone(), table.clone());
                async move |stage: Stage| {
                    let lock = AdvisoryLock::new(conn.lock_owned().await, &key);
                    let transaction = lock.transaction(async |conn| -> QueryResult<()> {
                        conn.batch_execute(&table.insert(1)).await?;
                        stage.pause().await;
                        panic_quietly()
                    });
                    transaction.await
                }
            });
            task.holds(&mut observer, &key);
            task.go_on();
            task.panics().await;
            assert!(is_broken(&mut *conn.lock().await));
            // Without a pool that closes it.
            wait_until_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            if C::KIND == Kind::Postgres {
                assert!(!in_transaction(&mut *conn.lock().await, &mut observer).await);
            }
        }
    }
}
