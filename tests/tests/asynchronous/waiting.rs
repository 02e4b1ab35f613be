//! Where a lock is waited for, for how long, how a wait ends, and that the connection's settings are as before.

use std::collections::BTreeMap;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use diesel::QueryableByName;
use diesel::sql_types::{Nullable, Text};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl};
use dlock_diesel_async::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    Kind, PATIENCE, Proxy, Server, TestConnection, on_every_network_server_async, unique_key,
    wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(60);

on_every_network_server_async! {
    async fn a_wait_is_in_the_servers_queue_with_and_without_a_limit<C: LockTest>(server: &Server) {
        let key = unique_key("async_queue");
        let mut observer = C::Observer::open(server);
        for limit in [None, Some(Duration::from_millis(59_999)), Some(Duration::from_secs(3_000_000)), Some(Duration::MAX)] {
            assert!(try_lock(&mut observer, &key));
            let waiter = in_task(server, {
                let key = key.clone();
                async move |mut conn: C, stage: Stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            let started = Instant::now();
            wait_for("the session to wait still", || {
                assert!(!waiter.is_finished());
                observer.is_waiting(waiter.id) && started.elapsed() > Duration::from_millis(300)
            });
            unlock(&mut observer, &key);
            waiter.holds(&mut observer, &key);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn a_timeout_is_never_early_and_not_much_late<C: LockTest>(server: &Server) {
        let key = unique_key("async_timeouts");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert!(try_lock(&mut observer, &key));
        for limit in [
            Duration::ZERO,
            Duration::from_nanos(1),
            Duration::from_millis(1),
            Duration::from_millis(250),
            Duration::from_millis(1_100),
        ] {
            // A busy machine is late at times, but not each time.
            let mut in_time = false;
            for _ in 0..8 {
                let started = Instant::now();
                let result = conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop);
                let elapsed = started.elapsed();
                let Err(Error::Timeout { waited, .. }) = result else {
                    panic!("{limit:?}: {result:?}");
                };
                assert!(limit <= waited && waited <= elapsed, "{limit:?}: {waited:?}, {elapsed:?}");
                in_time = elapsed - limit < Duration::from_millis(200);
                if in_time {
                    break;
                }
            }
            assert!(in_time, "{limit:?} took 200 ms more each time");
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_free_lock_is_granted_whatever_the_limit<C: LockTest>(server: &Server) {
        let key = unique_key("async_free");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        for limit in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            let lock = conn.advisory_lock(&key).timeout(limit).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            let lock = conn.advisory_lock(&key).timeout(limit).poll_every(limit).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
        }
    }

    async fn a_timeout_names_the_key_the_wait_and_the_holder<C: LockTest>(server: &Server) {
        let key = unique_key("async_culprit");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        if C::KIND == Kind::Postgres {
            holder.execute_sql("SET application_name = 'the culprit'").await;
        }
        let id = holder.backend_id().await;
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let errors = [
            conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop),
            conn.advisory_lock(&key).timeout(SHORT).poll_every(SHORT).acquire().await.map(drop),
            conn.advisory_lock(&key).timeout(SHORT).run(async |_| Ok(())).await,
            conn.advisory_lock(&key).timeout(SHORT).transaction(async |_| Ok(())).await,
        ];
        for error in errors {
            let message = error.as_ref().expect_err("it is held").to_string();
            let Err(Error::Timeout { key: timed_out, waited, holders, .. }) = error else {
                panic!("{error:?}");
            };
            assert_eq!(timed_out, LockKey::from(&key));
            assert!(waited >= SHORT, "{waited:?}");
            assert_eq!(holders.len(), 1, "{holders:?}");
            assert_eq!((holders[0].backend_id, holders[0].granted), (id, true), "{holders:?}");
            assert!(message.contains(&key) && message.contains(&format!("held by {id}")), "{message}");
            if C::KIND == Kind::Postgres {
                assert!(message.contains("the culprit"), "{message}");
            }
        }
        held.release().await.expect("a release");
        assert_clean(&mut conn, &mut C::Observer::open(server)).await;
    }

    async fn a_timeout_leaves_nothing_in_the_queue<C: LockTest>(server: &Server) {
        let key = unique_key("async_ghost");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert!(try_lock(&mut observer, &key));
        for _ in 0..5 {
            let error = conn.advisory_lock(&key).timeout(SHORT / 3).acquire().await.map(drop);
            assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
        assert_free(&mut observer, &key);
    }

    async fn polling_asks_again_and_again_never_queues_and_ends_with_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_poll");
        let mut observer = C::Observer::open(server);
        for limit in [None, Some(Duration::MAX)] {
            assert!(try_lock(&mut observer, &key));
            let proxy = Proxy::start(server);
            let poller = on_connection(C::open_url(proxy.url()).await, {
                let key = key.clone();
                async move |mut conn: C, stage: Stage| {
                    let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(10));
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            proxy.reset();
            wait_for("many polls", || {
                assert!(!observer.is_waiting(poller.id), "it is in the queue");
                proxy.round_trips() > 20
            });
            assert!(!poller.is_finished());
            unlock(&mut observer, &key);
            poller.holds(&mut observer, &key);
            poller.go_on();
            poller.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn polling_keeps_its_limit<C: LockTest>(server: &Server) {
        let key = unique_key("async_poll_limit");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert!(try_lock(&mut observer, &key));
        let limit = Duration::from_millis(150);
        // The last pause is cut short, also where the interval is longer than the limit.
        for interval in [Duration::ZERO, Duration::from_millis(40), Duration::from_secs(3_600)] {
            let started = Instant::now();
            let result = conn.advisory_lock(&key).timeout(limit).poll_every(interval).acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { waited, .. }) if waited >= limit), "{result:?}");
            assert!(started.elapsed() >= limit);
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        unlock(&mut observer, &key);
    }

    async fn one_of_two_in_a_deadlock_is_told_and_keeps_its_lock_and_the_other_goes_on<C: LockTest>(server: &Server) {
        let mut observer = C::Observer::open(server);
        for limit in [None, Some(LONG)] {
            let keys = [unique_key("async_deadlock_a"), unique_key("async_deadlock_b")];
            let (told, who_was_told) = channel();
            let mut tasks = Vec::new();
            for index in [0, 1] {
                let (own, other) = (keys[index].clone(), keys[1 - index].clone());
                let told = told.clone();
                tasks.push(
                    in_task(server, async move |mut conn: C, stage: Stage| {
                        let mut lock = conn.advisory_lock(&own).acquire().await.expect("a free lock");
                        stage.pause().await;
                        let second = lock.advisory_lock(&other);
                        let second = match limit {
                            Some(limit) => second.timeout(limit),
                            None => second,
                        };
                        let won = match second.acquire().await {
                            Ok(second) => {
                                told.send(index).expect("the test listens");
                                stage.pause().await;
                                second.release().await.expect("a release");
                                true
                            }
                            Err(Error::Deadlock { key, .. }) => {
                                told.send(index).expect("the test listens");
                                stage.pause().await;
                                assert_eq!(key, LockKey::from(&other));
                                false
                            }
                            Err(error) => panic!("{error:?}"),
                        };
                        lock.release().await.expect("its own lock is held");
                        won
                    })
                    .await,
                );
            }
            for (task, key) in tasks.iter().zip(&keys) {
                task.holds(&mut observer, key);
            }
            for task in &tasks {
                task.go_on();
            }
            // The other one is told nothing before this one releases.
            let victim = who_was_told.recv_timeout(PATIENCE).expect("a victim");
            let winner = 1 - victim;
            tasks[winner].waits(&mut observer);
            for (task, key) in tasks.iter().zip(&keys) {
                assert_held_by(&mut observer, key, task.id);
            }
            tasks[victim].go_on();
            wait_for("the winner to have both", || {
                keys.iter().all(|key| holders(&mut observer, key) == [tasks[winner].id])
            });
            tasks[winner].go_on();
            let mut won = Vec::new();
            for task in tasks {
                won.push(task.join().await);
            }
            assert!(won[winner] && !won[victim], "{won:?}");
            for key in &keys {
                assert_free(&mut observer, key);
            }
        }
    }

    async fn a_cancelled_wait_is_interrupted_and_leaves_nothing<C: LockTest>(server: &Server) {
        let (outer, key) = (unique_key("async_cancel_outer"), unique_key("async_cancel"));
        let mut observer = C::Observer::open(server);
        for limit in [None, Some(LONG)] {
            assert!(try_lock(&mut observer, &key));
            let waiter = in_task(server, {
                let (outer, key) = (outer.clone(), key.clone());
                async move |mut conn: C, stage: Stage| {
                    let mut outer = conn.advisory_lock(&outer).acquire().await.expect("a free lock");
                    for _ in 0..2 {
                        let lock = outer.advisory_lock(&key);
                        let lock = match limit {
                            Some(limit) => lock.timeout(limit),
                            None => lock,
                        };
                        match lock.acquire().await.map(drop) {
                            Err(Error::Interrupted { key: interrupted, .. }) => {
                                assert_eq!(interrupted, LockKey::from(&key));
                            }
                            other => panic!("{other:?}"),
                        }
                        stage.pause().await;
                    }
                    outer.advisory_lock(&key).acquire().await.expect("the lock").release().await.expect("a release");
                    outer.release().await.expect("the outer lock is held");
                }
            })
            .await;
            for _ in 0..2 {
                waiter.waits(&mut observer);
                observer.cancel(waiter.id);
                wait_for("the end of the wait", || !observer.is_waiting(waiter.id));
                assert_held_by(&mut observer, &outer, waiter.id);
                waiter.go_on();
            }
            waiter.waits(&mut observer);
            unlock(&mut observer, &key);
            waiter.join().await;
            assert_free(&mut observer, &key);
            assert_free(&mut observer, &outer);
        }
    }

    async fn a_cancelled_wait_inside_a_transaction_leaves_it_open<C: LockTest>(server: &Server) {
        let key = unique_key("async_cancel_inside");
        let table = Table::new(server);
        let mut observer = C::Observer::open(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_task(server, {
            let (key, table) = (key.clone(), table.clone());
            async move |mut conn: C, _| {
                let transaction = conn.transaction(async |conn| {
                    conn.batch_execute(&table.insert(1)).await?;
                    let error = conn.advisory_lock(&key).inside_transaction().acquire().await.map(drop);
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    conn.batch_execute(&table.insert(2)).await
                });
                transaction.await.expect("a commit");
            }
        })
        .await;
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        waiter.join().await;
        assert_eq!(table.rows(&mut observer), 2);
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }

    async fn a_waiter_whose_session_is_ended_has_a_broken_connection<C: LockTest>(server: &Server) {
        let key = unique_key("async_kill");
        let mut observer = C::Observer::open(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_task(server, {
            let key = key.clone();
            async move |mut conn: C, _| {
                let error = conn.advisory_lock(&key).acquire().await.map(drop).expect_err("killed");
                (matches!(error, Error::Database(_)), is_broken(&mut conn))
            }
        })
        .await;
        waiter.waits(&mut observer);
        observer.kill(waiter.id);
        let id = waiter.id;
        assert_eq!(waiter.join().await, (true, true));
        // MariaDB closes the connection first.
        wait_for("the end of the session", || !observer.is_connected(id));
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }
}

/// A connection whose settings can be compared.
trait SettingsTest: LockTest {
    /// Everything that a session can set, except what is dlock's own and what changes all the time.
    fn settings(&mut self) -> impl Future<Output = BTreeMap<String, String>> + Send;

    /// Values of the settings that bound waits, all of them far away.
    const BOUNDS: &[&str];
}

#[derive(QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Nullable<Text>)]
    value: Option<String>,
}

impl SettingsTest for AsyncPgConnection {
    async fn settings(&mut self) -> BTreeMap<String, String> {
        let settings = diesel::sql_query(
            "SELECT name, concat_ws(' ', current_setting(name), reset_val) AS value FROM pg_settings \
             WHERE name NOT LIKE 'dlock.%'",
        );
        let settings: Vec<Setting> = settings.load(self).await.expect("the settings");
        settings
            .into_iter()
            .map(|setting| (setting.name, setting.value.unwrap_or_default()))
            .collect()
    }

    const BOUNDS: &[&str] = &[
        "SELECT 1",
        "SET lock_timeout = '30s'; SET statement_timeout = '1min'",
        "SET lock_timeout = '20s'; SET statement_timeout = 0",
        "SET lock_timeout = 0; SET statement_timeout = '1h'",
    ];
}

impl SettingsTest for AsyncMysqlConnection {
    async fn settings(&mut self) -> BTreeMap<String, String> {
        #[derive(QueryableByName)]
        struct Variable {
            #[diesel(sql_type = Text, column_name = "Variable_name")]
            name: String,
            #[diesel(sql_type = Nullable<Text>, column_name = "Value")]
            value: Option<String>,
        }
        const ALWAYS_NEW: [&str; 7] = [
            "timestamp",
            "rand_seed1",
            "rand_seed2",
            "warning_count",
            "error_count",
            "statement_id",
            "pseudo_thread_id",
        ];
        let variables = diesel::sql_query("SHOW SESSION VARIABLES").load(self).await;
        let variables: Vec<Variable> = variables.expect("the settings");
        variables
            .into_iter()
            .filter(|variable| !ALWAYS_NEW.contains(&variable.name.as_str()))
            .map(|variable| (variable.name, variable.value.unwrap_or_default()))
            .collect()
    }

    // What only one of the products knows is left out by the other.
    const BOUNDS: &[&str] = &[
        "DO 1",
        "SET SESSION lock_wait_timeout = 30, innodb_lock_wait_timeout = 31 /*M! , max_statement_time = 20.25 */ \
         /*!80000 , max_execution_time = 20250 */",
    ];
}

async fn assert_unchanged<C: SettingsTest>(
    conn: &mut C,
    before: &BTreeMap<String, String>,
    after: &str,
) {
    // PostgreSQL shows more of them once PL/pgSQL is loaded.
    let now = conn.settings().await;
    for (name, value) in before {
        assert_eq!(now.get(name), Some(value), "{name} after {after}");
    }
}

/// What is bounded goes on while the observer shows that it waits, for longer than the bound.
fn outlasts<O: TestConnection>(observer: &mut O, waiter: &Task<()>, bound: Duration) {
    waiter.waits(observer);
    let started = Instant::now();
    wait_for("the session to wait still", || {
        assert!(!waiter.is_finished(), "the wait was cut short");
        observer.is_waiting(waiter.id) && started.elapsed() > bound * 2
    });
}

on_every_network_server_async! {
    async fn no_setting_is_changed_by_success_wait_timeout_or_cancel<C: SettingsTest>(server: &Server) {
        let mut observer = C::Observer::open(server);
        for bounds in C::BOUNDS {
            let key = unique_key("async_settings");
            let mut conn = C::open(server).await;
            conn.execute_sql(bounds).await;
            let before = conn.settings().await;

            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            assert_unchanged(&mut *lock, &before, "acquiring").await;
            lock.release().await.expect("a release");
            assert_unchanged(&mut conn, &before, "a release").await;
            conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("a free lock");
            assert_unchanged(&mut conn, &before, "a transaction").await;
            conn.transaction(async |conn| {
                let inside = conn.settings().await;
                let mut lock = conn.advisory_lock(&key).inside_transaction().acquire().await?;
                assert_unchanged(&mut *lock, &inside, "acquiring inside a transaction").await;
                lock.release().await?;
                assert_unchanged(conn, &inside, "a release inside a transaction").await;
                Ok::<_, Error>(())
            })
            .await
            .expect("a transaction");

            assert!(try_lock(&mut observer, &key));
            for limit in [Duration::ZERO, SHORT] {
                let error = conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop);
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                assert_unchanged(&mut conn, &before, "a timeout").await;
                let error = conn.advisory_lock(&key).timeout(limit).transaction(async |_| Ok(())).await;
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                assert_unchanged(&mut conn, &before, "a timeout of a transaction").await;
                conn.transaction(async |conn| {
                    let inside = conn.settings().await;
                    let error = conn.advisory_lock(&key).inside_transaction().timeout(limit).acquire().await.map(drop);
                    assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                    assert_unchanged(conn, &inside, "a timeout inside a transaction").await;
                    Ok::<_, Error>(())
                })
                .await
                .expect("a transaction");
            }

            let waiter = on_connection(conn, {
                let key = key.clone();
                async move |mut conn: C, stage: Stage| {
                    for limit in [None, Some(LONG)] {
                        let lock = conn.advisory_lock(&key);
                        let lock = match limit {
                            Some(limit) => lock.timeout(limit),
                            None => lock,
                        };
                        let mut lock = lock.acquire().await.expect("the lock");
                        assert_unchanged(&mut *lock, &before, "a wait").await;
                        lock.release().await.expect("a release");
                        stage.pause().await;
                    }
                    let error = conn.advisory_lock(&key).acquire().await.map(drop);
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    assert_unchanged(&mut conn, &before, "a cancel").await;
                }
            })
            .await;
            for _ in 0..2 {
                waiter.waits(&mut observer);
                unlock(&mut observer, &key);
                wait_for("the lock to be free again", || {
                    !observer.is_waiting(waiter.id) && try_lock(&mut observer, &key)
                });
                waiter.go_on();
            }
            waiter.waits(&mut observer);
            observer.cancel(waiter.id);
            waiter.join().await;
            unlock(&mut observer, &key);
            assert_free(&mut observer, &key);
        }
    }

    async fn limits_of_the_session_do_not_cut_a_wait_short<C: LockTest>(server: &Server) {
        let key = unique_key("async_limits");
        let mut observer = C::Observer::open(server);
        let limits = match C::KIND {
            Kind::Postgres => "SET lock_timeout = '40ms'; SET statement_timeout = '41ms'",
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                "SET SESSION lock_wait_timeout = 1, innodb_lock_wait_timeout = 1 /*M! , max_statement_time = 0.05 */ \
                 /*!80000 , max_execution_time = 50 */"
            }
        };
        for in_a_transaction in [false, true] {
            assert!(try_lock(&mut observer, &key));
            let mut conn = C::open(server).await;
            conn.execute_sql(limits).await;
            let waiter = on_connection(conn, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    if in_a_transaction {
                        let transaction = conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(()));
                        transaction.await.expect("the lock");
                    } else {
                        let lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
                        lock.release().await.expect("a release");
                    }
                }
            })
            .await;
            let bound = match C::KIND {
                Kind::Postgres => Duration::from_millis(100),
                Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
                Kind::Mysql => Duration::from_millis(600),
            };
            outlasts(&mut observer, &waiter, bound);
            unlock(&mut observer, &key);
            waiter.join().await;
            assert_free(&mut observer, &key);
        }
    }
}
