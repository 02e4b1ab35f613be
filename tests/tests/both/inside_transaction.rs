//! Locks in a transaction that is open already: a session's lock is refused, or allowed and then never stuck; a
//! transaction's lock ends with the transaction and leaves it usable.

use std::time::Duration;

use diesel::QueryResult;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use dlock_core::LockKey;
use dlock_tests::{Kind, Server, unique_key};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);

fn is_in_transaction<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::InTransaction { .. }))
}

/// That of [`Table::insert`], of which Diesel's `batch_execute` does not tell the kind on MySQL.
pub(crate) fn is_unique_violation<T>(result: &Result<T, Error>) -> bool {
    match result {
        Err(Error::Database(DieselError::DatabaseError(kind, info))) => {
            matches!(kind, DatabaseErrorKind::UniqueViolation)
                || info.message().starts_with("Duplicate entry")
        }
        _ => false,
    }
}

/// What PostgreSQL says in an aborted transaction.
#[both]
pub(crate) async fn is_aborted<C: Connection>(conn: &mut C) -> bool {
    conn.batch_execute("SELECT 1").await.is_err()
}

#[both]
on_every_server! {
    async fn a_session_lock_in_an_open_transaction_is_refused_and_that_goes_on<C: LockTest>(server: &Server) {
        let key = unique_key("refused");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            for nested in [false, true] {
                if nested {
                    begin(conn).await;
                }
                let mut errors = vec![
                    conn.advisory_lock(&key).acquire().await.map(drop),
                    conn.advisory_lock(&key).try_acquire().await.map(drop),
                    conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop),
                    conn.advisory_lock(&key).poll_every(SHORT).acquire().await.map(drop),
                    conn.advisory_lock(&key).run(async |_| Ok(())).await,
                ];
                if C::KIND != Kind::Postgres {
                    errors.push(conn.advisory_lock(&key).transaction(async |_| Ok(())).await);
                }
                for error in errors {
                    let error = error.expect_err("refused");
                    let message = error.to_string();
                    match error {
                        Error::InTransaction { key: refused, .. } => assert_eq!(refused, LockKey::from(&key)),
                        other => panic!("{other:?}"),
                    }
                    for named in [&key, "advisory_lock(key).transaction(", "advisory_xact_lock(key)", "inside_transaction()"] {
                        assert!(message.contains(named), "{message}");
                    }
                }
                assert_free(&mut observer, &key);
            }
            conn.batch_execute(&table.insert(2)).await?;
            commit(conn).await;
            QueryResult::Ok(())
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_test_transaction_is_let_through<C: LockTest>(server: &Server) {
        let key = unique_key("test_transaction");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        conn.begin_test_transaction().await.expect("it begins");

        let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);

        let mut lock = conn.advisory_lock(&key).try_acquire().await.expect("a try").expect("a free lock");
        lock.transaction(async |conn| conn.batch_execute(&table.insert(1)).await).await.expect("a savepoint");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        let run = conn.advisory_lock(&key).run(async |conn| conn.batch_execute(&table.insert(2)).await);
        run.await.expect("a free lock");
        assert_free(&mut observer, &key);

        // A transaction of the code under test is a real one in production, and refused there.
        let refused = conn.transaction(async |conn| {
            let lock = conn.advisory_lock(&key);
            lock.run(async |conn| conn.batch_execute(&table.insert(3)).await.map_err(Error::from)).await
        });
        let refused = refused.await;
        assert!(is_in_transaction(&refused), "{refused:?}");
        assert_free(&mut observer, &key);
        assert_eq!((conn.number(&table.count()).await, table.rows(&mut observer)), (Some(2), 0));
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
    }

    async fn inside_transaction_allows_it_and_frees_the_lock_before_commit<C: LockTest>(server: &Server) {
        let key = unique_key("inside");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.transaction(async |conn| {
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
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn waiting_and_giving_up_inside_a_transaction_keeps_its_writes<C: LockTest>(server: &Server) {
        let key = unique_key("inside_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut holder = C::open(server).await;
        let holder_id = holder.backend_id().await;
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let result = conn.advisory_lock(&key).inside_transaction().timeout(SHORT).acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert!(conn.advisory_lock(&key).inside_transaction().try_acquire().await?.is_none());
            let lock = conn.advisory_lock(&key).inside_transaction().poll_every(SHORT / 4).timeout(SHORT);
            let result = lock.acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            conn.batch_execute(&table.insert(2)).await
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_held_by(&mut observer, &key, holder_id);
        assert_clean(&mut conn, &mut observer).await;
        held.release().await.expect("a release");
    }

    async fn a_wait_inside_a_transaction_is_granted_and_released<C: LockTest>(server: &Server) {
        let key = unique_key("inside_wait");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let transaction = conn.transaction(async |conn| {
                    let lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
                    stage.say("acquired");
                    stage.pause().await;
                    lock.release().await?;
                    stage.say("released");
                    stage.pause().await;
                    QueryResult::Ok(())
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        waiter.says("acquired");
        assert_held_by(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.says("released");
        assert_free(&mut observer, &key);
        assert!(!waiter.is_finished());
        waiter.go_on();
        waiter.join().await;
    }

    /// On PostgreSQL the error aborts the transaction.
    async fn an_error_under_the_lock_in_a_transaction_frees_it_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("inside_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let transaction = conn.transaction(async |conn| -> Result<(), Error> {
            conn.batch_execute(&table.insert(1)).await?;
            let lock = conn.advisory_lock(&key).inside_transaction();
            let result = lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await;
            assert_free(&mut observer, &key);
            Ok(result?)
        });
        let result = transaction.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer).await;
    }
}

#[both]
on_every_network_server! {
    async fn a_refusal_sends_nothing<C: LockTest>(server: &Server) {
        let (mut conn, proxy) = open_counted::<C>(server).await;
        begin(&mut conn).await;
        proxy.reset();
        let error = conn.advisory_lock("refused").acquire().await.map(drop);
        assert!(is_in_transaction(&error), "{error:?}");
        assert_eq!(proxy.round_trips(), 0);
        roll_back(&mut conn).await;
    }
}

/// Asks for locks in an aborted transaction.
#[both]
async fn ask_in_vain<O: TestConnection>(conn: &mut PgConnection, observer: &mut O, key: &str) {
    let results = [
        conn.advisory_lock(key)
            .inside_transaction()
            .acquire()
            .await
            .map(drop),
        conn.advisory_lock(key)
            .inside_transaction()
            .try_acquire()
            .await
            .map(drop),
        conn.advisory_lock(key)
            .inside_transaction()
            .timeout(SHORT)
            .acquire()
            .await
            .map(drop),
    ];
    for result in results {
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
    }
    let lock = conn.advisory_lock(key);
    let transaction = lock.transaction(async |_| Ok::<_, Error>(()));
    assert!(transaction.await.is_err());
    assert!(conn.advisory_xact_lock(key).acquire().await.is_err());
    assert!(is_aborted(conn).await);
    assert_free(observer, key);
}

#[both]
on_postgres! {
    async fn a_lock_is_released_in_an_aborted_transaction_which_stays_aborted(server: &Server) {
        let key = unique_key("aborted");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for waits in [false, true] {
            let transaction = conn.transaction(async |conn| {
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
                assert!(is_aborted(conn).await);
                assert_eq!(depth(conn), 1);
                Err::<(), Error>(error.into())
            });
            let result = transaction.await;
            assert!(is_unique_violation(&result), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    /// A commit of an aborted transaction is a rollback.
    async fn the_writes_before_the_lock_are_not_committed_without_those_after_it(server: &Server) {
        let key = unique_key("swallowed");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let lock = conn.advisory_lock(&key).inside_transaction();
            let result = lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await;
            result.expect_err("there is such a row");
            QueryResult::Ok(()) // the error is swallowed
        });
        let _ = transaction.await;
        assert_eq!(table.rows(&mut observer), 1);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_error_under_the_lock_in_a_nested_transaction_leaves_the_outer_one_as_it_was(server: &Server) {
        let key = unique_key("nested");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            for deeper in [false, true] {
                let nested = conn.transaction(async |conn| {
                    if deeper {
                        begin(conn).await;
                    }
                    conn.batch_execute(&table.insert(2)).await?;
                    let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
                    let result = lock.batch_execute(&table.insert(0)).await;
                    lock.release().await?;
                    assert_free(&mut observer, &key);
                    assert!(is_aborted(conn).await);
                    if deeper {
                        roll_back(conn).await;
                        assert!(!is_aborted(conn).await);
                    }
                    result.map_err(Error::from)
                });
                let result = nested.await;
                assert!(is_unique_violation(&result), "{result:?}");
                assert_eq!(depth(conn), 1);
                let rows = conn.number(&table.count()).await;
                assert_eq!(rows, Some(2), "what came before the nested transaction");
            }
            // Diesel's savepoints and our locks still work.
            conn.transaction(async |conn| conn.batch_execute(&table.insert(3)).await).await?;
            let lock = conn.advisory_lock(&key).inside_transaction();
            lock.run(async |conn| conn.batch_execute(&table.insert(4)).await).await
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 4);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_nested_transaction_under_the_lock_may_fail_and_be_handled(server: &Server) {
        let key = unique_key("under");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
            lock.batch_execute(&table.insert(2)).await?;
            let nested = lock.transaction(async |conn| conn.batch_execute(&table.insert(0)).await);
            nested.await.expect_err("there is such a row");
            assert_held_by(&mut observer, &key, id);
            lock.batch_execute(&table.insert(3)).await?;
            lock.release().await?;
            assert_free(&mut observer, &key);
            QueryResult::Ok(())
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 4);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lock_asked_for_in_an_aborted_transaction_is_an_error_and_leaves_it_as_it_was(server: &Server) {
        let key = unique_key("late");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let error = conn.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
            ask_in_vain(conn, &mut observer, &key).await;
            Err::<(), Error>(error.into())
        });
        let result = transaction.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_clean(&mut conn, &mut observer).await;

        let transaction = conn.transaction(async |conn| {
            conn.batch_execute(&table.insert(1)).await?;
            let nested = conn.transaction(async |conn| {
                let error = conn.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
                ask_in_vain(conn, &mut observer, &key).await;
                Err::<(), Error>(error.into())
            });
            let result = nested.await;
            assert!(is_unique_violation(&result), "{result:?}");
            conn.batch_execute(&table.insert(2)).await
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn stacked_locks_are_all_freed_in_an_aborted_transaction(server: &Server) {
        let (first, second) = (unique_key("stack"), unique_key("stack"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for second in [&second, &first] {
            let transaction = conn.transaction(async |conn| {
                let mut outer = conn.advisory_lock(&first).inside_transaction().acquire().await?;
                outer.batch_execute(&table.insert(1)).await?;
                let mut inner = outer.advisory_lock(second).inside_transaction().acquire().await?;
                let error = inner.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
                assert_held_by(&mut observer, &first, id);
                assert_held_by(&mut observer, second, id);
                inner.release().await?;
                assert!(is_aborted(&mut *outer).await);
                assert_held_by(&mut observer, &first, id);
                outer.release().await?;
                assert!(is_aborted(conn).await);
                assert_free(&mut observer, &first);
                assert_free(&mut observer, second);
                Err::<(), Error>(error.into())
            });
            let result = transaction.await;
            assert!(is_unique_violation(&result), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn stacked_locks_in_nested_transactions_are_undone_one_by_one(server: &Server) {
        let (first, second) = (unique_key("stack_nested"), unique_key("stack_nested"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.transaction(async |conn| {
            let mut outer = conn.advisory_lock(&first).inside_transaction().acquire().await?;
            outer.batch_execute(&table.insert(1)).await?;
            let nested = (*outer).transaction(async |conn| -> Result<(), Error> {
                let lock = conn.advisory_lock(&second).inside_transaction();
                Ok(lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await?)
            });
            let result = nested.await;
            assert!(is_unique_violation(&result), "{result:?}");
            assert_free(&mut observer, &second);
            assert_held_by(&mut observer, &first, id);
            outer.batch_execute(&table.insert(2)).await?;
            outer.release().await?;
            assert_free(&mut observer, &first);
            QueryResult::Ok(())
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_outer_lock_survives_an_inner_one_in_an_aborted_transaction(server: &Server) {
        let (key, inner_key) = (unique_key("aborted_outer"), unique_key("aborted_inner"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let transaction = (*outer).transaction(async |conn| {
            let lock = conn.advisory_lock(&inner_key).inside_transaction();
            lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await
        });
        transaction.await.expect_err("there is such a row");
        assert_free(&mut observer, &inner_key);
        assert_held_by(&mut observer, &key, id);
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    /// The outer lock's savepoint is not that of the inner one, which was never taken.
    async fn a_lock_asked_for_under_another_one_in_an_aborted_transaction_leaves_both_as_they_were(server: &Server) {
        let (first, second) = (unique_key("late_stack"), unique_key("late_stack"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.transaction(async |conn| {
            let mut outer = conn.advisory_lock(&first).inside_transaction().acquire().await?;
            let error = outer.batch_execute(&table.insert(0)).await.expect_err("there is such a row");
            let inner = outer.advisory_lock(&second).inside_transaction().acquire().await;
            inner.map(drop).expect_err("it is aborted");
            assert!(is_aborted(&mut *outer).await, "the transaction is aborted as before");
            assert_held_by(&mut observer, &first, id);
            assert_free(&mut observer, &second);
            outer.release().await?;
            assert_free(&mut observer, &first);
            Err::<(), Error>(error.into())
        });
        let result = transaction.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_guard_may_outlive_its_transaction(server: &Server) {
        let key = unique_key("outlived");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for commits in [true, false] {
            begin(&mut conn).await;
            let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await.expect("a free lock");
            lock.execute_sql("SELECT 1").await;
            if commits {
                commit(&mut *lock).await;
            } else {
                roll_back(&mut *lock).await;
            }
            assert_held_by(&mut observer, &key, id);
            lock.execute_sql(&format!("DELETE FROM {}", table.name())).await;
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    /// Its savepoint has gone with the transaction that it was acquired in, and what that means the server does not
    /// tell.
    async fn a_guard_released_in_the_next_transaction_fails_and_nothing_is_held_or_committed(server: &Server) {
        let key = unique_key("next");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        begin(&mut conn).await;
        let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await.expect("a free lock");
        commit(&mut *lock).await;
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(1)).await;
        let result = lock.release().await.map(drop);
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        wait_until_free(&mut observer, &key);
        let committed = <PgConnection as Connection>::TransactionManager::commit_transaction(&mut conn).await;
        committed.expect_err("the session has ended");
        assert_eq!(table.rows(&mut observer), 0);
    }

    async fn a_test_transaction_survives_an_error_under_the_lock_in_a_savepoint(server: &Server) {
        let key = unique_key("test_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        conn.begin_test_transaction().await.expect("it begins");
        conn.execute_sql(&table.insert(1)).await;
        let run = conn.advisory_lock(&key).run(async |conn| -> Result<(), Error> {
            Ok(conn.transaction(async |conn| conn.batch_execute(&table.insert(0)).await).await?)
        });
        let result = run.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(conn.number(&table.count()).await, Some(2));
        let transaction = conn.transaction(async |conn| -> Result<(), Error> {
            let lock = conn.advisory_lock(&key).inside_transaction();
            Ok(lock.run(async |conn| conn.batch_execute(&table.insert(0)).await).await?)
        });
        let result = transaction.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(conn.number(&table.count()).await, Some(2));
    }

    async fn a_shared_lock_inside_a_transaction_is_freed_too(server: &Server) {
        let key = unique_key("inside_shared");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let mut other = PgConnection::open(server).await;
        let reader = other.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let transaction = conn.transaction(async |conn| -> Result<(), Error> {
            let lock = conn.advisory_lock(&key).shared().inside_transaction();
            let run = lock.run(async |conn| {
                assert_eq!(holders(&mut observer, &key).len(), 2);
                conn.batch_execute(&table.insert(0)).await
            });
            Ok(run.await?)
        });
        let result = transaction.await;
        assert!(is_unique_violation(&result), "{result:?}");
        assert_eq!(holders(&mut observer, &key).len(), 1);
        reader.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_transactions_lock_ends_with_it(server: &Server) {
        let key = unique_key("xact");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        for commits in [true, false] {
            let transaction = conn.transaction(async |conn| {
                conn.advisory_xact_lock(&key).acquire().await?;
                assert_held_by(&mut observer, &key, id);
                assert!(conn.advisory_xact_lock(&key).try_acquire().await?, "it is held already");
                assert_held_by(&mut observer, &key, id);
                conn.batch_execute(&table.insert(1)).await?;
                let seen = conn.advisory_xact_lock(&key).holders().await?;
                assert_eq!(seen[0].backend_id, id);
                if commits { Ok(()) } else { Err(AppError::Own) }
            });
            let result = transaction.await;
            assert_eq!(result.is_ok(), commits, "{result:?}");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
            observer.execute_sql(&format!("DELETE FROM {}", table.name()));
        }
    }

    async fn a_transactions_lock_ends_with_its_savepoint_only_if_that_is_rolled_back(server: &Server) {
        let key = unique_key("xact_savepoint");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let id = conn.backend_id().await;
        let transaction = conn.transaction(async |conn| {
            let nested = conn.transaction(async |conn| {
                conn.advisory_xact_lock(&key).acquire().await?;
                assert_held_by(&mut observer, &key, id);
                Err::<(), Error>(DieselError::RollbackTransaction.into())
            });
            nested.await.expect_err("rolled back");
            assert_free(&mut observer, &key);
            conn.transaction(async |conn| conn.advisory_xact_lock(&key).acquire().await).await?;
            assert_held_by(&mut observer, &key, id);
            QueryResult::Ok(())
        });
        transaction.await.expect("a commit");
        assert_free(&mut observer, &key);
    }

    async fn a_transactions_lock_outside_a_transaction_is_refused_and_the_remedies_are_named(server: &Server) {
        let key = unique_key("not_in_transaction");
        let mut observer = PgConnection::observer(server);
        let (mut conn, proxy) = open_counted::<PgConnection>(server).await;
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

    async fn giving_up_on_a_transactions_lock_keeps_the_transaction_its_writes_and_its_limits(server: &Server) {
        let key = unique_key("xact_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        assert!(try_lock(&mut observer, &key));
        let transaction = conn.transaction(async |conn| {
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
            conn.transaction(async |conn| conn.batch_execute(&table.insert(2)).await).await
        });
        transaction.await.expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        unlock(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_wait_for_a_transactions_lock_is_granted_or_cancelled_and_the_transaction_goes_on(server: &Server) {
        let key = unique_key("xact_wait");
        let table = Table::new(server);
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_background(server, {
            let (key, table) = (key.clone(), table.clone());
            async move |mut conn: PgConnection, stage: Stage| {
                let transaction = conn.transaction(async |conn| {
                    conn.batch_execute(&table.insert(1)).await?;
                    let error = conn.advisory_xact_lock(&key).acquire().await;
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    assert_eq!(conn.number("SELECT 1").await, Some(1));
                    stage.say("cancelled");
                    stage.pause().await;
                    conn.advisory_xact_lock(&key).acquire().await?;
                    stage.say("acquired");
                    stage.pause().await;
                    conn.batch_execute(&table.insert(2)).await
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        waiter.says("cancelled");
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        assert!(try_lock(&mut observer, &key));
        waiter.go_on();
        waiter.waits(&mut observer);
        unlock(&mut observer, &key);
        waiter.says("acquired");
        assert_held_by(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 2);
    }

    async fn a_deadlock_of_transactions_locks_leaves_the_transaction_and_its_writes(server: &Server) {
        let keys = [unique_key("xact_deadlock"), unique_key("xact_deadlock")];
        let table = Table::new(server);
        let mut observer = PgConnection::observer(server);
        let mut first = PgConnection::open(server).await;
        // The one that waits longest finds the deadlock.
        first.execute_sql("SET deadlock_timeout = '20s'").await;
        begin(&mut first).await;
        first.advisory_xact_lock(&keys[0]).acquire().await.expect("a free lock");
        let mut second = PgConnection::open(server).await;
        second.execute_sql("SET deadlock_timeout = '10ms'").await;
        let second_id = second.backend_id().await;
        begin(&mut second).await;
        second.execute_sql(&table.insert(1)).await;
        second.advisory_xact_lock(&keys[1]).acquire().await.expect("a free lock");

        let first = on_connection(first, {
            let key = keys[1].clone();
            async move |mut conn: PgConnection, _| {
                conn.advisory_xact_lock(&key).acquire().await.expect("the other one is the victim");
                commit(&mut conn).await;
            }
        })
        .await;
        first.waits(&mut observer);
        let result = second.advisory_xact_lock(&keys[0]).acquire().await;
        assert!(matches!(result, Err(Error::Deadlock { .. })), "{result:?}");
        assert_held_by(&mut observer, &keys[1], second_id);
        second.execute_sql(&table.insert(2)).await;
        commit(&mut second).await;
        first.join().await;
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut second, &mut observer).await;
        assert_free(&mut observer, &keys[0]);
        assert_free(&mut observer, &keys[1]);
    }

    async fn a_transactions_lock_changes_no_limit_of_the_transaction(server: &Server) {
        const LIMITS: &str = "SELECT current_setting('lock_timeout') || ' ' || current_setting('statement_timeout')";
        let key = unique_key("xact_settings");
        let mut observer = PgConnection::observer(server);
        // Where the user may have set them: for the transaction, in the transaction, before it, and not at all.
        for (before, inside, expected_inside, expected_after) in [
            ("SELECT 1", "SET LOCAL lock_timeout = '7s'; SET LOCAL statement_timeout = '8s'", "7s 8s", "0 0"),
            ("SELECT 1", "SET lock_timeout = '7s'; SET statement_timeout = '8s'", "7s 8s", "7s 8s"),
            ("SET lock_timeout = '7s'; SET statement_timeout = '8s'", "SELECT 1", "7s 8s", "7s 8s"),
            ("SELECT 1", "SELECT 1", "0 0", "0 0"),
        ] {
            let mut conn = PgConnection::open(server).await;
            conn.execute_sql(before).await;
            begin(&mut conn).await;
            conn.execute_sql(inside).await;
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_inside));
            conn.advisory_xact_lock(&key).acquire().await.expect("a free lock");
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_inside), "after a grant at once");
            commit(&mut conn).await;
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_after));

            assert!(try_lock(&mut observer, &key));
            begin(&mut conn).await;
            conn.execute_sql(inside).await;
            let result = conn.advisory_xact_lock(&key).timeout(SHORT).acquire().await;
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_inside), "after a timeout");
            let waiter = on_connection(conn, {
                let key = key.clone();
                async move |mut conn: PgConnection, _| {
                    conn.advisory_xact_lock(&key).acquire().await.expect("the lock");
                    conn
                }
            })
            .await;
            let id = waiter.id;
            waiter.waits(&mut observer);
            unlock(&mut observer, &key);
            let mut conn = waiter.join().await;
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_inside), "after a wait");
            assert_held_by(&mut observer, &key, id);
            commit(&mut conn).await;
            assert_eq!(conn.text(LIMITS).await.as_deref(), Some(expected_after));
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_transactions_lock_waits_longer_than_the_limits_of_the_transaction(server: &Server) {
        let key = unique_key("xact_unlimited");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let transaction = conn.transaction(async |conn| {
                    conn.batch_execute("SET LOCAL lock_timeout = '400ms'; SET LOCAL statement_timeout = '400ms'").await?;
                    conn.advisory_xact_lock(&key).acquire().await?;
                    // The limit is back.
                    conn.batch_execute("SELECT pg_sleep(20)").await
                });
                transaction.await.expect_err("statement_timeout")
            }
        })
        .await;
        waiter.still_waits(&mut observer, Duration::from_millis(1_000));
        unlock(&mut observer, &key);
        let error = waiter.join().await;
        assert!(matches!(error, DieselError::DatabaseError(..)), "{error}");
        assert_free(&mut observer, &key);
    }

    async fn shared_transaction_locks_admit_readers_and_keep_writers_out(server: &Server) {
        let key = unique_key("xact_shared");
        let mut observer = PgConnection::observer(server);
        let (mut first, mut second) = (PgConnection::open(server).await, PgConnection::open(server).await);
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

#[both]
on_mysql! {
    /// The lock is not the transaction's there.
    async fn a_lock_taken_inside_a_transaction_survives_its_end(server: &Server) {
        let key = unique_key("survives");
        let (mut conn, mut observer) = (MysqlConnection::open(server).await, MysqlConnection::observer(server));
        let id = conn.backend_id().await;
        for commits in [true, false] {
            begin(&mut conn).await;
            let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await.expect("a free lock");
            if commits {
                commit(&mut *lock).await;
            } else {
                roll_back(&mut *lock).await;
            }
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer).await;
        }
    }
}
