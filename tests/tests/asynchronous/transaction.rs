//! `AdvisoryLock::transaction`, whose lock outlives COMMIT and whose successor sees what was committed, and the locks
//! that end with a transaction.

use std::sync::Arc;
use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::{PgConnection, QueryResult};
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, SimpleAsyncConnection,
    TransactionManager,
};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    AsyncTestConnection, Kind, Server, TestConnection, on_every_network_server_async,
    on_mysql_async, on_postgres_async, unique_key, wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);

const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

/// A connection whose transactions have another isolation level than the server's default.
async fn open_at<C: LockTest>(server: &Server, level: &str) -> C {
    match C::KIND {
        Kind::Postgres => {
            // Not a SET, so that nothing of the session itself is changed.
            let option = level.replace(' ', "%5C%20");
            let sign = if server.url.contains('?') { '&' } else { '?' };
            let mut conn = C::open_url(&format!(
                "{}{sign}options=-c%20default_transaction_isolation%3D{option}",
                server.url
            ))
            .await;
            let current = conn
                .text("SELECT current_setting('default_transaction_isolation')")
                .await;
            assert_eq!(current.as_deref(), Some(level));
            conn
        }
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => {
            let mut conn = C::open(server).await;
            conn.execute_sql(&format!("SET SESSION TRANSACTION ISOLATION LEVEL {level}"))
                .await;
            conn
        }
    }
}

fn is_serialization_failure(error: &Error) -> bool {
    use DatabaseErrorKind::SerializationFailure;
    matches!(
        error,
        Error::Database(DieselError::DatabaseError(SerializationFailure, _))
    )
}

/// How the lock of a transaction is asked for.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Wait,
    Poll,
    Try,
}

/// Eight tasks add one to a counter again and again, each in a transaction that reads it and then writes it.
async fn count_in_contention<C: LockTest>(
    server: &Server,
    level: Option<&'static str>,
    rounds: i64,
    ask: Ask,
) {
    const TASKS: i64 = 8;
    let key = unique_key("async_transaction_counter");
    let table = Table::counter(server);
    let mut tasks = Vec::new();
    for _ in 0..TASKS {
        let conn = match level {
            Some(level) => open_at::<C>(server, level).await,
            None => C::open(server).await,
        };
        let (key, table) = (key.clone(), table.clone());
        let task = on_connection(conn, async move |mut conn: C, _| {
            let mut done = 0;
            while done < rounds {
                let lock = conn.advisory_lock(&key);
                let lock = match ask {
                    Ask::Wait => lock,
                    Ask::Poll => lock.poll_every(Duration::from_millis(2)),
                    Ask::Try => lock.timeout(Duration::ZERO),
                };
                let transaction = lock.transaction(async |conn| {
                    table.increment(conn).await?;
                    Ok::<_, Error>(())
                });
                match transaction.await {
                    Ok(()) => done += 1,
                    Err(Error::Timeout { .. }) => {}
                    // The server frees the lock just before it closes its books on the transaction.
                    Err(error)
                        if level == Some("serializable") && is_serialization_failure(&error) => {}
                    Err(error) => panic!("at {level:?}, {ask:?}: {error}"),
                }
            }
        });
        tasks.push(task.await);
    }
    for task in tasks {
        // On a slow machine longer than a single wait may last.
        wait_for(format!("a task at {level:?}, {ask:?}"), || {
            task.is_finished()
        });
        task.join().await;
    }
    let mut observer = C::Observer::open(server);
    let value = table.value(&mut observer);
    assert_eq!(value, TASKS * rounds, "at {level:?}, {ask:?}");
    assert_free(&mut observer, &key);
}

on_every_network_server_async! {
    async fn it_holds_the_lock_commits_and_frees<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_commits");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        let value = conn
            .advisory_lock(&key)
            .transaction(async |conn| {
                assert_held_by(&mut observer, &key, id);
                assert_eq!(depth(conn), 1);
                conn.batch_execute(&table.insert(1)).await?;
                assert!(in_transaction(conn, &mut observer).await);
                assert_eq!(table.rows(&mut observer), 0, "before COMMIT");
                QueryResult::Ok(conn.backend_id().await)
            })
            .await;
        assert_eq!(value, Ok(id));
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_rolls_back_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        let result = conn
            .advisory_lock(&key)
            .transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                assert_held_by(&mut observer, &key, id);
                Err::<(), _>(AppError::Own)
            })
            .await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
        let result = conn
            .advisory_lock(&key)
            .transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                conn.batch_execute(&table.insert(1)).await?; // there is such a row
                Ok::<_, AppError>(())
            })
            .await;
        assert!(matches!(result, Err(AppError::Lock(Error::Database(_)))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_panic_in_a_task_rolls_back_and_frees_the_lock<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_panic");
            let table = Table::new(server);
            let mut observer = C::Observer::open(server);
            let (conn, id) = share(open_at::<C>(server, level).await).await;
            let task = Task::spawn(id, {
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
            if C::KIND == Kind::Postgres {
                // Without a pool that closes it.
                wait_until_free(&mut observer, &key);
                assert!(!in_transaction(&mut *conn.lock().await, &mut observer).await);
            }
            drop(conn);
            wait_until_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
        }
    }

    /// Were the lock free before COMMIT, the waiter would not see the row now and then.
    async fn a_waiter_that_is_granted_the_lock_sees_the_row_that_was_committed<C: LockTest>(server: &Server) {
        const ROUNDS: i64 = 40;
        let key = unique_key("async_transaction_visible");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let waiter = in_task(server, {
            let (key, table) = (key.clone(), table.clone());
            async move |mut conn: C, stage: Stage| {
                let count = format!("SELECT COUNT(*) FROM {}", table.name());
                for round in 1..=ROUNDS {
                    stage.pause().await;
                    let run = conn.advisory_lock(&key).run(async |conn| Ok::<_, Error>(conn.number(&count).await));
                    assert_eq!(run.await.expect("the lock"), Some(round), "rows that the waiter saw");
                }
            }
        })
        .await;
        for round in 1..=ROUNDS {
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                conn.batch_execute(&table.insert(round)).await?;
                waiter.go_on();
                waiter.waits(&mut observer);
                QueryResult::Ok(())
            });
            transaction.await.expect("a commit");
            // Before the next transaction the waiter has its turn, for it is in the queue.
        }
        waiter.join().await;
        assert_free(&mut observer, &key);
    }

    async fn each_holder_sees_what_the_one_before_committed_at_every_isolation_level<C: LockTest>(server: &Server) {
        count_in_contention::<C>(server, None, 8, Ask::Wait).await;
        for level in LEVELS {
            count_in_contention::<C>(server, Some(level), 8, Ask::Wait).await;
        }
    }

    async fn so_it_does_without_a_queue<C: LockTest>(server: &Server) {
        for level in LEVELS {
            count_in_contention::<C>(server, Some(level), 3, Ask::Poll).await;
        }
    }

    /// Trying again and again hits the moment in which the lock becomes free, where a snapshot may be older than the
    /// commit although nobody has waited.
    async fn so_it_does_if_the_lock_becomes_free_at_that_moment<C: LockTest>(server: &Server) {
        let rounds = match C::KIND {
            Kind::Postgres => 30,
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => 2, // nothing can go wrong there: the snapshot comes with the first read
        };
        for level in &LEVELS[1..] {
            count_in_contention::<C>(server, Some(level), rounds, Ask::Try).await;
        }
    }

    async fn it_waits_for_its_turn<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_waits");
            let table = Table::new(server);
            let mut observer = C::Observer::open(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let (key, table) = (key.clone(), table.clone());
                async move |mut conn: C, stage: Stage| {
                    let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                        stage.pause().await;
                        conn.batch_execute(&table.insert(1)).await
                    });
                    transaction.await.expect("a commit");
                }
            })
            .await;
            waiter.waits(&mut observer);
            unlock(&mut observer, &key);
            waiter.holds(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 1);
        }
    }

    async fn a_timeout_leaves_no_transaction_behind<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_timeout");
            let mut observer = C::Observer::open(server);
            let mut conn: C = open_at(server, level).await;
            assert!(try_lock(&mut observer, &key));
            for limit in [Duration::ZERO, SHORT] {
                for poll in [false, true] {
                    let lock = conn.advisory_lock(&key).timeout(limit);
                    let lock = if poll { lock.poll_every(SHORT / 4) } else { lock };
                    let transaction = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") });
                    let result = transaction.await;
                    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
                    assert_clean(&mut conn, &mut observer).await;
                }
            }
            unlock(&mut observer, &key);
            let lock = conn.advisory_lock(&key).timeout(SHORT);
            lock.transaction(async |_| Ok::<_, Error>(())).await.expect("it is free");
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_cancelled_wait_leaves_no_transaction_behind<C: LockTest>(server: &'static Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_cancel");
            let mut observer = C::Observer::open(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    let lock = conn.advisory_lock(&key);
                    let transaction = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") });
                    let result = transaction.await;
                    assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
                    conn
                }
            })
            .await;
            waiter.waits(&mut observer);
            observer.cancel(waiter.id);
            let mut conn = waiter.join().await;
            assert_clean(&mut conn, &mut observer).await;
            unlock(&mut observer, &key);
            assert_free(&mut observer, &key);
        }
    }

    async fn a_session_killed_while_it_waits_is_an_error_and_holds_nothing<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_kill_waiter");
            let mut observer = C::Observer::open(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    let lock = conn.advisory_lock(&key);
                    let transaction = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") });
                    let result = transaction.await;
                    assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
                    is_broken(&mut conn)
                }
            })
            .await;
            waiter.waits(&mut observer);
            observer.kill(waiter.id);
            let id = waiter.id;
            assert!(waiter.join().await, "a pool would hand it out again");
            // MariaDB closes the connection first.
            wait_for("the end of the session", || !observer.is_connected(id));
            unlock(&mut observer, &key);
            assert_free(&mut observer, &key);
        }
    }

    async fn a_commit_or_a_rollback_that_cannot_be_sent_frees_the_lock_and_hides_no_error<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_kill");
        let table = Table::new(server);
        let mut observer = C::Observer::open(server);
        for succeeds in [true, false] {
            let mut conn = C::open(server).await;
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                let id = conn.backend_id().await;
                kill(&mut observer, id);
                if succeeds { Ok(()) } else { Err(AppError::Own) }
            });
            match transaction.await {
                Err(AppError::Own) if !succeeds => {}
                Err(AppError::Lock(Error::Database(_))) if succeeds => {}
                other => panic!("{other:?}"),
            }
            assert!(is_broken(&mut conn));
            wait_until_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
        }
    }

    async fn a_further_transaction_that_is_left_open_rolls_all_back_and_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_left_open");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        for left_open in 1..=2 {
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                for n in 1..=left_open {
                    begin(conn).await;
                    conn.batch_execute(&table.insert(n)).await?;
                }
                Ok::<_, Error>(())
            });
            match transaction.await {
                Err(Error::InTransaction { key: of, .. }) => assert_eq!(of, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_closure_that_ends_the_transaction_itself_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_ended");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        for commits in [true, false] {
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                if commits {
                    commit(conn).await;
                } else {
                    roll_back(conn).await;
                }
                Ok::<_, Error>(())
            });
            let result = transaction.await;
            assert!(matches!(result, Err(Error::Database(DieselError::NotInTransaction))), "{result:?}");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn transactions_of_diesel_nest_in_it<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_nests");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        conn.advisory_lock(&key)
            .transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                conn.transaction(async |conn| conn.batch_execute(&table.insert(2)).await).await?;
                let result = conn
                    .transaction(async |conn| {
                        conn.batch_execute(&table.insert(3)).await?;
                        Err::<(), _>(AppError::Own)
                    })
                    .await;
                result.expect_err("its own");
                assert_held_by(&mut observer, &key, id);
                QueryResult::Ok(())
            })
            .await
            .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn it_works_in_a_test_transaction<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_test");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        conn.begin_test_transaction().await.expect("it begins");
        conn.advisory_lock(&key)
            .transaction(async |conn| {
                assert_held_by(&mut observer, &key, id);
                conn.batch_execute(&table.insert(1)).await
            })
            .await
            .expect("a savepoint");
        let result = conn
            .advisory_lock(&key)
            .transaction(async |conn| {
                conn.batch_execute(&table.insert(2)).await?;
                Err::<(), _>(AppError::Own)
            })
            .await;
        result.expect_err("its own");
        let count = format!("SELECT COUNT(*) FROM {}", table.name());
        assert_eq!((conn.number(&count).await, table.rows(&mut observer)), (Some(1), 0));
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
        drop(conn);
        wait_until_free(&mut observer, &key);
    }

    async fn a_broken_connection_is_refused<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_broken");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        C::TransactionManager::transaction_manager_status_mut(&mut conn).set_in_error();
        let lock = conn.advisory_lock(&key);
        let result = lock.transaction(async |_| -> Result<(), Error> { panic!("it is broken") }).await;
        assert!(matches!(result, Err(Error::Database(DieselError::BrokenTransactionManager))), "{result:?}");
        let result = conn.advisory_lock(&key).acquire().await.map(drop);
        assert!(matches!(result, Err(Error::Database(DieselError::BrokenTransactionManager))), "{result:?}");
        assert!(is_broken(&mut conn));
        assert_free(&mut observer, &key);
    }

    async fn it_works_with_an_owned_connection_in_a_task<C: LockTest>(server: &Server) {
        let key = unique_key("async_transaction_owned");
        let table = Table::new(server);
        let mut observer = C::Observer::open(server);
        let conn = Box::new(C::open(server).await);
        let insert = table.insert(1);
        let lock = AdvisoryLock::new(conn, &key);
        tokio::spawn(lock.transaction(async move |conn| conn.batch_execute(&insert).await))
            .await
            .expect("no panic")
            .expect("a commit");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
    }

    async fn an_outer_hold_outlives_it<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_outer");
            let (mut conn, mut observer) = (open_at::<C>(server, level).await, C::Observer::open(server));
            let id = conn.backend_id().await;
            let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            outer.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("re-entrant");
            assert_held_by(&mut observer, &key, id);
            outer.release().await.expect("a release");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }
}

on_postgres_async! {
    async fn nested_in_an_open_transaction_the_lock_is_held_until_that_ends(server: &Server) {
        let key = unique_key("async_nested");
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        for commits in [true, false] {
            let table = Table::new(server);
            let result = conn
                .transaction(async |conn| {
                    conn.advisory_lock(&key)
                        .transaction(async |conn| {
                            assert_eq!(depth(conn), 2);
                            assert_held_by(&mut observer, &key, id);
                            conn.batch_execute(&table.insert(1)).await
                        })
                        .await?;
                    assert_eq!(depth(conn), 1);
                    assert_held_by(&mut observer, &key, id);
                    assert_eq!(table.rows(&mut observer), 0);
                    if commits { Ok(()) } else { Err(AppError::Own) }
                })
                .await;
            assert_eq!(result.is_ok(), commits);
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), i64::from(commits));
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn rolling_the_nested_one_back_frees_the_lock_and_keeps_the_outer_one(server: &Server) {
        let key = unique_key("async_nested_error");
        let table = Table::counter(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let lock = conn.advisory_lock(&key);
            let result = lock
                .transaction(async |conn| {
                    conn.batch_execute(&table.insert(2)).await?;
                    Err::<(), _>(AppError::Own)
                })
                .await;
            assert!(matches!(result, Err(AppError::Own)), "{result:?}");
            assert_free(&mut observer, &key);
            // The nested one is aborted by its error.
            let lock = conn.advisory_lock(&key);
            let result = lock.transaction(async |conn| conn.batch_execute(&table.insert(0)).await).await;
            result.expect_err("there is such a row");
            assert_free(&mut observer, &key);
            // And one that is not granted the lock.
            assert!(try_lock(&mut observer, &key));
            let lock = conn.advisory_lock(&key).timeout(SHORT);
            let result = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") }).await;
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            unlock(&mut observer, &key);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(3)).await
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_commit_that_fails_is_reported_rolls_back_and_frees_the_lock(server: &Server) {
        let key = unique_key("async_deferred");
        let table = Table::new(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let name = table.name();
        conn.execute_sql(&format!("ALTER TABLE {name} ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED")).await;
        conn.execute_sql(&format!("ALTER TABLE {name} DROP CONSTRAINT {name}_n_key")).await;
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            conn.batch_execute(&table.insert(1)).await?;
            Ok::<_, Error>(())
        });
        let result = transaction.await;
        use DatabaseErrorKind::UniqueViolation;
        assert!(
            matches!(&result, Err(Error::Database(DieselError::DatabaseError(UniqueViolation, _)))),
            "{result:?}"
        );
        // The server says what failed, and tokio-postgres so does, before it has rolled back.
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn shared_transactions_run_together_and_keep_writers_out(server: &Server) {
        for level in LEVELS {
            let key = unique_key("async_transaction_shared");
            let mut observer = PgConnection::open(server);
            let mut first: AsyncPgConnection = open_at(server, level).await;
            let mut second: AsyncPgConnection = open_at(server, level).await;
            let transaction = first.advisory_lock(&key).shared().transaction(async |_| {
                let nested = second.advisory_lock(&key).shared().transaction(async |_| {
                    assert_eq!(holders(&mut observer, &key).len(), 2);
                    assert!(!try_lock(&mut observer, &key), "an exclusive one");
                    Ok::<_, Error>(())
                });
                nested.await
            });
            transaction.await.expect("two commits");
            assert_free(&mut observer, &key);
            assert!(try_lock(&mut observer, &key));
            let lock = first.advisory_lock(&key).shared().timeout(SHORT);
            let result = lock.transaction(async |_| Ok::<_, Error>(())).await;
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            unlock(&mut observer, &key);
            assert_clean(&mut first, &mut observer).await;
            assert_clean(&mut second, &mut observer).await;
        }
    }

    async fn the_transaction_has_the_isolation_level_of_the_session(server: &Server) {
        let key = unique_key("async_transaction_level");
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        conn.execute_sql("SET default_transaction_read_only = on").await;
        for level in ["read uncommitted", "read committed", "repeatable read", "serializable"] {
            conn.execute_sql(&format!("SET default_transaction_isolation = '{level}'")).await;
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                assert_held_by(&mut observer, &key, id);
                Ok::<_, Error>(conn.text("SELECT current_setting('transaction_isolation')").await)
            });
            assert_eq!(transaction.await.expect("a commit").as_deref(), Some(level));
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_transactions_lock_ends_with_it(server: &Server) {
        let key = unique_key("async_xact");
        let table = Table::new(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        for commits in [true, false] {
            let result = conn
                .transaction(async |conn| {
                    conn.advisory_xact_lock(&key).acquire().await?;
                    assert_held_by(&mut observer, &key, id);
                    assert!(conn.advisory_xact_lock(&key).try_acquire().await?, "it is held already");
                    conn.batch_execute(&table.insert(1)).await?;
                    let seen = conn.advisory_xact_lock(&key).holders().await?;
                    assert_eq!(seen[0].backend_id, id);
                    if commits { Ok(()) } else { Err(AppError::Own) }
                })
                .await;
            assert_eq!(result.is_ok(), commits, "{result:?}");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
            observer.execute_sql(&format!("DELETE FROM {}", table.name()));
        }
        begin(&mut conn).await;
        begin(&mut conn).await;
        conn.advisory_xact_lock(&key).acquire().await.expect("a free lock");
        roll_back(&mut conn).await;
        assert_free(&mut observer, &key);
        begin(&mut conn).await;
        conn.advisory_xact_lock(&key).acquire().await.expect("a free lock");
        commit(&mut conn).await;
        assert_held_by(&mut observer, &key, id);
        commit(&mut conn).await;
        assert_free(&mut observer, &key);
    }

    async fn a_transactions_lock_outside_a_transaction_is_refused_and_the_remedies_are_named(server: &Server) {
        let key = unique_key("async_not_in_transaction");
        let mut observer = PgConnection::open(server);
        let (mut conn, proxy) = open_counted::<AsyncPgConnection>(server).await;
        let errors = [
            conn.advisory_xact_lock(&key).acquire().await,
            conn.advisory_xact_lock(&key).shared().acquire().await,
            conn.advisory_xact_lock(&key).timeout(SHORT).acquire().await,
            conn.advisory_xact_lock(&key).try_acquire().await.map(drop),
        ];
        for error in errors {
            let error = error.expect_err("refused");
            let message = error.to_string();
            match error {
                Error::NotInTransaction { key: refused, .. } => assert_eq!(refused, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            for named in [&key, "conn.transaction(", "advisory_lock(key).transaction("] {
                assert!(message.contains(named), "{message}");
            }
        }
        assert_eq!(proxy.round_trips(), 0);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
        conn.begin_test_transaction().await.expect("it begins");
        conn.advisory_xact_lock(&key).acquire().await.expect("a test transaction is one");
        let id = conn.backend_id().await;
        assert_held_by(&mut observer, &key, id);
    }

    async fn a_transactions_lock_that_is_not_granted_leaves_the_transaction_and_its_limits(server: &Server) {
        let key = unique_key("async_xact_timeout");
        let table = Table::new(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        assert!(try_lock(&mut observer, &key));
        conn.transaction(async |conn| {
            conn.batch_execute("SET LOCAL lock_timeout = '7s'; SET LOCAL statement_timeout = '8s'").await?;
            conn.batch_execute(&table.insert(1)).await?;
            for poll in [false, true] {
                let lock = conn.advisory_xact_lock(&key).timeout(SHORT);
                let lock = if poll { lock.poll_every(SHORT / 4) } else { lock };
                match lock.acquire().await {
                    Err(Error::Timeout { waited, holders, .. }) => {
                        assert!(waited >= SHORT);
                        assert_eq!(holders[0].backend_id, observer.backend_id());
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert!(!conn.advisory_xact_lock(&key).try_acquire().await?);
            assert!(!conn.advisory_xact_lock(&key).timeout(SHORT).try_acquire().await?);
            let limits = "SELECT current_setting('lock_timeout') || current_setting('statement_timeout')";
            assert_eq!(conn.text(limits).await.as_deref(), Some("7s8s"));
            conn.batch_execute(&table.insert(2)).await
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        unlock(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_wait_for_a_transactions_lock_is_granted_or_cancelled_and_the_transaction_goes_on(server: &Server) {
        let key = unique_key("async_xact_wait");
        let table = Table::new(server);
        let mut observer = PgConnection::open(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_task(server, {
            let (key, table) = (key.clone(), table.clone());
            async move |mut conn: AsyncPgConnection, stage: Stage| {
                let transaction = conn.transaction(async |conn| {
                    conn.batch_execute(&table.insert(1)).await?;
                    let error = conn.advisory_xact_lock(&key).acquire().await;
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    stage.pause().await;
                    conn.advisory_xact_lock(&key).acquire().await?;
                    stage.pause().await;
                    conn.batch_execute(&table.insert(2)).await
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        wait_for("the end of the wait", || !observer.is_waiting(waiter.id));
        waiter.go_on();
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        waiter.holds(&mut observer, &key);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 2);
    }

    async fn shared_transaction_locks_admit_readers_and_keep_writers_out(server: &Server) {
        let key = unique_key("async_xact_shared");
        let mut observer = PgConnection::open(server);
        let mut first = AsyncPgConnection::open(server).await;
        let mut second = AsyncPgConnection::open(server).await;
        begin(&mut first).await;
        begin(&mut second).await;
        first.advisory_xact_lock(&key).shared().acquire().await.expect("a free lock");
        second.advisory_xact_lock(&key).shared().acquire().await.expect("it is shared");
        assert_eq!(holders(&mut observer, &key).len(), 2);
        assert!(!second.advisory_xact_lock(&key).try_acquire().await.expect("an answer"));
        commit(&mut first).await;
        assert!(second.advisory_xact_lock(&key).try_acquire().await.expect("an answer"), "an upgrade");
        commit(&mut second).await;
        assert_free(&mut observer, &key);
    }
}

on_mysql_async! {
    async fn in_an_open_transaction_it_is_refused_and_that_goes_on(server: &Server) {
        let key = unique_key("async_transaction_refused");
        let table = Table::new(server);
        let mut observer = diesel::MysqlConnection::open(server);
        let mut conn = AsyncMysqlConnection::open(server).await;
        conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let lock = conn.advisory_lock(&key);
            let result = lock.transaction(async |_| -> Result<(), Error> { panic!("refused") }).await;
            assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
            assert_free(&mut observer, &key);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(2)).await
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer).await;
    }
}
