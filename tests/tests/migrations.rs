//! `AdvisoryLock::run_pending_migrations`, on real servers.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use diesel::migration::MigrationVersion;
use diesel::r2d2::{ConnectionManager, CustomizeConnection, NopConnectionCustomizer, Pool};
use diesel::{Connection, MysqlConnection, PgConnection, SqliteConnection};
use diesel_migrations::{FileBasedMigrations, MigrationHarness};
use dlock_diesel::{
    AdvisoryLock, AdvisoryLockExt, EnableAdvisoryLocks, Error, LockConnection, LockKey,
};
use dlock_tests::{
    Kind, PATIENCE, Process, Proxy, Server, TestConnection, on_every_network_server,
    on_every_server, on_postgres, unique_key, wait_for,
};
use fresh_database::FreshDatabase;
use tempfile::TempDir;

#[path = "migrations/asynchronous.rs"]
mod asynchronous;
mod fresh_database;

/// A connection that can be locked and migrated.
trait Migratable:
    TestConnection
    + LockConnection
    + MigrationHarness<<Self as Connection>::Backend>
    + diesel::r2d2::R2D2Connection
{
    /// What a pool does with new connections.
    fn customizer() -> Box<dyn CustomizeConnection<Self, diesel::r2d2::Error>> {
        Box::new(NopConnectionCustomizer)
    }
}

impl Migratable for PgConnection {}
impl Migratable for MysqlConnection {}

impl Migratable for SqliteConnection {
    fn customizer() -> Box<dyn CustomizeConnection<Self, diesel::r2d2::Error>> {
        Box::new(EnableAdvisoryLocks)
    }
}

/// A migration of a table `applied`, which counts how often it was applied.
const CREATE: (&str, &str) = ("1_create", "CREATE TABLE applied (version INT NOT NULL);");
const INSERT: (&str, &str) = ("2_insert", "INSERT INTO applied VALUES (2);");

fn folder(migrations: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, sql) in migrations {
        write(folder.path(), name, sql);
    }
    folder
}

fn write(folder: &Path, name: &str, sql: &str) {
    let folder = folder.join(name);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("up.sql"), sql).expect("a file");
}

fn without_transaction(folder: &Path, name: &str) {
    fs::write(
        folder.join(name).join("metadata.toml"),
        "run_in_transaction = false",
    )
    .expect("a file");
}

fn migrations(folder: &TempDir) -> FileBasedMigrations {
    FileBasedMigrations::from_path(folder).expect("a folder with migrations")
}

fn versions(names: &[&'static str]) -> Vec<MigrationVersion<'static>> {
    names
        .iter()
        .map(|name| MigrationVersion::from(*name))
        .collect()
}

/// Processes that are connected, each through a proxy (except to SQLite), and wait for a line.
fn processes(
    server: &Server,
    key: &str,
    folder: &TempDir,
    count: usize,
) -> Vec<(Process, Option<Proxy>)> {
    let mut processes: Vec<_> = (0..count)
        .map(|_| {
            let proxy = (server.kind != Kind::Sqlite).then(|| Proxy::start(server));
            let url = proxy.as_ref().map_or(server.url.as_str(), Proxy::url);
            let mut command = Command::new(env!("CARGO_BIN_EXE_dlock-migrate"));
            command
                .args(["--url", url, "--key", key])
                .arg(folder.path());
            (Process::spawn(command), proxy)
        })
        .collect();
    for (process, proxy) in &mut processes {
        process.expect_line("ready");
        if let Some(proxy) = proxy {
            proxy.reset();
        }
    }
    processes
}

fn lines(processes: &mut [(Process, Option<Proxy>)]) -> Vec<String> {
    let mut lines: Vec<_> = processes
        .iter_mut()
        .map(|(process, _)| process.line())
        .collect();
    lines.sort();
    lines
}

#[track_caller]
fn assert_free<C: Migratable>(server: &Server, key: &str) {
    let mut conn = C::open(server);
    let lock = conn.advisory_lock(key).try_acquire().expect("a try");
    assert!(lock.is_some(), "{key} is held");
}

on_every_server! {
    fn processes_that_find_the_lock_free_apply_each_migration_once<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let server = &database.server;
        let key = unique_key("migrate_once_free");
        let folder = folder(&[CREATE, INSERT]);
        let mut processes = processes(server, &key, &folder, 5);
        for (process, _) in &mut processes {
            process.send("go");
        }
        let lines = lines(&mut processes);
        assert_eq!(lines, ["applied: ", "applied: ", "applied: ", "applied: ", "applied: 1 2"]);
        assert_eq!(C::open(server).number("SELECT COUNT(*) FROM applied"), Some(1));
    }

    fn a_failing_migration_releases_the_lock_and_reports_its_own_error<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let server = &database.server;
        let key = unique_key("migration_fails");
        let folder = folder(&[CREATE, ("2_fail", "INSERT INTO no_such_table VALUES (2);"), ("3_insert", "INSERT INTO applied VALUES (3);")]);
        let mut conn = C::open(server);
        for transaction in [true, false] {
            if !transaction {
                without_transaction(folder.path(), "2_fail");
            }
            let error = conn
                .advisory_lock(&key)
                .run_pending_migrations(migrations(&folder))
                .expect_err("the second migration fails");
            assert!(error.downcast_ref::<Error>().is_none(), "{error:?}");
            let same = conn.run_pending_migrations(migrations(&folder)).expect_err("it fails without a lock, too");
            assert_eq!(format!("{error:?}"), format!("{same:?}"));
            assert!(error.to_string().contains("no_such_table"), "{error}");
            assert_free::<C>(server, &key);
        }

        write(folder.path(), "2_fail", INSERT.1);
        let mut another = C::open(server);
        let applied = another.advisory_lock(&key).run_pending_migrations(migrations(&folder)).expect("mended");
        assert_eq!(applied, versions(&["2", "3"]));
        assert_eq!(conn.number("SELECT COUNT(*) FROM applied"), Some(2));
        // The connection of the failure goes on.
        let applied = conn.advisory_lock(&key).run_pending_migrations(migrations(&folder)).expect("nothing to do");
        assert_eq!(applied, versions(&[]));
    }

    fn a_timeout_can_be_matched_and_leaves_the_database_untouched<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let server = &database.server;
        let key = unique_key("migration_timeout");
        let folder = folder(&[CREATE, INSERT]);
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let holder_id = holder.backend_id();
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let limit = Duration::from_millis(250);
        let error = conn
            .advisory_lock(&key)
            .timeout(limit)
            .run_pending_migrations(migrations(&folder))
            .expect_err("the lock is taken");
        match error.downcast_ref() {
            Some(Error::Timeout { waited, holders, .. }) => {
                assert!(*waited >= limit, "{waited:?}");
                assert_eq!(holders[0].backend_id, C::holder_id(holder_id));
            }
            other => panic!("{other:?}, {error}"),
        }
        assert_eq!(tables(&mut conn), Some(0));
        lock.release().expect("a release");
        let applied = conn.advisory_lock(&key).timeout(limit).run_pending_migrations(migrations(&folder)).expect("a free lock");
        assert_eq!(applied, versions(&["1", "2"]));
    }

    fn an_open_transaction_is_refused<C: Migratable>(server: &Server) {
        let key = unique_key("migration_transaction");
        let database = FreshDatabase::<C>::create(server);
        let folder = folder(&[CREATE]);
        let mut conn = C::open(&database.server);
        let error = conn
            .transaction(|conn| conn.advisory_lock(&key).run_pending_migrations(migrations(&folder)))
            .expect_err("a transaction is open");
        assert!(matches!(error.downcast_ref(), Some(Error::InTransaction { .. })), "{error:?}");
        assert_eq!(tables(&mut conn), Some(0));
    }

    fn a_pooled_connection_goes_back_to_the_pool<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let key = unique_key("migration_pool");
        let folder = folder(&[CREATE, INSERT]);
        let manager = ConnectionManager::<C>::new(&database.server.url);
        let pool = Pool::builder().max_size(1).connection_customizer(C::customizer());
        let pool = pool.build(manager).expect("a pool");
        let lock = AdvisoryLock::new(pool.get().expect("a connection"), &key);
        let applied = lock.run_pending_migrations(migrations(&folder)).expect("a free lock");
        assert_eq!(applied, versions(&["1", "2"]));
        let lock = AdvisoryLock::new(pool.get().expect("the connection again"), &key);
        let applied = lock.run_pending_migrations(migrations(&folder)).expect("a free lock");
        assert_eq!(applied, versions(&[]));
        assert_free::<C>(&database.server, &key);
    }
}

on_every_network_server! {
    fn a_start_that_waits_for_long_says_so_and_names_the_holder<C: Migratable>(server: &Server) {
        let key = unique_key("migrations_notice");
        let mut conn = C::open(server);
        let id = conn.backend_id();
        let held = conn.advisory_lock(&key).acquire().expect("a free lock");
        let nothing = folder(&[]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_dlock-migrate"));
        command.args(["--url", &server.url, "--key", &key]).arg(nothing.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("it starts");
        // It begins at the end of the line.
        drop(process.stdin.take());
        let errors = process.stderr.take().expect("it is piped");
        let (say, said) = mpsc::channel();
        thread::spawn(move || say.send(BufReader::new(errors).lines().next()));
        let notice = said.recv_timeout(PATIENCE).expect("it says so in time");
        let notice = notice.expect("a line").expect("text");
        let start = format!("waiting to migrate: lock {} was not free within ", LockKey::from(&key));
        assert!(notice.starts_with(&start), "{notice}");
        assert!(notice.contains(&format!(": held by {id}")) && notice.contains("; to end that session: "), "{notice}");
        drop(held);
        assert!(process.wait().expect("an end").success());
    }

    fn a_migration_that_releases_all_locks_is_told<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let key = unique_key("migration_not_held");
        let folder = folder(&[("0_release", release_all(C::KIND)), CREATE]);
        let mut conn = C::open(&database.server);
        let error = conn
            .advisory_lock(&key)
            .run_pending_migrations(migrations(&folder))
            .expect_err("others may have migrated, too");
        assert!(matches!(Error::find(&*error), Some(Error::NotHeld { .. })), "{error:?}");
        assert!(error.to_string().contains("all migrations are applied ("), "{error}");
        assert_eq!(tables(&mut conn), Some(2));
    }

    fn processes_that_start_at_once_apply_each_migration_once<C: Migratable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let server = &database.server;
        let key = unique_key("migrate_once");
        let folder = folder(&[CREATE, INSERT, ("3_insert", "INSERT INTO applied VALUES (3);")]);
        let mut conn = C::open(server);
        let mut processes = processes(server, &key, &folder, 5);

        // All of them have found the lock taken, more than once, before the first one can have it.
        let lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        for (process, _) in &mut processes {
            process.send("go");
        }
        for (_, proxy) in &processes {
            wait_for("each process to ask again and again", || proxy.as_ref().expect("a proxy").round_trips() >= 6);
        }
        let mut observer = C::open(server);
        assert_eq!(tables(&mut observer), Some(0), "nothing happens before the lock is held");
        lock.release().expect("a release");

        let lines = lines(&mut processes);
        assert_eq!(lines, ["applied: ", "applied: ", "applied: ", "applied: ", "applied: 1 2 3"]);
        assert_eq!(conn.number("SELECT COUNT(*) FROM applied WHERE version = 2"), Some(1));
        assert_eq!(conn.number("SELECT COUNT(*) FROM applied WHERE version = 3"), Some(1));
        assert_free::<C>(server, &key);
    }

    fn the_interval_can_be_chosen<C: Migratable>(server: &Server) {
        let key = unique_key("migration_interval");
        let folder = folder(&[]);
        let mut holder = C::open(server);
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        let mut round_trips = |interval: Option<Duration>| {
            proxy.reset();
            let mut lock = conn.advisory_lock(&key).timeout(Duration::from_secs(2));
            if let Some(interval) = interval {
                lock = lock.poll_every(interval);
            }
            lock.run_pending_migrations(migrations(&folder)).expect_err("the lock is taken");
            proxy.round_trips()
        };
        let seldom = round_trips(Some(Duration::from_secs(3600)));
        let by_default = round_trips(None);
        // 2 and 21 times, on a machine that is not busy.
        assert!(by_default >= seldom + 5, "{by_default} and {seldom} round trips");
    }
}

/// The migration that takes the lock away from under itself.
fn release_all(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "SELECT pg_advisory_unlock_all();",
        Kind::Mysql => "DO RELEASE_ALL_LOCKS();",
        Kind::Sqlite => unreachable!("nothing releases all of SQLite's locks"),
    }
}

/// How many of the tables are there, that of Diesel included.
fn tables<C: Migratable>(conn: &mut C) -> Option<i64> {
    let schema = match C::KIND {
        Kind::Postgres => "'public'",
        Kind::Mysql => "DATABASE()",
        Kind::Sqlite => {
            return conn.number(
                "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('applied', '__diesel_schema_migrations')",
            );
        }
    };
    conn.number(&format!(
        "SELECT COUNT(*) FROM information_schema.tables \
         WHERE table_schema = {schema} AND table_name IN ('applied', '__diesel_schema_migrations')"
    ))
}

on_postgres! {
    fn those_who_wait_for_the_lock_do_not_get_in_the_way_of_create_index_concurrently(server: &Server) {
        let database = FreshDatabase::<PgConnection>::create(server);
        let server = &database.server;
        let key = unique_key("migration_index");
        let (mut conn, mut writer) = (PgConnection::open(server), PgConnection::open(server));
        let folder = folder(&[CREATE]);
        conn.advisory_lock(&key).run_pending_migrations(migrations(&folder)).expect("the table");
        write(folder.path(), "2_index", "CREATE INDEX CONCURRENTLY applied_index ON applied (version);");
        without_transaction(folder.path(), "2_index");
        let mut processes = processes(server, &key, &folder, 5);

        // A transaction that wrote to the table holds the index up until the others wait for the lock.
        writer.execute_sql("BEGIN; INSERT INTO applied VALUES (0)");
        processes[0].0.send("go");
        wait_for("the index to wait for the writer", || {
            conn.number("SELECT COUNT(*) FROM pg_stat_progress_create_index WHERE datname = current_database() AND phase LIKE 'waiting for writers%'") == Some(1)
        });
        for (process, _) in &mut processes[1..] {
            process.send("go");
        }
        wait_for("the others to ask for the lock", || {
            conn.number("SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() \
                AND query LIKE '%pg_%advisory%' AND pid <> pg_backend_pid()") == Some(4)
        });
        writer.execute_sql("COMMIT");

        processes[0].0.expect_line("applied: 2");
        for (process, _) in &mut processes[1..] {
            process.expect_line("applied: ");
        }
        assert_eq!(conn.number("SELECT COUNT(*) FROM pg_index WHERE indexrelid = 'applied_index'::regclass AND indisvalid"), Some(1));
    }

    fn a_migration_that_leaves_an_aborted_transaction_releases_the_lock(server: &Server) {
        let database = FreshDatabase::<PgConnection>::create(server);
        let key = unique_key("migration_aborted");
        // A transaction that Diesel does not know of.
        let folder = folder(&[("1_abort", "BEGIN;\nINSERT INTO no_such_table VALUES (1);")]);
        without_transaction(folder.path(), "1_abort");
        let mut conn = PgConnection::open(&database.server);
        let error = conn
            .advisory_lock(&key)
            .run_pending_migrations(migrations(&folder))
            .expect_err("the migration fails");
        assert!(error.to_string().contains("no_such_table"), "{error}");
        assert_free::<PgConnection>(&database.server, &key);
    }

    fn a_pooled_connection_can_be_borrowed(server: &Server) {
        let database = FreshDatabase::<PgConnection>::create(server);
        let folder = folder(&[CREATE]);
        let manager = ConnectionManager::<PgConnection>::new(&database.server.url);
        let mut conn = Pool::builder().max_size(1).build(manager).expect("a pool").get().expect("a connection");
        let lock = conn.advisory_lock("migrations");
        let applied = lock.run_pending_migrations(migrations(&folder)).expect("a free lock");
        assert_eq!(applied, versions(&["1"]));
    }

    fn a_shared_lock_does_not_let_two_migrate_at_once(server: &Server) {
        let key = unique_key("migration_shared");
        let folder = folder(&[]);
        let (mut reader, mut conn) = (PgConnection::open(server), PgConnection::open(server));
        let _lock = reader.advisory_lock(&key).shared().acquire().expect("a free lock");
        let lock = conn.advisory_lock(&key).shared().timeout(Duration::ZERO);
        let error = lock.run_pending_migrations(migrations(&folder)).expect_err("a reader has the lock");
        assert!(matches!(error.downcast_ref(), Some(Error::Timeout { .. })), "{error:?}");
    }
}
