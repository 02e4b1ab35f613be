//! `AdvisoryLock::transaction`: the lock outlives COMMIT, the successor sees what was committed, and no path leaves a
//! lock or a transaction behind.

use std::time::Duration;

use diesel::QueryResult;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use dlock_core::LockKey;
use dlock_tests::{Kind, PATIENCE, Proxy, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);

pub(crate) const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

/// A connection whose transactions have another isolation level than the server's default.
#[both]
pub(crate) async fn open_at<C: LockTest>(server: &Server, level: &str) -> C {
    match C::KIND {
        Kind::Postgres => {
            // Not a SET, so that nothing of the session itself is changed.
            let option = level.replace(' ', "%5C%20");
            let sign = if server.url.contains('?') { '&' } else { '?' };
            let url = format!(
                "{}{sign}options=-c%20default_transaction_isolation%3D{option}",
                server.url
            );
            let mut conn = C::open_url(&url).await;
            let current = "SELECT current_setting('default_transaction_isolation')";
            assert_eq!(conn.text(current).await.as_deref(), Some(level));
            conn
        }
        Kind::Mysql => {
            let mut conn = C::open(server).await;
            let set = format!("SET SESSION TRANSACTION ISOLATION LEVEL {level}");
            conn.execute_sql(&set).await;
            conn
        }
        // It has one, which is serializable.
        Kind::Sqlite => C::open(server).await,
    }
}

/// At SERIALIZABLE it is possible between two holders in turn, on PostgreSQL: the server frees the lock just before it
/// closes its books on the transaction.
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

/// Eight connections add one to a counter again and again, each in a transaction that reads it and then writes it.
#[both]
async fn count_in_contention<C: LockTest>(
    server: &Server,
    level: Option<&'static str>,
    rounds: i64,
    ask: Ask,
) {
    const CONNECTIONS: i64 = 8;
    let key = unique_key("transaction_counter");
    let table = Table::counter(server);
    let mut contenders = Vec::new();
    for _ in 0..CONNECTIONS {
        let conn: C = match level {
            Some(level) => open_at(server, level).await,
            None => C::open(server).await,
        };
        let (key, table) = (key.clone(), table.clone());
        let contender = on_connection(conn, async move |mut conn: C, _| {
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
                    Err(error)
                        if level == Some("serializable") && is_serialization_failure(&error) => {}
                    Err(error) => panic!("at {level:?}, {ask:?}: {error}"),
                }
            }
        });
        contenders.push(contender.await);
    }
    for contender in contenders {
        // On a slow machine longer than a single wait may last.
        wait_for(format!("a contender at {level:?}, {ask:?}"), || {
            contender.is_finished()
        });
        contender.join().await;
    }
    let mut observer = C::observer(server);
    let value = table.value(&mut observer);
    assert_eq!(value, CONNECTIONS * rounds, "at {level:?}, {ask:?}");
    assert_free(&mut observer, &key);
}

#[both]
on_every_server! {
    async fn it_holds_the_lock_commits_and_frees<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_commits");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            assert_held_by(&mut observer, &key, id);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(1)).await?;
            assert!(in_transaction(conn, &mut observer).await);
            assert_eq!(table.rows(&mut observer), 0, "before COMMIT");
            QueryResult::Ok(conn.backend_id().await)
        });
        assert_eq!(transaction.await, Ok(id));
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_rolls_back_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            assert_held_by(&mut observer, &key, id);
            Err::<(), _>(AppError::Own)
        });
        let result = transaction.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_of_the_database_rolls_back_too<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_sql_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            conn.batch_execute(&table.insert(1)).await?; // there is such a row
            Ok::<_, AppError>(())
        });
        let result = transaction.await;
        assert!(matches!(result, Err(AppError::Lock(Error::Database(_)))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
    }

    /// Were the lock free before COMMIT, the waiter would not see the row now and then.
    async fn a_waiter_that_is_granted_the_lock_sees_the_row_that_was_committed<C: LockTest>(server: &Server) {
        const ROUNDS: i64 = 40;
        let key = unique_key("transaction_visible");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let waiter = in_background(server, {
            let (key, count) = (key.clone(), table.count());
            async move |mut conn: C, stage: Stage| {
                for round in 1..=ROUNDS {
                    stage.pause().await;
                    let run = conn.advisory_lock(&key).run(async |conn| Ok::<_, Error>(conn.number(&count).await));
                    assert_eq!(run.await.expect("the lock"), Some(round), "rows that the waiter saw");
                    stage.say("seen");
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
            waiter.says("seen");
        }
        waiter.join().await;
        assert_free(&mut observer, &key);
    }

    async fn each_holder_sees_what_the_one_before_committed_at_every_isolation_level<C: LockTest>(server: &Server) {
        count_in_contention::<C>(server, None, 12, Ask::Wait).await;
        for level in LEVELS {
            count_in_contention::<C>(server, Some(level), 12, Ask::Wait).await;
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
            Kind::Postgres => 60,
            // Nothing can go wrong there: the snapshot comes with the first read.
            Kind::Mysql | Kind::Sqlite => 2,
        };
        for level in &LEVELS[1..] {
            count_in_contention::<C>(server, Some(level), rounds, Ask::Try).await;
        }
    }

    async fn it_waits_for_its_turn<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_waits");
            let table = Table::new(server);
            let mut observer = C::observer(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let (key, table) = (key.clone(), table.clone());
                async move |mut conn: C, stage: Stage| {
                    let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                        stage.say("began");
                        stage.pause().await;
                        conn.batch_execute(&table.insert(1)).await
                    });
                    transaction.await.expect("a commit");
                    conn
                }
            })
            .await;
            waiter.waits(&mut observer);
            assert_eq!(table.rows(&mut observer), 0);
            unlock(&mut observer, &key);
            waiter.says("began");
            assert_held_by(&mut observer, &key, waiter.id);
            assert_eq!(table.rows(&mut observer), 0);
            waiter.go_on();
            let mut conn = waiter.join().await;
            assert_clean(&mut conn, &mut observer).await;
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 1);
        }
    }

    async fn a_timeout_leaves_no_transaction_behind<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_timeout");
            let (mut holder, mut observer) = (C::open(server).await, C::observer(server));
            let mut conn: C = open_at(server, level).await;
            let holder_id = holder.backend_id().await;
            let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
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
            assert_held_by(&mut observer, &key, holder_id);
            held.release().await.expect("a release");
            let lock = conn.advisory_lock(&key).timeout(SHORT);
            lock.transaction(async |_| Ok::<_, Error>(())).await.expect("it is free");
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_further_transaction_that_is_left_open_rolls_all_back_and_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_left_open");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        for left_open in 1..=2 {
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                conn.batch_execute(&table.insert(0)).await?;
                for n in 1..=left_open {
                    begin(conn).await;
                    conn.batch_execute(&table.insert(n)).await?;
                }
                Ok::<_, Error>(())
            });
            match transaction.await {
                Err(Error::TransactionLeftOpen { key: of, .. }) => assert_eq!(of, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_further_transaction_that_is_left_open_does_not_hide_the_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_left_open_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            begin(conn).await;
            conn.batch_execute(&table.insert(1)).await?;
            Err::<(), _>(AppError::Own)
        });
        let result = transaction.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_closure_that_ends_the_transaction_itself_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_ended");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
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
        let key = unique_key("transaction_nests");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            conn.transaction(async |conn| conn.batch_execute(&table.insert(2)).await).await?;
            let nested = conn.transaction(async |conn| {
                conn.batch_execute(&table.insert(3)).await?;
                Err::<(), _>(AppError::Own)
            });
            nested.await.expect_err("its own");
            assert_held_by(&mut observer, &key, id);
            QueryResult::Ok(())
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn it_works_in_a_test_transaction<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_test");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        conn.begin_test_transaction().await.expect("it begins");
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            assert_held_by(&mut observer, &key, id);
            conn.batch_execute(&table.insert(1)).await
        });
        transaction.await.expect("a savepoint");
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(2)).await?;
            Err::<(), _>(AppError::Own)
        });
        transaction.await.expect_err("its own");
        assert_eq!((conn.number(&table.count()).await, table.rows(&mut observer)), (Some(1), 0));
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
        drop(conn);
        wait_until_free(&mut observer, &key);
    }

    async fn a_broken_connection_is_refused<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_broken");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        C::TransactionManager::transaction_manager_status_mut(&mut conn).set_in_error();
        let lock = conn.advisory_lock(&key);
        let result = lock.transaction(async |_| -> Result<(), Error> { panic!("it is broken") }).await;
        use DieselError::BrokenTransactionManager as Broken;
        assert!(matches!(result, Err(Error::Lost { source: Broken, .. })), "{result:?}");
        assert!(is_broken(&mut conn));
        let result = conn.advisory_lock(&key).acquire().await.map(drop);
        assert!(matches!(result, Err(Error::Lost { source: Broken, .. })), "{result:?}");
        assert!(is_broken(&mut conn));
        assert_free(&mut observer, &key);
        assert!(!in_transaction(&mut conn, &mut observer).await);
    }

    async fn it_works_with_an_owned_connection_elsewhere<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_owned");
        let table = Table::new(server);
        let mut observer = C::observer(server);
        let lock = AdvisoryLock::new(Box::new(C::open(server).await), &key);
        let transaction = {
            let (key, table, mut observer) = (key.clone(), table.clone(), C::observer(server));
            async move || {
                lock.transaction(async move |conn| {
                    let id = conn.backend_id().await;
                    assert_held_by(&mut observer, &key, id);
                    conn.batch_execute(&table.insert(1)).await
                })
                .await
            }
        };
        elsewhere(transaction).await.expect("a commit");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
    }

    async fn an_outer_hold_outlives_it<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_outer");
            let (mut conn, mut observer) = (open_at::<C>(server, level).await, C::observer(server));
            let id = conn.backend_id().await;
            let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            outer.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("held already");
            assert_held_by(&mut observer, &key, id);
            outer.release().await.expect("a release");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }
}

#[both]
on_every_network_server! {
    async fn a_cancelled_wait_leaves_no_transaction_behind<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_cancel");
            let mut observer = C::observer(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    let lock = conn.advisory_lock(&key);
                    let transaction = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") });
                    let error = transaction.await.expect_err("cancelled");
                    assert!(matches!(error, Error::Interrupted { .. }), "{error:?}");
                    if C::KIND == Kind::Postgres {
                        let source = std::error::Error::source(&error).expect("the server's word").to_string();
                        assert!(source.contains("cancel"), "{source}");
                    }
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
            conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("a free lock");
            assert_free(&mut observer, &key);
        }
    }

    async fn a_session_killed_while_it_waits_is_an_error_and_holds_nothing<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_kill_waiter");
            let mut observer = C::observer(server);
            assert!(try_lock(&mut observer, &key));
            let waiter = on_connection(open_at::<C>(server, level).await, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    let lock = conn.advisory_lock(&key);
                    let transaction = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") });
                    let result = transaction.await;
                    assert!(matches!(result, Err(Error::Lost { .. })), "{result:?}");
                    assert!(is_broken(&mut conn), "a pool would hand it out again");
                }
            })
            .await;
            waiter.waits(&mut observer);
            observer.kill(waiter.id);
            let id = waiter.id;
            waiter.join().await;
            // MariaDB closes the connection first.
            wait_for("the end of the session", || !observer.is_connected(id));
            unlock(&mut observer, &key);
            assert_free(&mut observer, &key);
        }
    }

    async fn a_session_that_is_gone_is_an_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_gone");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        kill(&mut observer, id);
        let lock = conn.advisory_lock(&key);
        let result = lock.transaction(async |_| -> Result<(), Error> { panic!("it is gone") }).await;
        assert!(matches!(result, Err(Error::Lost { .. })), "{result:?}");
        assert!(is_broken(&mut conn));
    }

    async fn a_commit_or_a_rollback_that_cannot_be_sent_frees_the_lock_and_hides_no_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_kill");
        let table = Table::new(server);
        let mut observer = C::observer(server);
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

    async fn a_network_failure_in_the_closure_does_not_hide_the_error_either<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_cut");
        let table = Table::new(server);
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()).await, C::observer(server));
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            proxy.cut();
            Err::<(), _>(AppError::Own)
        });
        let result = transaction.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
    }

    async fn polling_asks_again_and_again<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_poll");
        let table = Table::new(server);
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &key));
        let proxy = Proxy::start(server);
        let poller = on_connection(C::open_url(proxy.url()).await, {
            let (key, table) = (key.clone(), table.clone());
            async move |mut conn: C, _| {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(2));
                lock.transaction(async |conn| conn.batch_execute(&table.insert(1)).await).await.expect("a commit");
            }
        })
        .await;
        proxy.reset();
        wait_for("many attempts", || proxy.round_trips() >= 50);
        unlock(&mut observer, &key);
        poller.join().await;
        assert_eq!(table.rows(&mut observer), 1);
        wait_until_free(&mut observer, &key);
    }
}

#[both]
on_postgres! {
    /// As Diesel's own `transaction` does: the closure's COMMIT ends the raw one as well.
    async fn in_a_raw_transaction_it_takes_the_lock_and_commits_all(server: &Server) {
        let key = unique_key("transaction_raw_begin");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for waits in [false, true] {
            let table = Table::new(server);
            conn.execute_sql("BEGIN").await;
            conn.execute_sql(&table.insert(1)).await;
            assert!(!waits || try_lock(&mut observer, &key));
            let asker = on_connection(conn, {
                let (key, table) = (key.clone(), table.clone());
                async move |mut conn: PgConnection, stage: Stage| {
                    let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                        stage.say("granted");
                        stage.pause().await;
                        conn.batch_execute(&table.insert(2)).await
                    });
                    transaction.await.expect("a commit");
                    conn
                }
            })
            .await;
            if waits {
                asker.waits(&mut observer);
                unlock(&mut observer, &key);
            }
            asker.says("granted");
            assert_held_by(&mut observer, &key, id);
            assert_eq!(table.rows(&mut observer), 0);
            asker.go_on();
            conn = asker.join().await;
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 2);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn in_a_raw_transaction_a_timeout_rolls_all_back(server: &Server) {
        let key = unique_key("transaction_raw_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        assert!(try_lock(&mut observer, &key));
        for limit in [Duration::ZERO, SHORT] {
            conn.execute_sql("BEGIN").await;
            conn.execute_sql(&table.insert(1)).await;
            let lock = conn.advisory_lock(&key).timeout(limit);
            let result = lock.transaction(async |_| -> Result<(), Error> { panic!("the lock is held") }).await;
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert_clean(&mut conn, &mut observer).await;
            assert_eq!(table.rows(&mut observer), 0);
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }

    async fn nested_in_an_open_transaction_the_lock_is_held_until_that_ends(server: &Server) {
        let key = unique_key("transaction_nested");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for commits in [true, false] {
            let table = Table::new(server);
            let transaction = conn.transaction(async |conn| {
                let nested = conn.advisory_lock(&key).transaction(async |conn| {
                    assert_eq!(depth(conn), 2);
                    assert_held_by(&mut observer, &key, id);
                    conn.batch_execute(&table.insert(1)).await
                });
                nested.await?;
                assert_eq!(depth(conn), 1);
                assert_held_by(&mut observer, &key, id);
                assert_eq!(table.rows(&mut observer), 0);
                if commits { Ok(()) } else { Err(AppError::Own) }
            });
            assert_eq!(transaction.await.is_ok(), commits);
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), i64::from(commits));
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn rolling_the_nested_one_back_frees_the_lock_and_keeps_the_outer_one(server: &Server) {
        let key = unique_key("transaction_nested_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let nested = conn.advisory_lock(&key).transaction(async |conn| {
                conn.batch_execute(&table.insert(2)).await?;
                Err::<(), _>(AppError::Own)
            });
            let result = nested.await;
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
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_commit_that_fails_is_reported_rolls_back_and_frees_the_lock(server: &Server) {
        let key = unique_key("transaction_deferred");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let name = table.name();
        conn.execute_sql(&format!("ALTER TABLE {name} ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED")).await;
        conn.execute_sql(&format!("ALTER TABLE {name} DROP CONSTRAINT {name}_n_key")).await;
        for nested in [false, true] {
            let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                if nested {
                    conn.transaction(async |conn| conn.batch_execute(&table.insert(1)).await).await?;
                } else {
                    conn.batch_execute(&table.insert(1)).await?;
                }
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
    }

    async fn shared_transactions_run_together_and_keep_writers_out(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_shared");
            let mut observer = PgConnection::observer(server);
            let mut first: PgConnection = open_at(server, level).await;
            let mut second: PgConnection = open_at(server, level).await;
            let transaction = first.advisory_lock(&key).shared().transaction(async |_| {
                let lock = second.advisory_lock(&key).shared().timeout(PATIENCE);
                lock.transaction(async |_| {
                    assert_eq!(holders(&mut observer, &key).len(), 2);
                    assert!(!try_lock(&mut observer, &key), "an exclusive one");
                    Ok::<_, Error>(())
                })
                .await
            });
            transaction.await.expect("two commits");
            assert_free(&mut observer, &key);
            // A writer excludes them.
            assert!(try_lock(&mut observer, &key));
            let lock = first.advisory_lock(&key).shared().timeout(SHORT);
            let result = lock.transaction(async |_| Ok::<_, Error>(())).await;
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            unlock(&mut observer, &key);
            assert_clean(&mut first, &mut observer).await;
            assert_clean(&mut second, &mut observer).await;
        }
    }

    async fn the_transaction_has_the_isolation_level_of_the_session_and_may_be_read_only(server: &Server) {
        let key = unique_key("transaction_level");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
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

    async fn limits_of_the_session_neither_cut_the_wait_short_nor_change(server: &Server) {
        let key = unique_key("transaction_limits");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let mut conn = PgConnection::open(server).await;
        conn.execute_sql("SET lock_timeout = '400ms'; SET statement_timeout = '401ms'").await;
        let waiter = on_connection(conn, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let transaction = conn.advisory_lock(&key).transaction(async |conn| {
                    let sql = "SELECT current_setting('lock_timeout') || current_setting('statement_timeout')";
                    assert_eq!(conn.text(sql).await.as_deref(), Some("400ms401ms"));
                    Ok::<_, Error>(())
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.still_waits(&mut observer, Duration::from_millis(1_000));
        unlock(&mut observer, &key);
        waiter.join().await;
        assert_free(&mut observer, &key);
    }
}

#[both]
on_mysql! {
    async fn in_an_open_transaction_it_is_refused_and_that_goes_on(server: &Server) {
        let key = unique_key("transaction_refused");
        let table = Table::new(server);
        let (mut conn, mut observer) = (MysqlConnection::open(server).await, MysqlConnection::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let lock = conn.advisory_lock(&key);
            let result = lock.transaction(async |_| -> Result<(), Error> { panic!("refused") }).await;
            assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
            assert_free(&mut observer, &key);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(2)).await
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer).await;
    }
}
