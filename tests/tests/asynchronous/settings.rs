//! The settings of the user's connection: none cuts a wait short, and none is another one afterwards.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use diesel::QueryableByName;
use diesel::sql_types::{Nullable, Text};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl};
use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server_async, unique_key, wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(60);

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
fn outlasts<O: TestConnection>(observer: &mut O, waiter: &Background<()>, bound: Duration) {
    waiter.waits(observer);
    let started = Instant::now();
    wait_for("the session to wait still", || {
        assert!(!waiter.is_finished(), "the wait was cut short");
        observer.is_waiting(waiter.id) && started.elapsed() > bound * 2
    });
}

on_every_network_server_async! {
    async fn no_setting_is_changed_by_success_wait_timeout_or_cancel<C: SettingsTest>(server: &Server) {
        let mut observer = C::observer(server);
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
        let mut observer = C::observer(server);
        let limits = match C::KIND {
            Kind::Postgres if server.version() >= (17, 0) => {
                "SET lock_timeout = '400ms'; SET statement_timeout = '401ms'; SET transaction_timeout = '402ms'"
            }
            Kind::Postgres => "SET lock_timeout = '400ms'; SET statement_timeout = '401ms'",
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => {
                "SET SESSION lock_wait_timeout = 1, innodb_lock_wait_timeout = 1 /*M! , max_statement_time = 0.4 */ \
                 /*!80000 , max_execution_time = 400 */"
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
            // Long enough for every other statement, on a busy machine, too.
            let bound = match C::KIND {
                Kind::Postgres => Duration::from_millis(500),
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
