//! Locks in a transaction that is open already: a session's lock is refused, or allowed and then never stuck; a
//! transaction's lock ends with the transaction and leaves it usable.

use std::thread;
use std::time::Duration;

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::{Connection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Server, TestConnection, on_every_network_server, on_every_server, on_mysql, on_postgres,
    unique_key, wait_for,
};

use crate::support::*;

const SOON: Duration = Duration::from_millis(30);

fn is_in_transaction<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::InTransaction { .. }))
}

/// That of [`Table::insert`], of which Diesel's `batch_execute` does not tell the kind on MySQL.
fn is_unique_violation<T>(result: &Result<T, Error>) -> bool {
    match result {
        Err(Error::Database(DieselError::DatabaseError(kind, info))) => {
            matches!(kind, DatabaseErrorKind::UniqueViolation)
                || info.message().starts_with("Duplicate entry")
        }
        _ => false,
    }
}

/// What PostgreSQL says in an aborted transaction.
fn is_aborted(conn: &mut PgConnection) -> bool {
    conn.batch_execute("SELECT 1").is_err()
}

on_every_server! {
    fn a_session_lock_in_an_open_transaction_is_refused_and_the_transaction_goes_on<C: LockTest>(server: &Server) {
        let key = unique_key("inside_refused");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            for nested in 0..2 {
                if nested == 1 {
                    begin(conn);
                }
                assert!(is_in_transaction(&conn.advisory_lock(&key).acquire()));
                assert!(is_in_transaction(&conn.advisory_lock(&key).try_acquire()));
                assert!(is_in_transaction(&conn.advisory_lock(&key).timeout(SOON).acquire()));
                assert!(is_in_transaction(&conn.advisory_lock(&key).poll_every(SOON).acquire()));
                assert!(is_in_transaction(&conn.advisory_lock(&key).run(|_| Ok::<_, Error>(()))));
                assert_free(&mut observer, &key);
            }
            conn.batch_execute(&table.insert(2))?;
            commit(conn);
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_test_transaction_is_let_through<C: LockTest>(server: &Server) {
        let key = unique_key("inside_test");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        conn.begin_test_transaction().expect("it begins");

        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        guard.release().expect("held");
        assert_free(&mut observer, &key);

        let mut guard = conn.advisory_lock(&key).try_acquire().expect("an answer").expect("free");
        guard.transaction(|conn| conn.batch_execute(&table.insert(1))).expect("a savepoint");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);

        // A transaction of the code under test is a real one in production, and refused there.
        let refused = conn.transaction(|conn| {
            conn.advisory_lock(&key).run(|conn| conn.batch_execute(&table.insert(2)).map_err(Error::from))
        });
        assert!(is_in_transaction(&refused), "{refused:?}");
        assert_free(&mut observer, &key);
        assert_eq!((table.rows(&mut conn), table.rows(&mut observer)), (1, 0));
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
    }

    fn inside_transaction_allows_it_and_frees_the_lock_before_commit<C: LockTest>(server: &Server) {
        let key = unique_key("inside_allowed");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
            assert_held_by(&mut observer, &key, id);
            guard.batch_execute(&table.insert(2))?;
            guard.release()?;
            assert_free(&mut observer, &key);
            drop(conn.advisory_lock(&key).inside_transaction().try_acquire()?.expect("free"));
            assert_free(&mut observer, &key);
            conn.advisory_lock(&key).inside_transaction().run(|conn| conn.batch_execute(&table.insert(3)))?;
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0, "before COMMIT");
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer);
    }

    fn waiting_and_giving_up_inside_a_transaction_keeps_its_writes<C: LockTest>(server: &Server) {
        let key = unique_key("inside_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer, mut holder) = (C::open(server), C::open(server), C::open(server));
        let holder_id = holder.backend_id();
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.advisory_lock(&key).inside_transaction().timeout(SOON).acquire().map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert!(conn.advisory_lock(&key).inside_transaction().try_acquire()?.is_none());
            let lock = conn.advisory_lock(&key).inside_transaction().poll_every(SOON / 4).timeout(SOON);
            let result = lock.acquire().map(drop);
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            conn.batch_execute(&table.insert(2))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_held_by(&mut observer, &key, holder_id);
        assert_clean(&mut conn, &mut observer);
        drop(guard);
    }

    fn a_wait_inside_a_transaction_is_granted<C: LockTest>(server: &Server) {
        let key = unique_key("inside_wait");
        let (mut observer, mut holder) = (C::open(server), C::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let (_, waiter) = waiting(server, &mut observer, {
            let (key, server) = (key.clone(), server.clone());
            move |conn: &mut C| {
                let id = conn.backend_id();
                conn.transaction(|conn| {
                    let guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
                    let mut observer = C::open(&server);
                    assert_held_by(&mut observer, &key, id);
                    guard.release()?;
                    assert_free(&mut observer, &key);
                    QueryResult::Ok(())
                })
            }
        });
        guard.release().expect("held");
        waiter.join().expect("the waiter's assertions").expect("a commit");
    }

    /// On PostgreSQL the error aborts the transaction.
    fn an_error_under_the_lock_in_a_transaction_frees_it_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("inside_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        for release_in_run in [false, true] {
            let result = conn.transaction(|conn| -> Result<(), Error> {
                conn.batch_execute(&table.insert(1))?;
                let lock = conn.advisory_lock(&key).inside_transaction();
                if release_in_run {
                    return lock.run(|conn| Ok(conn.batch_execute(&table.insert(0))?));
                }
                let mut guard = lock.acquire()?;
                guard.batch_execute(&table.insert(0))?;
                unreachable!("there is such a row");
            });
            assert!(is_unique_violation(&result), "{result:?}");
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer);
        }
    }
}

on_every_network_server! {
    fn a_refusal_sends_nothing_and_names_the_alternatives<C: LockTest>(server: &Server) {
        let key = unique_key("inside_message");
        let proxy = dlock_tests::Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        begin(&mut conn);
        proxy.reset();
        let error = conn.advisory_lock(&key).acquire().expect_err("a transaction is open");
        assert_eq!(proxy.round_trips(), 0);
        let message = error.to_string();
        for part in [key.as_str(), ".transaction(", "advisory_xact_lock", "inside_transaction()"] {
            assert!(message.contains(part), "{part} in {message}");
        }
        roll_back(&mut conn);
    }
}

on_postgres! {
    fn a_lock_is_free_at_once_in_an_aborted_transaction_which_stays_aborted(server: &Server) {
        let key = unique_key("inside_aborted");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for release in [false, true] {
            let result = conn.transaction(|conn| {
                conn.batch_execute(&table.insert(1))?;
                let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
                let error = guard.batch_execute(&table.insert(0)).expect_err("there is such a row");
                assert_held_by(&mut observer, &key, id);
                if release {
                    guard.release()?;
                } else {
                    drop(guard);
                }
                assert_free(&mut observer, &key);
                assert!(is_aborted(conn));
                assert_eq!(depth(conn), 1);
                Err::<(), Error>(error.into())
            });
            assert!(is_unique_violation(&result), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer);
        }
    }

    /// A commit of an aborted transaction is a rollback.
    fn the_writes_before_the_lock_are_not_committed_without_those_after_it(server: &Server) {
        let key = unique_key("inside_swallowed");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let _ = conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
            guard.batch_execute(&table.insert(0)).expect_err("there is such a row");
            drop(guard);
            QueryResult::Ok(()) // the error is swallowed
        });
        assert_eq!(table.rows(&mut observer), 1);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn an_error_under_the_lock_in_a_nested_transaction_leaves_the_outer_one_as_it_was(server: &Server) {
        let key = unique_key("inside_nested");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            for nesting in 0..2 {
                let result = conn.transaction(|conn| {
                    if nesting == 1 {
                        begin(conn);
                    }
                    conn.batch_execute(&table.insert(2))?;
                    let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
                    let result = guard.batch_execute(&table.insert(0));
                    drop(guard);
                    assert_free(&mut observer, &key);
                    assert!(is_aborted(conn));
                    if nesting == 1 {
                        roll_back(conn);
                        assert!(!is_aborted(conn));
                    }
                    result.map_err(Error::from)
                });
                assert!(is_unique_violation(&result), "{result:?}");
                assert_eq!(depth(conn), 1);
                assert_eq!(table.rows(conn), 2, "what came before the nested transaction");
            }
            // Diesel's savepoints and our locks still work.
            conn.transaction(|conn| conn.batch_execute(&table.insert(3)))?;
            conn.advisory_lock(&key).inside_transaction().run(|conn| conn.batch_execute(&table.insert(4)))?;
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 4);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_nested_transaction_under_the_lock_may_fail_and_be_handled(server: &Server) {
        let key = unique_key("inside_under");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
            guard.batch_execute(&table.insert(2))?;
            guard.transaction(|conn| conn.batch_execute(&table.insert(0))).expect_err("there is such a row");
            assert_held_by(&mut observer, &key, id);
            guard.batch_execute(&table.insert(3))?;
            guard.release()?;
            assert_free(&mut observer, &key);
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 4);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_lock_asked_for_in_an_aborted_transaction_is_an_error_and_leaves_it_as_it_was(server: &Server) {
        let key = unique_key("inside_late");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let ask = |conn: &mut PgConnection, observer: &mut PgConnection| {
            let result = conn.advisory_lock(&key).inside_transaction().acquire().map(drop);
            assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
            let result = conn.advisory_lock(&key).inside_transaction().try_acquire().map(drop);
            assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
            let result = conn.advisory_lock(&key).inside_transaction().timeout(SOON).acquire().map(drop);
            assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
            assert!(conn.advisory_lock(&key).transaction(|_| Ok::<_, Error>(())).is_err());
            assert!(conn.advisory_xact_lock(&key).acquire().is_err());
            assert!(is_aborted(conn));
            assert_free(observer, &key);
        };
        let result = conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let error = conn.batch_execute(&table.insert(0)).expect_err("there is such a row");
            ask(conn, &mut observer);
            Err::<(), Error>(error.into())
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_clean(&mut conn, &mut observer);

        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.transaction(|conn| {
                let error = conn.batch_execute(&table.insert(0)).expect_err("there is such a row");
                ask(conn, &mut observer);
                Err::<(), Error>(error.into())
            });
            assert!(is_unique_violation(&result), "{result:?}");
            conn.batch_execute(&table.insert(2))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer);
    }

    fn stacked_locks_are_all_freed_in_an_aborted_transaction(server: &Server) {
        let (first, second) = (unique_key("inside_stack"), unique_key("inside_stack"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for second in [&second, &first] {
            let result = conn.transaction(|conn| {
                let mut outer = conn.advisory_lock(&first).inside_transaction().acquire()?;
                outer.batch_execute(&table.insert(1))?;
                let mut inner = outer.advisory_lock(second).inside_transaction().acquire()?;
                let error = inner.batch_execute(&table.insert(0)).expect_err("there is such a row");
                assert_held_by(&mut observer, &first, id);
                assert_held_by(&mut observer, second, id);
                inner.release()?;
                assert!(is_aborted(&mut outer));
                assert_held_by(&mut observer, &first, id);
                outer.release()?;
                assert!(is_aborted(conn));
                assert_free(&mut observer, &first);
                assert_free(&mut observer, second);
                Err::<(), Error>(error.into())
            });
            assert!(is_unique_violation(&result), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn stacked_locks_in_nested_transactions_are_undone_one_by_one(server: &Server) {
        let (first, second) = (unique_key("inside_stack_nested"), unique_key("inside_stack_nested"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        conn.transaction(|conn| {
            let mut outer = conn.advisory_lock(&first).inside_transaction().acquire()?;
            outer.batch_execute(&table.insert(1))?;
            let result = outer.transaction(|conn| {
                let mut inner = conn.advisory_lock(&second).inside_transaction().acquire()?;
                Ok::<(), Error>(inner.batch_execute(&table.insert(0))?)
            });
            assert!(is_unique_violation(&result), "{result:?}");
            assert_free(&mut observer, &second);
            assert_held_by(&mut observer, &first, id);
            outer.batch_execute(&table.insert(2))?;
            outer.release()?;
            assert_free(&mut observer, &first);
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer);
    }

    /// The outer lock's savepoint is not that of the inner one, which was never taken.
    fn a_lock_asked_for_under_another_one_in_an_aborted_transaction_leaves_both_as_they_were(server: &Server) {
        let (first, second) = (unique_key("inside_late_stack"), unique_key("inside_late_stack"));
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        let result = conn.transaction(|conn| {
            let mut outer = conn.advisory_lock(&first).inside_transaction().acquire()?;
            let error = outer.batch_execute(&table.insert(0)).expect_err("there is such a row");
            outer.advisory_lock(&second).inside_transaction().acquire().map(drop).expect_err("it is aborted");
            assert!(is_aborted(&mut outer), "the transaction is aborted as before");
            assert_held_by(&mut observer, &first, id);
            assert_free(&mut observer, &second);
            outer.release()?;
            assert_free(&mut observer, &first);
            Err::<(), Error>(error.into())
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_clean(&mut conn, &mut observer);
    }

    fn a_guard_may_outlive_its_transaction(server: &Server) {
        let key = unique_key("inside_outlived");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for end in [commit::<PgConnection>, roll_back] {
            begin(&mut conn);
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire().expect("the lock is free");
            guard.execute_sql("SELECT 1");
            end(&mut guard);
            assert_held_by(&mut observer, &key, id);
            guard.execute_sql(&format!("DELETE FROM {}", table.name()));
            guard.release().expect("held");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }

    /// Its savepoint has gone with the transaction that it was acquired in, and what that means the server does not
    /// tell.
    fn a_guard_released_in_the_next_transaction_fails_and_nothing_is_held_or_committed(server: &Server) {
        let key = unique_key("inside_next");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        begin(&mut conn);
        let mut guard = conn.advisory_lock(&key).inside_transaction().acquire().expect("the lock is free");
        commit(&mut *guard);
        begin(&mut *guard);
        guard.execute_sql(&table.insert(1));
        assert!(matches!(guard.release(), Err(Error::Database(_))));
        wait_for("the lock to be free", || {
            let holders = observer.advisory_lock(&key).holders().expect("an answer");
            holders.is_empty()
        });
        AnsiTransactionManager::commit_transaction(&mut conn).expect_err("the session has ended");
        assert_eq!(table.rows(&mut observer), 0);
    }

    fn a_test_transaction_survives_an_error_under_the_lock_in_a_savepoint(server: &Server) {
        let key = unique_key("inside_test_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        conn.begin_test_transaction().expect("it begins");
        conn.execute_sql(&table.insert(1));
        let result = conn.advisory_lock(&key).run(|conn| {
            conn.transaction(|conn| conn.batch_execute(&table.insert(0))).map_err(Error::from)
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut conn), 2);
        let result = conn.transaction(|conn| {
            let lock = conn.advisory_lock(&key).inside_transaction();
            lock.run(|conn| conn.batch_execute(&table.insert(0)).map_err(Error::from))
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut conn), 2);
    }

    fn a_shared_lock_inside_a_transaction_is_freed_too(server: &Server) {
        let key = unique_key("inside_shared");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let mut other = PgConnection::open(server);
        let reader = other.advisory_lock(&key).shared().acquire().expect("the lock is free");
        let result = conn.transaction(|conn| {
            let mut guard = conn.advisory_lock(&key).shared().inside_transaction().acquire()?;
            assert_eq!(holders(&mut observer, &key).len(), 2);
            Ok::<(), Error>(guard.batch_execute(&table.insert(0))?)
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_eq!(holders(&mut observer, &key).len(), 1);
        drop(reader);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_cancelled_wait_inside_a_transaction_leaves_it_usable(server: &Server) {
        let key = unique_key("inside_cancel");
        let table = Table::new(server);
        let (mut observer, mut holder) = (PgConnection::open(server), PgConnection::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let (id, waiter) = waiting(server, &mut observer, {
            let (key, insert) = (key.clone(), table.insert(1));
            move |conn: &mut PgConnection| {
                let result = conn.transaction(|conn| {
                    conn.batch_execute(&insert)?;
                    let result = conn.advisory_lock(&key).inside_transaction().acquire().map(drop);
                    assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
                    conn.batch_execute("SELECT 1")
                });
                (result, conn.number("SELECT 1"))
            }
        });
        observer.cancel(id);
        let (result, answer) = waiter.join().expect("the waiter's assertions");
        result.expect("a commit");
        assert_eq!(answer, Some(1));
        assert_eq!(table.rows(&mut observer), 1);
        guard.release().expect("held");
        assert_free(&mut observer, &key);
    }

    fn a_transaction_lock_ends_with_commit_and_rollback(server: &Server) {
        let key = unique_key("xact_ends");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for end in [commit, roll_back] {
            begin(&mut conn);
            conn.advisory_xact_lock(&key).acquire().expect("the lock is free");
            assert_held_by(&mut observer, &key, id);
            assert!(conn.advisory_xact_lock(&key).try_acquire().expect("re-entrant"));
            assert_held_by(&mut observer, &key, id);
            end(&mut conn);
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn a_transaction_lock_ends_with_its_savepoint_only_if_that_is_rolled_back(server: &Server) {
        let key = unique_key("xact_savepoint");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        conn.transaction(|conn| {
            conn.transaction(|conn| {
                conn.advisory_xact_lock(&key).acquire()?;
                assert_held_by(&mut observer, &key, id);
                Err::<(), Error>(DieselError::RollbackTransaction.into())
            })
            .expect_err("rolled back");
            assert_free(&mut observer, &key);
            conn.transaction(|conn| conn.advisory_xact_lock(&key).acquire())?;
            assert_held_by(&mut observer, &key, id);
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert_free(&mut observer, &key);
    }

    fn a_transaction_lock_outside_a_transaction_is_refused(server: &Server) {
        let key = unique_key("xact_outside");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let refused = |error| matches!(error, Error::NotInTransaction { key: of, .. } if of == key.as_str().into());
        assert!(refused(conn.advisory_xact_lock(&key).acquire().expect_err("no transaction")));
        assert!(refused(conn.advisory_xact_lock(&key).try_acquire().expect_err("no transaction")));
        assert!(refused(conn.advisory_xact_lock(&key).timeout(SOON).acquire().expect_err("no transaction")));
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
        conn.begin_test_transaction().expect("it begins");
        conn.advisory_xact_lock(&key).acquire().expect("a test transaction is one");
        assert_held_by(&mut observer, &key, conn.backend_id());
    }

    fn giving_up_on_a_transaction_lock_keeps_the_transaction_and_its_writes(server: &Server) {
        let key = unique_key("xact_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let mut holder = PgConnection::open(server);
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.advisory_xact_lock(&key).timeout(SOON).acquire();
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert!(!conn.advisory_xact_lock(&key).try_acquire()?);
            assert!(!conn.advisory_xact_lock(&key).timeout(SOON).try_acquire()?);
            let result = conn.advisory_xact_lock(&key).poll_every(SOON / 4).timeout(SOON).acquire();
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            conn.transaction(|conn| conn.batch_execute(&table.insert(2)))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer);
        drop(guard);
    }

    fn a_deadlock_of_transaction_locks_leaves_the_transaction_and_its_writes(server: &'static Server) {
        let keys = [unique_key("xact_deadlock"), unique_key("xact_deadlock")];
        let table = Table::new(server);
        let mut observer = PgConnection::open(server);
        let mut first = PgConnection::open(server);
        // The one that waits longest finds the deadlock.
        first.execute_sql("SET deadlock_timeout = '20s'");
        begin(&mut first);
        first.advisory_xact_lock(&keys[0]).acquire().expect("the lock is free");
        let mut second = PgConnection::open(server);
        second.execute_sql("SET deadlock_timeout = '10ms'");
        let second_id = second.backend_id();
        begin(&mut second);
        second.execute_sql(&table.insert(1));
        second.advisory_xact_lock(&keys[1]).acquire().expect("the lock is free");

        let first_id = first.backend_id();
        let thread = thread::spawn({
            let key = keys[1].clone();
            move || {
                first.advisory_xact_lock(&key).acquire().expect("the other one is the victim");
                commit(&mut first);
            }
        });
        dlock_tests::wait_for("the first to wait", || observer.is_waiting(first_id));
        let result = second.advisory_xact_lock(&keys[0]).acquire();
        assert!(matches!(result, Err(Error::Deadlock { .. })), "{result:?}");
        assert_held_by(&mut observer, &keys[1], second_id);
        second.execute_sql(&table.insert(2));
        commit(&mut second);
        thread.join().expect("the first one's assertions");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut second, &mut observer);
        assert_free(&mut observer, &keys[0]);
        assert_free(&mut observer, &keys[1]);
    }

    fn a_transaction_lock_changes_no_limit_of_the_transaction(server: &Server) {
        let key = unique_key("xact_settings");
        let settings = |conn: &mut PgConnection| {
            conn.text("SELECT concat_ws(' ', current_setting('lock_timeout'), current_setting('statement_timeout'))")
                .expect("a text")
        };
        let mut observer = PgConnection::open(server);
        let mut holder = PgConnection::open(server);
        // Where the user may have set them: for the transaction, in the transaction, before it, and not at all.
        for (before, inside, expected_inside, expected_after) in [
            ("SELECT 1", "SET LOCAL lock_timeout = '7s'; SET LOCAL statement_timeout = '8s'", "7s 8s", "0 0"),
            ("SELECT 1", "SET lock_timeout = '7s'; SET statement_timeout = '8s'", "7s 8s", "7s 8s"),
            ("SET lock_timeout = '7s'; SET statement_timeout = '8s'", "SELECT 1", "7s 8s", "7s 8s"),
            ("SELECT 1", "SELECT 1", "0 0", "0 0"),
        ] {
            let mut conn = PgConnection::open(server);
            conn.execute_sql(before);
            begin(&mut conn);
            conn.execute_sql(inside);
            assert_eq!(settings(&mut conn), expected_inside);
            conn.advisory_xact_lock(&key).acquire().expect("the lock is free");
            assert_eq!(settings(&mut conn), expected_inside, "after a grant at once");
            commit(&mut conn);
            assert_eq!(settings(&mut conn), expected_after);

            let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
            begin(&mut conn);
            conn.execute_sql(inside);
            let result = conn.advisory_xact_lock(&key).timeout(SOON).acquire();
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert_eq!(settings(&mut conn), expected_inside, "after a timeout");
            let id = conn.backend_id();
            let thread = thread::spawn({
                let key = key.clone();
                move || {
                    conn.advisory_xact_lock(&key).acquire().expect("the holder releases");
                    conn
                }
            });
            dlock_tests::wait_for("the wait", || observer.is_waiting(id));
            guard.release().expect("held");
            let mut conn = thread.join().expect("the waiter's assertions");
            assert_eq!(settings(&mut conn), expected_inside, "after a wait");
            assert_held_by(&mut observer, &key, id);
            commit(&mut conn);
            assert_eq!(settings(&mut conn), expected_after);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn a_transaction_lock_waits_longer_than_the_limits_of_the_transaction(server: &Server) {
        let key = unique_key("xact_unlimited");
        let (mut observer, mut holder) = (PgConnection::open(server), PgConnection::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let (id, waiter) = waiting(server, &mut observer, {
            let key = key.clone();
            move |conn: &mut PgConnection| {
                conn.transaction(|conn| {
                    conn.batch_execute("SET LOCAL lock_timeout = '40ms'; SET LOCAL statement_timeout = '40ms'")?;
                    conn.advisory_xact_lock(&key).acquire()?;
                    // The limit is back.
                    conn.batch_execute("SELECT pg_sleep(20)")
                })
            }
        });
        // No proof of anything, but it would be over by now.
        thread::sleep(Duration::from_millis(150));
        assert!(observer.is_waiting(id));
        guard.release().expect("held");
        let error = waiter.join().expect("the waiter's thread").expect_err("statement_timeout");
        assert!(matches!(error, DieselError::DatabaseError(..)), "{error}");
        assert_free(&mut observer, &key);
    }

    fn shared_transaction_locks_admit_readers_and_keep_writers_out(server: &Server) {
        let key = unique_key("xact_shared");
        let (mut a, mut b) = (PgConnection::open(server), PgConnection::open(server));
        let mut observer = PgConnection::open(server);
        begin(&mut a);
        begin(&mut b);
        a.advisory_xact_lock(&key).shared().acquire().expect("the lock is free");
        b.advisory_xact_lock(&key).shared().acquire().expect("it is shared");
        assert_eq!(holders(&mut observer, &key).len(), 2);
        assert!(!b.advisory_xact_lock(&key).try_acquire().expect("an answer"));
        commit(&mut a);
        assert!(b.advisory_xact_lock(&key).try_acquire().expect("an answer"), "an upgrade");
        commit(&mut b);
        assert_free(&mut observer, &key);
    }
}

on_mysql! {
    /// The lock is not the transaction's there.
    fn a_lock_taken_inside_a_transaction_survives_its_end(server: &Server) {
        type C = diesel::MysqlConnection;
        let key = unique_key("inside_survives");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        for end in [commit::<C>, roll_back] {
            begin(&mut conn);
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire().expect("the lock is free");
            end(&mut guard);
            assert_held_by(&mut observer, &key, id);
            guard.release().expect("held");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }
}
