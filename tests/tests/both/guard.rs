//! A guard that is released, `run`, and what they say when the lock had been lost.

use std::time::Duration;

use diesel::QueryResult;
use diesel::result::Error as DieselError;
use dlock_core::LockKey;
use dlock_tests::{Proxy, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);

#[both]
on_every_server! {
    async fn run_holds_the_lock_while_it_runs_and_returns_the_value<C: LockTest>(server: &Server) {
        let key = unique_key("run");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let run = conn.advisory_lock(&key).run(async |conn| {
            let id = conn.backend_id().await;
            assert_held_by(&mut observer, &key, id);
            Ok::<_, Error>(id)
        });
        let value = run.await;
        assert_free(&mut observer, &key);
        assert_eq!(value.expect("it ran"), conn.backend_id().await);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_in_run_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("run_error");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let run = conn.advisory_lock(&key).run(async |conn| {
            let id = conn.backend_id().await;
            assert_held_by(&mut observer, &key, id);
            Err::<(), _>(AppError::Own)
        });
        let result = run.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.batch_execute("SELECT no_such_column").await?;
            Ok::<_, AppError>(())
        });
        let result = run.await;
        assert!(matches!(result, Err(AppError::Lock(Error::Database(_)))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    /// What an application hands to the closures: references, values that move in, and errors of its own.
    async fn closures_capture_by_reference_and_by_move_and_have_errors_of_their_own<C: LockTest>(server: &Server) {
        let key = unique_key("closures");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let (word, mut words) = (String::from("borrowed"), vec![String::new()]);
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.batch_execute("SELECT 1").await?;
            words.push(word.clone());
            Ok::<_, AppError>(())
        });
        run.await.expect("a free lock");
        let transaction = conn.advisory_lock(&key).transaction(async |conn| {
            conn.batch_execute("SELECT 1").await?;
            words.push(word.clone());
            Ok::<_, AppError>(())
        });
        transaction.await.expect("a free lock");
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
        let key = unique_key("convert");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        assert!(try_lock(&mut observer, &key));

        async fn in_query_result<C: LockTest>(conn: &mut C, key: &str) -> QueryResult<()> {
            let lock = conn.advisory_lock(key).timeout(SHORT).acquire().await?;
            lock.release().await?;
            Ok(())
        }
        let error = in_query_result(&mut conn, &key).await.expect_err("held");
        let message = error.to_string();
        assert!(message.contains(&key), "{message}");
        match Error::from(error) {
            Error::Timeout { key: timed_out, waited, holders, .. } => {
                assert_eq!(timed_out, LockKey::from(&key));
                assert!(waited >= SHORT && !holders.is_empty());
            }
            other => panic!("{other:?}"),
        }
        let result = conn.advisory_lock(&key).timeout(SHORT).run(async |_| QueryResult::Ok(())).await;
        assert!(matches!(result.map_err(Error::from), Err(Error::Timeout { .. })));
        let result = conn.advisory_lock(&key).timeout(SHORT).transaction(async |_| QueryResult::Ok(())).await;
        assert!(matches!(result.map_err(Error::from), Err(Error::Timeout { .. })));
        let error = in_query_result(&mut conn, "").await.expect_err("an empty key");
        assert!(matches!(Error::from(error), Error::InvalidKey(_)));
        let result = conn.advisory_lock("").run(async |_| Ok::<_, AppError>(())).await;
        assert!(matches!(result, Err(AppError::Lock(Error::InvalidKey(_)))));
        // Also out of a transaction, which is rolled back.
        let error = conn.transaction(async |conn| in_query_result(conn, &key).await).await.expect_err("refused");
        assert!(matches!(error, DieselError::QueryBuilderError(_)));
        assert!(matches!(Error::from(error), Error::InTransaction { .. }));
        unlock(&mut observer, &key);
        in_query_result(&mut conn, &key).await.expect("a free lock");

        // An error of Diesel is itself again.
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.batch_execute("SELECT nonsense FROM nowhere").await?;
            Ok::<_, Error>(())
        });
        let error = run.await.expect_err("nonsense");
        assert!(matches!(DieselError::from(error), DieselError::DatabaseError(..)));
        let error = Error::from(DieselError::QueryBuilderError("somebody else's".into()));
        assert!(matches!(error, Error::Database(DieselError::QueryBuilderError(_))));
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lost_lock_is_not_held_when_it_is_released_and_the_next_holder_keeps_it<C: LockTest>(server: &Server) {
        let key = unique_key("lost");
        let mut next = C::observer(server);
        let next_id = next.backend_id();
        for taken_by_another in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.execute_sql(C::RELEASE_ALL).await;
            if taken_by_another {
                assert!(try_lock(&mut next, &key));
            }
            match lock.release().await.map(drop) {
                Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
                result => panic!("{result:?}"),
            }
            assert!(is_broken(&mut conn), "it is not the session that it was");
            if taken_by_another {
                assert_held_by(&mut C::observer(server), &key, next_id);
                unlock(&mut next, &key);
            }
        }
        assert_free(&mut next, &key);
    }

    async fn run_reports_a_lost_lock_unless_its_closure_failed<C: LockTest>(server: &Server) {
        let key = unique_key("run_lost");
        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.execute_sql(C::RELEASE_ALL).await;
            Ok::<_, Error>(())
        });
        let result = run.await;
        assert!(matches!(result, Err(Error::NotHeld { .. })), "{result:?}");
        assert!(is_broken(&mut conn));
        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            conn.execute_sql(C::RELEASE_ALL).await;
            Err::<(), _>(AppError::Own)
        });
        let result = run.await;
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
    }

    async fn a_transaction_that_was_committed_under_the_lock_is_no_reason_to_complain<C: LockTest>(server: &Server) {
        let key = unique_key("committed");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(1)).await;
        commit(&mut *lock).await;
        let transaction = lock.transaction(async |conn| conn.batch_execute(&table.insert(2)).await);
        transaction.await.expect("a transaction");
        lock.release().await.expect("a release");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer).await;
    }

    /// As with any guard, forgetting it is a leak; that of a session ends with the connection.
    async fn a_forgotten_guard_holds_the_lock_until_the_connection_closes<C: LockTest>(server: &Server) {
        let key = unique_key("forget");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        std::mem::forget(conn.advisory_lock(&key).acquire().await.expect("a free lock"));
        assert_held_by(&mut observer, &key, id);
        assert_eq!(conn.number("SELECT 1").await, Some(1));
        drop(conn);
        wait_until_free(&mut observer, &key);
    }
}

#[both]
on_every_network_server! {
    async fn a_killed_session_is_an_error_of_run_and_does_not_hide_that_of_its_closure<C: LockTest>(server: &Server) {
        let key = unique_key("run_killed");
        let mut observer = C::observer(server);
        for succeeds in [true, false] {
            let mut conn = C::open(server).await;
            let run = conn.advisory_lock(&key).run(async |conn| {
                let id = conn.backend_id().await;
                kill(&mut observer, id);
                if succeeds { Ok(()) } else { Err(AppError::Own) }
            });
            match run.await {
                Err(AppError::Own) if !succeeds => {}
                Err(AppError::Lock(Error::Lost { .. })) if succeeds => {}
                other => panic!("{other:?}"),
            }
            assert_free(&mut observer, &key);
            assert!(is_broken(&mut conn));
        }
    }

    async fn a_killed_holder_hands_the_lock_to_the_next_and_release_says_so<C: LockTest>(server: &Server) {
        let key = unique_key("killed");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let mut lock = conn.advisory_lock(&key).acquire().await.expect("the holder was killed");
                let id = lock.backend_id().await;
                stage.say("acquired");
                stage.pause().await;
                assert_eq!(lock.release().await.expect("a release").backend_id().await, id);
                id
            }
        })
        .await;
        waiter.waits(&mut observer);
        let waiter_id = waiter.id;
        observer.kill(id);
        waiter.says("acquired");
        assert_held_by(&mut observer, &key, waiter_id);
        waiter.go_on();
        assert_eq!(waiter.join().await, waiter_id);
        let error = lock.release().await.map(drop);
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        assert!(is_broken(&mut conn));
        assert_free(&mut observer, &key);
    }

    async fn a_release_that_cannot_reach_the_server_says_so<C: LockTest>(server: &Server) {
        let key = unique_key("cut_release");
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()).await, C::observer(server));
        let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        proxy.cut();
        let error = lock.release().await.map(drop);
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
    }
}

#[both]
on_postgres! {
    /// The end of a turn is an error, which aborts that transaction.
    async fn a_wait_in_a_raw_transaction_that_outlasts_its_limit_or_turn_ends_the_session_and_says_why(server: &Server) {
        let key = unique_key("raw_wait");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        for limit in [Some(SHORT), None] {
            let mut conn = PgConnection::open(server).await;
            let id = conn.backend_id().await;
            conn.execute_sql("BEGIN").await;
            let lock = conn.advisory_lock(&key);
            let lock = match limit {
                Some(limit) => lock.timeout(limit),
                None => lock,
            };
            match lock.acquire().await.map(drop) {
                Err(Error::InTransaction { key: refused, .. }) => assert_eq!(refused, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert!(is_broken(&mut conn));
            wait_for("the end of the session", || !observer.is_connected(id));
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }

    /// Until COMMIT, because it was waited for as the transaction's.
    async fn a_lock_waited_for_in_a_raw_transaction_is_held_until_its_end(server: &Server) {
        let key = unique_key("raw_granted");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        assert!(try_lock(&mut observer, &key));
        conn.execute_sql("BEGIN").await;
        let waiter = on_connection(conn, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
                lock.release().await.expect("a release");
                conn
            }
        })
        .await;
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        let id = waiter.id;
        let mut conn = waiter.join().await;
        assert_held_by(&mut observer, &key, id);
        conn.execute_sql("COMMIT").await;
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    /// A raw BEGIN is not seen, and in an aborted transaction the server refuses to unlock.
    async fn a_release_that_the_server_refuses_ends_the_session_and_says_so(server: &Server) {
        let key = unique_key("refused_release");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        lock.execute_sql("BEGIN").await;
        lock.batch_execute("SELECT 1 / 0").await.expect_err("division by zero");
        let error = lock.release().await.map(drop);
        assert!(matches!(error, Err(Error::Database(_))), "{error:?}");
        assert!(is_broken(&mut conn));
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }
}
