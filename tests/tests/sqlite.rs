//! What holds for SQLite alone. The tests of `sync/` run on it as well. No server is needed here.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use dlock_diesel::{
    AdvisoryLock, AdvisoryLockExt, EnableAdvisoryLocks, Error, LockKey, Mode, SqliteLocksExt,
};
use dlock_tests::{
    Process, TestConnection, dlock_child, is_claimed_on_disk, is_locked_on_disk, wait_for,
    with_causes,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(60);

/// A folder with a database.
struct Database {
    folder: TempDir,
    path: PathBuf,
}

impl Database {
    fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let path = folder.path().join("app.db");
        let mut conn =
            SqliteConnection::establish(path.to_str().expect("UTF-8")).expect("a database");
        conn.batch_execute("CREATE TABLE t (n INTEGER NOT NULL)")
            .expect("a table");
        Self { folder, path }
    }

    fn url(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    fn open(&self) -> SqliteConnection {
        SqliteConnection::open_url(self.url())
    }

    /// The lock file.
    fn lock_file(&self) -> PathBuf {
        self.folder.path().join("app.db-dlock")
    }

    /// What is in the folder, and how long it is.
    fn listing(&self) -> BTreeSet<(String, u64)> {
        let entries = fs::read_dir(self.folder.path()).expect("a folder");
        entries
            .map(|entry| {
                let entry = entry.expect("an entry");
                let name = entry.file_name().into_string().expect("UTF-8");
                (name, entry.metadata().expect("a file").len())
            })
            .collect()
    }

    /// A process that says when it holds the lock.
    fn holder(&self, role: &str, key: &str) -> Process {
        let mut process =
            Process::spawn_without_servers(dlock_child!("--url", self.url(), role, key));
        let line = process.line();
        assert!(line.starts_with("connected "), "{line}");
        process
    }

    #[track_caller]
    fn is_locked(&self, key: &str) -> bool {
        let number = LockKey::from(key).to_sqlite().expect("a valid key");
        is_locked_on_disk(self.url(), number)
    }
}

#[track_caller]
fn assert_free(conn: &mut SqliteConnection, key: &str) {
    let lock = conn.advisory_lock(key).try_acquire().expect("a try");
    lock.unwrap_or_else(|| panic!("{key} is not free"))
        .release()
        .expect("a release");
}

#[track_caller]
fn assert_taken(conn: &mut SqliteConnection, key: &str) {
    let lock = conn.advisory_lock(key).try_acquire().expect("a try");
    assert!(lock.is_none(), "{key} is free");
}

// What a connection needs.

#[test]
fn a_connection_that_was_not_enabled_says_which_line_is_missing() {
    let database = Database::new();
    let mut conn = SqliteConnection::establish(database.url()).expect("a connection");
    let mut errors = vec![
        conn.advisory_lock("a").acquire().map(drop),
        conn.advisory_lock("a").try_acquire().map(drop),
        conn.advisory_lock("a").timeout(SHORT).acquire().map(drop),
        conn.advisory_lock("a").run(|_| Ok(())),
        conn.advisory_lock("a").transaction(|_| Ok(())),
    ];
    for error in errors.drain(..) {
        let error = error.expect_err("no locks");
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        assert!(
            with_causes(&error).contains("conn.enable_advisory_locks()"),
            "{error}"
        );
    }
    let error = conn.advisory_lock("a").holders().expect_err("no locks");
    assert!(
        with_causes(&error).contains("conn.enable_advisory_locks()"),
        "{error}"
    );
    // The connection is as good as before.
    conn.enable_advisory_locks().expect("SQLite");
    assert_free(&mut conn, "a");
}

mod sql {
    #[diesel::declare_sql_function]
    extern "SQL" {
        fn dlock_session() -> diesel::sql_types::BigInt;
        fn dlock_copy() -> diesel::sql_types::BigInt;
    }
}

#[test]
fn a_connection_that_another_version_has_made_ready_is_refused() {
    let database = Database::new();
    // Each version counts its sessions, so that two have the same ones.
    let mut open = database.open();
    let number = open.backend_id();
    for (session, copy) in [(number, None), (number, Some(1)), (-1, Some(1))] {
        let mut conn = SqliteConnection::establish(database.url()).expect("a connection");
        sql::dlock_session_utils::register_nondeterministic_impl(&conn, move || session)
            .expect("a function");
        if let Some(copy) = copy {
            sql::dlock_copy_utils::register_nondeterministic_impl(&conn, move || copy)
                .expect("a function");
        }
        let error = conn.enable_advisory_locks().expect_err("not its own");
        assert!(error.to_string().contains("another version"), "{error}");
    }
}

#[test]
fn enabling_twice_keeps_what_is_held() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let mut lock = conn.advisory_lock("a").acquire().expect("a free lock");
    for _ in 0..3 {
        lock.enable_advisory_locks().expect("SQLite");
        assert_taken(&mut other, "a");
        assert!(lock.is_held().expect("an answer"));
    }
    lock.release().expect("a release");
    assert_free(&mut other, "a");
}

#[test]
fn a_lock_takes_no_lock_of_sqlite() {
    let database = Database::new();
    let (mut conn, mut writer) = (database.open(), database.open());
    conn.batch_execute("PRAGMA busy_timeout = 0")
        .expect("a pragma");
    writer
        .batch_execute("BEGIN EXCLUSIVE")
        .expect("nobody else is there");
    assert!(
        conn.batch_execute("SELECT * FROM t").is_err(),
        "the database is locked"
    );
    let mut lock = conn
        .advisory_lock("a")
        .timeout(LONG)
        .acquire()
        .expect("a free lock");
    assert!(lock.is_held().expect("an answer"));
    assert_eq!(lock.holders().expect("an answer").len(), 1);
    lock.release().expect("a release");
    writer.batch_execute("ROLLBACK").expect("a rollback");
}

#[test]
fn a_pool_enables_each_connection() {
    let database = Database::new();
    let pool = Pool::builder()
        .max_size(3)
        .connection_customizer(Box::new(EnableAdvisoryLocks))
        .build(ConnectionManager::<SqliteConnection>::new(database.url()))
        .expect("a pool");
    let lock = AdvisoryLock::new(pool.get().expect("a connection"), "a")
        .acquire()
        .expect("a free lock");
    let mut second = pool.get().expect("a connection");
    assert!(
        second
            .advisory_lock("a")
            .try_acquire()
            .expect("a try")
            .is_none()
    );
    drop(lock);
    let lock = AdvisoryLock::new(second, "a").try_acquire().expect("a try");
    assert!(lock.is_some());
}

// To whom a lock belongs.

#[test]
fn a_leaked_guard_is_freed_with_its_connection() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    std::mem::forget(conn.advisory_lock("a").acquire().expect("a free lock"));
    std::mem::forget(
        conn.advisory_lock("b")
            .shared()
            .acquire()
            .expect("a free lock"),
    );
    assert_taken(&mut other, "a");
    assert!(database.is_locked("a") && database.is_locked("b"));
    assert_eq!(conn.number("SELECT 1"), Some(1));
    drop(conn);
    assert!(!database.is_locked("a") && !database.is_locked("b"));
    assert_free(&mut other, "a");
    assert_free(&mut other, "b");
}

#[test]
fn a_connection_that_is_closed_wakes_who_waits() {
    let database = Database::new();
    let mut conn = database.open();
    std::mem::forget(conn.advisory_lock("a").acquire().expect("a free lock"));
    let mut waiter = database.open();
    let id = waiter.backend_id();
    let thread = thread::spawn(move || {
        let lock = waiter.advisory_lock("a").timeout(LONG).acquire();
        (Instant::now(), lock.map(drop))
    });
    let mut other = database.open();
    wait_for("the waiter", || other.is_waiting(id));
    let closed = Instant::now();
    drop(conn);
    let (granted, lock) = thread.join().expect("no panic");
    lock.expect("the lock");
    assert!(
        granted - closed < Duration::from_millis(500),
        "{:?}",
        granted - closed
    );
}

#[test]
fn paths_that_differ_are_one_database() {
    let database = Database::new();
    let mut conn = database.open();
    let _lock = conn.advisory_lock("a").acquire().expect("a free lock");
    let link = database.folder.path().join("link.db");
    std::os::unix::fs::symlink(&database.path, &link).expect("a link");
    let folder = database.folder.path().display();
    for url in [
        format!("{folder}/./app.db"),
        format!("file:{folder}/app.db"),
        format!("sqlite://{folder}/app.db"),
        format!("{folder}/link.db"),
    ] {
        let mut other = SqliteConnection::open_url(&url);
        assert_taken(&mut other, "a");
        // Towards other processes, too.
        let file = url.ends_with("link.db") && folder_has(&database, "link.db-dlock");
        assert!(!file, "{url} has a lock file of its own");
    }
}

fn folder_has(database: &Database, name: &str) -> bool {
    database.listing().iter().any(|(entry, _)| entry == name)
}

#[test]
fn another_database_has_locks_of_its_own() {
    let (database, another) = (Database::new(), Database::new());
    let (mut conn, mut other) = (database.open(), another.open());
    let _lock = conn.advisory_lock("a").acquire().expect("a free lock");
    assert_free(&mut other, "a");
}

// Readers and writers.

/// Takes the lock in a thread, on a connection of its own, once it is granted says so, and keeps it until it is told.
fn in_thread(
    database: &Database,
    key: &'static str,
    mode: Mode,
) -> (i64, Receiver<()>, Sender<()>) {
    let mut conn = database.open();
    let id = conn.backend_id();
    let (say, said) = channel();
    let (tell, told) = channel::<()>();
    thread::spawn(move || {
        let lock = conn.advisory_lock(key);
        let lock = match mode {
            Mode::Exclusive => lock,
            Mode::Shared => lock.shared(),
        };
        let lock = lock.acquire();
        let _ = say.send(());
        let _ = told.recv_timeout(LONG);
        drop(lock);
    });
    (id, said, tell)
}

fn wait_until_waiting(id: i64) {
    wait_for("a waiter", || dlock_tests::is_waiting_here(id));
}

#[test]
fn a_writer_is_not_overtaken_by_readers_that_come_later() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let (writer, writes, end_writing) = in_thread(&database, "a", Mode::Exclusive);
    wait_until_waiting(writer);
    assert!(
        other
            .advisory_lock("a")
            .shared()
            .try_acquire()
            .expect("a try")
            .is_none()
    );
    let readers = [(); 2].map(|()| {
        let reader = in_thread(&database, "a", Mode::Shared);
        wait_until_waiting(reader.0);
        reader
    });
    drop(reading);
    writes.recv_timeout(LONG).expect("its turn");
    assert!(
        readers
            .iter()
            .all(|(_, reads, _)| reads.try_recv().is_err())
    );
    drop(end_writing);
    for (_, reads, _) in &readers {
        reads.recv_timeout(LONG).expect("both at once");
    }
}

#[test]
fn who_holds_a_lock_gets_it_again_before_those_who_wait() {
    let database = Database::new();
    let mut conn = database.open();
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let (writer, writes, _end) = in_thread(&database, "a", Mode::Exclusive);
    wait_until_waiting(writer);
    for _ in 0..2 {
        let again = reading
            .advisory_lock("a")
            .shared()
            .try_acquire()
            .expect("a try");
        drop(again.expect("it is its own"));
        let alone = reading.advisory_lock("a").try_acquire().expect("a try");
        drop(alone.expect("nobody else reads"));
    }
    assert!(writes.try_recv().is_err());
    drop(reading);
    writes.recv_timeout(LONG).expect("its turn");
}

#[test]
fn shared_and_exclusive_holds_of_a_connection_are_released_each_on_its_own() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut writing = reading
        .advisory_lock("a")
        .acquire()
        .expect("nobody else reads");
    let inner = writing
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("its own");
    let mut is_shared = || {
        other
            .advisory_lock("a")
            .shared()
            .try_acquire()
            .expect("a try")
            .is_some()
    };
    assert!(!is_shared());
    drop(inner);
    assert!(!is_shared());
    writing.release().expect("a release");
    assert!(is_shared());
    assert!(reading.is_held().expect("an answer"));
    reading.release().expect("a release");
    assert_free(&mut other, "a");
}

#[test]
fn two_connections_that_both_upgrade_a_shared_lock_are_a_deadlock() {
    let database = Database::new();
    let (mut one, mut two) = (database.open(), database.open());
    let id = one.backend_id();
    let mut reading = two
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let thread = thread::spawn(move || {
        let mut reading = one.advisory_lock("a").shared().acquire().expect("shared");
        reading.advisory_lock("a").timeout(LONG).acquire().map(drop)
    });
    wait_until_waiting(id);
    let error = reading
        .advisory_lock("a")
        .timeout(LONG)
        .acquire()
        .map(drop)
        .expect_err("a deadlock");
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    assert!(reading.is_held().expect("an answer"));
    drop(reading);
    thread.join().expect("no panic").expect("the lock");
}

/// SQLite reads the schema with a connection's first statement, for which it needs a lock of its own.
#[test]
fn a_connection_is_made_ready_while_others_write_and_then_needs_nothing_of_the_database() {
    let database = Database::new();
    let mut writer = database.open();
    writer.execute_sql("BEGIN EXCLUSIVE");
    let mut conn = SqliteConnection::establish(database.url()).expect("a connection");
    let begin = Instant::now();
    let mut conn = thread::scope(|scope| {
        let ready = scope.spawn(move || {
            conn.enable_advisory_locks().expect("the writer ends");
            conn
        });
        thread::sleep(5 * SHORT);
        writer.execute_sql("COMMIT");
        ready.join().expect("no panic")
    });
    assert!(begin.elapsed() >= 5 * SHORT);
    writer.execute_sql("BEGIN EXCLUSIVE");
    for _ in 0..3 {
        let lock = conn.advisory_lock("a").acquire().expect("a free lock");
        lock.release().expect("a release");
    }
    writer.execute_sql("COMMIT");
}

#[test]
fn readers_that_relieve_each_other_do_not_starve_a_writer_of_another_process() {
    let database = Database::new();
    let url = database.url().to_owned();
    let reader =
        move || AdvisoryLock::new(Box::new(SqliteConnection::open_url(&url)), "a").shared();
    let end = Arc::new(AtomicBool::new(false));
    let mut held = reader().acquire().expect("a free lock");
    let readers = thread::spawn({
        let end = Arc::clone(&end);
        move || {
            let mut refused = 0;
            while !end.load(Ordering::Relaxed) {
                // The next one comes before this one goes, if it may.
                match reader()
                    .timeout(Duration::from_millis(20))
                    .try_acquire()
                    .expect("a try")
                {
                    Some(next) => held = next,
                    None => {
                        refused += 1;
                        drop(held);
                        held = reader().acquire().expect("the lock");
                    }
                }
            }
            refused
        }
    });
    for _ in 0..3 {
        let mut writer = database.holder("hold", "a");
        writer.expect_line("acquired");
        writer.send("");
        writer.expect_line("released");
    }
    end.store(true, Ordering::Relaxed);
    assert!(readers.join().expect("no panic") > 0);
}

/// Processes that read again and again, each for another time, so that they never all let go.
fn readers(database: &Database, key: &str, processes: usize) -> Vec<Process> {
    let reader = |process: usize| {
        let (url, millis) = (database.url(), 20 + 7 * process);
        let command = dlock_child!("--url", url, "read", key, "--millis", millis.to_string());
        let mut process = Process::spawn_without_servers(command);
        assert!(process.line().starts_with("connected "));
        process.expect_line("reading");
        process
    };
    (0..processes).map(reader).collect()
}

/// Waits until a process waits for readers.
fn wait_until_claimed(database: &Database, key: &str) {
    let number = LockKey::from(key).to_sqlite().expect("a valid key");
    wait_for("a writer that waits for readers", || {
        is_claimed_on_disk(database.url(), number)
    });
}

/// Ends them, and tells how often each has read.
fn end_reading(readers: &mut [Process]) -> Vec<u64> {
    for reader in &mut *readers {
        reader.send("");
    }
    let read = |reader: &mut Process| {
        let line = reader.line();
        let count = line.strip_prefix("read ").expect("a count");
        count.parse().expect("a number")
    };
    readers.iter_mut().map(read).collect()
}

#[test]
fn readers_of_three_and_more_processes_do_not_starve_a_writer_of_another() {
    for processes in [3, 4, 8] {
        let database = Database::new();
        let mut readers = readers(&database, "a", processes);
        let mut conn = database.open();
        let begin = Instant::now();
        let times = (0..20).map(|_| {
            thread::sleep(SHORT);
            let begin = Instant::now();
            let lock = conn
                .advisory_lock("a")
                .timeout(Duration::from_secs(8))
                .acquire();
            lock.unwrap_or_else(|error| panic!("{processes} processes: {error}"))
                .release()
                .expect("a release");
            begin.elapsed()
        });
        show(
            &format!("a writer among {processes} processes that read"),
            times.collect(),
        );
        let counts = end_reading(&mut readers);
        println!(
            "meanwhile they read {counts:?} times in {:?}",
            begin.elapsed()
        );
        assert!(counts.iter().all(|count| *count >= 10), "{counts:?}");
    }
}

#[test]
fn readers_of_other_processes_do_not_starve_who_holds_the_lock_and_wants_it_alone() {
    let database = Database::new();
    let mut readers = readers(&database, "a", 4);
    let mut conn = database.open();
    for _ in 0..5 {
        let mut reading = conn
            .advisory_lock("a")
            .shared()
            .acquire()
            .expect("the lock");
        let alone = reading
            .advisory_lock("a")
            .timeout(Duration::from_secs(8))
            .acquire();
        alone.expect("no reader").release().expect("a release");
        // It has what it waited for, so that others read, too.
        let mut reader = database.holder("hold-shared", "a");
        reader.expect_line("acquired");
        assert!(reading.is_held().expect("an answer"));
    }
    end_reading(&mut readers);
}

#[test]
fn reader_threads_of_a_process_do_not_starve_a_writer_of_another() {
    let database = Database::new();
    let (begin, end) = (Instant::now(), AtomicBool::new(false));
    thread::scope(|scope| {
        for millis in [3, 4, 5] {
            let (mut conn, end) = (database.open(), &end);
            scope.spawn(move || {
                while !end.load(Ordering::Relaxed) && begin.elapsed() < LONG {
                    let lock = conn.advisory_lock("a").shared().acquire();
                    thread::sleep(Duration::from_millis(millis));
                    drop(lock.expect("the lock"));
                }
            });
        }
        let mut writer = database.holder("stamp", "a");
        for _ in 0..100 {
            assert!(writer.line().starts_with("acquired "));
            writer.send("");
            assert!(writer.line().starts_with("released "));
            writer.send("");
        }
        end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn writers_of_other_processes_do_not_starve_a_reader() {
    let database = Database::new();
    let counters = TempDir::new().expect("a temporary folder");
    fs::write(counters.path().join("0"), "0").expect("a file");
    let folder = counters.path().to_str().expect("UTF-8");
    let mut writers = [(); 3].map(|()| {
        let mut process = Process::spawn_without_servers(dlock_child!(
            "--url",
            database.url(),
            "count-in-files",
            folder,
            "--files",
            "1",
            "--millis",
            "2000"
        ));
        assert!(process.line().starts_with("connected "));
        process
    });
    for writer in &mut writers {
        writer.send("");
    }
    let mut conn = database.open();
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < Duration::from_millis(1_800) {
        let begin = Instant::now();
        let lock = conn
            .advisory_lock("0")
            .shared()
            .acquire()
            .expect("the lock");
        times.push(begin.elapsed());
        thread::sleep(Duration::from_millis(1));
        drop(lock);
    }
    let reads = times.len();
    show("a reader among 3 processes that write", times);
    let writes = writers.each_mut().map(|writer| writer.line());
    println!("meanwhile they wrote: {writes:?}");
    assert!(reads >= 20, "{reads}");
}

#[test]
fn readers_wait_behind_one_writer_not_behind_all() {
    let database = Database::new();
    let mut conn = database.open();
    let reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let number = LockKey::from("a").to_sqlite().expect("a valid key");
    let mut writers = [(); 3].map(|()| database.holder("hold", "a"));
    for writer in &mut writers {
        wait_for("the writer to wait", || {
            SqliteConnection::is_waiting(&mut database.open(), writer.id().into())
        });
    }
    assert!(is_claimed_on_disk(database.url(), number));
    drop(reading);
    wait_for("the turn of all that wait", || {
        !is_claimed_on_disk(database.url(), number)
    });
    assert!(database.is_locked("a"));
}

#[test]
fn who_reads_already_reads_again_while_a_writer_of_another_process_waits() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut writer = database.holder("hold", "a");
    wait_until_claimed(&database, "a");
    // As on PostgreSQL: who comes new waits behind the writer, and a try fails.
    let mut is_shared = || {
        let lock = other.advisory_lock("a").shared().try_acquire();
        lock.expect("a try").is_some()
    };
    assert!(!is_shared());
    let mut reader = database.holder("hold-shared", "a");
    let again = reading
        .advisory_lock("a")
        .shared()
        .timeout(LONG)
        .acquire()
        .expect("it is its own");
    again.release().expect("its own");
    wait_until_claimed(&database, "a");
    assert!(!is_shared());
    assert!(reader.is_silent_for(Duration::from_millis(300)));
    drop(reading);
    writer.expect_line("acquired");
    writer.send("");
    writer.expect_line("released");
    reader.expect_line("acquired");
    assert!(is_shared());
}

/// Without another reader that waits: after it was held alone it may be that one's turn.
#[test]
fn who_reads_already_may_hold_it_alone_while_a_writer_of_another_process_waits() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut writer = database.holder("hold", "a");
    wait_until_claimed(&database, "a");
    let mut again = reading
        .advisory_lock("a")
        .shared()
        .timeout(LONG)
        .acquire()
        .expect("it is its own");
    let alone = again.advisory_lock("a").try_acquire().expect("a try");
    alone
        .expect("nobody else reads")
        .release()
        .expect("its own");
    again.release().expect("its own");
    wait_until_claimed(&database, "a");
    let shared = other.advisory_lock("a").shared().try_acquire();
    assert!(shared.expect("a try").is_none());
    drop(reading);
    writer.expect_line("acquired");
}

#[test]
fn a_writer_that_waits_no_more_lets_readers_in() {
    let database = Database::new();
    let mut conn = database.open();
    let mut reading = database.holder("hold-shared", "a");
    reading.expect_line("acquired");

    let mut killed = database.holder("hold", "a");
    wait_until_claimed(&database, "a");
    let mut reader = database.holder("hold-shared", "a");
    assert!(reader.is_silent_for(Duration::from_millis(300)));
    killed.kill9();
    reader.expect_line("acquired");

    let writer = thread::spawn({
        let mut conn = database.open();
        let limit = Duration::from_secs(2);
        move || conn.advisory_lock("a").timeout(limit).acquire().map(drop)
    });
    wait_until_claimed(&database, "a");
    let mut reader = database.holder("hold-shared", "a");
    reader.expect_line("acquired");
    let result = writer.join().expect("no panic");
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");

    let mut shared = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("the lock");
    let alone = shared.advisory_lock("a").timeout(SHORT).acquire();
    let alone = alone.map(drop);
    assert!(matches!(alone, Err(Error::Timeout { .. })), "{alone:?}");
    let mut reader = database.holder("hold-shared", "a");
    reader.expect_line("acquired");
    assert!(shared.is_held().expect("an answer"));
}

/// The lock to be read, on a connection of its own.
fn database_lock(database: &Database) -> AdvisoryLock<Box<SqliteConnection>> {
    AdvisoryLock::new(Box::new(database.open()), "a").shared()
}

#[test]
fn a_writer_that_is_stopped_while_it_waits_keeps_no_readers_out_of_a_free_lock() {
    let database = Database::new();
    let mut conn = database.open();
    let reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut writer = database.holder("hold", "a");
    wait_until_claimed(&database, "a");
    let id = Pid::from_raw(writer.id().try_into().expect("a process id"));
    kill(id, Signal::SIGSTOP).expect("it runs");
    drop(reading);
    for _ in 0..3 {
        let lock = conn
            .advisory_lock("a")
            .shared()
            .timeout(Duration::from_secs(8))
            .acquire();
        lock.expect("nobody takes it").release().expect("a release");
    }
    // Who only tries waits for nothing, and gets it sometime. Then readers share it.
    let mut lock = None;
    let begin = Instant::now();
    while lock.is_none() {
        assert!(begin.elapsed() < Duration::from_secs(8));
        thread::sleep(Duration::from_millis(20));
        lock = database_lock(&database).try_acquire().expect("a try");
    }
    let other = database_lock(&database).try_acquire().expect("a try");
    drop((lock, other.expect("it is shared")));
    kill(id, Signal::SIGCONT).expect("it is there");
    writer.expect_line("acquired");
}

#[test]
fn who_holds_what_others_wait_for_is_not_kept_from_reading_by_a_writer_that_waits() {
    let database = Database::new();
    let (mut conn, mut other) = (database.open(), database.open());
    let mut x = conn
        .advisory_lock("x")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut holder_of_y = database.holder("hold-shared", "y");
    holder_of_y.expect_line("acquired");
    let mut writer_of_y = database.holder("hold", "y");
    wait_until_claimed(&database, "y");
    let y = x.advisory_lock("y").shared().try_acquire();
    assert!(y.expect("a try").is_none(), "the writer goes first");

    // Would they wait for y, and the holder of y wait for x likewise, this would have no end.
    let mut writer_of_x = database.holder("hold", "x");
    wait_until_claimed(&database, "x");
    let y = x.advisory_lock("y").shared().timeout(LONG).acquire();
    drop(y.expect("only readers hold it"));
    let y = other.advisory_lock("y").shared().try_acquire();
    assert!(y.expect("a try").is_none(), "the writer goes first");

    drop(x);
    writer_of_x.expect_line("acquired");
    holder_of_y.send("");
    writer_of_y.expect_line("acquired");
}

#[test]
fn a_connection_that_takes_a_lock_again_and_again_leaves_it_to_other_processes() {
    let database = Database::new();
    let counters = TempDir::new().expect("a temporary folder");
    fs::write(counters.path().join("0"), "0").expect("a file");
    let folder = counters.path().to_str().expect("UTF-8");
    let mut process = Process::spawn_without_servers(dlock_child!(
        "--url",
        database.url(),
        "count-in-files",
        folder,
        "--files",
        "1",
        "--millis",
        "2000"
    ));
    assert!(process.line().starts_with("connected "));
    let mut conn = database.open();
    let number = LockKey::from("0").to_sqlite().expect("a valid key");
    // In one statement: the lock is free for a moment only.
    let again = format!(
        "SELECT CASE WHEN dlock_release({number}, -1) >= 0 THEN dlock_acquire({number}, 1, -1, -1) END"
    );
    let begin = Instant::now();
    process.send("");
    let mut own = 0;
    while begin.elapsed() < Duration::from_millis(1_900) {
        assert_eq!(conn.number(&again), Some(1));
        thread::sleep(Duration::from_millis(5));
        own += 1;
    }
    drop(conn);
    let line = process.line();
    let others: u64 = line
        .strip_prefix("counted ")
        .expect("a count")
        .parse()
        .expect("a number");
    println!("in 2 s, each for 5 ms: {own} times here, {others} times in the other process");
    assert!(others >= 60 && own >= 30, "{own}, {others}");
}

#[test]
fn guards_whose_connections_were_swapped_release_nothing() {
    let database = Database::new();
    let (mut one, mut two, mut other) = (database.open(), database.open(), database.open());
    let mut a = one.advisory_lock("a").acquire().expect("a free lock");
    let mut b = two.advisory_lock("b").acquire().expect("a free lock");
    std::mem::swap(&mut *a, &mut *b);
    assert!(!a.is_held().expect("an answer"));
    assert!(matches!(a.release(), Err(Error::NotHeld { .. })));
    assert!(matches!(b.release(), Err(Error::NotHeld { .. })));
    assert_taken(&mut other, "a");
    assert_taken(&mut other, "b");
    drop((one, two));
    assert_free(&mut other, "a");
    assert_free(&mut other, "b");
}

// Databases that are no files.

/// Who ends in SQL the transaction that Diesel has begun breaks the connection, as far as Diesel knows. It goes on all the
/// same, and so does the work under the outer guards.
#[test]
fn a_guard_that_breaks_the_connection_frees_its_own_hold_and_no_outer_one() {
    let database = Database::new();
    let mut other = database.open();
    for ends_with in ["an error", "a drop", "a release"] {
        let mut conn = database.open();
        let mut outer = conn.advisory_lock("a").acquire().expect("a free lock");
        let lock = outer.advisory_lock("b");
        if ends_with == "an error" {
            let result: Result<(), Error> = lock.transaction(|conn| {
                conn.batch_execute("ROLLBACK")?;
                Err(diesel::result::Error::RollbackTransaction.into())
            });
            result.expect_err("the error");
        } else {
            let mut inner = lock.acquire().expect("a free lock");
            AnsiTransactionManager::begin_transaction(&mut *inner).expect("it begins");
            inner.execute_sql("ROLLBACK");
            if ends_with == "a release" {
                let released = inner.release().map(drop);
                assert!(matches!(released, Err(Error::Database(_))), "{released:?}");
            }
        }
        assert_free(&mut other, "b");
        assert!(outer.is_held().expect("an answer"), "{ends_with}");
        assert_taken(&mut other, "a");

        // Nor is it free as long as there is a transaction.
        outer.execute_sql("BEGIN; INSERT INTO t VALUES (1)");
        drop(outer);
        assert_free(&mut other, "a");
        other.execute_sql("BEGIN IMMEDIATE; ROLLBACK");
        assert_eq!(other.number("SELECT COUNT(*) FROM t"), Some(0));
        assert!(AnsiTransactionManager::is_broken_transaction_manager(
            &mut conn
        ));
    }
}

#[test]
fn databases_in_memory_share_the_locks_of_the_process() {
    let urls = [
        ":memory:",
        "file:dlock_shared?mode=memory&cache=shared",
        "file:/dlock_vfs?vfs=memdb",
        "",
    ];
    for (url, key) in urls
        .iter()
        .zip(["memory a", "memory b", "memory c", "memory d"])
    {
        let (mut conn, mut other) = (
            SqliteConnection::open_url(url),
            SqliteConnection::open_url(url),
        );
        let lock = conn.advisory_lock(key).acquire().expect("a free lock");
        assert_taken(&mut other, key);
        let mut elsewhere = SqliteConnection::open_url(":memory:");
        assert_taken(&mut elsewhere, key);
        drop(lock);
        assert_free(&mut other, key);
        let lock = conn
            .advisory_lock(key)
            .shared()
            .acquire()
            .expect("a free lock");
        let shared = other
            .advisory_lock(key)
            .shared()
            .try_acquire()
            .expect("a try");
        assert!(shared.is_some());
        drop((lock, shared));
        std::mem::forget(conn.advisory_lock(key).acquire().expect("a free lock"));
        drop(conn);
        assert_free(&mut other, key);
    }
}

// What it leaves alone.

#[test]
fn others_write_while_a_lock_is_held_across_transactions() {
    let database = Database::new();
    let mut holder = database.open();
    let mut lock = holder.advisory_lock("a").acquire().expect("a free lock");
    let mut writer = database.open();
    writer
        .batch_execute("PRAGMA busy_timeout = 0")
        .expect("a pragma");
    for n in 0..10 {
        lock.transaction(|conn| conn.batch_execute("INSERT INTO t VALUES (1)"))
            .expect("a write");
        writer
            .transaction(|conn| conn.batch_execute("INSERT INTO t VALUES (2)"))
            .expect("a write of somebody else");
        writer
            .batch_execute("VACUUM")
            .expect("nobody has the database locked");
        assert_eq!(lock.number("SELECT COUNT(*) FROM t"), Some(2 * n + 2));
        assert!(lock.is_held().expect("an answer"));
    }
    assert_taken(&mut writer, "a");
}

#[test]
fn others_write_while_a_lock_is_waited_for() {
    let database = Database::new();
    let mut holder = database.open();
    let lock = holder.advisory_lock("a").acquire().expect("a free lock");
    let mut waiter = database.open();
    let id = waiter.backend_id();
    let waiting = thread::spawn(move || waiter.advisory_lock("a").acquire().map(drop));
    let mut writer = database.open();
    wait_for("the waiter", || writer.is_waiting(id));
    writer
        .batch_execute("PRAGMA busy_timeout = 0")
        .expect("a pragma");
    for _ in 0..10 {
        // It needs all locks of SQLite, and that nobody reads.
        writer
            .batch_execute("BEGIN EXCLUSIVE; INSERT INTO t VALUES (2); COMMIT; VACUUM")
            .expect("a write");
    }
    drop(lock);
    waiting.join().expect("no panic").expect("the lock");
}

#[test]
fn the_database_is_not_touched() {
    let database = Database::new();
    let before = fs::read(&database.path).expect("the database");
    let modified = |path: &Path| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .expect("a file")
    };
    let modified_before = modified(&database.path);
    let (mut conn, mut other) = (database.open(), database.open());
    for key in ["a", "b"] {
        let lock = conn.advisory_lock(key).acquire().expect("a free lock");
        assert_taken(&mut other, key);
        drop(lock);
    }
    assert_eq!(fs::read(&database.path).expect("the database"), before);
    assert_eq!(modified(&database.path), modified_before);
}

#[test]
fn one_empty_file_is_all_that_ten_thousand_keys_leave() {
    let database = Database::new();
    let before = database.listing();
    let mut conn = database.open();
    assert_eq!(
        database.listing(),
        before,
        "nothing appears before the first lock"
    );
    for n in 0..10_000 {
        conn.advisory_lock(format!("key {n}"))
            .run(|_| Ok::<_, Error>(()))
            .expect("a free lock");
    }
    // Held at once.
    for n in 0..1_000 {
        std::mem::forget(conn.advisory_lock(n).acquire().expect("a free lock"));
    }
    let mut expected = before;
    expected.insert(("app.db-dlock".into(), 0));
    assert_eq!(database.listing(), expected);
    drop(conn);
    assert_eq!(database.listing(), expected);
}

#[test]
fn the_lock_file_is_for_those_who_may_use_the_database() {
    let database = Database::new();
    fs::set_permissions(&database.path, Permissions::from_mode(0o660)).expect("permissions");
    assert_free(&mut database.open(), "a");
    let mode = fs::metadata(database.lock_file())
        .expect("the lock file")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o660);
}

// Processes.

#[test]
fn a_lock_of_another_process_excludes_and_is_freed_by_its_release() {
    let database = Database::new();
    let mut conn = database.open();
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    assert_taken(&mut conn, "a");
    let error = conn
        .advisory_lock("a")
        .timeout(SHORT)
        .acquire()
        .map(drop)
        .expect_err("taken");
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert_taken(&mut conn, "a");
    let is_shared = conn
        .advisory_lock("a")
        .shared()
        .try_acquire()
        .expect("a try")
        .is_some();
    assert!(!is_shared);
    process.send("");
    process.expect_line("released");
    assert_free(&mut conn, "a");
}

#[test]
fn readers_of_two_processes_share_and_exclude_writers() {
    let database = Database::new();
    let mut process = database.holder("hold-shared", "a");
    process.expect_line("acquired");
    let (mut conn, mut other) = (database.open(), database.open());
    let reader = conn
        .advisory_lock("a")
        .shared()
        .try_acquire()
        .expect("a try")
        .expect("shared");
    assert_taken(&mut other, "a");
    process.send("");
    process.expect_line("released");
    assert_taken(&mut other, "a");
    drop(reader);
    assert_free(&mut other, "a");
}

#[test]
fn a_downgrade_lets_readers_of_other_processes_in_and_no_writers() {
    let database = Database::new();
    let mut conn = database.open();
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let writing = reading
        .advisory_lock("a")
        .acquire()
        .expect("nobody else reads");
    let mut reader = database.holder("hold-shared", "a");
    assert!(reader.is_silent_for(Duration::from_millis(300)));
    drop(writing);
    reader.expect_line("acquired");
    let mut writer = database.holder("hold", "a");
    reader.send("");
    reader.expect_line("released");
    assert!(writer.is_silent_for(Duration::from_millis(300)));
    assert!(reading.is_held().expect("an answer"));
    drop(reading);
    writer.expect_line("acquired");
}

#[test]
fn sigkill_frees_what_a_process_holds_at_once() {
    let database = Database::new();
    let mut conn = database.open();
    for role in ["hold", "hold-shared"] {
        let mut process = database.holder(role, "a");
        process.expect_line("acquired");
        assert!(database.is_locked("a"));
        assert_taken(&mut conn, "a");
        process.kill9();
        // It has been waited for: the kernel has closed its files.
        assert!(!database.is_locked("a"));
        assert_free(&mut conn, "a");
    }
}

#[test]
fn sigkill_of_a_holder_hands_the_lock_to_a_waiter() {
    let database = Database::new();
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    let mut waiter = database.holder("hold", "a");
    let mut conn = database.open();
    assert!(waiter.is_silent_for(Duration::from_millis(200)));
    process.kill9();
    waiter.expect_line("acquired");
    assert_taken(&mut conn, "a");
    // A waiter that is killed leaves nothing behind.
    let mut killed = database.holder("hold", "a");
    assert!(killed.is_silent_for(Duration::from_millis(50)));
    killed.kill9();
    waiter.send("");
    waiter.expect_line("released");
    assert_free(&mut conn, "a");
}

#[test]
fn a_program_that_a_holder_starts_does_not_keep_the_lock() {
    let database = Database::new();
    let mut conn = database.open();
    let lock = conn.advisory_lock("a").acquire().expect("a free lock");
    let mut sleeping = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .expect("a program");
    let files = fs::read_dir(format!("/proc/{}/fd", sleeping.id())).expect("its files");
    let names: Vec<_> = files
        .flatten()
        .filter_map(|file| fs::read_link(file.path()).ok())
        .collect();
    assert!(!names.contains(&database.lock_file()), "{names:?}");
    drop(lock);
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    sleeping.kill().expect("it runs");
    sleeping.wait().expect("it ends");
}

#[test]
fn opening_and_closing_the_lock_file_in_the_same_process_frees_nothing() {
    let database = Database::new();
    let mut conn = database.open();
    let mut lock = conn.advisory_lock("a").acquire().expect("a free lock");
    drop(fs::File::open(database.lock_file()).expect("the lock file"));
    let mut process = database.holder("hold", "a");
    assert!(process.is_silent_for(Duration::from_millis(200)));
    assert!(lock.is_held().expect("an answer"));
    drop(lock);
    process.expect_line("acquired");
}

#[test]
fn two_processes_that_both_upgrade_a_shared_lock_are_a_deadlock() {
    let database = Database::new();
    let mut conn = database.open();
    let mut reading = conn
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let mut process = database.holder("upgrade", "a");
    process.expect_line("shared");
    process.send("");
    process.expect_line("upgrading");
    wait_for("the other process to wait", || {
        reading.is_waiting(process.id().into())
    });
    thread::sleep(Duration::from_millis(50));
    // A try is no deadlock, nor is what comes back in time.
    assert!(
        reading
            .advisory_lock("a")
            .try_acquire()
            .expect("a try")
            .is_none()
    );
    let error = reading
        .advisory_lock("a")
        .timeout(LONG)
        .acquire()
        .map(drop)
        .expect_err("a deadlock");
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    assert!(reading.is_held().expect("an answer"));
    drop(reading);
    process.expect_line("acquired");
}

#[test]
fn a_thread_that_waits_for_itself_on_other_connections_ends_with_its_limit() {
    let (one, two) = (Database::new(), Database::new());
    let (mut first, mut second) = (one.open(), two.open());
    let (mut first_in_two, mut second_in_one) = (two.open(), one.open());
    let _a = first.advisory_lock("a").acquire().expect("a free lock");
    let _b = second.advisory_lock("b").acquire().expect("a free lock");
    // Two connections more, so no circle: whether a thread has two is not known.
    let error = first_in_two
        .advisory_lock("b")
        .timeout(SHORT)
        .acquire()
        .map(drop);
    assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
    let error = second_in_one
        .advisory_lock("a")
        .timeout(SHORT)
        .acquire()
        .map(drop);
    assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
}

#[test]
fn sixteen_processes_on_four_keys_count_exactly_for_ten_seconds() {
    const PROCESSES: usize = 16;
    const FILES: usize = 4;
    let database = Database::new();
    let counters = TempDir::new().expect("a temporary folder");
    for file in 0..FILES {
        fs::write(counters.path().join(file.to_string()), "0").expect("a file");
    }
    let folder = counters.path().to_str().expect("UTF-8");
    let mut processes: Vec<Process> = (0..PROCESSES)
        .map(|_| {
            let mut process = Process::spawn_without_servers(dlock_child!(
                "--url",
                database.url(),
                "count-in-files",
                folder,
                "--files",
                FILES.to_string(),
                "--millis",
                "10000"
            ));
            assert!(process.line().starts_with("connected "));
            process
        })
        .collect();
    for process in &mut processes {
        process.send("");
    }
    let mut counted = [0u64; FILES];
    let mut least = u64::MAX;
    for process in &mut processes {
        let line = process.line();
        let counts = line.strip_prefix("counted ").expect("counts");
        let counts: Vec<u64> = counts
            .split(' ')
            .map(|count| count.parse().expect("a number"))
            .collect();
        least = least.min(counts.iter().sum());
        for (sum, count) in counted.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    for (file, counted) in counted.iter().enumerate() {
        let number = fs::read_to_string(counters.path().join(file.to_string())).expect("the file");
        assert_eq!(number, counted.to_string(), "file {file}");
        assert!(*counted > 100, "file {file}: {counted}");
    }
    println!(
        "{counted:?} increments in 10 s by {PROCESSES} processes, of which none did less than {least}"
    );
    assert!(least > 0, "a process starved");
}

#[test]
fn threads_and_processes_share_a_key_fairly_enough() {
    const THREADS: usize = 4;
    let database = Database::new();
    let counters = TempDir::new().expect("a temporary folder");
    fs::write(counters.path().join("0"), "0").expect("a file");
    let folder = counters.path().to_str().expect("UTF-8");
    let mut processes: Vec<Process> = (0..2)
        .map(|_| {
            let mut process = Process::spawn_without_servers(dlock_child!(
                "--url",
                database.url(),
                "count-in-files",
                folder,
                "--files",
                "1",
                "--millis",
                "3000"
            ));
            assert!(process.line().starts_with("connected "));
            process
        })
        .collect();
    for process in &mut processes {
        process.send("");
    }
    let begin = Instant::now();
    let path = counters.path().join("0");
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (mut conn, path) = (database.open(), path.clone());
            thread::spawn(move || {
                let mut count = 0u64;
                while begin.elapsed() < Duration::from_secs(3) {
                    let lock = conn.advisory_lock("0").acquire().expect("the lock");
                    let number: u64 = fs::read_to_string(&path)
                        .expect("the file")
                        .parse()
                        .expect("a number");
                    fs::write(&path, (number + 1).to_string()).expect("the file");
                    drop(lock);
                    count += 1;
                }
                count
            })
        })
        .collect();
    let by_threads: Vec<u64> = threads
        .into_iter()
        .map(|thread| thread.join().expect("no panic"))
        .collect();
    let by_processes: Vec<u64> = processes
        .iter_mut()
        .map(|process| {
            let line = process.line();
            line.strip_prefix("counted ")
                .expect("a count")
                .parse()
                .expect("a number")
        })
        .collect();
    println!(
        "in 3 s: {by_threads:?} by the threads of a process, {by_processes:?} by two other processes"
    );
    let all: u64 = by_threads.iter().chain(&by_processes).sum();
    assert_eq!(
        fs::read_to_string(&path).expect("the file"),
        all.to_string()
    );
    // Without turns, who has it takes it again before the others ask.
    assert!(
        by_processes.iter().all(|count| *count >= 20),
        "{by_processes:?}"
    );
    assert!(
        by_threads.iter().all(|count| *count >= 20),
        "{by_threads:?}"
    );
}

// How soon.

fn nanos() -> i128 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.expect("after 1970").as_nanos() as i128
}

fn show(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let median = times[times.len() / 2];
    println!(
        "{what}: median {median:?}, 9 of 10 within {:?}, at most {:?}, of {}",
        times[times.len() * 9 / 10],
        times[times.len() - 1],
        times.len()
    );
    median
}

#[test]
fn within_a_process_who_waits_is_woken() {
    let database = Database::new();
    let mut conn = database.open();
    let (mut times, mut sleeps) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let lock = conn.advisory_lock("a").acquire().expect("a free lock");
        let mut waiter = database.open();
        let id = waiter.backend_id();
        let thread = thread::spawn(move || {
            let before = sleeps_of_this_thread();
            let lock = waiter.advisory_lock("a").acquire().expect("the lock");
            let granted = Instant::now();
            let sleeps = sleeps_of_this_thread() - before;
            drop(lock);
            (granted, sleeps)
        });
        wait_for("the waiter", || dlock_tests::is_waiting_here(id));
        thread::sleep(Duration::from_millis(20));
        let released = Instant::now();
        drop(lock);
        let (granted, slept) = thread.join().expect("no panic");
        times.push(granted - released);
        sleeps.push(slept);
    }
    show("hand-over within a process", times);
    // One who asks again and again would have slept dozens of times.
    sleeps.sort_unstable();
    assert!(sleeps[sleeps.len() / 2] <= 8, "{sleeps:?}");
}

/// How often this thread has given its processor up of its own accord.
fn sleeps_of_this_thread() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").expect("Linux tells");
    let sleeps = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    sleeps
        .and_then(|number| number.trim().parse().ok())
        .expect("a number")
}

#[test]
fn who_waits_for_another_process_is_in_nobodys_way() {
    let database = Database::new();
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    let waiters = [(); 3].map(|()| {
        let waiter = in_thread(&database, "a", Mode::Shared);
        wait_until_waiting(waiter.0);
        waiter
    });
    // They ask seldom by now.
    thread::sleep(Duration::from_millis(300));
    let mut conn = database.open();
    let begin = Instant::now();
    for _ in 0..200 {
        conn.advisory_lock("b")
            .run(|_| Ok::<_, Error>(()))
            .expect("a free lock");
    }
    let each = begin.elapsed() / 200;
    println!("a free lock is taken and released in {each:?}");
    assert!(each < Duration::from_millis(3), "{each:?}");
    process.send("");
    for (_, granted, _) in &waiters {
        granted.recv_timeout(LONG).expect("the lock");
    }
}

#[test]
fn between_processes_it_takes_milliseconds() {
    let database = Database::new();
    let mut conn = database.open();
    let mut process = database.holder("stamp", "a");
    for waited in [1, 20, 100, 600] {
        let times = (0..5_000 / (waited + 100)).map(|_| {
            assert!(process.line().starts_with("acquired "));
            process.send("");
            assert!(process.line().starts_with("released "));
            let lock = conn
                .advisory_lock("a")
                .timeout(LONG)
                .acquire()
                .expect("the lock");
            process.send("");
            wait_for("the other process to wait", || {
                let path = database.url();
                let number = LockKey::from("a").to_sqlite().expect("a valid key");
                dlock_tests::is_awaited_on_disk(path, number)
            });
            thread::sleep(Duration::from_millis(waited));
            let released = nanos();
            drop(lock);
            let line = process.line();
            let acquired: i128 = line
                .strip_prefix("acquired ")
                .expect("a time")
                .parse()
                .expect("a number");
            process.send("");
            assert!(process.line().starts_with("released "));
            process.send("");
            Duration::from_nanos((acquired - released).try_into().unwrap_or_default())
        });
        let median = show(
            &format!("hand-over between processes after {waited} ms"),
            times.collect(),
        );
        assert!(median < Duration::from_millis(50), "{median:?}");
    }
}

// Who has it.

#[test]
fn holders_and_a_timeout_name_the_processes() {
    let database = Database::new();
    let (mut conn, mut here) = (database.open(), database.open());
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    let holders = conn.advisory_lock("a").holders().expect("an answer");
    let [holder] = &holders[..] else {
        panic!("{holders:?}");
    };
    assert_eq!(holder.backend_id, i64::from(process.id()));
    assert_eq!(holder.application_name.as_deref(), Some("dlock-child"));
    assert_eq!((holder.mode, holder.granted), (Mode::Exclusive, true));
    let error = conn
        .advisory_lock("a")
        .timeout(SHORT)
        .acquire()
        .map(drop)
        .expect_err("taken");
    let named = format!("held by {} (dlock-child)", process.id());
    assert!(error.to_string().contains(&named), "{error}");

    // And of this process.
    process.send("");
    process.expect_line("released");
    let before = SystemTime::now();
    let lock = here
        .advisory_lock("a")
        .shared()
        .acquire()
        .expect("a free lock");
    let holders = conn.advisory_lock("a").holders().expect("an answer");
    let [holder] = &holders[..] else {
        panic!("{holders:?}");
    };
    assert_eq!(holder.backend_id, i64::from(std::process::id()));
    assert_eq!((holder.mode, holder.granted), (Mode::Shared, true));
    let since = holder.since.expect("a time");
    assert!(
        since >= before - Duration::from_millis(1) && since <= SystemTime::now(),
        "{since:?}"
    );

    let waiting = database.holder("hold", "a");
    wait_for("the other process to wait", || {
        conn.is_waiting(waiting.id().into())
    });
    let holders = conn.advisory_lock("a").holders().expect("an answer");
    let told: Vec<_> = holders
        .iter()
        .map(|holder| (holder.backend_id, holder.granted))
        .collect();
    assert_eq!(
        told,
        [
            (i64::from(std::process::id()), true),
            (i64::from(waiting.id()), false)
        ]
    );
    drop(lock);
}

// What goes wrong.

#[test]
fn a_folder_that_may_not_be_written_to_is_told() {
    let database = Database::new();
    let path = database.folder.path();
    let mut process = dlock_child!("--url", database.url(), "fail", "a");
    if nix::unistd::geteuid().is_root() {
        use std::os::unix::process::CommandExt;
        // Root may write everywhere.
        process.uid(65534).gid(65534);
        fs::set_permissions(&database.path, Permissions::from_mode(0o666)).expect("permissions");
    }
    fs::set_permissions(path, Permissions::from_mode(0o555)).expect("permissions");
    let mut process = Process::spawn_without_servers(process);
    assert!(process.line().starts_with("connected "));
    let line = process.line();
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("permissions");
    assert!(line.starts_with("Unsupported: "), "{line}");
    assert!(
        line.contains("app.db-dlock") && line.contains("make the folder writable"),
        "{line}"
    );
}

#[test]
fn a_lock_file_that_is_there_serves_in_a_folder_that_may_not_be_written_to() {
    let database = Database::new();
    fs::write(database.lock_file(), "").expect("a file");
    let mut process = dlock_child!("--url", database.url(), "hold", "a");
    if nix::unistd::geteuid().is_root() {
        use std::os::unix::process::CommandExt;
        process.uid(65534).gid(65534);
    }
    for file in [&database.path, &database.lock_file()] {
        fs::set_permissions(file, Permissions::from_mode(0o666)).expect("permissions");
    }
    fs::set_permissions(database.folder.path(), Permissions::from_mode(0o555))
        .expect("permissions");
    let mut process = Process::spawn_without_servers(process);
    assert!(process.line().starts_with("connected "));
    process.expect_line("acquired");
    assert!(database.is_locked("a"));
    fs::set_permissions(database.folder.path(), Permissions::from_mode(0o755))
        .expect("permissions");
}

#[test]
fn a_folder_that_is_gone_is_told() {
    let database = Database::new();
    let mut conn = database.open();
    let moved = database.folder.path().with_extension("moved");
    fs::rename(database.folder.path(), &moved).expect("a new name");
    let error = conn
        .advisory_lock("a")
        .acquire()
        .map(drop)
        .expect_err("no folder");
    fs::rename(&moved, database.folder.path()).expect("the old name");
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert!(
        with_causes(&error).contains("app.db") && with_causes(&error).contains("reconnect"),
        "{error}"
    );
    // Back again.
    assert_free(&mut conn, "a");
}

#[test]
fn a_database_that_was_replaced_is_told() {
    let database = Database::new();
    let mut conn = database.open();
    assert_free(&mut conn, "a");
    fs::rename(&database.path, database.folder.path().join("old.db")).expect("a new name");
    fs::write(&database.path, "").expect("another file");
    let error = conn
        .advisory_lock("a")
        .acquire()
        .map(drop)
        .expect_err("another file");
    assert!(with_causes(&error).contains("reconnect"), "{error}");
    assert_free(&mut database.open(), "a");
}

#[test]
fn a_lock_whose_database_was_renamed_counts_as_lost() {
    let database = Database::new();
    let mut conn = database.open();
    let renamed = database.folder.path().join("new.db");
    let mut lock = conn.advisory_lock("a").acquire().expect("a free lock");
    fs::rename(&database.path, &renamed).expect("a new name");
    let here = SqliteConnection::open_url(renamed.to_str().expect("UTF-8"))
        .advisory_lock("b")
        .acquire()
        .map(drop);
    assert!(matches!(here, Err(Error::Unsupported { .. })), "{here:?}");
    // Another process that opens it now has another lock file.
    let mut process = Process::spawn_without_servers(dlock_child!(
        "--url",
        renamed.to_str().expect("UTF-8"),
        "hold",
        "a"
    ));
    assert!(process.line().starts_with("connected "));
    process.expect_line("acquired");
    assert!(!lock.is_held().expect("an answer"));
    let again = lock.advisory_lock("a").shared().try_acquire().map(drop);
    let error = again.expect_err("it was lost");
    assert!(with_causes(&error).contains("database"), "{error}");
    let released = lock.release().map(drop);
    assert!(
        matches!(released, Err(Error::NotHeld { .. })),
        "{released:?}"
    );
}

#[test]
fn a_lock_file_that_is_deleted_between_two_locks_is_made_again() {
    let database = Database::new();
    let mut conn = database.open();
    assert_free(&mut conn, "a");
    fs::remove_file(database.lock_file()).expect("the lock file");
    let lock = conn.advisory_lock("a").acquire().expect("a free lock");
    let mut process = database.holder("hold", "a");
    assert!(process.is_silent_for(Duration::from_millis(200)));
    drop(lock);
    process.expect_line("acquired");
}

#[test]
fn a_lock_whose_file_was_deleted_counts_as_lost() {
    let database = Database::new();
    let mut conn = database.open();
    let mut lock = conn.advisory_lock("a").acquire().expect("a free lock");
    fs::remove_file(database.lock_file()).expect("the lock file");
    assert!(!lock.is_held().expect("an answer"));
    let mut other = database.open();
    let error = other.advisory_lock("a").shared().try_acquire().map(drop);
    assert!(error.is_ok(), "who holds it here is in the way: {error:?}");
    assert!(matches!(lock.release(), Err(Error::NotHeld { .. })));
    assert_free(&mut other, "a");
}

#[test]
fn a_waiter_goes_with_a_lock_file_that_is_replaced() {
    let database = Database::new();
    let mut process = database.holder("hold", "a");
    process.expect_line("acquired");
    let mut waiter = database.open();
    let id = waiter.backend_id();
    let waiting =
        thread::spawn(move || waiter.advisory_lock("a").timeout(LONG).acquire().map(drop));
    wait_for("the waiter", || dlock_tests::is_waiting_here(id));
    fs::remove_file(database.lock_file()).expect("the lock file");
    // The holder's lock is one that nobody sees any more.
    waiting.join().expect("no panic").expect("the lock");
}

#[test]
fn what_is_no_plain_file_is_no_lock_file() {
    let database = Database::new();
    let mut conn = database.open();
    fs::create_dir(database.lock_file()).expect("a folder");
    let error = conn
        .advisory_lock("a")
        .acquire()
        .map(drop)
        .expect_err("a folder");
    assert!(with_causes(&error).contains("app.db-dlock"), "{error}");
    fs::remove_dir(database.lock_file()).expect("a folder");
    std::os::unix::fs::symlink("/dev/null", database.lock_file()).expect("a link");
    let error = conn
        .advisory_lock("a")
        .acquire()
        .map(drop)
        .expect_err("a link");
    assert!(with_causes(&error).contains("app.db-dlock"), "{error}");
    fs::remove_file(database.lock_file()).expect("a link");
    // Nor is what a link names, of which nobody would know.
    let elsewhere = database.folder.path().join("elsewhere");
    fs::write(&elsewhere, "").expect("a file");
    std::os::unix::fs::symlink(&elsewhere, database.lock_file()).expect("a link");
    let error = conn
        .advisory_lock("a")
        .acquire()
        .map(drop)
        .expect_err("a link");
    assert!(with_causes(&error).contains("cannot open "), "{error}");
    fs::remove_file(database.lock_file()).expect("a link");
    assert_free(&mut conn, "a");
}

// Transactions.

#[test]
fn holders_of_different_locks_that_read_and_then_write_wait_for_each_other() {
    let database = Database::new();
    database
        .open()
        .batch_execute("PRAGMA journal_mode = WAL; INSERT INTO t VALUES (0)")
        .expect("a row");
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let mut conn = database.open();
            thread::spawn(move || {
                for _ in 0..50 {
                    conn.advisory_lock(n).transaction(|conn| {
                        let next = conn.number("SELECT n FROM t").expect("a row") + 1;
                        conn.batch_execute(&format!("UPDATE t SET n = {next}"))
                    })?;
                }
                QueryResult::Ok(())
            })
        })
        .collect();
    for thread in threads {
        // With a plain BEGIN: "database is locked".
        thread.join().expect("no panic").expect("50 transactions");
    }
    assert_eq!(database.open().number("SELECT n FROM t"), Some(200));
}

#[test]
fn readers_in_transactions_run_at_once() {
    let database = Database::new();
    let (mut one, mut two) = (database.open(), database.open());
    two.batch_execute("PRAGMA busy_timeout = 0")
        .expect("a pragma");
    one.advisory_lock("a")
        .shared()
        .transaction(|conn| {
            assert_eq!(conn.number("SELECT COUNT(*) FROM t"), Some(0));
            two.advisory_lock("a").shared().transaction(|conn| {
                assert_eq!(conn.number("SELECT COUNT(*) FROM t"), Some(0));
                Ok::<_, Error>(())
            })
        })
        .expect("two readers");
}

// A lock file that others do not see.

#[test]
fn a_database_with_two_names_has_no_locks_by_either() {
    let database = Database::new();
    let mut conn = database.open();
    assert_free(&mut conn, "a");
    let other = database.folder.path().join("other.db");
    fs::hard_link(&database.path, &other).expect("a link");
    for path in [&database.path, &other] {
        let mut conn = SqliteConnection::open_url(path.to_str().expect("UTF-8"));
        conn.enable_advisory_locks().expect("a connection");
        let error = conn.advisory_lock("a").acquire().map(drop);
        let Err(Error::Unsupported { source, .. }) = error else {
            panic!("{}: {error:?}", path.display())
        };
        assert!(source.to_string().contains("hard links"), "{source}");
        let report = conn.check_advisory_locks().expect("a report");
        assert!(!report.excludes(), "{report}");
        assert!(report.to_string().contains("hard links"), "{report}");
    }
    drop(conn);
    fs::remove_file(&other).expect("a link");
    assert_free(&mut database.open(), "a");
}

/// A process that sees what `mounts` has bound: pairs of a path and of the place where it is seen.
#[cfg(target_os = "linux")]
fn in_container(mounts: &[(&Path, &Path)], database: &Path, role: &str, key: &str) -> Process {
    let child = dlock_child!("--url", database, role, key);
    let mut command = std::process::Command::new("unshare");
    let script = r#"
        while [ "$1" != -- ]; do
            mount --bind "$1" "$2" || { echo "cannot mount: allow user namespaces"; exit 1; }
            shift 2
        done
        shift
        exec "$@"
    "#;
    command.args(["-rm", "sh", "-c", script, "sh"]);
    for (path, place) in mounts {
        command.arg(path).arg(place);
    }
    command
        .arg("--")
        .arg(child.get_program())
        .args(child.get_args());
    let mut process = Process::spawn_without_servers(command);
    let line = process.line();
    assert!(line.starts_with("connected "), "{line}");
    process
}

/// The place of a container: a folder with empty files to mount on.
#[cfg(target_os = "linux")]
fn place() -> (TempDir, PathBuf, PathBuf) {
    let place = TempDir::new().expect("a temporary folder");
    let (database, lock_file) = (
        place.path().join("app.db"),
        place.path().join("app.db-dlock"),
    );
    fs::write(&database, "").expect("a file");
    (place, database, lock_file)
}

#[test]
#[cfg(target_os = "linux")]
fn a_database_that_is_mounted_without_its_folder_has_no_locks() {
    let database = Database::new();
    for lock_file_is_there in [false, true] {
        let (_place, mounted, lock_file) = place();
        if lock_file_is_there {
            fs::write(lock_file, "").expect("a file");
        }
        let mut process = in_container(&[(&database.path, &mounted)], &mounted, "fail", "a");
        let line = process.line();
        assert!(line.contains("mount the folder"), "{line}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_database_that_is_mounted_with_its_folder_or_its_lock_file_has_the_locks_of_the_others() {
    let database = Database::new();
    let mut conn = database.open();
    assert_free(&mut conn, "a"); // makes the lock file
    let folder = TempDir::new().expect("a temporary folder");
    let (_place, mounted, lock_file) = place();
    fs::write(&lock_file, "").expect("a file");
    let places: [(&[(&Path, &Path)], PathBuf); 2] = [
        (
            &[(database.folder.path(), folder.path())],
            folder.path().join("app.db"),
        ),
        (
            &[
                (&database.path, &mounted),
                (&database.lock_file(), &lock_file),
            ],
            mounted.clone(),
        ),
    ];
    for (mounts, path) in places {
        let mut process = in_container(mounts, &path, "hold", "a");
        assert_eq!(process.line(), "acquired");
        assert_taken(&mut conn, "a");
        process.send("");
        assert_eq!(process.line(), "released");
        assert_free(&mut conn, "a");
    }
}

#[test]
fn looking_at_the_mount_does_not_free_the_locks_of_sqlite() {
    let database = Database::new();
    let (mut writer, mut other) = (database.open(), database.open());
    writer
        .batch_execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)")
        .expect("a writer");
    // The lock file is opened, and before it the mount is looked at.
    assert_free(&mut other, "a");
    let path = database.url();
    let blocked = std::process::Command::new(env!("CARGO_BIN_EXE_dlock-child"))
        .args(["--url", path, "write"])
        .output()
        .expect("a process");
    let output = String::from_utf8_lossy(&blocked.stdout);
    assert!(output.contains("database is locked"), "{output}");
}

// Fencing tokens.

fn draw(conn: &mut SqliteConnection, key: &str) -> i64 {
    let mut lock = conn.advisory_lock(key).acquire().expect("a free lock");
    let token = lock.fencing_token().expect("a token");
    lock.release().expect("a release");
    token.into()
}

fn last_token(database: &Database) -> String {
    fs::read_to_string(database.lock_file()).expect("the lock file")
}

/// A process that has drawn this token, and still holds the lock.
fn fencing_process(database: &Database, key: &str) -> (Process, i64) {
    let mut process = database.holder("fence", key);
    let line = process.line();
    let token = line.strip_prefix("acquired ").expect("a token");
    (process, token.parse().expect("a number"))
}

#[test]
fn tokens_rise_over_processes_and_the_lock_file_keeps_the_last_one() {
    let database = Database::new();
    let mut conn = database.open();
    let mut tokens = vec![draw(&mut conn, "a")];
    for _ in 0..2 {
        let (mut process, token) = fencing_process(&database, "a");
        // Others hold other locks meanwhile.
        tokens.extend([token, draw(&mut conn, "b")]);
        process.kill9();
        tokens.push(draw(&mut conn, "a"));
    }
    assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
    assert_eq!(
        last_token(&database),
        format!("{:019}\n", tokens[tokens.len() - 1])
    );
    assert!(
        database
            .listing()
            .iter()
            .any(|(name, length)| name == "app.db-dlock" && *length == 20)
    );
}

/// As if the clock had been set back by some decades.
#[test]
fn a_clock_that_was_set_back_sets_no_token_back() {
    let database = Database::new();
    let mut conn = database.open();
    let first = draw(&mut conn, "a");
    let ahead = first + 1_000_000_000_000_000;
    fs::write(database.lock_file(), format!("{ahead:019}\n")).expect("the lock file");
    assert_eq!(draw(&mut conn, "a"), ahead + 1);
    let (_process, token) = fencing_process(&database, "a");
    assert_eq!(token, ahead + 2);
    assert_eq!(draw(&mut conn, "b"), ahead + 3);
    // The lock file goes, but this process remembers.
    fs::remove_file(database.lock_file()).expect("the lock file");
    assert_eq!(draw(&mut conn, "a"), ahead + 4);
}

#[test]
fn what_a_loss_of_power_leaves_of_the_last_token_is_made_good_by_the_clock() {
    for rest in [
        "",
        "00017",
        "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        "no number at all, and long",
    ] {
        let database = Database::new();
        let first = draw(&mut database.open(), "a");
        fs::write(database.lock_file(), rest).expect("the lock file");
        let (_process, token) = fencing_process(&database, "a");
        assert!(token > first, "after {rest:?}");
        assert!(last_token(&database).starts_with(&format!("{token:019}\n")));
    }
}

#[test]
fn many_processes_draw_no_token_twice() {
    let database = Database::new();
    let mut processes: Vec<(Process, i64)> = Vec::new();
    thread::scope(|scope| {
        let database = &database;
        let starting: Vec<_> = (0..8)
            .map(|n| scope.spawn(move || fencing_process(database, &format!("key {n}"))))
            .collect();
        let threads: Vec<_> = (0..4)
            .map(|n| {
                scope.spawn(move || {
                    let mut conn = database.open();
                    let mut lock = conn.advisory_lock(n).acquire().expect("a free lock");
                    let draw = || i64::from(lock.fencing_token().expect("a token"));
                    std::iter::repeat_with(draw).take(500).collect::<Vec<_>>()
                })
            })
            .collect();
        let mut all = BTreeSet::new();
        for thread in threads {
            let tokens = thread.join().expect("no panic");
            assert!(tokens.is_sorted_by(|one, next| one < next));
            all.extend(tokens);
        }
        processes.extend(
            starting
                .into_iter()
                .map(|thread| thread.join().expect("no panic")),
        );
        all.extend(processes.iter().map(|(_, token)| *token));
        assert_eq!(all.len(), 4 * 500 + 8);
    });
}

/// Locks the byte that is locked while a token is drawn, as a process does that is stopped there.
#[test]
fn a_draw_waits_for_another_process_that_draws() {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    let database = Database::new();
    let first = draw(&mut database.open(), "a");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(database.lock_file());
    let file = file.expect("the lock file");
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: 4 * ((1 << 61) - 1) + 2,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).expect("nobody draws");
    thread::scope(|scope| {
        let drawing = scope.spawn(|| draw(&mut database.open(), "a"));
        thread::sleep(Duration::from_millis(200));
        assert!(!drawing.is_finished());
        // Locks are taken meanwhile.
        assert_free(&mut database.open(), "b");
        drop(file);
        assert!(drawing.join().expect("no panic") > first);
    });
}

/// There is no session that somebody could end, but the lock file can be deleted.
#[test]
fn a_holder_that_was_stopped_and_whose_lock_file_was_deleted_changes_no_row_after_the_next_one() {
    let database = Database::new();
    let mut conn = database.open();
    conn.execute_sql("CREATE TABLE fenced (id INTEGER PRIMARY KEY, value BIGINT NOT NULL, fence BIGINT NOT NULL)");
    conn.execute_sql("INSERT INTO fenced VALUES (1, 0, 0)");
    let (mut holder, token) = fencing_process(&database, "a");
    let id = Pid::from_raw(holder.id().try_into().expect("a process id"));
    kill(id, Signal::SIGSTOP).expect("it runs");
    assert_taken(&mut conn, "a");
    fs::remove_file(database.lock_file()).expect("the lock file");
    let next = draw(&mut conn, "a");
    assert!(next > token);
    conn.execute_sql(&format!(
        "UPDATE fenced SET value = 2, fence = {next} WHERE fence < {next}"
    ));
    holder.send("write");
    kill(id, Signal::SIGCONT).expect("it is there");
    holder.expect_line("changed 0");
    holder.expect_line("NotHeld");
    assert_eq!(conn.number("SELECT value FROM fenced"), Some(2));
}

#[test]
fn databases_in_memory_have_tokens() {
    let (mut one, mut two) = (
        SqliteConnection::open_url(":memory:"),
        SqliteConnection::open_url(":memory:"),
    );
    let mut tokens = Vec::new();
    for _ in 0..3 {
        tokens.extend([draw(&mut one, "memory"), draw(&mut two, "memory")]);
    }
    assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
}

/// A subquery that depends on no row is one that SQLite asks once.
#[test]
fn the_condition_is_asked_once_for_a_statement() {
    #[derive(QueryableByName)]
    struct Step {
        #[diesel(sql_type = diesel::sql_types::Text)]
        detail: String,
    }
    let database = Database::new();
    let mut conn = database.open();
    let lock = conn.advisory_lock("a").acquire().expect("a free lock");
    let select = diesel::select(lock.held());
    let sql = diesel::debug_query::<diesel::sqlite::Sqlite, _>(&select).to_string();
    let condition = sql
        .strip_prefix("SELECT ")
        .and_then(|sql| sql.split(" -- ").next());
    let condition = condition.expect("a condition").to_owned();
    drop(lock);
    let plan: Vec<Step> = diesel::sql_query(format!(
        "EXPLAIN QUERY PLAN SELECT n FROM t WHERE n > 0 AND {condition}"
    ))
    .bind::<diesel::sql_types::BigInt, _>(1)
    .bind::<diesel::sql_types::BigInt, _>(1)
    .load(&mut conn)
    .expect("a plan");
    let plan: Vec<String> = plan.into_iter().map(|step| step.detail).collect();
    assert!(
        plan.iter().any(|step| step.starts_with("SCALAR SUBQUERY")),
        "{plan:?}"
    );
    assert!(
        !plan.iter().any(|step| step.contains("CORRELATED")),
        "{plan:?}"
    );
}
