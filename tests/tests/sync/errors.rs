//! Every outcome that a caller can act on, told apart in every language, and what is left after it.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use diesel::connection::{SimpleConnection, TransactionManager};
use diesel::result::Error as DieselError;
use diesel::{Connection, MysqlConnection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server, on_every_server, on_mysql, on_postgres,
    start_extra_postgres, unique_key, wait_for,
};

use crate::observe::{
    Background, LockTestConnection, Stage, assert_free, assert_held, in_background, on_connection,
};

const SHORT: Duration = Duration::from_millis(20);

/// The kind of an error, and the message of the server.
fn kind_and_message(error: &Error) -> (&'static str, String) {
    let kind = match error {
        Error::Timeout { .. } => "timeout",
        Error::Deadlock { .. } => "deadlock",
        Error::Interrupted { .. } => "interrupted",
        Error::TooManyLocks { .. } => "too many locks",
        Error::Database(_) => "database",
        other => panic!("{other:?}"),
    };
    let source = std::error::Error::source(error).map(ToString::to_string);
    (kind, source.unwrap_or_default())
}

/// Two sessions, each of which holds a lock and then waits for the other's with `acquire`, which gives the session's
/// connection back. The one that is told of the deadlock keeps its own lock until the test goes on.
struct Deadlock {
    keys: [String; 2],
    actors: [Background<Result<(), Error>>; 2],
}

type Act<C> = fn(&mut C, &Stage, [&str; 2]) -> Result<(), Error>;

impl Deadlock {
    fn stage<C: LockTestConnection>(conns: [C; 2], act: Act<C>) -> Self {
        let keys = [unique_key("deadlock_a"), unique_key("deadlock_b")];
        Self::stage_on(keys, conns, act)
    }

    fn stage_on<C: LockTestConnection>(keys: [String; 2], conns: [C; 2], act: Act<C>) -> Self {
        let mut order = keys.clone();
        let actors = conns.map(|conn| {
            let own = order.clone();
            order.reverse();
            on_connection(conn, move |mut conn: C, stage| {
                act(&mut conn, stage, [&own[0], &own[1]])
            })
        });
        for actor in &actors {
            actor.says("holds its own");
        }
        for actor in &actors {
            actor.go_on();
        }
        Self { keys, actors }
    }

    /// Asserts what is promised of the deadlock, and gives the victim's index and error.
    fn play_out<C: LockTestConnection>(self, observer: &mut C) -> (usize, Error) {
        wait_for("a victim", || {
            let [first, second] = &self.actors;
            !(observer.is_waiting(first.id) && observer.is_waiting(second.id))
        });
        // The victim says so at once, the other one waits until the victim releases.
        let mut victim = None;
        wait_for("the victim's word", || {
            victim = self
                .actors
                .iter()
                .position(|actor| actor.has_said("victim"));
            victim.is_some()
        });
        let victim = victim.expect("BUG: waited for");
        let (loser, winner) = (&self.actors[victim], &self.actors[1 - victim]);
        winner.waits(observer);
        assert_held(observer, &self.keys[victim], loser.id);
        assert_held(observer, &self.keys[1 - victim], winner.id);
        loser.go_on();
        winner.says("has both");
        let winner_id = winner.id;
        assert_held(observer, &self.keys[0], winner_id);
        assert_held(observer, &self.keys[1], winner_id);
        winner.go_on();
        let [first, second] = self.actors;
        let mut results = [first.join(), second.join()];
        for key in &self.keys {
            assert_free(observer, key);
        }
        results[1 - victim].as_ref().expect("both locks");
        let result = std::mem::replace(&mut results[victim], Ok(()));
        (victim, result.expect_err("a deadlock"))
    }
}

/// Tells the test how the second lock went, and waits for it.
fn report<T>(stage: &Stage, second: Result<T, Error>) -> Result<T, Error> {
    stage.say(if second.is_ok() { "has both" } else { "victim" });
    stage.pause();
    second
}

fn session_locks<C: LockTestConnection>(
    conn: &mut C,
    stage: &Stage,
    [own, other]: [&str; 2],
) -> Result<(), Error> {
    let mut lock = conn.advisory_lock(own).acquire()?;
    stage.say("holds its own");
    stage.pause();
    let second = lock.advisory_lock(other).acquire();
    drop(report(stage, second)?);
    lock.release()?;
    Ok(())
}

/// With a limit, which is another statement on some servers.
fn session_locks_with_a_limit<C: LockTestConnection>(
    conn: &mut C,
    stage: &Stage,
    [own, other]: [&str; 2],
) -> Result<(), Error> {
    let mut lock = conn.advisory_lock(own).acquire()?;
    stage.say("holds its own");
    stage.pause();
    let second = lock
        .advisory_lock(other)
        .timeout(Duration::from_secs(60))
        .acquire();
    drop(report(stage, second)?);
    lock.release()?;
    Ok(())
}

/// Writes a row before the locks, and after the deadlock one more.
fn locks_inside_a_transaction<C: LockTestConnection>(
    conn: &mut C,
    stage: &Stage,
    [own, other]: [&str; 2],
) -> Result<(), Error> {
    let table = table_of(own.min(other));
    conn.transaction(|conn| {
        conn.batch_execute(&format!("INSERT INTO {table} VALUES ('{own}')"))?;
        let mut lock = conn.advisory_lock(own).inside_transaction().acquire()?;
        stage.say("holds its own");
        stage.pause();
        let second = lock.advisory_lock(other).inside_transaction().acquire();
        let result = report(stage, second).map(drop);
        lock.batch_execute(&format!("INSERT INTO {table} VALUES ('after {own}')"))?;
        lock.release()?;
        Ok(result)
    })
    .and_then(|result| result)
}

fn locks_of_a_transaction(
    conn: &mut PgConnection,
    stage: &Stage,
    [own, other]: [&str; 2],
) -> Result<(), Error> {
    let table = table_of(own.min(other));
    conn.transaction(|conn| {
        conn.batch_execute(&format!("INSERT INTO {table} VALUES ('{own}')"))?;
        conn.advisory_xact_lock(own).acquire()?;
        stage.say("holds its own");
        stage.pause();
        let second = conn.advisory_xact_lock(other).acquire();
        let result = report(stage, second);
        conn.batch_execute(&format!("INSERT INTO {table} VALUES ('after {own}')"))?;
        Ok(result)
    })
    .and_then(|result| result)
}

/// The name of the table that belongs to a key.
fn table_of(key: &str) -> String {
    let name: String = key.chars().filter(char::is_ascii_alphanumeric).collect();
    format!("t{}", &name[name.len().saturating_sub(40)..])
}

/// Ends waiters and creates deadlocks in sessions that speak another language.
fn kinds_in<C: LockTestConnection>(server: &Server, language: &str) -> Vec<(&'static str, String)> {
    let mut observer = C::open(server);
    let open = || {
        let mut conn = C::open(server);
        conn.execute_sql(language);
        conn
    };
    let deadlock = Deadlock::stage([open(), open()], session_locks);
    let (_, deadlock) = deadlock.play_out(&mut observer);

    let key = unique_key("language");
    let mut holder = open();
    let held = holder.advisory_lock(&key).acquire().expect("a free lock");
    let waiter = on_connection(open(), {
        let key = key.clone();
        move |mut conn, _| {
            conn.advisory_lock(&key)
                .acquire()
                .map(drop)
                .expect_err("cancelled")
        }
    });
    waiter.waits(&mut observer);
    observer.cancel(waiter.id);
    let interrupted = waiter.join();
    let timeout = open()
        .advisory_lock(&key)
        .timeout(SHORT)
        .acquire()
        .map(drop)
        .expect_err("held");
    held.release().expect("a release");
    [deadlock, interrupted, timeout]
        .iter()
        .map(kind_and_message)
        .collect()
}

on_every_server! {
    fn one_of_two_in_a_deadlock_is_told_and_keeps_its_lock_and_the_other_goes_on<C: LockTestConnection>(server: &Server) {
        let mut observer = C::open(server);
        for act in [session_locks, session_locks_with_a_limit] {
            let deadlock = Deadlock::stage([C::open(server), C::open(server)], act);
            let keys = deadlock.keys.clone();
            match deadlock.play_out(&mut observer) {
                (victim, Error::Deadlock { key, .. }) => assert_eq!(key, LockKey::from(&keys[1 - victim])),
                (_, other) => panic!("{other:?}"),
            }
        }
    }

    fn a_healthy_connection_does_not_count_as_broken_after_an_error<C: LockTestConnection>(server: &Server) {
        let key = unique_key("healthy");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let _held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let error = conn.advisory_lock(&key).timeout(SHORT).acquire().map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert!(conn.advisory_lock(&key).try_acquire().expect("a try").is_none());
        let error = conn.advisory_lock("").acquire().map(drop);
        assert!(matches!(error, Err(Error::InvalidKey(_))), "{error:?}");
        assert!(!C::TransactionManager::is_broken_transaction_manager(&mut conn));
    }

    fn a_session_lock_in_an_open_transaction_is_refused_and_the_remedies_are_named<C: LockTestConnection>(server: &Server) {
        let key = unique_key("in_transaction");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        conn.transaction(|conn| {
            let mut errors = vec![
                conn.advisory_lock(&key).acquire().map(drop),
                conn.advisory_lock(&key).try_acquire().map(drop),
                conn.advisory_lock(&key).timeout(SHORT).acquire().map(drop),
                conn.advisory_lock(&key).run(|_| Ok(())),
            ];
            if server.kind == Kind::Mysql {
                errors.push(conn.advisory_lock(&key).transaction(|_| Ok(())));
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
            Ok::<_, Error>(())
        })
        .expect("the transaction goes on");
    }

    fn a_lost_lock_is_not_held_when_it_is_released<C: LockTestConnection>(server: &Server) {
        let key = unique_key("lost");
        let (mut conn, mut other) = (C::open(server), C::open(server));
        for taken_by_another in [false, true] {
            let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
            lock.execute_sql(C::RELEASE_ALL);
            let other_lock = taken_by_another.then(|| other.advisory_lock(&key).acquire().expect("a free lock"));
            match lock.release().map(drop) {
                Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
                result => panic!("{result:?}"),
            }
            if let Some(mut other_lock) = other_lock {
                assert!(other_lock.is_held().expect("an answer"), "it is not ours to release");
            }
            assert!(C::TransactionManager::is_broken_transaction_manager(&mut conn));
            conn = C::open(server);
        }
        assert_free(&mut other, &key);
    }

    fn a_timeouts_message_names_the_key_and_the_holder<C: LockTestConnection>(server: &Server) {
        let key = unique_key("message");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let id = C::holder_id(holder.backend_id());
        let _held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let error = conn.advisory_lock(&key).timeout(SHORT).acquire().map(drop).expect_err("held");
        let message = error.to_string();
        assert!(message.starts_with(&format!("lock {:?} was not free within ", key)), "{message}");
        assert!(message.contains(&format!(": held by {id}")), "{message}");
    }

    fn errors_pass_through_functions_of_diesel_and_back<C: LockTestConnection>(server: &Server) {
        let key = unique_key("convert");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");

        fn in_query_result<C: LockTestConnection>(conn: &mut C, key: &str) -> QueryResult<()> {
            let lock = conn.advisory_lock(key).timeout(SHORT).acquire()?;
            lock.release()?;
            Ok(())
        }
        let error = in_query_result(&mut conn, &key).expect_err("held");
        let message = error.to_string();
        assert!(message.contains(&key), "{message}");
        match Error::from(error) {
            Error::Timeout { key: timed_out, waited, holders, .. } => {
                assert_eq!(timed_out, LockKey::from(&key));
                assert!(waited >= SHORT && !holders.is_empty());
            }
            other => panic!("{other:?}"),
        }
        let error = in_query_result(&mut conn, "").expect_err("an empty key");
        assert!(matches!(Error::from(error), Error::InvalidKey(_)));
        // Also out of a transaction, which is rolled back.
        let error = conn.transaction(|conn| in_query_result(conn, &key)).expect_err("refused");
        assert!(matches!(error, DieselError::QueryBuilderError(_)));
        assert!(matches!(Error::from(error), Error::InTransaction { .. }));
        held.release().expect("a release");
        in_query_result(&mut conn, &key).expect("a free lock");

        // An error of Diesel is itself again.
        let error = conn
            .advisory_lock(&key)
            .run(|conn| {
                conn.batch_execute("SELECT nonsense FROM nowhere")?;
                Ok::<_, Error>(())
            })
            .expect_err("nonsense");
        assert!(matches!(DieselError::from(error), DieselError::DatabaseError(..)));
        let error = Error::from(DieselError::QueryBuilderError("somebody else's".into()));
        assert!(matches!(error, Error::Database(DieselError::QueryBuilderError(_))));
    }
}

on_every_network_server! {
    // On SQLite two transactions cannot write at once.
    fn a_deadlock_leaves_the_transaction_open<C: LockTestConnection>(server: &Server) {
        deadlock_in_transactions::<C>(server, locks_inside_a_transaction);
    }

    fn a_cancelled_wait_is_interrupted_and_leaves_nothing<C: LockTestConnection>(server: &Server) {
        let key = unique_key("cancel");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        for limit in [None, Some(Duration::from_secs(60))] {
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: C, stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let error = lock.acquire().map(drop).expect_err("cancelled");
                    stage.say("cancelled");
                    stage.pause();
                    assert_eq!(conn.number("SELECT 1"), Some(1));
                    conn.advisory_lock(&key).acquire().expect("a free lock").release().expect("a release");
                    error
                }
            });
            waiter.waits(&mut observer);
            observer.cancel(waiter.id);
            waiter.says("cancelled");
            held.release().expect("a release");
            assert_free(&mut observer, &key);
            waiter.go_on();
            match waiter.join() {
                Error::Interrupted { key: interrupted, .. } => assert_eq!(interrupted, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert_free(&mut observer, &key);
        }
    }

    /// Some clients never come back from a prepared statement that has failed before.
    fn a_connection_can_wait_again_after_a_cancelled_wait<C: LockTestConnection>(server: &Server) {
        let key = unique_key("again");
        let mut observer = C::open(server);
        for limit in [None, Some(Duration::from_secs(60))] {
            let mut holder = C::open(server);
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: C, stage| {
                    let lock = |conn: &mut C| {
                        let lock = conn.advisory_lock(&key);
                        match limit {
                            Some(limit) => lock.timeout(limit),
                            None => lock,
                        }
                        .acquire()
                        .map(drop)
                    };
                    for _ in 0..2 {
                        let error = lock(&mut conn);
                        assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                        stage.say("cancelled");
                        stage.pause();
                    }
                    lock(&mut conn).expect("the lock");
                }
            });
            for _ in 0..2 {
                waiter.waits(&mut observer);
                observer.cancel(waiter.id);
                waiter.says("cancelled");
                waiter.go_on();
            }
            waiter.waits(&mut observer);
            held.release().expect("a release");
            waiter.join();
            assert_free(&mut observer, &key);
        }
    }

    fn a_cancelled_wait_inside_a_transaction_leaves_it_open<C: LockTestConnection>(server: &Server) {
        let (outer, key) = (unique_key("cancel_outer"), unique_key("cancel_inside"));
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let (outer, key) = (outer.clone(), key.clone());
            move |mut conn: C, stage| {
                conn.transaction(|conn| {
                    let mut lock = conn.advisory_lock(&outer).inside_transaction().acquire()?;
                    let error = lock.advisory_lock(&key).inside_transaction().acquire().map(drop);
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    assert_eq!(lock.number("SELECT 1"), Some(1));
                    stage.say("cancelled");
                    stage.pause();
                    lock.release()?;
                    Ok::<_, Error>(())
                })
            }
        });
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        waiter.says("cancelled");
        assert_held(&mut observer, &outer, waiter.id);
        held.release().expect("a release");
        assert_free(&mut observer, &key);
        waiter.go_on();
        waiter.join().expect("a transaction");
        assert_free(&mut observer, &outer);
    }

    fn a_waiter_whose_session_is_ended_has_a_broken_connection<C: LockTestConnection>(server: &Server) {
        let key = unique_key("kill");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let key = key.clone();
            move |mut conn: C, _| {
                let error = conn.advisory_lock(&key).acquire().map(drop).expect_err("killed");
                (error, C::TransactionManager::is_broken_transaction_manager(&mut conn))
            }
        });
        waiter.waits(&mut observer);
        let id = waiter.id;
        observer.kill(id);
        let (error, broken) = waiter.join();
        assert!(matches!(error, Error::Database(_)), "{error:?}");
        assert!(broken, "a pool would hand it out again");
        wait_for("the end of the session", || !observer.is_connected(id));
        held.release().expect("a release");
        assert_free(&mut observer, &key);
    }
}

fn deadlock_in_transactions<C: LockTestConnection>(server: &Server, act: Act<C>) {
    let mut observer = C::open(server);
    let keys = [unique_key("deadlock_a"), unique_key("deadlock_b")];
    let table = table_of(&keys[0]);
    observer.execute_sql(&format!("CREATE TABLE {table} (word VARCHAR(200))"));
    let conns = [C::open(server), C::open(server)];
    let deadlock = Deadlock::stage_on(keys.clone(), conns, act);
    let (victim, error) = deadlock.play_out(&mut observer);
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    for (index, key) in keys.iter().enumerate() {
        for word in [key.clone(), format!("after {key}")] {
            let rows = observer.number(&format!(
                "SELECT COUNT(*) FROM {table} WHERE word = '{word}'"
            ));
            // The victim's transaction ends with the error, but not before all was done in it.
            assert_eq!(rows, Some(1), "{index}, victim {victim}: {word}");
        }
    }
    observer.execute_sql(&format!("DROP TABLE {table}"));
}

on_postgres! {
    fn a_deadlock_of_transactions_locks_leaves_the_transaction_open(server: &Server) {
        deadlock_in_transactions(server, locks_of_a_transaction);
    }

    fn a_deadlock_in_transactions_that_the_lock_began_rolls_one_back(server: &Server) {
        fn nested(conn: &mut PgConnection, stage: &Stage, [own, other]: [&str; 2]) -> Result<(), Error> {
            conn.advisory_lock(own).transaction(|conn| {
                stage.say("holds its own");
                stage.pause();
                let second = conn.advisory_lock(other).transaction(|_| {
                    stage.say("has both");
                    stage.pause();
                    Ok(())
                });
                if second.is_err() {
                    report(stage, second)
                } else {
                    second
                }
            })
        }
        let mut observer = PgConnection::open(server);
        let deadlock = Deadlock::stage([PgConnection::open(server), PgConnection::open(server)], nested);
        let (_, error) = deadlock.play_out(&mut observer);
        assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    }

    fn of_two_upgrades_one_is_a_deadlock_and_keeps_its_shared_lock(server: &Server) {
        let key = unique_key("two_upgrades");
        let mut observer = PgConnection::open(server);
        let actors = [(); 2].map(|()| in_background(server, {
            let key = key.clone();
            move |mut conn: PgConnection, stage| {
                let mut shared = conn.advisory_lock(&key).shared().acquire().expect("a shared lock");
                stage.say("holds its own");
                stage.pause();
                let second = shared.advisory_lock(&key).acquire();
                let result = report(stage, second).map(drop);
                assert!(shared.is_held().expect("an answer"));
                shared.release().expect("a release");
                result
            }
        }));
        for actor in &actors {
            actor.says("holds its own");
        }
        for actor in &actors {
            actor.go_on();
        }
        let mut victim = None;
        wait_for("the victim's word", || {
            victim = actors.iter().position(|actor| actor.has_said("victim"));
            victim.is_some()
        });
        let victim = victim.expect("BUG: waited for");
        assert_eq!(observer.holder_ids(&LockKey::from(&key)).len(), 2);
        actors[victim].go_on();
        actors[1 - victim].says("has both");
        actors[1 - victim].go_on();
        let results = actors.map(Background::join);
        assert!(matches!(results[victim], Err(Error::Deadlock { .. })), "{results:?}");
        assert!(results[1 - victim].is_ok(), "{results:?}");
        assert_free(&mut observer, &key);
    }

    fn a_cancelled_wait_for_a_transactions_lock_leaves_the_transaction_open(server: &Server) {
        let key = unique_key("cancel_xact");
        let [mut holder, mut observer] = [(); 2].map(|()| PgConnection::open(server));
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let key = key.clone();
            move |mut conn: PgConnection, _| {
                conn.transaction(|conn| {
                    let error = conn.advisory_xact_lock(&key).acquire();
                    assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                    assert_eq!(conn.number("SELECT 1"), Some(1));
                    Ok::<_, Error>(())
                })
            }
        });
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        waiter.join().expect("a transaction");
        held.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn a_cancelled_wait_for_a_transaction_is_interrupted(server: &Server) {
        let key = unique_key("cancel_transaction");
        let [mut holder, mut observer] = [(); 2].map(|()| PgConnection::open(server));
        for isolation in ["read committed", "serializable"] {
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
            let mut conn = PgConnection::open(server);
            conn.execute_sql(&format!("SET default_transaction_isolation = '{isolation}'"));
            let waiter = on_connection(conn, {
                let key = key.clone();
                move |mut conn, stage| {
                    let error = conn.advisory_lock(&key).transaction(|_| Ok(()));
                    assert_eq!(conn.number("SELECT 1"), Some(1));
                    stage.say("cancelled");
                    stage.pause();
                    conn.advisory_lock(&key).transaction(|_| Ok::<_, Error>(())).expect("a free lock");
                    error
                }
            });
            waiter.waits(&mut observer);
            observer.cancel(waiter.id);
            waiter.says("cancelled");
            held.release().expect("a release");
            assert_free(&mut observer, &key);
            waiter.go_on();
            let error = waiter.join();
            let error = error.expect_err("cancelled");
            let (kind, message) = kind_and_message(&error);
            assert_eq!(kind, "interrupted", "{error:?}");
            assert!(message.contains("cancel"), "the server's word, not: {message}");
            assert_free(&mut observer, &key);
        }
    }

    fn a_transactions_lock_outside_a_transaction_is_refused_and_the_remedies_are_named(server: &Server) {
        let key = unique_key("not_in_transaction");
        let mut conn = PgConnection::open(server);
        let errors = [
            conn.advisory_xact_lock(&key).acquire(),
            conn.advisory_xact_lock(&key).shared().acquire(),
            conn.advisory_xact_lock(&key).timeout(SHORT).acquire(),
            conn.advisory_xact_lock(&key).try_acquire().map(drop),
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
        assert_free(&mut PgConnection::open(server), &key);
    }
}

/// A PostgreSQL with little room for locks, which speaks German too. For one test at a time.
fn small_postgres() -> (MutexGuard<'static, ()>, &'static Server) {
    static TURN: Mutex<()> = Mutex::new(());
    static SERVER: OnceLock<Server> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let server = SERVER.get_or_init(|| {
        start_extra_postgres("-c max_connections=20 -c max_locks_per_transaction=10")
    });
    (turn, server)
}

#[test]
fn postgres_kinds_of_errors_do_not_depend_on_the_language() {
    let (_turn, server) = small_postgres();
    let english = kinds_in::<PgConnection>(server, "SET lc_messages = 'C'");
    // Nobody has made the locale where the message is still English.
    let german = PgConnection::open(server).batch_execute("SET lc_messages = 'de_DE.UTF-8'");
    german.expect("the server has no German: install the programs and sources of locales (`locales` on Debian)");
    let german = kinds_in::<PgConnection>(server, "SET lc_messages = 'de_DE.UTF-8'");
    assert_eq!(
        english.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
        ["deadlock", "interrupted", "timeout"]
    );
    assert_translated(&english, &german);
}

/// The kinds are the same, and what the server said is not.
#[track_caller]
fn assert_translated(english: &[(&str, String)], other: &[(&str, String)]) {
    let mut translated = 0;
    for ((kind, english), (other_kind, other)) in english.iter().zip(other) {
        assert_eq!(kind, other_kind);
        translated += usize::from(english != other);
    }
    assert!(translated > 0, "it still speaks English: {other:?}");
}

on_mysql! {
    fn mysql_kinds_of_errors_do_not_depend_on_the_language(server: &Server) {
        let english = kinds_in::<MysqlConnection>(server, "SET lc_messages = 'en_US'");
        assert_eq!(
            english.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
            ["deadlock", "interrupted", "timeout"]
        );
        // Neither server has all messages in German, but each has some.
        let german = kinds_in::<MysqlConnection>(server, "SET lc_messages = 'de_DE'");
        assert_translated(&english, &german);
    }
}

#[test]
fn a_full_table_of_locks_is_too_many_locks_and_leaves_the_others() {
    let (_turn, server) = small_postgres();
    let key = unique_key("too_many");
    let outer = unique_key("too_many_outer");
    let [mut conn, mut filler, mut observer] = [(); 3].map(|()| PgConnection::open(server));
    let id = conn.backend_id();
    let mut lock = conn.advisory_lock(&outer).acquire().expect("a free lock");
    // What came before the failure stays locked.
    filler
        .batch_execute("SELECT pg_advisory_lock(i) FROM generate_series(1, 1000000) i")
        .expect_err("the table is full");
    let error = lock.advisory_lock(&key).acquire().map(drop);
    filler.execute_sql(PgConnection::RELEASE_ALL);
    match error {
        Err(Error::TooManyLocks { key: refused, .. }) => assert_eq!(refused, LockKey::from(&key)),
        other => panic!("{other:?}"),
    }
    assert_held(&mut observer, &outer, id);
    assert_free(&mut observer, &key);
    lock.release().expect("a release");
    conn.advisory_lock(&key)
        .acquire()
        .expect("there is room again")
        .release()
        .expect("a release");
}
