//! A transaction that is left open under a lock is rolled back before the lock is free, and the connection goes on.

use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{Kind, Server, on_every_server, unique_key};

use crate::support::*;

on_every_server! {
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
            Err(Error::TransactionLeftOpen { key: of, .. }) => assert_eq!(of, key.as_str().into()),
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
            let waiter = in_background(server, {
                let (key, name) = (key.clone(), table.name().to_owned());
                move |mut conn: C, _| {
                    let mut guard = conn.advisory_lock(&key).acquire().expect("the lock");
                    if C::KIND == Kind::Sqlite {
                        guard.batch_execute("PRAGMA busy_timeout = 0")?;
                        guard.batch_execute("BEGIN IMMEDIATE")?;
                        return guard.batch_execute("ROLLBACK");
                    }
                    guard.batch_execute(&format!("SELECT n FROM {name} FOR UPDATE NOWAIT"))
                }
            });
            waiter.waits(&mut observer);
            if round % 2 == 0 {
                drop(guard);
            } else {
                guard.release().map(drop).expect_err("the transaction was open");
            }
            waiter.join().expect("the row is not locked");
        }
        assert_eq!(table.value(&mut observer), 0);
    }
}
