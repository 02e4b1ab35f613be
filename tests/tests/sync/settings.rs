//! The settings of the user's connection: none cuts a wait short, and none is another one afterwards.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use diesel::sql_types::{Nullable, Text};
use diesel::{Connection, MysqlConnection, PgConnection, QueryableByName, RunQueryDsl, sql_query};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server, on_mysql, on_postgres, unique_key,
    wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);
/// Less than the first turn of a wait on PostgreSQL. A busy machine may take longer than that.
const WITHIN_A_TURN: Duration = Duration::from_millis(750);

/// A connection whose settings can be compared.
trait SettingsConnection: LockTest {
    /// Everything that a session can set, except what is dlock's own and what changes all the time.
    fn settings(&mut self) -> BTreeMap<String, String>;

    /// Values of the settings that bound waits, all of them far away.
    const BOUNDS: &[&str];

    /// Makes every wait end that a setting can end, but no statement before the end of a turn of dlock's own.
    const SHORT_BOUNDS: &str;

    /// When such a wait has ended, and a turn has not.
    const SHORT_BOUNDS_PASSED: Duration;

    /// [`BOUNDS`](Self::BOUNDS) for the open transaction alone, where there are such.
    const LOCAL_BOUNDS: &[&str];
}

#[derive(QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Nullable<Text>)]
    value: Option<String>,
}

fn by_name(settings: Vec<Setting>) -> BTreeMap<String, String> {
    settings
        .into_iter()
        .map(|setting| (setting.name, setting.value.unwrap_or_default()))
        .collect()
}

impl SettingsConnection for PgConnection {
    fn settings(&mut self) -> BTreeMap<String, String> {
        let settings = sql_query(
            "SELECT name, concat_ws(' ', current_setting(name), reset_val) AS value FROM pg_settings \
             WHERE name NOT LIKE 'dlock.%'",
        );
        by_name(settings.load(self).expect("the settings"))
    }

    const BOUNDS: &[&str] = &[
        "SET lock_timeout = '30s'; SET statement_timeout = '1min'",
        "SET lock_timeout = '1min'; SET statement_timeout = '20001ms'",
        "SET lock_timeout = '20s'; SET statement_timeout = 0",
        "SET lock_timeout = 0; SET statement_timeout = '1h'",
    ];

    const SHORT_BOUNDS: &str = "SET lock_timeout = '100ms'; SET statement_timeout = '2s'";

    const SHORT_BOUNDS_PASSED: Duration = Duration::from_millis(200);

    const LOCAL_BOUNDS: &[&str] = &[
        "SET LOCAL lock_timeout = '30s'; SET LOCAL statement_timeout = '1min'",
        "SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = '40s'",
        "SET lock_timeout = '40s'; SET LOCAL statement_timeout = 0",
        "SET LOCAL lock_timeout = '31s'; SET statement_timeout = '2min'",
    ];
}

impl SettingsConnection for MysqlConnection {
    fn settings(&mut self) -> BTreeMap<String, String> {
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
        let variables: Vec<Variable> = sql_query("SHOW SESSION VARIABLES")
            .load(self)
            .expect("the settings");
        let settings = variables
            .into_iter()
            .filter(|variable| !ALWAYS_NEW.contains(&variable.name.as_str()))
            .map(|Variable { name, value }| Setting { name, value })
            .collect();
        by_name(settings)
    }

    // What only one of the products knows is left out by the other.
    const BOUNDS: &[&str] = &[
        "SET SESSION lock_wait_timeout = 30, innodb_lock_wait_timeout = 31 /*M! , max_statement_time = 20.25 */ \
         /*!80000 , max_execution_time = 20250 */",
        "SET autocommit = 0 /*M! , max_statement_time = 40 */ /*!80000 , max_execution_time = 40000 */",
    ];

    const SHORT_BOUNDS: &str = "SET SESSION lock_wait_timeout = 1, innodb_lock_wait_timeout = 1 \
        /*M! , max_statement_time = 0.3 */ /*!80000 , max_execution_time = 300 */";

    const SHORT_BOUNDS_PASSED: Duration = Duration::from_millis(1_100);

    const LOCAL_BOUNDS: &[&str] = Self::BOUNDS;
}

#[track_caller]
fn assert_unchanged<C: SettingsConnection>(
    conn: &mut C,
    before: &BTreeMap<String, String>,
    after: &str,
) {
    // PostgreSQL shows more of them once PL/pgSQL is loaded.
    let now = conn.settings();
    for (name, value) in before {
        assert_eq!(now.get(name), Some(value), "{name} after {after}");
    }
}

/// Acquires a lock within the limit, looks at the settings under it, and releases it if that can be done.
type Lock<C> = fn(&mut C, &str, Option<Duration>, &BTreeMap<String, String>) -> Result<(), Error>;

fn session_lock<C: SettingsConnection>(
    conn: &mut C,
    key: &str,
    limit: Option<Duration>,
    before: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let lock = conn.advisory_lock(key).inside_transaction();
    let mut lock = match limit {
        Some(limit) => lock.timeout(limit).acquire()?,
        None => lock.acquire()?,
    };
    assert_unchanged(&mut *lock, before, "acquiring");
    lock.release()?;
    Ok(())
}

fn transaction_lock(
    conn: &mut PgConnection,
    key: &str,
    limit: Option<Duration>,
    before: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let lock = conn.advisory_xact_lock(key);
    match limit {
        Some(limit) => lock.timeout(limit).acquire()?,
        None => lock.acquire()?,
    };
    assert_unchanged(conn, before, "acquiring");
    Ok(())
}

/// Runs `lock` to every outcome and compares the settings after each: free, taken and then granted with and without a
/// limit, timed out, cancelled.
fn every_outcome<C: SettingsConnection>(conn: &mut C, stage: &Stage, key: &str, lock: Lock<C>) {
    let before = &conn.settings();
    let named = |what| format!("{key}/{what}");
    lock(conn, &named("free"), None, before).expect("a free lock");
    assert_unchanged(conn, before, "release");
    lock(conn, &named("free/limit"), Some(SHORT), before).expect("a free lock");
    assert_unchanged(conn, before, "release");

    for limit in [Duration::ZERO, SHORT] {
        let error = lock(conn, &named("held"), Some(limit), before).expect_err("held");
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert_unchanged(conn, before, "a timeout");
    }

    stage.say("granted");
    lock(conn, &named("granted"), None, before).expect("the lock");
    assert_unchanged(conn, before, "a wait");

    stage.say("granted/limit");
    let limit = Some(Duration::from_secs(20));
    lock(conn, &named("granted/limit"), limit, before).expect("the lock");
    assert_unchanged(conn, before, "a wait with a limit");

    stage.say("cancelled");
    let error = lock(conn, &named("cancelled"), None, before).expect_err("cancelled");
    assert!(matches!(error, Error::Interrupted { .. }), "{error:?}");
    assert_unchanged(conn, before, "a cancel");
    stage.say("done");
}

/// The other side of [`every_outcome`].
fn direct<C: SettingsConnection>(server: &Server, key: &str, actor: Background<()>) {
    let mut observer = C::open(server);
    let [mut held, mut granted, mut limited, mut cancelled] = [(); 4].map(|()| C::open(server));
    let mut hold = |conn: &mut C, what: &str| {
        let id = conn.backend_id();
        // Held to the end of the session, or until all are released.
        std::mem::forget(
            conn.advisory_lock(format!("{key}/{what}"))
                .acquire()
                .expect("a free lock"),
        );
        assert_held_by(&mut observer, format!("{key}/{what}"), id);
    };
    hold(&mut held, "held");
    hold(&mut granted, "granted");
    hold(&mut limited, "granted/limit");
    hold(&mut cancelled, "cancelled");
    actor.go_on();
    for (step, holder) in [("granted", &mut granted), ("granted/limit", &mut limited)] {
        actor.says(step);
        actor.waits(&mut observer);
        holder.execute_sql(C::RELEASE_ALL);
    }
    actor.says("cancelled");
    actor.waits(&mut observer);
    observer.cancel(actor.id);
    actor.says("done");
    actor.go_on();
    actor.join();
    for what in ["free", "free/limit", "granted", "granted/limit"] {
        assert_free(&mut observer, format!("{key}/{what}"));
    }
}

/// Waits without a limit for a lock that is held for longer than `bound`.
fn outlasts<C: LockTest>(
    server: &Server,
    conn: C,
    bound: Duration,
    lock: impl FnOnce(&mut C, &str) -> Result<(), Error> + Send + 'static,
) {
    let key = unique_key("outlasts");
    let (mut holder, mut observer) = (C::open(server), C::open(server));
    let held = holder.advisory_lock(&key).acquire().expect("a free lock");
    let waiter = on_connection(conn, {
        let key = key.clone();
        move |mut conn, _| lock(&mut conn, &key)
    });
    waiter.waits(&mut observer);
    let started = Instant::now();
    wait_for("the session to wait still", || {
        assert!(!waiter.is_finished(), "the wait was cut short");
        observer.is_waiting(waiter.id) && started.elapsed() > bound * 2
    });
    held.release().expect("a release");
    waiter.join().expect("the lock");
    assert_free(&mut observer, &key);
}

/// Waits for the lock, tells its number when it has it, and gives it back.
fn tells<C: LockTest>(conn: C, key: &str, number: usize, told: &Sender<usize>) -> Background<()> {
    let (key, told) = (key.to_owned(), told.clone());
    on_connection(conn, move |mut conn: C, _| {
        let lock = conn.advisory_lock(&key).acquire().expect("the lock");
        told.send(number).expect("the test listens");
        lock.release().expect("a release");
    })
}

fn acquire<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).acquire()?.release()?;
    Ok(())
}

fn acquire_within_a_day<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    let day = Duration::from_secs(86_400);
    conn.advisory_lock(key).timeout(day).acquire()?.release()?;
    Ok(())
}

on_every_network_server! {
    fn a_session_lock_changes_no_setting<C: SettingsConnection>(server: &Server) {
        for bounds in [""].iter().chain(C::BOUNDS) {
            let key = unique_key("settings");
            let actor = on_connection(C::open(server), {
                let key = key.clone();
                move |mut conn: C, stage| {
                    if !bounds.is_empty() {
                        conn.execute_sql(bounds);
                    }
                    stage.pause();
                    every_outcome(&mut conn, &stage, &key, session_lock);
                    stage.pause();
                }
            });
            direct::<C>(server, &key, actor);
        }
    }

    /// A wait that is cut short and begun again stands at the end of the queue.
    fn limits_of_the_session_do_not_cost_the_place_in_the_queue<C: SettingsConnection>(server: &Server) {
        let key = unique_key("place");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        for _ in 0..8 {
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
            let [mut bounded, free] = [(); 2].map(|()| C::open(server));
            bounded.execute_sql(C::SHORT_BOUNDS);
            let (told, order) = channel();
            let started = Instant::now();
            let first = tells(bounded, &key, 1, &told);
            first.waits(&mut observer);
            let second = tells(free, &key, 2, &told);
            second.waits(&mut observer);
            wait_for("the bounds to pass", || {
                observer.is_waiting(second.id) && started.elapsed() > C::SHORT_BOUNDS_PASSED
            });
            held.release().expect("a release");
            first.join();
            second.join();
            if C::KIND == Kind::Mysql || started.elapsed() < WITHIN_A_TURN {
                assert_eq!(order.try_iter().collect::<Vec<_>>(), [1, 2]);
                return;
            }
        }
        panic!("this machine is too slow");
    }

    fn a_session_lock_inside_a_transaction_changes_no_setting<C: SettingsConnection>(server: &Server) {
        for bounds in [""].iter().chain(C::LOCAL_BOUNDS) {
            let key = unique_key("settings_inside");
            let actor = on_connection(C::open(server), {
                let key = key.clone();
                move |mut conn: C, stage| inside(&mut conn, &stage, &key, bounds, session_lock)
            });
            direct::<C>(server, &key, actor);
        }
    }
}

/// [`every_outcome`] in a transaction, after which the settings are those of a transaction without locks.
fn inside<C: SettingsConnection>(
    conn: &mut C,
    stage: &Stage,
    key: &str,
    bounds: &str,
    lock: Lock<C>,
) {
    let plain = |conn: &mut C| {
        if !bounds.is_empty() {
            conn.execute_sql(bounds);
        }
        Ok::<_, Error>(())
    };
    conn.transaction(plain).expect("a transaction");
    let before = conn.settings();
    stage.pause();
    conn.transaction(|conn| {
        plain(conn)?;
        every_outcome(conn, stage, key, lock);
        Ok::<_, Error>(())
    })
    .expect("a transaction");
    assert_unchanged(conn, &before, "COMMIT");
    stage.pause();
}

on_postgres! {
    fn a_transactions_lock_changes_no_setting(server: &Server) {
        for bounds in [""].iter().chain(PgConnection::LOCAL_BOUNDS) {
            let key = unique_key("settings_xact");
            let actor = on_connection(PgConnection::open(server), {
                let key = key.clone();
                move |mut conn, stage| inside(&mut conn, &stage, &key, bounds, transaction_lock)
            });
            direct::<PgConnection>(server, &key, actor);
        }
    }

    fn timeouts_of_the_role_do_not_cut_a_wait_short_and_stay(server: &Server) {
        let bound = Duration::from_millis(500);
        let mut admin = PgConnection::open(server);
        let user = TestUser::create(PgConnection::open(server), server, "");
        for setting in timeouts(server) {
            admin.execute_sql(&format!("ALTER ROLE {} SET {setting} = '500ms'", &*user));
        }
        for lock in [acquire, acquire_within_a_day] {
            let mut conn = PgConnection::open_url(user.url());
            let before = conn.settings();
            assert!(before["lock_timeout"].starts_with("500ms"));
            outlasts(server, conn, bound, move |conn, key| {
                lock(conn, key)?;
                assert_unchanged(conn, &before, "a wait");
                Ok(())
            });
        }
    }

    fn timeouts_of_the_connection_do_not_cut_a_wait_short_and_stay(server: &Server) {
        for setting in timeouts(server) {
            let mut conn = PgConnection::open(server);
            conn.execute_sql(&format!("SET {setting} = '400ms'"));
            let before = conn.settings();
            outlasts(server, conn, Duration::from_millis(400), move |conn, key| {
                acquire(conn, key)?;
                assert_unchanged(conn, &before, "a wait");
                Ok(())
            });
        }
    }

    fn timeouts_do_not_cut_a_wait_inside_a_transaction_short(server: &Server) {
        let bound = Duration::from_millis(400);
        let locks: [Wait; 4] = [
            |conn, key| conn.transaction(|conn| conn.advisory_xact_lock(key).acquire()),
            |conn, key| conn.transaction(|conn| {
                conn.advisory_lock(key).inside_transaction().acquire()?.release()?;
                Ok(())
            }),
            |conn, key| conn.advisory_lock(key).transaction(|_| Ok(())),
            |conn, key| conn.transaction(|conn| conn.advisory_lock(key).transaction(|_| Ok(()))),
        ];
        for lock in locks {
            let mut conn = PgConnection::open(server);
            conn.execute_sql("SET lock_timeout = '400ms'; SET statement_timeout = '400ms'");
            let before = conn.settings();
            outlasts(server, conn, bound, move |conn, key| {
                lock(conn, key)?;
                assert_unchanged(conn, &before, "a wait");
                Ok(())
            });
        }
    }

    /// It counts from the grant on.
    fn a_transaction_timeout_does_not_end_the_wait_of_a_transaction_that_the_lock_begins(server: &Server) {
        // Less than a turn, and more.
        for limit in [500, 3_000] {
            let bound = Duration::from_millis(limit);
            // 16 and before do not know it.
            for setting in timeouts(server).into_iter().filter(|setting| *setting == "transaction_timeout") {
                for (isolation, several) in [("read committed", false), ("read committed", true), ("repeatable read", false)] {
                    let mut conn = PgConnection::open(server);
                    conn.execute_sql(&format!("SET {setting} = {limit}; SET default_transaction_isolation = '{isolation}'"));
                    let before = conn.settings();
                    outlasts(server, conn, bound, move |conn, key| {
                        let in_force = "SELECT current_setting('transaction_timeout')";
                        let set = conn.text(in_force);
                        let lock = match several {
                            true => conn.advisory_locks([key, &format!("{key}/first"), &format!("{key}/last")]),
                            false => conn.advisory_lock(key),
                        };
                        lock.transaction(|conn| {
                            assert_eq!(conn.text(in_force), set);
                            Ok::<_, Error>(())
                        })?;
                        assert_unchanged(conn, &before, "a wait");
                        Ok(())
                    });
                }
            }
        }
    }

    /// The wait goes on without it.
    fn a_statement_timeout_that_cuts_the_first_turn_changes_neither_the_limit_nor_the_outcome(server: &Server) {
        const CUT: &str = "SET statement_timeout = '300ms'";
        const LIMIT: Duration = Duration::from_millis(900);
        let within: [Wait; 6] = [
            |conn, key| conn.advisory_lock(key).timeout(LIMIT).acquire().map(drop),
            |conn, key| conn.advisory_lock(key).shared().timeout(LIMIT).acquire().map(drop),
            |conn, key| conn.advisory_lock(key).timeout(LIMIT).transaction(|_| Ok(())),
            |conn, key| {
                conn.execute_sql("SET default_transaction_isolation = 'serializable'");
                conn.advisory_lock(key).timeout(LIMIT).transaction(|_| Ok(()))
            },
            |conn, key| conn.transaction(|conn| conn.advisory_xact_lock(key).timeout(LIMIT).acquire()),
            |conn, key| conn.transaction(|conn| {
                conn.advisory_lock(key).inside_transaction().timeout(LIMIT).acquire()?.release()?;
                Ok(())
            }),
        ];
        let mut observer = PgConnection::open(server);
        for lock in within {
            let key = unique_key("cut");
            let mut conn = PgConnection::open(server);
            conn.execute_sql(CUT);
            assert!(try_lock(&mut observer, &key));
            let result = lock(&mut conn, &key);
            assert!(matches!(result, Err(Error::Timeout { waited, .. }) if waited >= LIMIT), "{result:?}");
            assert_eq!(conn.text("SELECT current_setting('statement_timeout')").as_deref(), Some("300ms"));
            assert_clean(&mut conn, &mut observer);
            unlock(&mut observer, &key);
            lock(&mut conn, &key).expect("a free lock");
            assert_clean(&mut conn, &mut observer);
            assert_free(&mut observer, &key);
        }
    }

    /// The place in the queue is lost once: when the statement is cut.
    fn a_wait_whose_first_turn_was_cut_is_in_the_queue_again_and_granted_in_its_order(server: &Server) {
        let key = unique_key("cut_place");
        let (mut holder, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        for _ in 0..8 {
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
            let [mut bounded, free] = [(); 2].map(|()| PgConnection::open(server));
            bounded.execute_sql("SET statement_timeout = '300ms'");
            let (told, order) = channel();
            let first = tells(bounded, &key, 1, &told);
            first.waits_again(&mut observer);
            let started = Instant::now();
            let second = tells(free, &key, 2, &told);
            second.waits(&mut observer);
            held.release().expect("a release");
            first.join();
            second.join();
            if started.elapsed() < WITHIN_A_TURN {
                assert_eq!(order.try_iter().collect::<Vec<_>>(), [1, 2]);
                return;
            }
        }
        panic!("this machine is too slow");
    }

    fn a_timeout_of_the_user_still_ends_what_runs_under_the_lock(server: &Server) {
        let key = unique_key("still");
        let [mut conn, mut holder, mut observer] = [(); 3].map(|()| PgConnection::open(server));
        conn.execute_sql("SET statement_timeout = '200ms'");
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = on_connection(conn, {
            let key = key.clone();
            move |mut conn, _| {
                let mut lock = conn.advisory_lock(&key).acquire().expect("the lock");
                let started = Instant::now();
                diesel::connection::SimpleConnection::batch_execute(&mut *lock, "SELECT pg_sleep(15)")
                    .expect_err("statement_timeout");
                assert!(started.elapsed() < Duration::from_secs(10));
                lock.release().expect("a release");
            }
        });
        waiter.waits(&mut observer);
        held.release().expect("a release");
        waiter.join();
        assert_free(&mut observer, &key);
    }
}

/// Waits for a lock on this key and gives it back.
type Wait = fn(&mut PgConnection, &str) -> Result<(), Error>;

/// The settings of PostgreSQL that end statements.
fn timeouts(server: &Server) -> Vec<&'static str> {
    let mut timeouts = vec!["lock_timeout", "statement_timeout"];
    if server.version() >= (17, 0) {
        timeouts.push("transaction_timeout");
    }
    timeouts
}

on_mysql! {
    fn limits_of_the_session_do_not_cut_a_wait_short_and_stay(server: &Server) {
        let limit = if server.is_mariadb() {
            "SET SESSION max_statement_time = 0.4"
        } else {
            "SET SESSION max_execution_time = 400"
        };
        for (setting, bound) in [(limit, 400), ("SET SESSION lock_wait_timeout = 1, innodb_lock_wait_timeout = 1", 1_000)] {
            for lock in [acquire, acquire_within_a_day] {
                let mut conn = MysqlConnection::open(server);
                conn.execute_sql(setting);
                let before = conn.settings();
                outlasts(server, conn, Duration::from_millis(bound), move |conn, key| {
                    lock(conn, key)?;
                    assert_unchanged(conn, &before, "a wait");
                    Ok(())
                });
            }
        }
    }

    fn a_limit_of_the_user_account_does_not_cut_a_wait_short_and_stays(server: &Server) {
        // MySQL has a global value only.
        let options = if server.is_mariadb() { "WITH MAX_STATEMENT_TIME 0.4" } else { "" };
        let user = TestUser::create(MysqlConnection::open(server), server, options);
        let mut conn = MysqlConnection::open_url(user.url());
        let before = conn.settings();
        if server.is_mariadb() {
            assert_eq!(before["max_statement_time"], "0.400000");
        }
        outlasts(server, conn, Duration::from_millis(400), move |conn, key| {
            acquire(conn, key)?;
            assert_unchanged(conn, &before, "a wait");
            Ok(())
        });
    }

    fn a_limit_of_the_user_still_ends_what_runs_under_the_lock(server: &Server) {
        let key = unique_key("still");
        let [mut conn, mut holder, mut observer] = [(); 3].map(|()| MysqlConnection::open(server));
        conn.execute_sql(if server.is_mariadb() {
            "SET SESSION max_statement_time = 0.2"
        } else {
            "SET SESSION max_execution_time = 200"
        });
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = on_connection(conn, {
            let key = key.clone();
            move |mut conn, _| {
                let mut lock = conn.advisory_lock(&key).acquire().expect("the lock");
                let started = Instant::now();
                // MySQL's SLEEP() returns when it is interrupted.
                let _ = sql_query("SELECT SLEEP(15)").execute(&mut *lock);
                assert!(started.elapsed() < Duration::from_secs(10));
                lock.release().expect("a release");
            }
        });
        waiter.waits(&mut observer);
        held.release().expect("a release");
        waiter.join();
        assert_free(&mut observer, &key);
    }

    fn without_autocommit_a_lock_outlives_commit_and_rollback(server: &Server) {
        let key = unique_key("autocommit");
        let [mut conn, mut observer] = [(); 2].map(|()| MysqlConnection::open(server));
        let id = conn.backend_id();
        conn.execute_sql("SET autocommit = 0");
        let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        for end in ["COMMIT", "ROLLBACK"] {
            lock.execute_sql(end);
            assert_held_by(&mut observer, &key, id);
        }
        lock.release().expect("a release");
        assert_free(&mut observer, &key);
    }
}
