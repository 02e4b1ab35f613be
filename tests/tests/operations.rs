//! The statements that `docs/guide/operations.md` gives to copy, as they stand there.

use std::process::Command;
use std::thread::{self, JoinHandle};

use diesel::{MysqlConnection, PgConnection, SqliteConnection};
use dlock_core::proto::Dialect;
use dlock_diesel::{AdvisoryLockExt, Error, LockBackend, LockConnection};
use dlock_tests::{
    Server, TestConnection, on_every_network_server, on_mysql, on_postgres, on_sqlite, wait_for,
};

const PAGE: &str = include_str!("../../docs/guide/operations.md");

/// The key of the page.
const KEY: (&str, &str) = ("billing", "migrations");

/// What stands between the lines "```LANGUAGE" and "```" of a section, and of the sections in it.
fn blocks(section: &str, language: &str) -> Vec<String> {
    let start = format!("\n## {section}\n");
    let (_, rest) = PAGE.split_once(&start).expect("the section is there");
    let section = rest.split("\n## ").next().expect("a section");
    let start = format!("```{language}\n");
    let blocks = section.split(&*start).skip(1);
    let blocks: Vec<String> = blocks
        .map(|block| block.split("```").next().expect("a block").to_owned())
        .collect();
    assert!(!blocks.is_empty(), "no {language} in {section}");
    blocks
}

trait Lockable:
    TestConnection + LockConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>>
{
}

impl Lockable for PgConnection {}
impl Lockable for MysqlConnection {}

/// A session that waits for the lock.
struct Waiter {
    id: i64,
    thread: JoinHandle<Result<(), Error>>,
}

fn wait_in_background<C: Lockable>(server: &Server, observer: &mut C) -> Waiter {
    let mut conn = C::open(server);
    let id = conn.backend_id();
    let thread = thread::spawn(move || conn.advisory_lock(KEY).acquire()?.release().map(drop));
    wait_for("the session to wait", || observer.is_waiting(id));
    Waiter { id, thread }
}

/// Runs one statement of the page while a session holds the lock and another one waits for it, and looks at what it
/// did to them.
#[track_caller]
fn run_on_holder_and_waiter<C: Lockable>(server: &Server, sql: &str) {
    let (mut conn, mut observer) = (C::open(server), C::open(server));
    let holder = conn.backend_id();
    let held = conn.advisory_lock(KEY).acquire().expect("a free lock");
    let waiter = wait_in_background(server, &mut observer);
    let ends_a_wait = sql.contains("pg_cancel_backend") || sql.contains("KILL QUERY");
    let ends_a_session =
        sql.contains("pg_terminate_backend") || (sql.contains("KILL") && !ends_a_wait);
    let meant = match sql.contains("pg_blocking_pids") || ends_a_wait {
        true => waiter.id,
        false => holder,
    };
    let sql = sql
        .replace("4711", &meant.to_string())
        .replace("KILL 10", &format!("KILL {meant}"))
        .replace("KILL QUERY 10", &format!("KILL QUERY {meant}"))
        .replace("PROCESSLIST_ID = 10", &format!("PROCESSLIST_ID = {meant}"));
    let result = observer.batch_execute(&sql);
    assert!(result.is_ok(), "{sql}: {result:?}");
    let waited = |waiter: Waiter| waiter.thread.join().expect("no panic");
    if ends_a_wait {
        let told = waited(waiter);
        assert!(
            matches!(told, Err(Error::Interrupted { .. })),
            "{sql}: {told:?}"
        );
        held.release().expect("the holder keeps the lock");
    } else if ends_a_session {
        waited(waiter).expect("the lock is free");
        wait_for("the end of the session", || !observer.is_connected(holder));
        let told = held.release().map(drop);
        assert!(matches!(told, Err(Error::Lost { .. })), "{sql}: {told:?}");
    } else {
        held.release().expect("nothing has happened to it");
        waited(waiter).expect("nothing has happened to it");
    }
}

/// The statements of "What to watch" for this server.
fn watched(on_postgres: bool) -> Vec<String> {
    let mut blocks = blocks("What to watch", "sql");
    blocks.retain(|block| block.contains("PROCESSLIST") != on_postgres);
    assert!(!blocks.is_empty());
    blocks
}

/// The statement without its semicolon, to stand inside another one.
fn inner(sql: &str) -> &str {
    sql.trim().trim_end_matches(';')
}

// One test for each kind of server: the page has one key, and some of its statements end whoever holds it.
on_postgres! {
    fn the_statements_for_postgres_do_what_the_page_says(server: &Server) {
        let blocks = blocks("PostgreSQL", "sql");
        for sql in blocks.iter().chain(&watched(true)) {
            run_on_holder_and_waiter::<PgConnection>(server, sql);
        }

        // The first one computes the columns of the key, and the second one the key of the columns.
        let (mut conn, mut observer) = (PgConnection::open(server), PgConnection::open(server));
        let id = conn.backend_id();
        let _held = conn.advisory_lock(KEY).acquire().expect("a free lock");
        let there = format!(
            "SELECT count(*) FROM pg_locks JOIN ({}) AS k ON k.classid = pg_locks.classid::bigint \
             AND k.objid = pg_locks.objid::bigint WHERE granted AND pid = {id} AND objsubid = 1",
            inner(&blocks[0])
        );
        assert_eq!(observer.number(&there), Some(1));
        let listed = format!("SELECT key FROM ({}) AS list WHERE pid = {id}", inner(&blocks[1]));
        let key = observer.text(&listed).expect("a row");
        assert!(blocks[0].contains(&key), "{key}");
    }
}

on_mysql! {
    fn the_statements_for_mysql_and_mariadb_do_what_the_page_says(server: &Server) {
        let (mut conn, mut observer) = (MysqlConnection::open(server), MysqlConnection::open(server));
        let mut all = blocks("MySQL", "sql");
        let is_used = all[0].clone();
        if observer.text("SELECT VERSION()").is_some_and(|version| version.contains("MariaDB")) {
            all.extend(blocks("MariaDB", "sql"));
        }
        for sql in all.iter().chain(&watched(false)) {
            run_on_holder_and_waiter::<MysqlConnection>(server, sql);
        }

        let id = conn.backend_id();
        let _held = conn.advisory_lock(KEY).acquire().expect("a free lock");
        assert_eq!(observer.number(inner(&is_used)), Some(id));
    }
}

on_sqlite! {
    fn the_commands_for_sqlite_find_the_process(server: &Server) {
        let (mut conn, mut other) = (SqliteConnection::open(server), SqliteConnection::open(server));
        let find = || {
            let script = blocks("SQLite", "sh").remove(0);
            let output = Command::new("sh").args(["-c", &script]).output().expect("it starts");
            let text = String::from_utf8(output.stdout).expect("text");
            let here = format!("/proc/{}/fdinfo/", std::process::id());
            text.lines().filter(|line| line.starts_with(&here)).count()
        };
        assert_eq!(find(), 0);
        let held = conn.advisory_lock(KEY).acquire().expect("a free lock");
        assert_eq!(find(), 1);
        assert!(other.advisory_lock(KEY).try_acquire().expect("an answer").is_none());
        held.release().expect("a release");
        assert_eq!(find(), 0);
    }
}

on_every_network_server! {
    fn what_a_timeout_names_is_what_the_page_ends<C: Lockable>(server: &Server) {
        let key = dlock_tests::unique_key("operations_timeout");
        let (mut conn, mut other) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let _held = conn.advisory_lock(&key).acquire().expect("a free lock");
        let limit = std::time::Duration::from_millis(10);
        let error = other.advisory_lock(&key).timeout(limit).acquire().map(drop).expect_err("it is taken");
        let text = error.to_string();
        let (_, how) = text.split_once("; to end that session: ").expect("how to end it");
        other.batch_execute(how).expect("a statement for this server");
        wait_for("the end of the session", || !other.is_connected(id));
    }
}

#[test]
fn the_script_prints_what_the_page_shows() {
    let [command, shown] = [
        blocks("From a key to what the server shows", "sh"),
        blocks("From a key to what the server shows", "text"),
    ]
    .map(|mut blocks| blocks.remove(0));
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = Command::new("sh")
        .args(["-c", &command])
        .current_dir(root)
        .output()
        .expect("it starts");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), shown.trim());
}
