//! Every outcome that a caller can act on, told apart in every language, and what is left after it.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::{Connection, MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error, LockKey};
use dlock_tests::{
    Server, TestConnection, on_every_network_server, on_mysql, on_postgres, start_extra_postgres,
    unique_key, wait_for,
};

use crate::support::*;

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
    fn stage<C: LockTest>(conns: [C; 2], act: Act<C>) -> Self {
        let keys = [unique_key("deadlock_a"), unique_key("deadlock_b")];
        Self::stage_on(keys, conns, act)
    }

    fn stage_on<C: LockTest>(keys: [String; 2], conns: [C; 2], act: Act<C>) -> Self {
        let mut order = keys.clone();
        let actors = conns.map(|conn| {
            let own = order.clone();
            order.reverse();
            on_connection(conn, move |mut conn: C, stage| {
                act(&mut conn, &stage, [&own[0], &own[1]])
            })
        });
        for actor in &actors {
            actor.says("holds its own");
        }
        Self { keys, actors }
    }

    /// Asserts what is promised of the deadlock, and gives the victim's index and error.
    fn play_out<C: LockTest>(self, observer: &mut C) -> (usize, Error) {
        let [first, second] = &self.actors;
        // One after the other: of two that ask at the same moment, MySQL and MariaDB tell both.
        first.go_on();
        first.waits(observer);
        second.go_on();
        wait_for("a victim", || {
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
        assert_held_by(observer, &self.keys[victim], loser.id);
        assert_held_by(observer, &self.keys[1 - victim], winner.id);
        loser.go_on();
        winner.says("has both");
        let winner_id = winner.id;
        assert_held_by(observer, &self.keys[0], winner_id);
        assert_held_by(observer, &self.keys[1], winner_id);
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

fn session_locks<C: LockTest>(
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

/// Writes a row before the locks, and after the deadlock one more.
fn locks_inside_a_transaction<C: LockTest>(
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
fn kinds_in<C: LockTest>(server: &Server, language: &str) -> Vec<(&'static str, String)> {
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

on_every_network_server! {
    // On SQLite two transactions cannot write at once.
    fn a_deadlock_leaves_the_transaction_open<C: LockTest>(server: &Server) {
        deadlock_in_transactions::<C>(server, locks_inside_a_transaction);
    }

}

fn deadlock_in_transactions<C: LockTest>(server: &Server, act: Act<C>) {
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
    assert_held_by(&mut observer, &outer, id);
    assert_free(&mut observer, &key);
    lock.release().expect("a release");
    conn.advisory_lock(&key)
        .acquire()
        .expect("there is room again")
        .release()
        .expect("a release");
}
