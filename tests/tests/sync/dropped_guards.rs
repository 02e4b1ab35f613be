//! A guard that is dropped frees its lock at once, and no other hold; where it cannot, the session ends.

use diesel::connection::{SimpleConnection, TransactionManager};
use diesel::{Connection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Proxy, Server, TestConnection, on_every_network_server, on_every_server, on_postgres,
    unique_key, wait_for,
};

use crate::both::inside_transaction::{is_aborted, is_unique_violation};
use crate::support::*;

on_every_server! {
    fn dropping_frees_the_lock_at_once<C: LockTest>(server: &Server) {
        let key = unique_key("drop");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);

        begin(&mut conn);
        drop(conn.advisory_lock(&key).inside_transaction().try_acquire().expect("an answer").expect("free"));
        assert_free(&mut observer, &key);
        commit(&mut conn);
        assert_clean(&mut conn, &mut observer);

        conn.begin_test_transaction().expect("it begins");
        let guard = conn.advisory_lock(&key).try_acquire().expect("an answer").expect("free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
    }

    fn a_dropped_guard_never_frees_an_outer_hold<C: LockTest>(server: &Server) {
        let key = unique_key("drop_outer");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&key).acquire().expect("the lock is free");
        drop(outer.advisory_lock(&key).acquire().expect("re-entrant"));
        assert_held_by(&mut observer, &key, id);
        drop(outer.advisory_lock(&key).try_acquire().expect("an answer").expect("re-entrant"));
        assert_held_by(&mut observer, &key, id);
        assert!(outer.is_held().expect("an answer"));
        outer.release().expect("held");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn dropping_the_guard_of_a_lost_lock_is_silent_and_leaves_the_next_holder_alone<C: LockTest>(server: &Server) {
        let key = unique_key("guard_lost_drop");
        let (mut conn, mut next) = (C::open(server), C::open(server));
        let next_id = next.backend_id();
        let mut guard = conn.advisory_lock(&key).acquire().expect("the lock is free");
        guard.execute_sql(C::RELEASE_ALL);
        let next_guard = next.advisory_lock(&key).acquire().expect("the lock was lost");
        drop(guard);
        assert!(is_broken(&mut conn), "it is not the session that it was");
        assert_held_by(&mut C::open(server), &key, next_id);
        next_guard.release().expect("held");
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

    fn an_error_that_drops_the_guard_in_a_transaction_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("drop_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.transaction(|conn| -> Result<(), Error> {
            conn.batch_execute(&table.insert(1))?;
            let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
            guard.batch_execute(&table.insert(0))?;
            unreachable!("there is such a row");
        });
        assert!(is_unique_violation(&result), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer);
    }
}

on_every_network_server! {
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

    fn a_lock_is_free_at_once_in_an_aborted_transaction_which_stays_aborted(server: &Server) {
        let key = unique_key("drop_aborted");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for swallowed in [false, true] {
            let result = conn.transaction(|conn| {
                conn.batch_execute(&table.insert(1))?;
                let mut guard = conn.advisory_lock(&key).inside_transaction().acquire()?;
                let error = guard.batch_execute(&table.insert(0)).expect_err("there is such a row");
                assert_held_by(&mut observer, &key, id);
                drop(guard);
                assert_free(&mut observer, &key);
                assert!(is_aborted(conn));
                assert_eq!(depth(conn), 1);
                if swallowed { Ok(()) } else { Err(Error::from(error)) }
            });
            assert!(swallowed || is_unique_violation(&result), "{result:?}");
            assert_eq!(table.rows(&mut observer), 1, "a commit of an aborted transaction is a rollback");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
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
}
