//! `AdvisoryLock::transaction`: the lock outlives COMMIT, the successor sees what was committed, and no path leaves a
//! lock or a transaction behind.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use diesel::connection::{SimpleConnection, TransactionManager};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel::{Connection, MysqlConnection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, PATIENCE, Proxy, Server, TestConnection, on_every_network_server, on_every_server,
    on_mysql, on_postgres, unique_key, wait_for,
};

use crate::support::*;

const SOON: Duration = Duration::from_millis(30);

const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

/// A connection whose transactions have another isolation level than the server's default.
fn open_at<C: TestConnection>(server: &Server, level: &str) -> C {
    match C::KIND {
        Kind::Postgres => {
            // Not a SET, so that nothing of the session itself is changed.
            let option = level.replace(' ', "%5C%20");
            let sign = if server.url.contains('?') { '&' } else { '?' };
            let mut conn = C::open_url(&format!(
                "{}{sign}options=-c%20default_transaction_isolation%3D{option}",
                server.url
            ));
            let current = conn.text("SELECT current_setting('default_transaction_isolation')");
            assert_eq!(current.as_deref(), Some(level));
            conn
        }
        Kind::Mysql => {
            let mut conn = C::open(server);
            conn.execute_sql(&format!("SET SESSION TRANSACTION ISOLATION LEVEL {level}"));
            conn
        }
        // It has one, which is serializable.
        Kind::Sqlite => C::open(server),
    }
}

/// At SERIALIZABLE it is possible between two holders in turn, on PostgreSQL.
fn is_serialization_failure(error: &Error) -> bool {
    use DatabaseErrorKind::SerializationFailure;
    matches!(
        error,
        Error::Database(DieselError::DatabaseError(SerializationFailure, _))
    )
}

/// Eight threads add one to a counter again and again, each in a transaction that reads it and then writes it.
fn count_in_contention<C: LockTest>(
    server: &Server,
    level: &str,
    rounds: i64,
    options: impl Fn(AdvisoryLock<&mut C>) -> AdvisoryLock<&mut C> + Sync,
) {
    const THREADS: i64 = 8;
    let key = unique_key("transaction_counter");
    let table = Table::counter(server);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut conn: C = open_at(server, level);
                let mut done = 0;
                while done < rounds {
                    let lock = options(conn.advisory_lock(&key));
                    match lock.transaction(|conn| table.increment(conn).map_err(Error::from)) {
                        Ok(()) => done += 1,
                        Err(Error::Timeout { .. }) => {}
                        Err(error)
                            if level == "serializable" && is_serialization_failure(&error) => {}
                        Err(error) => panic!("at {level}: {error}"),
                    }
                }
            });
        }
    });
    let mut observer = C::open(server);
    assert_eq!(table.value(&mut observer), THREADS * rounds, "at {level}");
    assert_free(&mut observer, &key);
}

on_every_server! {
    fn it_holds_the_lock_commits_and_frees<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_commits");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let value = conn.advisory_lock(&key).transaction(|conn| {
            assert_held_by(&mut observer, &key, id);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(1))?;
            assert!(in_transaction(conn, &mut observer));
            assert_eq!(table.rows(&mut observer), 0, "before COMMIT");
            QueryResult::Ok(conn.backend_id())
        });
        assert_eq!(value, Ok(id));
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
        assert_clean(&mut conn, &mut observer);
    }

    fn an_error_rolls_back_frees_the_lock_and_comes_back<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            assert_held_by(&mut observer, &key, conn.backend_id());
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer);
    }

    fn an_error_of_the_database_rolls_back_too<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_sql_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| -> Result<(), AppError> {
            conn.batch_execute(&table.insert(1))?;
            conn.batch_execute(&table.insert(1))?; // there is such a row
            Ok(())
        });
        assert!(matches!(result, Err(AppError::Lock(Error::Database(_)))), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
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

    /// Were the lock free before COMMIT, the waiter would not see the row now and then.
    fn a_waiter_that_is_granted_the_lock_sees_the_row_that_was_committed<C: LockTest>(server: &Server) {
        const ROUNDS: i64 = 40;
        let key = unique_key("transaction_visible");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let (ask, asked) = channel::<()>();
        let (answer, answered) = channel();
        let mut waiter = C::open(server);
        let waiter_id = waiter.backend_id();
        thread::scope(|scope| {
            scope.spawn(|| {
                for () in asked {
                    let lock = waiter.advisory_lock(&key).timeout(PATIENCE);
                    let rows = lock.run(|conn| Ok::<_, Error>(table.rows(conn)));
                    answer.send(rows.expect("the lock")).expect("the test listens");
                }
            });
            let ask = ask; // a failure drops it, which ends the waiter
            for round in 1..=ROUNDS {
                conn.advisory_lock(&key)
                    .transaction(|conn| {
                        conn.batch_execute(&table.insert(round))?;
                        ask.send(()).expect("the waiter listens");
                        wait_for("the waiter", || observer.is_waiting(waiter_id));
                        QueryResult::Ok(())
                    })
                    .expect("a commit");
                assert_eq!(answered.recv_timeout(PATIENCE), Ok(round), "rows that the waiter saw");
            }
        });
    }

    fn each_holder_sees_what_the_one_before_committed_at_every_isolation_level<C: LockTest>(server: &Server) {
        for level in LEVELS {
            count_in_contention::<C>(server, level, 12, |lock| lock);
        }
    }

    fn so_it_does_without_a_queue<C: LockTest>(server: &Server) {
        for level in LEVELS {
            count_in_contention::<C>(server, level, 3, |lock| lock.poll_every(Duration::from_millis(2)));
        }
    }

    /// Trying again and again hits the moment in which the lock becomes free, where a snapshot may be older than the
    /// commit although nobody has waited.
    fn so_it_does_if_the_lock_becomes_free_at_that_moment<C: LockTest>(server: &Server) {
        let rounds = match C::KIND {
            Kind::Postgres => 60,
            // Nothing can go wrong there: the snapshot comes with the first read.
            Kind::Mysql | Kind::Sqlite => 2,
        };
        for level in &LEVELS[1..] {
            count_in_contention::<C>(server, level, rounds, |lock| lock.timeout(Duration::ZERO));
        }
    }

    fn it_waits_for_its_turn<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_waits");
            let table = Table::new(server);
            let (mut holder, mut observer) = (C::open(server), C::open(server));
            let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
            let mut conn: C = open_at(server, level);
            let id = conn.backend_id();
            let waiter = thread::spawn({
                let (key, insert, server) = (key.clone(), table.insert(1), server.clone());
                move || {
                    conn.advisory_lock(&key)
                        .transaction(|conn| {
                            assert_held_by(&mut C::open(&server), &key, id);
                            conn.batch_execute(&insert)
                        })
                        .expect("a commit");
                    assert_clean(&mut conn, &mut C::open(&server));
                }
            });
            wait_for("the waiter", || observer.is_waiting(id));
            assert_eq!(table.rows(&mut observer), 0);
            guard.release().expect("held");
            waiter.join().expect("the waiter's assertions");
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 1);
        }
    }

    fn a_timeout_leaves_no_transaction_behind<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_timeout");
            let (mut holder, mut observer) = (C::open(server), C::open(server));
            let mut conn: C = open_at(server, level);
            let holder_id = holder.backend_id();
            let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
            for limit in [Duration::ZERO, SOON] {
                let lock = conn.advisory_lock(&key).timeout(limit);
                let result = lock.transaction(|_| -> Result<(), Error> { panic!("the lock is held") });
                assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
                assert_clean(&mut conn, &mut observer);
                let lock = conn.advisory_lock(&key).poll_every(SOON / 4).timeout(limit);
                let result = lock.transaction(|_| -> Result<(), Error> { panic!("the lock is held") });
                assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
                assert_clean(&mut conn, &mut observer);
            }
            assert_held_by(&mut observer, &key, holder_id);
            guard.release().expect("held");
            conn.advisory_lock(&key).timeout(SOON).transaction(|_| Ok::<_, Error>(())).expect("it is free");
        }
    }

    fn a_further_transaction_that_is_left_open_rolls_all_back_and_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_left_open");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        for left_open in 1..=2 {
            let result = conn.advisory_lock(&key).transaction(|conn| {
                conn.batch_execute(&table.insert(0))?;
                for n in 1..=left_open {
                    begin(conn);
                    conn.batch_execute(&table.insert(n))?;
                }
                Ok::<_, Error>(())
            });
            match result {
                Err(Error::InTransaction { key: of, .. }) => assert_eq!(of, key.as_str().into()),
                other => panic!("{other:?}"),
            }
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn a_further_transaction_that_is_left_open_does_not_hide_the_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_left_open_error");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| {
            begin(conn);
            conn.batch_execute(&table.insert(1))?;
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert_clean(&mut conn, &mut observer);
    }

    fn a_closure_that_ends_the_transaction_itself_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_ended");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        for end in [commit, roll_back] {
            let result = conn.advisory_lock(&key).transaction(|conn| {
                end(conn);
                Ok::<_, Error>(())
            });
            assert!(matches!(result, Err(Error::Database(DieselError::NotInTransaction))), "{result:?}");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn transactions_of_diesel_nest_in_it<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_nests");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        conn.advisory_lock(&key)
            .transaction(|conn| {
                conn.batch_execute(&table.insert(1))?;
                conn.transaction(|conn| conn.batch_execute(&table.insert(2)))?;
                conn.transaction(|conn| {
                    conn.batch_execute(&table.insert(3))?;
                    Err::<(), _>(AppError::Own)
                })
                .expect_err("its own");
                assert_held_by(&mut observer, &key, conn.backend_id());
                QueryResult::Ok(())
            })
            .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer);
    }

    fn it_works_in_a_test_transaction<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_test");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        conn.begin_test_transaction().expect("it begins");
        conn.advisory_lock(&key)
            .transaction(|conn| {
                assert_held_by(&mut observer, &key, conn.backend_id());
                conn.batch_execute(&table.insert(1))
            })
            .expect("a savepoint");
        conn.advisory_lock(&key)
            .transaction(|conn| {
                conn.batch_execute(&table.insert(2))?;
                Err::<(), _>(AppError::Own)
            })
            .expect_err("its own");
        assert_eq!((table.rows(&mut conn), table.rows(&mut observer)), (1, 0));
        assert_eq!((depth(&mut conn), is_broken(&mut conn)), (1, false));
        drop(conn);
        wait_until_free(&mut observer, &key);
    }

    fn a_broken_connection_is_refused<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_broken");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        C::TransactionManager::transaction_manager_status_mut(&mut conn).set_in_error();
        let result = conn.advisory_lock(&key).transaction(|_| -> Result<(), Error> { panic!("it is broken") });
        assert!(matches!(result, Err(Error::Database(DieselError::BrokenTransactionManager))), "{result:?}");
        assert!(is_broken(&mut conn));
        let result = conn.advisory_lock(&key).acquire().map(drop);
        assert!(matches!(result, Err(Error::Database(DieselError::BrokenTransactionManager))), "{result:?}");
        assert_free(&mut observer, &key);
        assert!(!in_transaction(&mut conn, &mut observer));
    }

    fn it_works_with_an_owned_connection<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_owned");
        let table = Table::new(server);
        let mut observer = C::open(server);
        AdvisoryLock::new(Box::new(C::open(server)), &key)
            .transaction(|conn| {
                assert_held_by(&mut observer, &key, conn.backend_id());
                conn.batch_execute(&table.insert(1))
            })
            .expect("a commit");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 1);
    }

    fn an_outer_hold_outlives_it<C: LockTest>(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_outer");
            let (mut conn, mut observer) = (open_at::<C>(server, level), C::open(server));
            let id = conn.backend_id();
            let mut outer = conn.advisory_lock(&key).acquire().expect("the lock is free");
            outer.advisory_lock(&key).transaction(|_| Ok::<_, Error>(())).expect("re-entrant");
            assert_held_by(&mut observer, &key, id);
            outer.release().expect("held");
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }
}

on_every_network_server! {
    fn a_cancelled_wait_leaves_no_transaction_behind<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_cancel");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let holder_id = holder.backend_id();
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let (id, waiter) = waiting(server, &mut observer, {
            let (key, server) = (key.clone(), server.clone());
            move |conn: &mut C| {
                let result = conn.advisory_lock(&key).transaction(|_| -> Result<(), Error> {
                    panic!("the lock is held")
                });
                assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
                assert_clean(conn, &mut C::open(&server));
            }
        });
        observer.cancel(id);
        waiter.join().expect("the waiter's assertions");
        assert_held_by(&mut observer, &key, holder_id);
        guard.release().expect("held");
        assert_free(&mut observer, &key);
    }

    fn a_session_killed_while_it_waits_is_an_error_and_holds_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_kill_waiter");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let (id, waiter) = waiting(server, &mut observer, {
            let key = key.clone();
            move |conn: &mut C| {
                let result = conn.advisory_lock(&key).transaction(|_| -> Result<(), Error> {
                    panic!("the lock is held")
                });
                (matches!(result, Err(Error::Database(_))), is_broken(conn))
            }
        });
        observer.kill(id);
        assert_eq!(waiter.join().expect("no panic"), (true, true));
        guard.release().expect("held");
        wait_until_free(&mut observer, &key);
    }

    fn a_session_that_is_gone_is_an_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_gone");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        kill(&mut observer, id);
        let result = conn.advisory_lock(&key).transaction(|_| -> Result<(), Error> { panic!("it is gone") });
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        assert!(is_broken(&mut conn));
    }

    fn a_commit_that_cannot_be_sent_is_reported_and_the_lock_is_free<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_kill_commit");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            kill(&mut observer, conn.backend_id());
            Ok::<_, Error>(())
        });
        assert!(matches!(result, Err(Error::Database(_))), "{result:?}");
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
    }

    fn a_rollback_that_cannot_be_sent_does_not_hide_the_error<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_kill_error");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| {
            kill(&mut observer, conn.backend_id());
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
    }

    fn a_network_failure_in_the_closure_does_not_hide_the_error_either<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_cut");
        let table = Table::new(server);
        let proxy = Proxy::start(server);
        let (mut conn, mut observer) = (C::open_url(proxy.url()), C::open(server));
        let result = conn.advisory_lock(&key).transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            proxy.cut();
            Err::<(), _>(AppError::Own)
        });
        assert!(matches!(result, Err(AppError::Own)), "{result:?}");
        assert!(is_broken(&mut conn));
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
    }

    fn polling_asks_again_and_again<C: LockTest>(server: &Server) {
        let key = unique_key("transaction_poll");
        let table = Table::new(server);
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        proxy.reset();
        let thread = thread::spawn({
            let (key, insert) = (key.clone(), table.insert(1));
            move || {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(2));
                lock.transaction(|conn| conn.batch_execute(&insert))
            }
        });
        wait_for("many attempts", || proxy.round_trips() >= 50);
        guard.release().expect("held");
        thread.join().expect("no panic").expect("a commit");
        assert_eq!(table.rows(&mut observer), 1);
        wait_until_free(&mut observer, &key);
    }
}

on_postgres! {
    /// Its writes would be lost without a word, or committed by somebody else's COMMIT.
    fn a_transaction_that_diesel_does_not_know_of_is_refused(server: &Server) {
        let key = unique_key("transaction_raw_begin");
        let (mut conn, mut holder) = (PgConnection::open(server), PgConnection::open(server));
        for taken in [false, true] {
            let lock = taken.then(|| holder.advisory_lock(&key).acquire().expect("the lock is free"));
            conn.execute_sql("BEGIN");
            conn.execute_sql("SELECT 1");
            let limit = Duration::from_millis(10);
            let result = conn.advisory_lock(&key).timeout(limit).transaction(|_| Ok::<(), Error>(()));
            assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
            conn.batch_execute("SELECT 1").expect_err("it is aborted, so that nobody takes it for committed");
            conn.execute_sql("ROLLBACK");
            drop(lock);
            conn.advisory_lock(&key).transaction(|_| Ok::<(), Error>(())).expect("all is as before");
        }
    }

    fn nested_in_an_open_transaction_the_lock_is_held_until_that_ends(server: &Server) {
        let key = unique_key("transaction_nested");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        for commits in [true, false] {
            let result = conn.transaction(|conn| {
                conn.advisory_lock(&key).transaction(|conn| {
                    assert_eq!(depth(conn), 2);
                    assert_held_by(&mut observer, &key, id);
                    conn.batch_execute(&table.insert(1))
                })?;
                assert_eq!(depth(conn), 1);
                assert_held_by(&mut observer, &key, id);
                assert_eq!(table.rows(&mut observer), 0);
                if commits { Ok(()) } else { Err(AppError::Own) }
            });
            assert_eq!(result.is_ok(), commits);
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), i64::from(commits));
            assert_clean(&mut conn, &mut observer);
            observer.execute_sql(&format!("DELETE FROM {}", table.name()));
        }
    }

    fn rolling_the_nested_one_back_frees_the_lock_and_keeps_the_outer_one(server: &Server) {
        let key = unique_key("transaction_nested_error");
        let table = Table::counter(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.advisory_lock(&key).transaction(|conn| {
                conn.batch_execute(&table.insert(2))?;
                Err::<(), _>(AppError::Own)
            });
            assert!(matches!(result, Err(AppError::Own)), "{result:?}");
            assert_free(&mut observer, &key);
            // The nested one is aborted by its error.
            conn.advisory_lock(&key).transaction(|conn| conn.batch_execute(&table.insert(0))).expect_err("a row");
            assert_free(&mut observer, &key);
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

    fn a_timeout_of_the_nested_one_keeps_the_outer_one(server: &Server) {
        let key = unique_key("transaction_nested_timeout");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let mut holder = PgConnection::open(server);
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.advisory_lock(&key).timeout(SOON).transaction(|_| -> Result<(), Error> {
                panic!("the lock is held")
            });
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(2))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer);
        drop(guard);
    }

    fn a_commit_that_fails_is_reported_rolls_back_and_frees_the_lock(server: &Server) {
        let key = unique_key("transaction_deferred");
        let table = Table::new(server);
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let name = table.name();
        conn.execute_sql(&format!("ALTER TABLE {name} ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED"));
        conn.execute_sql(&format!("ALTER TABLE {name} DROP CONSTRAINT {name}_n_key"));
        for nested in [false, true] {
            let result = conn.advisory_lock(&key).transaction(|conn| {
                conn.batch_execute(&table.insert(1))?;
                if nested {
                    conn.transaction(|conn| conn.batch_execute(&table.insert(1)))?;
                } else {
                    conn.batch_execute(&table.insert(1))?;
                }
                Ok::<_, Error>(())
            });
            use DatabaseErrorKind::UniqueViolation;
            assert!(
                matches!(&result, Err(Error::Database(DieselError::DatabaseError(UniqueViolation, _)))),
                "{result:?}"
            );
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 0);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn shared_transactions_run_together_and_keep_writers_out(server: &Server) {
        for level in LEVELS {
            let key = unique_key("transaction_shared");
            let (mut a, mut b): (PgConnection, PgConnection) = (open_at(server, level), open_at(server, level));
            let mut observer = PgConnection::open(server);
            a.advisory_lock(&key)
                .shared()
                .transaction(|_| {
                    b.advisory_lock(&key).shared().timeout(PATIENCE).transaction(|_| {
                        assert_eq!(holders(&mut observer, &key).len(), 2);
                        assert!(!try_lock(&mut observer, &key), "an exclusive one");
                        Ok::<_, Error>(())
                    })
                })
                .expect("two commits");
            assert_free(&mut observer, &key);
            // A writer excludes them.
            assert!(try_lock(&mut observer, &key));
            let result = a.advisory_lock(&key).shared().timeout(SOON).transaction(|_| Ok::<_, Error>(()));
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            unlock(&mut observer, &key);
            assert_clean(&mut a, &mut observer);
            assert_clean(&mut b, &mut observer);
        }
    }

    fn the_isolation_level_may_be_set_for_the_session_and_the_transaction_be_read_only(server: &Server) {
        let key = unique_key("transaction_level");
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        conn.execute_sql("SET default_transaction_read_only = on");
        for level in ["read uncommitted", "read committed", "repeatable read", "serializable"] {
            conn.execute_sql(&format!("SET default_transaction_isolation = '{level}'"));
            let inside = conn.advisory_lock(&key).transaction(|conn| {
                assert_held_by(&mut observer, &key, conn.backend_id());
                Ok::<_, Error>(conn.text("SELECT current_setting('transaction_isolation')"))
            });
            assert_eq!(inside.expect("a commit").as_deref(), Some(level));
            assert_free(&mut observer, &key);
            assert_clean(&mut conn, &mut observer);
        }
    }

    fn limits_of_the_session_neither_cut_the_wait_short_nor_change(server: &Server) {
        let key = unique_key("transaction_limits");
        let (mut holder, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let guard = holder.advisory_lock(&key).acquire().expect("the lock is free");
        let mut conn = PgConnection::open(server);
        conn.execute_sql("SET lock_timeout = '40ms'; SET statement_timeout = '41ms'");
        let id = conn.backend_id();
        let waiter = thread::spawn({
            let key = key.clone();
            move || {
                conn.advisory_lock(&key).transaction(|conn| {
                    let sql = "SELECT current_setting('lock_timeout') || current_setting('statement_timeout')";
                    assert_eq!(conn.text(sql).as_deref(), Some("40ms41ms"));
                    Ok::<_, Error>(())
                })
            }
        });
        wait_for("the waiter", || observer.is_waiting(id));
        // No proof of anything, but it would be over by now.
        thread::sleep(Duration::from_millis(150));
        assert!(observer.is_waiting(id));
        guard.release().expect("held");
        waiter.join().expect("the waiter's assertions").expect("a commit");
        assert_free(&mut observer, &key);
    }
}

on_mysql! {
    fn in_an_open_transaction_it_is_refused_and_that_goes_on(server: &Server) {
        let key = unique_key("transaction_refused");
        let table = Table::new(server);
        let (mut conn, mut observer) = (MysqlConnection::open(server), MysqlConnection::open(server));
        conn.transaction(|conn| {
            conn.batch_execute(&table.insert(1))?;
            let result = conn.advisory_lock(&key).transaction(|_| -> Result<(), Error> { panic!("refused") });
            assert!(matches!(result, Err(Error::InTransaction { .. })), "{result:?}");
            assert_free(&mut observer, &key);
            assert_eq!(depth(conn), 1);
            conn.batch_execute(&table.insert(2))
        })
        .expect("a commit");
        assert_eq!(table.rows(&mut observer), 2);
        assert_clean(&mut conn, &mut observer);
    }
}
