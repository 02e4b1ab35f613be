//! A panic frees the lock at once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::connection::SimpleConnection;
use diesel::{Connection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{Server, TestConnection, on_every_server, on_postgres, unique_key};

use crate::support::*;

on_every_server! {
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

    fn a_panic_rolls_back_and_frees_the_lock_at_once<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_panic");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        catch_unwind(AssertUnwindSafe(|| {
            conn.advisory_lock(&key).transaction(|conn| -> QueryResult<()> {
                conn.batch_execute(&table.insert(1))?;
                panic_quietly()
            })
        }))
        .expect_err("a panic");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_panic_in_a_transaction_never_frees_an_outer_hold<C: LockTest>(server: &Server) {
        let key = unique_key("panic_outer");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&key).acquire().expect("the lock is free");
        catch_unwind(AssertUnwindSafe(|| {
            outer.advisory_lock(&key).transaction(|_| -> Result<(), Error> { panic_quietly() })
        }))
        .expect_err("a panic");
        assert_held_by(&mut observer, &key, id);
        outer.release().expect("held");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }
}

on_postgres! {
    fn a_panic_in_a_nested_transaction_frees_the_lock_and_keeps_the_outer_one(server: &Server) {
        let key = unique_key("panic_nested");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            catch_unwind(AssertUnwindSafe(|| {
                conn.advisory_lock(&key).transaction(|conn| -> QueryResult<()> {
                    conn.batch_execute(&table.insert(3))?;
                    panic_quietly()
                })
            }))
            .expect_err("a panic");
            assert_free(&mut observer, &key);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(4))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 3);
        assert_clean(&mut conn, &mut observer);
    }
}
