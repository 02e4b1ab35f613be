//! A guard is the connection, frees its lock on every path, frees no other hold, and says so when it had been lost.

use std::sync::Arc;
use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::{ExpressionMethods, PgConnection, QueryDsl, QueryResult};
use diesel_async::{
    AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    AsyncTestConnection, Kind, Server, TestConnection, on_every_network_server_async,
    on_mysql_async, on_postgres_async, unique_key,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);

diesel::table! {
    users {
        id -> Integer,
        name -> Text,
    }
}

/// A guard of this connection was dropped: on PostgreSQL the lock is free at once, and otherwise when what is marked
/// broken is closed.
async fn assert_given_up<C: LockTest>(conn: Shared<C>, observer: &mut C::Observer, key: &str) {
    match C::KIND {
        Kind::Postgres => {
            wait_until_free(observer, key);
            assert_clean(&mut *conn.lock().await, observer).await;
        }
        Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
        Kind::Mysql => {
            assert!(is_broken(&mut *conn.lock().await));
            drop(conn);
            wait_until_free(observer, key);
        }
    }
}

/// Queries of Diesel, methods of the connection, and transactions, all with the guard as the connection.
macro_rules! queries_through_the_guard {
    ($Connection:ty, $server:ident) => {{
        let key = unique_key("async_guard_queries");
        let mut observer = <$Connection as AsyncTestConnection>::Observer::open($server);
        let mut conn = <$Connection as AsyncTestConnection>::open($server).await;
        conn.execute_sql(
            "CREATE TEMPORARY TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)",
        )
        .await;
        let id = conn.backend_id().await;
        let mut lock = conn
            .advisory_lock(&key)
            .acquire()
            .await
            .expect("a free lock");

        let ann = (users::id.eq(1), users::name.eq("Ann"));
        diesel::insert_into(users::table)
            .values(ann)
            .execute(&mut lock)
            .await
            .expect("an insert");
        let loaded: Vec<(i32, String)> = users::table.load(&mut lock).await.expect("the users");
        assert_eq!(loaded, [(1, "Ann".to_owned())]);
        let name: String = users::table
            .find(1)
            .select(users::name)
            .first(&mut *lock)
            .await
            .expect("a user");
        assert_eq!(name, "Ann");
        lock.batch_execute("UPDATE users SET name = 'Bea'")
            .await
            .expect("an update");

        let result = lock
            .transaction(async |conn| {
                let dan = (users::id.eq(2), users::name.eq("Dan"));
                diesel::insert_into(users::table)
                    .values(dan)
                    .execute(conn)
                    .await?;
                Err::<(), _>(DieselError::RollbackTransaction)
            })
            .await;
        assert_eq!(result, Err(DieselError::RollbackTransaction));
        assert_held_by(&mut observer, &key, id);
        let names: Vec<String> = users::table
            .select(users::name)
            .load(&mut lock)
            .await
            .expect("the users");
        assert_eq!(names, ["Bea"]);

        // It is a connection for functions that are generic, too, and stacks.
        async fn count<Conn: AsyncConnection>(conn: &mut Conn) -> QueryResult<()> {
            conn.batch_execute("DELETE FROM users").await
        }
        let mut inner = lock
            .advisory_lock(format!("{key}/inner"))
            .acquire()
            .await
            .expect("a free lock");
        count(&mut inner).await.expect("a statement");
        let rest: Vec<(i32, String)> = users::table.load(&mut inner).await.expect("the users");
        assert!(rest.is_empty());
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }};
}

on_postgres_async! {
    async fn the_guard_is_an_async_connection_on_postgres(server: &Server) {
        queries_through_the_guard!(AsyncPgConnection, server)
    }
}

on_mysql_async! {
    async fn the_guard_is_an_async_connection_on_mysql(server: &Server) {
        queries_through_the_guard!(AsyncMysqlConnection, server)
    }
}

on_every_network_server_async! {
    async fn run_holds_the_lock_while_it_runs_and_returns_the_value<C: LockTest>(server: &Server) {
        let key = unique_key("async_run");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let value = conn
            .advisory_lock(&key)
            .run(async |conn| {
                let id = conn.backend_id().await;
                assert_held_by(&mut observer, &key, id);
                Ok::<_, Error>(id)
            })
            .await;
        assert_free(&mut observer, &key);
        assert_eq!(value.expect("it ran"), conn.backend_id().await);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_in_run_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("async_run_error");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let result = conn
            .advisory_lock(&key)
            .run(async |conn| {
                let id = conn.backend_id().await;
                assert_held_by(&mut observer, &key, id);
                Err::<(), _>(AppError::Own)
            })
            .await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        let result = conn
            .advisory_lock(&key)
            .run(async |conn| {
                conn.batch_execute("SELECT no_such_column").await?;
                Ok::<_, AppError>(())
            })
            .await;
        assert!(matches!(result, Err(AppError::Lock(Error::Database(_)))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_panic_in_run_in_a_task_frees_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_run_panic");
        let mut observer = C::Observer::open(server);
        let (conn, id) = share(C::open(server).await).await;
        let task = Task::spawn(id, {
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
        let mut observer = C::Observer::open(server);
        let (conn, id) = share(C::open(server).await).await;
        let task: Task<()> = Task::spawn(id, {
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

    /// What an application hands to the closures: references, values that move in, and errors of its own.
    async fn closures_capture_by_reference_and_by_move_and_have_errors_of_their_own<C: LockTest>(server: &Server) {
        let key = unique_key("async_closures");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let (word, mut words) = (String::from("borrowed"), vec![String::new()]);
        conn.advisory_lock(&key)
            .run(async |conn| {
                conn.batch_execute("SELECT 1").await?;
                words.push(word.clone());
                Ok::<_, AppError>(())
            })
            .await
            .expect("a free lock");
        conn.advisory_lock(&key)
            .transaction(async |conn| {
                conn.batch_execute("SELECT 1").await?;
                words.push(word.clone());
                Ok::<_, AppError>(())
            })
            .await
            .expect("a free lock");
        assert_eq!(words.len(), 3);

        let moved = words.clone();
        let run = conn.advisory_lock(&key).run(async move |conn| {
            conn.batch_execute("SELECT 1").await?;
            QueryResult::Ok(moved)
        });
        let moved = run.await.expect("a free lock");
        let transaction = conn.advisory_lock(&key).transaction(async move |conn| {
            conn.batch_execute("SELECT 1").await?;
            QueryResult::Ok(moved)
        });
        assert_eq!(transaction.await.expect("a free lock"), words);

        // By way of functions, which have a connection of a type of their own.
        async fn work<C: LockTest>(conn: &mut C, words: &[String]) -> Result<usize, AppError> {
            conn.batch_execute("SELECT 1").await?;
            Ok(words.len())
        }
        let lock = conn.advisory_lock(&key);
        assert!(matches!(lock.run(async |conn| work(conn, &words).await).await, Ok(3)));
        let lock = conn.advisory_lock(&key);
        assert!(matches!(lock.transaction(async |conn| work(conn, &words).await).await, Ok(3)));
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn errors_pass_through_functions_of_diesel_and_back<C: LockTest>(server: &Server) {
        let key = unique_key("async_convert");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert!(try_lock(&mut observer, &key));

        async fn in_query_result<C: LockTest>(conn: &mut C, key: &str) -> QueryResult<()> {
            let lock = conn.advisory_lock(key).timeout(SHORT).acquire().await?;
            lock.release().await?;
            Ok(())
        }
        match in_query_result(&mut conn, &key).await.map_err(Error::from) {
            Err(Error::Timeout { key: timed_out, waited, holders, .. }) => {
                assert_eq!(timed_out, LockKey::from(&key));
                assert!(waited >= SHORT && !holders.is_empty());
            }
            other => panic!("{other:?}"),
        }
        let result = conn.advisory_lock(&key).timeout(SHORT).run(async |_| QueryResult::Ok(())).await;
        assert!(matches!(result.map_err(Error::from), Err(Error::Timeout { .. })));
        let result = conn.advisory_lock(&key).timeout(SHORT).transaction(async |_| QueryResult::Ok(())).await;
        assert!(matches!(result.map_err(Error::from), Err(Error::Timeout { .. })));
        let result = conn.advisory_lock("").run(async |_| Ok::<_, AppError>(())).await;
        assert!(matches!(result, Err(AppError::Lock(Error::InvalidKey(_)))));
        unlock(&mut observer, &key);
        in_query_result(&mut conn, &key).await.expect("a free lock");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lost_lock_is_not_held_when_it_is_released_and_the_next_holder_keeps_it<C: LockTest>(server: &Server) {
        let key = unique_key("async_lost");
        let mut observer = C::Observer::open(server);
        for taken_by_another in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.execute_sql(C::RELEASE_ALL).await;
            if taken_by_another {
                assert!(try_lock(&mut observer, &key));
            }
            match lock.release().await.map(drop) {
                Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
                result => panic!("{result:?}"),
            }
            assert!(is_broken(&mut conn), "it is not the session that it was");
            if taken_by_another {
                unlock(&mut observer, &key);
            }
        }
        assert_free(&mut observer, &key);
    }

    async fn run_reports_a_lost_lock_unless_its_closure_failed<C: LockTest>(server: &Server) {
        let key = unique_key("async_run_lost");
        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.execute_sql(C::RELEASE_ALL).await;
            Ok::<_, Error>(())
        });
        let result = run.await;
        assert!(matches!(result, Err(Error::NotHeld { .. })), "{result:?}");
        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.execute_sql(C::RELEASE_ALL).await;
            Err::<(), _>(AppError::Own)
        });
        let result = run.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
    }

    async fn a_killed_session_is_an_error_of_the_release_and_does_not_hide_that_of_run<C: LockTest>(server: &Server) {
        let key = unique_key("async_killed");
        let mut observer = C::Observer::open(server);
        let mut conn = C::open(server).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let id = lock.backend_id().await;
        kill(&mut observer, id);
        assert_free(&mut observer, &key);
        let result = lock.release().await.map(drop);
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        assert!(is_broken(&mut conn));
        for succeeds in [true, false] {
            let mut conn = C::open(server).await;
            let run = conn.advisory_lock(&key).run(async |conn| {
                let id = conn.backend_id().await;
                kill(&mut observer, id);
                if succeeds { Ok(()) } else { Err(AppError::Own) }
            });
            match run.await {
                Err(AppError::Own) if !succeeds => {}
                Err(AppError::Lock(Error::Database(_))) if succeeds => {}
                other => panic!("{other:?}"),
            }
            assert!(is_broken(&mut conn));
            assert_free(&mut observer, &key);
        }
    }

    async fn a_transaction_left_open_under_the_lock_is_rolled_back_and_reported<C: LockTest>(server: &Server) {
        let key = unique_key("async_left_open");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(1)).await;
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(2)).await;
        let result = lock.release().await.map(drop);
        assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert!(is_broken(&mut conn));

        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            begin(conn).await;
            conn.batch_execute(&table.insert(3)).await?;
            Ok::<_, Error>(())
        });
        let result = run.await;
        assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert!(is_broken(&mut conn));
    }

    async fn a_session_lock_in_an_open_transaction_is_refused_and_that_goes_on<C: LockTest>(server: &Server) {
        let key = unique_key("async_refused");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let mut errors = vec![
                conn.advisory_lock(&key).acquire().await.map(drop),
                conn.advisory_lock(&key).try_acquire().await.map(drop),
                conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop),
                conn.advisory_lock(&key).poll_every(SHORT).acquire().await.map(drop),
                conn.advisory_lock(&key).run(async |_| Ok(())).await,
            ];
            if C::KIND == Kind::Mysql {
                errors.push(conn.advisory_lock(&key).transaction(async |_| Ok(())).await);
            }
            for error in errors {
                let error = error.expect_err("refused");
                let message = error.to_string();
                assert!(matches!(error, Error::InTransaction { .. }), "{error:?}");
                for named in [&key, ".transaction(", "advisory_xact_lock", "inside_transaction()"] {
                    assert!(message.contains(named), "{message}");
                }
            }
            assert_free(&mut observer, &key);
            conn.batch_execute(&table.insert(2)).await
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_refusal_sends_nothing<C: LockTest>(server: &Server) {
        let (mut conn, proxy) = open_counted::<C>(server).await;
        begin(&mut conn).await;
        proxy.reset();
        let error = conn.advisory_lock("refused").acquire().await.map(drop);
        assert!(matches!(error, Err(Error::InTransaction { .. })), "{error:?}");
        assert_eq!(proxy.round_trips(), 0);
        roll_back(&mut conn).await;
    }

    async fn a_test_transaction_is_let_through<C: LockTest>(server: &Server) {
        let key = unique_key("async_test_transaction");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        conn.begin_test_transaction().await.expect("it begins");
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        lock.transaction(async |conn| conn.batch_execute(&table.insert(1)).await).await.expect("a savepoint");
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        conn.advisory_lock(&key).run(async |conn| conn.batch_execute(&table.insert(2)).await).await.expect("a free lock");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
    }

    async fn inside_transaction_allows_it_and_frees_the_lock_before_commit<C: LockTest>(server: &Server) {
        let key = unique_key("async_inside");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
            assert_held_by(&mut observer, &key, id);
            lock.batch_execute(&table.insert(2)).await?;
            lock.release().await?;
            assert_free(&mut observer, &key);
            let lock = conn.advisory_lock(&key).inside_transaction().try_acquire().await?.expect("a free lock");
            lock.release().await?;
            assert_free(&mut observer, &key);
            let lock = conn.advisory_lock(&key).inside_transaction();
            lock.run(async |conn| conn.batch_execute(&table.insert(3)).await).await?;
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0, "before COMMIT");
            QueryResult::Ok(())
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn waiting_and_giving_up_inside_a_transaction_keeps_its_writes<C: LockTest>(server: &Server) {
        let key = unique_key("async_inside_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert!(try_lock(&mut observer, &key));
        conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let result = conn.advisory_lock(&key).inside_transaction().timeout(SHORT).acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert!(conn.advisory_lock(&key).inside_transaction().try_acquire().await?.is_none());
            let lock = conn.advisory_lock(&key).inside_transaction().poll_every(SHORT / 4).timeout(SHORT);
            let result = lock.acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            conn.batch_execute(&table.insert(2)).await
        })
        .await
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        unlock(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_wait_inside_a_transaction_is_granted_and_released<C: LockTest>(server: &Server) {
        let key = unique_key("async_inside_wait");
        let mut observer = C::Observer::open(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_task(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let transaction = conn.transaction(async |conn| {
                    let lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
                    stage.pause().await;
                    lock.release().await?;
                    stage.pause().await;
                    QueryResult::Ok(())
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        waiter.holds(&mut observer, &key);
        waiter.go_on();
        wait_until_free(&mut observer, &key);
        assert!(!waiter.is_finished());
        waiter.go_on();
        waiter.join().await;
    }

    /// On PostgreSQL the error aborts the transaction.
    async fn an_error_under_the_lock_in_a_transaction_frees_it_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("async_inside_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let result = conn
            .transaction(async |conn| {
                conn.batch_execute(&table.insert(1)).await?;
                let lock = conn.advisory_lock(&key).inside_transaction();
                let result = lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await;
                assert_free(&mut observer, &key);
                result
            })
            .await;
        use DatabaseErrorKind::UniqueViolation;
        assert!(matches!(&result, Err(DieselError::DatabaseError(UniqueViolation, _))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer).await;
    }
}

on_postgres_async! {
    async fn a_lock_is_released_in_an_aborted_transaction_which_stays_aborted(server: &Server) {
        let key = unique_key("async_aborted");
        let table = Table::counter(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        for waits in [false, true] {
            let result = conn
                .transaction(async |conn| {
                    conn.batch_execute(&table.insert(1)).await?;
                    if waits {
                        // Another way to acquire it.
                        assert!(try_lock(&mut observer, &key));
                        let lock = conn.advisory_lock(&key).inside_transaction().timeout(SHORT);
                        assert!(lock.try_acquire().await?.is_none());
                        unlock(&mut observer, &key);
                    }
                    let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
                    let error = lock.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
                    assert_held_by(&mut observer, &key, id);
                    lock.release().await?;
                    assert_free(&mut observer, &key);
                    conn.batch_execute("SELECT 1").await.expect_err("it is aborted");
                    assert_eq!(depth(conn), 1);
                    Err::<(), Error>(error.into())
                })
                .await;
            assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn an_outer_lock_survives_an_inner_one_in_an_aborted_transaction(server: &Server) {
        let (key, inner_key) = (unique_key("async_aborted_outer"), unique_key("async_aborted_inner"));
        let table = Table::counter(server);
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let result = (*outer)
            .transaction(async |conn| {
                let lock = conn.advisory_lock(&inner_key).inside_transaction();
                lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await
            })
            .await;
        assert!(result.is_err());
        assert_free(&mut observer, &inner_key);
        assert_held_by(&mut observer, &key, id);
        outer.release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
    }
}
