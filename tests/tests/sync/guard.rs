//! A guard frees its lock on every path, frees no other hold, and says so when it had been lost.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::PgConnection;
use diesel::connection::{SimpleConnection, TransactionManager};
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Proxy, Server, TestConnection, on_every_network_server, on_every_server, on_postgres,
    unique_key, wait_for,
};

use crate::support::*;

/// Releases every lock of the session, behind the guard's back.
fn lose_all_locks<C: TestConnection>(conn: &mut C) {
    conn.execute_sql(match C::KIND {
        Kind::Postgres => "SELECT pg_advisory_unlock_all()",
        Kind::Mysql => "DO RELEASE_ALL_LOCKS()",
        Kind::Sqlite => "SELECT dlock_release_all()",
    });
}

on_every_server! {
    fn dropping_frees_the_lock_at_once<C: LockTest>(server: &Server) {
        let key = unique_key("guard_drop");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn releasing_frees_the_lock_at_once_and_gives_the_connection_back<C: LockTest>(server: &Server) {
        let key = unique_key("guard_release");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        let conn: &mut C = guard.release().expect("the lock was held");
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id(), id);
        assert_clean(conn, &mut observer);
    }

    fn an_owning_guard_gives_what_it_owns_back<C: LockTest>(server: &Server) {
        let key = unique_key("guard_owned");
        let (conn, mut observer) = (Box::new(C::open(server)), C::open(server));
        let mut guard = AdvisoryLock::new(conn, &key).acquire().expect("the lock is free");
        let id = guard.backend_id();
        assert_held_by(&mut observer, &key, id);
        let mut conn: Box<C> = guard.release().expect("the lock was held");
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id(), id);
    }

    fn the_guard_is_the_session_that_holds_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("guard_session");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        let id = guard.backend_id();
        assert_held_by(&mut observer, &key, id);
        assert!(guard.is_held().expect("an answer"));
    }

    fn a_panic_with_a_live_guard_frees_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("guard_panic");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        catch_unwind(AssertUnwindSafe(|| {
            let _guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
            assert_held_by(&mut observer, &key, id);
            panic_quietly();
        }))
        .expect_err("a panic");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn run_holds_the_lock_while_it_runs_and_returns_the_value<C: LockTest>(server: &Server) {
        let key = unique_key("guard_run");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let value = conn.advisory_lock(&key).run(|conn| {
            let id = conn.backend_id();
            assert_held_by(&mut observer, &key, id);
            Ok::<_, Error>(id)
        });
        assert_free(&mut observer, &key);
        assert_eq!(value.expect("it ran"), conn.backend_id());
        assert_clean(&mut conn, &mut observer);
    }

    fn an_error_in_run_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("guard_run_error");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).run(|conn| {
            assert_held_by(&mut observer, &key, conn.backend_id());
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_panic_in_run_frees_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("guard_run_panic");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        catch_unwind(AssertUnwindSafe(|| {
            conn.advisory_lock(&key).run(|conn| -> Result<(), Error> {
                assert_held_by(&mut observer, &key, conn.backend_id());
                panic_quietly()
            })
        }))
        .expect_err("a panic");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn is_held_sees_the_loss<C: LockTest>(server: &Server) {
        let key = unique_key("guard_is_held");
        let mut conn = C::open(server);
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert!(guard.is_held().expect("an answer"));
        lose_all_locks(&mut *guard);
        assert!(!guard.is_held().expect("an answer"));
    }

    fn releasing_a_lost_lock_says_so_and_leaves_the_next_holder_alone<C: LockTest>(server: &Server) {
        let key = unique_key("guard_lost");
        let (mut conn, mut next) = (C::open(server), C::open(server));
        let next_id = next.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        lose_all_locks(&mut *guard);
        let next_guard = next.advisory_lock(&key).acquire().expect("the lock was lost");

        match guard.release().map(drop) {
            Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, key.as_str().into()),
            other => panic!("{other:?}"),
        }
        assert!(is_broken(&mut conn), "it is not the session that it was");
        assert_held_by(&mut C::open(server), &key, next_id);
        next_guard.release().expect("held");
    }

    fn dropping_the_guard_of_a_lost_lock_is_silent_and_leaves_the_next_holder_alone<C: LockTest>(server: &Server) {
        let key = unique_key("guard_lost_drop");
        let (mut conn, mut next) = (C::open(server), C::open(server));
        let next_id = next.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        lose_all_locks(&mut *guard);
        let next_guard = next.advisory_lock(&key).acquire().expect("the lock was lost");
        drop(guard);
        assert!(is_broken(&mut conn), "it is not the session that it was");
        assert_held_by(&mut C::open(server), &key, next_id);
        next_guard.release().expect("held");
    }

    fn run_says_that_the_lock_was_lost_although_the_closure_succeeded<C: LockTest>(server: &Server) {
        let key = unique_key("guard_lost_run");
        let mut conn = C::open(server);
        let result = conn.advisory_lock(&key).run(|conn| {
            lose_all_locks(conn);
            Ok::<_, Error>(())
        });
        assert!(matches!(result, Err(Error::NotHeld { .. })), "{result:?}");
        assert!(is_broken(&mut conn));
    }

    fn a_lost_lock_does_not_hide_the_error_in_run<C: LockTest>(server: &Server) {
        let key = unique_key("guard_lost_run_error");
        let mut conn = C::open(server);
        let result = conn.advisory_lock(&key).run(|conn| {
            lose_all_locks(conn);
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
    }

    fn a_connection_marked_broken_under_the_guard_does_not_keep_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("guard_broken");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        C::TransactionManager::transaction_manager_status_mut(&mut *guard).set_in_error();
        drop(guard);
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
    }

    fn release_rolls_an_open_transaction_back_and_says_so<C: LockTest>(server: &Server) {
        let key = unique_key("guard_open_release");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        begin(&mut *guard);
        guard.execute_sql(&table.insert(1));
        assert_held_by(&mut observer, &key, id);
        match guard.release().map(drop) {
            Err(Error::InTransaction { key: of, .. }) => assert_eq!(of, key.as_str().into()),
            other => panic!("{other:?}"),
        }
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer);
    }

    fn drop_rolls_an_open_transaction_back_at_whatever_depth<C: LockTest>(server: &Server) {
        let key = unique_key("guard_open_drop");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        for depth in 1..=3 {
            let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
            for n in 0..depth {
                begin(&mut *guard);
                guard.execute_sql(&table.insert(n));
            }
            drop(guard);
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            assert_clean(&mut conn, &mut observer);
        }
    }

    /// Otherwise the next holder would run into the row locks of a transaction that is still open.
    fn an_open_transaction_is_rolled_back_before_the_lock_is_free<C: LockTest>(server: &Server) {
        let key = unique_key("guard_open_order");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        for round in 0..20 {
            let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
            begin(&mut *guard);
            table.increment(&mut *guard).expect("an update");
            let (_, waiter) = waiting(server, &mut observer, {
                let (key, name) = (key.clone(), table.name().to_owned());
                move |conn: &mut C| {
                    let mut guard = conn.advisory_lock(&key).acquire().expect("the lock");
                    if C::KIND == Kind::Sqlite {
                        guard.batch_execute("PRAGMA busy_timeout = 0")?;
                        guard.batch_execute("BEGIN IMMEDIATE")?;
                        return guard.batch_execute("ROLLBACK");
                    }
                    guard.batch_execute(&format!("SELECT n FROM {name} FOR UPDATE NOWAIT"))
                }
            });
            if round % 2 == 0 {
                drop(guard);
            } else {
                guard.release().map(drop).expect_err("the transaction was open");
            }
            waiter.join().expect("the waiter's assertions").expect("the row is not locked");
        }
        assert_eq!(table.value(&mut observer), 0);
    }

    fn a_transaction_that_was_committed_under_the_lock_is_no_reason_to_complain<C: LockTest>(server: &Server) {
        let key = unique_key("guard_committed");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        begin(&mut *guard);
        guard.execute_sql(&table.insert(1));
        commit(&mut *guard);
        guard.transaction(|conn| conn.batch_execute(&table.insert(2))).expect("a transaction");
        guard.release().expect("held");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_holder_never_frees_an_outer_hold<C: LockTest>(server: &Server) {
        let key = unique_key("guard_outer");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&key).acquire().expect("the lock is free");

        outer.advisory_lock(&key).acquire().expect("re-entrant").release().expect("held");
        assert_held_by(&mut observer, &key, id);
        drop(outer.advisory_lock(&key).acquire().expect("re-entrant"));
        assert_held_by(&mut observer, &key, id);
        drop(outer.advisory_lock(&key).try_acquire().expect("an answer").expect("re-entrant"));
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).run(|_| Ok::<_, Error>(())).expect("re-entrant");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).run(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).transaction(|_| Ok::<_, Error>(())).expect("re-entrant");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).transaction(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
        assert_held_by(&mut observer, &key, id);
        catch_unwind(AssertUnwindSafe(|| {
            outer.advisory_lock(&key).transaction(|_| -> Result<(), Error> { panic_quietly() })
        }))
        .expect_err("a panic");
        assert_held_by(&mut observer, &key, id);

        outer.release().expect("held");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn guards_of_two_locks_stack_and_free_one_each<C: LockTest>(server: &Server) {
        let (first, second) = (unique_key("guard_stack"), unique_key("guard_stack"));
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&first).acquire().expect("the lock is free");
        let inner = outer.advisory_lock(&second).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &first, id);
        assert_held_by(&mut observer, &second, id);
        inner.release().expect("held");
        assert_held_by(&mut observer, &first, id);
        assert_free(&mut observer, &second);
        outer.release().expect("held");
        assert_free(&mut observer, &first);
    }

    /// As with any guard, forgetting it is a leak; that of a session ends with the connection.
    fn a_forgotten_guard_holds_the_lock_until_the_connection_closes<C: LockTest>(server: &Server) {
        let key = unique_key("guard_forget");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        std::mem::forget(conn.advisory_lock(&key).acquire().expect("the lock is free"));
        assert_held_by(&mut observer, &key, id);
        assert_eq!(conn.number("SELECT 1"), Some(1));
        drop(conn);
        wait_until_free(&mut observer, &key);
    }
}

on_every_network_server! {
    fn a_killed_session_does_not_hide_the_error_in_run<C: LockTest>(server: &Server) {
        let key = unique_key("guard_run_killed");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).run(|conn| {
            kill(&mut observer, conn.backend_id());
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert!(is_broken(&mut conn));
    }

    fn run_fails_if_the_session_was_killed_although_the_closure_succeeded<C: LockTest>(server: &Server) {
        let key = unique_key("guard_run_killed_ok");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).run(|conn| {
            kill(&mut observer, conn.backend_id());
            Ok::<_, Error>(())
        });
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        assert_free(&mut observer, &key);
        assert!(is_broken(&mut conn));
    }

    fn a_killed_holder_hands_the_lock_to_the_next_and_release_says_so<C: LockTest>(server: &Server) {
        let key = unique_key("guard_killed");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        let (waiter_id, waiter) = waiting(server, &mut observer, {
            let (key, server) = (key.clone(), server.clone());
            move |conn: &mut C| {
                let mut guard = conn.advisory_lock(&key).acquire().expect("the holder was killed");
                let id = guard.backend_id();
                assert_held_by(&mut C::open(&server), &key, id);
                guard.release().expect("held").backend_id()
            }
        });
        observer.kill(id);
        assert_eq!(waiter.join().expect("the waiter's assertions"), waiter_id);
        assert!(matches!(guard.release(), Err(Error::Database(_))));
        assert!(is_broken(&mut conn));
        assert_free(&mut observer, &key);
    }

    fn dropping_the_guard_of_a_killed_session_is_silent_and_marks_the_connection_broken<C: LockTest>(server: &Server) {
        let key = unique_key("guard_killed_drop");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        kill(&mut observer, id);
        assert_free(&mut observer, &key);
        drop(guard);
        assert!(is_broken(&mut conn));
    }

    fn a_drop_that_cannot_reach_the_server_marks_the_connection_broken<C: LockTest>(server: &Server) {
        let key = unique_key("guard_cut");
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        proxy.cut();
        drop(guard);
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
    }

    fn a_release_that_cannot_reach_the_server_says_so<C: LockTest>(server: &Server) {
        let key = unique_key("guard_cut_release");
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()), C::open(server));
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        proxy.cut();
        assert!(matches!(guard.release(), Err(Error::Database(_))));
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
    }
}

on_postgres! {
    /// A raw BEGIN is not seen, and in an aborted transaction the server refuses to unlock.
    fn a_drop_that_the_server_refuses_ends_the_session(server: &Server) {
        let key = unique_key("guard_refused");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        guard.execute_sql("BEGIN");
        guard.batch_execute("SELECT 1 / 0").expect_err("division by zero");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert!(is_broken(&mut conn));
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    /// A role that was taken on may not end a session of the role that logged in.
    fn a_drop_that_the_server_refuses_ends_the_session_of_another_role_too(server: &Server) {
        let key = unique_key("guard_role");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        conn.execute_sql("SET ROLE pg_monitor");
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        guard.execute_sql("BEGIN");
        guard.batch_execute("SELECT 1 / 0").expect_err("division by zero");
        drop(guard);
        assert!(is_broken(&mut conn));
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    /// What a wait sets would stay with that transaction, and so would its lock.
    fn a_wait_in_a_transaction_that_diesel_does_not_know_of_is_refused(server: &Server) {
        let key = unique_key("guard_raw_wait");
        let (mut conn, mut holder) = (PgConnection::open(server), PgConnection::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("the lock is free");
        conn.execute_sql("BEGIN");
        let result = conn.advisory_lock(&key).acquire().map(drop);
        assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
        conn.execute_sql("ROLLBACK");
        drop(lock);
        assert_free(&mut conn, &key);
    }

    fn a_release_that_the_server_refuses_ends_the_session_and_says_so(server: &Server) {
        let key = unique_key("guard_refused_release");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        guard.execute_sql("BEGIN");
        guard.batch_execute("SELECT 1 / 0").expect_err("division by zero");
        assert!(matches!(guard.release(), Err(Error::Database(_))));
        assert!(is_broken(&mut conn));
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    fn shared_guards_release_shared_holds(server: &Server) {
        let key = unique_key("guard_shared");
        let mut observer = PgConnection::open(server);
        let (mut a, mut b) = (PgConnection::open(server), PgConnection::open(server));
        let (a_id, b_id) = (a.backend_id(), b.backend_id());
        let first = a.advisory_lock(&key).shared().acquire().expect("the lock is free");
        let second = b.advisory_lock(&key).shared().acquire().expect("it is shared");
        let mut both = [a_id, b_id];
        both.sort_unstable();
        assert_eq!(holders(&mut observer, &key), both);
        first.release().expect("held");
        assert_held_by(&mut observer, &key, b_id);
        drop(second);
        assert_free(&mut observer, &key);
    }

    /// The modes are two locks to the server: each guard undoes its own.
    fn a_shared_guard_under_an_exclusive_one_leaves_it_alone(server: &Server) {
        let key = unique_key("guard_modes");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&key).acquire().expect("the lock is free");
        let inner = outer.advisory_lock(&key).shared().acquire().expect("re-entrant");
        inner.release().expect("held");
        assert_held_by(&mut observer, &key, id);
        assert!(outer.is_held().expect("an answer"));
        outer.release().expect("held");
        assert_free(&mut observer, &key);
    }
}
