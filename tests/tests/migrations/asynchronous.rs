//! The same on async connections, in tasks.

use std::ops::DerefMut;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use diesel::backend::Backend;
use diesel::connection::BoxableConnection;
use diesel::migration::{
    Migration, MigrationMetadata, MigrationName, MigrationSource, MigrationVersion, Result,
};
use diesel_async::pooled_connection::{
    AsyncDieselConnectionManager,
    bb8::{Pool, PooledConnection},
};
use diesel_async::{AsyncMigrationHarness, AsyncMysqlConnection, AsyncPgConnection};
use diesel_migrations::MigrationHarness;
use dlock_diesel::AdvisoryLockExt as _;
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, Kind, PATIENCE, Proxy, Server, TestConnection,
    on_every_network_server_async, on_postgres_async, unique_key, wait_for,
};
use tokio::runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{
    CREATE, INSERT, Migratable, assert_free, folder, migrations, release_all, tables, versions,
    without_transaction, write,
};
use crate::fresh_database::FreshDatabase;

type Versions = Vec<MigrationVersion<'static>>;

/// An async connection that can be locked and migrated.
trait AsyncMigratable: AsyncTestConnection<Observer: Migratable> {
    fn migrate<M, S>(
        lock: AdvisoryLock<M>,
        source: S,
    ) -> impl Future<Output = Result<Versions>> + Send
    where
        M: DerefMut<Target = Self> + Send,
        S: MigrationSource<Self::Backend> + Send + 'static;

    /// Without a lock, as diesel-async does it.
    fn migrate_unlocked<M, S>(conn: M, source: S) -> (M, Result<Versions>)
    where
        M: DerefMut<Target = Self> + Send + 'static,
        S: MigrationSource<Self::Backend>;

    /// As diesel-async does it.
    fn revert_last<M, S>(conn: M, source: S) -> (M, Result<MigrationVersion<'static>>)
    where
        M: DerefMut<Target = Self> + Send + 'static,
        S: MigrationSource<Self::Backend>;

    type Pool: Send;
    type Pooled: DerefMut<Target = Self> + Send + 'static;

    /// A pool of one connection.
    fn pool(server: &Server) -> impl Future<Output = Self::Pool> + Send;

    fn take(pool: &Self::Pool) -> impl Future<Output = Self::Pooled> + Send;
}

macro_rules! migratable {
    ($($Connection:ty),*) => {$(
        impl AsyncMigratable for $Connection {
            async fn migrate<M, S>(lock: AdvisoryLock<M>, source: S) -> Result<Versions>
            where
                M: DerefMut<Target = Self> + Send,
                S: MigrationSource<Self::Backend> + Send + 'static,
            {
                timeout(PATIENCE, lock.run_pending_migrations(source)).await.expect("no deadlock")
            }

            fn migrate_unlocked<M, S>(conn: M, source: S) -> (M, Result<Versions>)
            where
                M: DerefMut<Target = Self> + Send + 'static,
                S: MigrationSource<Self::Backend>,
            {
                let mut harness = AsyncMigrationHarness::new(conn);
                let applied = harness.run_pending_migrations(source);
                let applied = applied.map(|all| all.iter().map(MigrationVersion::as_owned).collect());
                (harness.into_inner(), applied)
            }

            fn revert_last<M, S>(conn: M, source: S) -> (M, Result<MigrationVersion<'static>>)
            where
                M: DerefMut<Target = Self> + Send + 'static,
                S: MigrationSource<Self::Backend>,
            {
                let mut harness = AsyncMigrationHarness::new(conn);
                let reverted = harness.revert_last_migration(source);
                (harness.into_inner(), reverted)
            }

            type Pool = Pool<Self>;
            type Pooled = PooledConnection<'static, Self>;

            async fn pool(server: &Server) -> Self::Pool {
                let url = Self::direct_url(&server.url);
                let manager = AsyncDieselConnectionManager::new(url);
                Pool::builder().max_size(1).build(manager).await.expect("a pool")
            }

            async fn take(pool: &Self::Pool) -> Self::Pooled {
                pool.get_owned().await.expect("the connection")
            }
        }
    )*};
}

migratable!(AsyncPgConnection, AsyncMysqlConnection);

/// A migration that is a function.
#[derive(Clone)]
struct Code<F>(F);

impl<F, DB> MigrationSource<DB> for Code<F>
where
    DB: Backend,
    F: Fn(&mut dyn BoxableConnection<DB>) -> Result<()> + Clone + 'static,
{
    fn migrations(&self) -> Result<Vec<Box<dyn Migration<DB>>>> {
        Ok(vec![Box::new(self.clone())])
    }
}

impl<F, DB> Migration<DB> for Code<F>
where
    DB: Backend,
    F: Fn(&mut dyn BoxableConnection<DB>) -> Result<()>,
{
    fn run(&self, conn: &mut dyn BoxableConnection<DB>) -> Result<()> {
        self.0(conn)
    }

    fn revert(&self, _: &mut dyn BoxableConnection<DB>) -> Result<()> {
        Ok(())
    }

    fn metadata(&self) -> &dyn MigrationMetadata {
        &WithoutTransaction
    }

    fn name(&self) -> &dyn MigrationName {
        &NAME
    }
}

struct WithoutTransaction;

impl MigrationMetadata for WithoutTransaction {
    fn run_in_transaction(&self) -> bool {
        false
    }
}

struct Name(&'static str);

const NAME: Name = Name("1");

impl MigrationName for Name {
    fn version(&self) -> MigrationVersion<'_> {
        self.0.into()
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// A task that migrates on a connection of its own.
fn spawn<C, S>(conn: C, key: &str, source: S) -> JoinHandle<Result<Versions>>
where
    C: AsyncMigratable,
    S: MigrationSource<C::Backend> + Send + 'static,
{
    tokio::spawn(C::migrate(AdvisoryLock::new(Box::new(conn), key), source))
}

/// What the tasks applied, the one that did something last.
async fn join(tasks: Vec<JoinHandle<Result<Versions>>>) -> Vec<String> {
    let mut all = Vec::new();
    for task in tasks {
        let result = task.await.expect("no panic");
        let applied = result.expect("a migration");
        let applied: Vec<String> = applied.iter().map(ToString::to_string).collect();
        all.push(applied.join(" "));
    }
    all.sort();
    all
}

/// Waits until a session runs a statement that begins like this.
#[track_caller]
fn wait_until_it_runs<O: TestConnection>(observer: &mut O, backend_id: i64, statement: &str) {
    let sql = match O::KIND {
        Kind::Postgres => format!(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE pid = {backend_id} AND state = 'active' AND query LIKE '{statement}%'"
        ),
        Kind::Mysql => format!(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE id = {backend_id} AND info LIKE '{statement}%'"
        ),
        Kind::Sqlite => unreachable!("these tests are for servers"),
    };
    wait_for(format!("{statement} to run"), || {
        observer.number(&sql) == Some(1)
    });
}

#[track_caller]
fn wait_until_free<O: Migratable>(observer: &mut O, key: &str) {
    wait_for(format!("{key} to be free"), || {
        let lock = observer.advisory_lock(key).try_acquire().expect("a try");
        lock.is_some()
    });
}

on_every_network_server_async! {
    async fn tasks_that_start_at_once_apply_each_migration_once<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migrate_once");
        let folder = folder(&[CREATE, INSERT, ("3_insert", "INSERT INTO applied VALUES (3);")]);
        let mut observer = C::Observer::open(server);
        let proxies: Vec<_> = (0..5).map(|_| Proxy::start(server)).collect();

        // All of them have found the lock taken, more than once, before the first one can have it.
        let lock = observer.advisory_lock(&key).acquire().expect("a free lock");
        let mut tasks = Vec::new();
        for proxy in &proxies {
            let conn = C::open_url(proxy.url()).await;
            proxy.reset();
            tasks.push(spawn(conn, &key, migrations(&folder)));
        }
        for proxy in &proxies {
            wait_for("each task to ask again and again", || proxy.round_trips() >= 6);
        }
        assert_eq!(tables(&mut C::Observer::open(server)), Some(0), "nothing happens before the lock is held");
        lock.release().expect("a release");

        assert_eq!(join(tasks).await, ["", "", "", "", "1 2 3"]);
        for version in [2, 3] {
            let count = format!("SELECT COUNT(*) FROM applied WHERE version = {version}");
            assert_eq!(observer.number(&count), Some(1));
        }
        assert_free::<C::Observer>(server, &key);
    }

    async fn tasks_that_find_the_lock_free_apply_each_migration_once<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migrate_once_free");
        let folder = folder(&[CREATE, INSERT]);
        let mut tasks = Vec::new();
        for _ in 0..5 {
            let conn = C::open(&database.server).await;
            tasks.push(spawn(conn, &key, migrations(&folder)));
        }
        assert_eq!(join(tasks).await, ["", "", "", "", "1 2"]);
        assert_eq!(C::Observer::open(&database.server).number("SELECT COUNT(*) FROM applied"), Some(1));
    }

    async fn a_failing_migration_releases_the_lock_and_reports_its_own_error<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_fails");
        let folder = folder(&[CREATE, ("2_fail", "INSERT INTO no_such_table VALUES (2);"), ("3_insert", "INSERT INTO applied VALUES (3);")]);
        let mut conn = Box::new(C::open(server).await);
        for transaction in [true, false] {
            if !transaction {
                without_transaction(folder.path(), "2_fail");
            }
            let error = C::migrate(conn.as_mut().advisory_lock(&key), migrations(&folder))
                .await
                .expect_err("the second migration fails");
            assert_free::<C::Observer>(server, &key);
            assert!(error.downcast_ref::<Error>().is_none(), "{error:?}");
            assert!(error.to_string().contains("no_such_table"), "{error}");
            let (same_conn, same) = C::migrate_unlocked(conn, migrations(&folder));
            conn = same_conn;
            assert_eq!(format!("{error:?}"), format!("{:?}", same.expect_err("it fails without a lock, too")));
        }

        write(folder.path(), "2_fail", INSERT.1);
        let mut another = C::open(server).await;
        let applied = C::migrate(another.advisory_lock(&key), migrations(&folder)).await.expect("mended");
        assert_eq!(applied, versions(&["2", "3"]));
        assert_eq!(another.number("SELECT COUNT(*) FROM applied").await, Some(2));
        // The connection of the failure goes on.
        let applied = C::migrate(conn.as_mut().advisory_lock(&key), migrations(&folder)).await.expect("nothing to do");
        assert_eq!(applied, versions(&[]));
        assert_eq!(conn.number("SELECT 4711").await, Some(4711));
    }

    async fn a_migration_that_releases_all_locks_is_told<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migration_not_held");
        let folder = folder(&[("0_release", release_all(C::KIND)), CREATE]);
        let mut conn = C::open(&database.server).await;
        let error = C::migrate(conn.advisory_lock(&key), migrations(&folder))
            .await
            .expect_err("others may have migrated, too");
        assert!(matches!(Error::find(&*error), Some(Error::NotHeld { .. })), "{error:?}");
        assert!(error.to_string().contains("all migrations are applied ("), "{error}");
        assert_eq!(tables(&mut C::Observer::open(&database.server)), Some(2));
    }

    async fn a_timeout_can_be_matched_and_leaves_the_database_untouched<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_timeout");
        let folder = folder(&[CREATE, INSERT]);
        let (mut holder, mut conn) = (C::Observer::open(server), C::open(server).await);
        let holder_id = holder.backend_id();
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let limit = Duration::from_millis(250);
        let error = C::migrate(conn.advisory_lock(&key).timeout(limit), migrations(&folder))
            .await
            .expect_err("the lock is taken");
        match error.downcast_ref() {
            Some(Error::Timeout { waited, holders, .. }) => {
                assert!(*waited >= limit, "{waited:?}");
                assert_eq!(holders[0].backend_id, holder_id);
            }
            other => panic!("{other:?}, {error}"),
        }
        assert_eq!(tables(&mut C::Observer::open(server)), Some(0));
        lock.release().expect("a release");
        let applied = C::migrate(conn.advisory_lock(&key).timeout(limit), migrations(&folder)).await.expect("a free lock");
        assert_eq!(applied, versions(&["1", "2"]));
    }

    async fn the_interval_can_be_chosen<C: AsyncMigratable>(server: &Server) {
        let key = unique_key("async_migration_interval");
        let folder = folder(&[]);
        let mut holder = C::Observer::open(server);
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url()).await;
        let mut round_trips = [0; 2];
        for (round_trips, interval) in round_trips.iter_mut().zip([Some(Duration::from_secs(3600)), None]) {
            proxy.reset();
            let mut lock = conn.advisory_lock(&key).timeout(Duration::from_secs(2));
            if let Some(interval) = interval {
                lock = lock.poll_every(interval);
            }
            C::migrate(lock, migrations(&folder)).await.expect_err("the lock is taken");
            *round_trips = proxy.round_trips();
        }
        let [seldom, by_default] = round_trips;
        // 2 and 21 times, on a machine that is not busy.
        assert!(by_default >= seldom + 5, "{by_default} and {seldom} round trips");
    }

    async fn an_open_transaction_is_refused<C: AsyncMigratable>(server: &Server) {
        let key = unique_key("async_migration_transaction");
        let database = FreshDatabase::<C::Observer>::create(server);
        let folder = folder(&[CREATE]);
        let mut conn = C::open(&database.server).await;
        let error = conn
            .transaction(async |conn| C::migrate(conn.advisory_lock(&key), migrations(&folder)).await)
            .await
            .expect_err("a transaction is open");
        assert!(matches!(error.downcast_ref(), Some(Error::InTransaction { .. })), "{error:?}");
        assert_eq!(tables(&mut C::Observer::open(&database.server)), Some(0));
    }

    async fn a_pooled_connection_goes_back_to_the_pool<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migration_pool");
        let folder = folder(&[CREATE, INSERT, ("3_fail", "INSERT INTO no_such_table VALUES (3);")]);
        let pool = C::pool(&database.server).await;
        let session = C::take(&pool).await.backend_id().await;
        for success in [false, true] {
            let result = C::migrate(AdvisoryLock::new(C::take(&pool).await, &key), migrations(&folder)).await;
            assert_eq!(result.is_ok(), success);
            write(folder.path(), "3_fail", "INSERT INTO applied VALUES (3);");
            let same = C::take(&pool).await.backend_id().await;
            assert_eq!(same, session, "the pool has kept it");
            assert_free::<C::Observer>(&database.server, &key);
        }
        assert_eq!(C::Observer::open(&database.server).number("SELECT COUNT(*) FROM applied"), Some(2));
    }

    async fn a_runtime_with_a_single_thread_will_do<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = database.server.clone();
        let key = unique_key("async_migration_current_thread");
        let folder = folder(&[CREATE, INSERT]);
        let applied = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let (mut one, mut two) = (C::open(&server).await, C::open(&server).await);
                let (one, two) = tokio::join!(
                    C::migrate(one.advisory_lock(&key), migrations(&folder)),
                    C::migrate(two.advisory_lock(&key), migrations(&folder)),
                );
                [one.expect("a migration").len(), two.expect("a migration").len()]
            })
        });
        let mut applied = applied.join().expect("no panic");
        applied.sort_unstable();
        assert_eq!(applied, [0, 2]);
    }

    async fn a_migration_that_is_code_sees_what_its_statements_did<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migration_code");
        let source = Code(|conn: &mut dyn BoxableConnection<C::Backend>| {
            conn.batch_execute("CREATE TABLE applied (version INT NOT NULL)")?;
            let failed = conn.batch_execute("INSERT INTO no_such_table VALUES (1)");
            failed.expect_err("there is no such table");
            conn.batch_execute("INSERT INTO applied VALUES (1)")?;
            Ok(())
        });
        let mut conn = C::open(&database.server).await;
        for expected in [&["1"][..], &[]] {
            let applied = C::migrate(conn.advisory_lock(&key), source.clone()).await.expect("it goes on");
            assert_eq!(applied, versions(expected));
        }
        assert_eq!(conn.number("SELECT COUNT(*) FROM applied").await, Some(1));
    }

    async fn a_panic_frees_the_lock<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migration_panic");
        let source = Code(|_: &mut dyn BoxableConnection<C::Backend>| -> Result<()> {
            std::panic::resume_unwind(Box::new("as asked"))
        });
        let task = spawn(C::open(&database.server).await, &key, source);
        let panic = task.await.expect_err("a panic").into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"as asked"));
        let mut observer = C::Observer::open(&database.server);
        wait_until_free(&mut observer, &key);
        assert_eq!(observer.number("SELECT COUNT(*) FROM __diesel_schema_migrations"), Some(0));
    }

    async fn a_dropped_future_keeps_the_lock_until_its_statement_has_ended<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_dropped");
        let folder = folder(&[CREATE, INSERT, ("3_wait", "UPDATE applied SET version = 3;"), ("4_insert", "INSERT INTO applied VALUES (4);")]);
        for transaction in [true, false] {
            let mut observer = C::Observer::open(server);
            if transaction {
                observer.execute_sql("CREATE TABLE applied (version INT NOT NULL)");
                write(folder.path(), CREATE.0, "DELETE FROM applied;");
            } else {
                without_transaction(folder.path(), "3_wait");
            }
            // The first two run, the third one waits for this transaction.
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            if transaction {
                let applied = {
                    let some = self::folder(&[(CREATE.0, "DELETE FROM applied;"), INSERT]);
                    C::migrate(conn.advisory_lock(&key), migrations(&some)).await.expect("a migration")
                };
                assert_eq!(applied, versions(&["1", "2"]));
            }
            let mut writer = C::Observer::open(server);
            writer.execute_sql("BEGIN");
            writer.execute_sql("UPDATE applied SET version = 1");
            let task = spawn(conn, &key, migrations(&folder));
            wait_until_it_runs(&mut observer, id, "UPDATE applied SET version = 3");
            task.abort();
            let end = timeout(PATIENCE, task).await.expect("it does not wait for the migration");
            assert!(end.expect_err("it is aborted").is_cancelled());

            // As long as the server is at it, nobody else can be.
            wait_until_it_runs(&mut observer, id, "UPDATE applied SET version = 3");
            let lock = observer.advisory_lock(&key).try_acquire().expect("a try");
            assert!(lock.is_none(), "the migration still runs");
            drop(lock);
            writer.execute_sql("ROLLBACK");
            wait_until_free(&mut observer, &key);

            // Neither recorded nor followed by the next one.
            let recorded = observer.number("SELECT COUNT(*) FROM __diesel_schema_migrations WHERE version > '2'");
            assert_eq!(recorded, Some(0));
            let done = observer.number("SELECT COUNT(*) FROM applied WHERE version = 3");
            assert_eq!(done, Some((!transaction).into()));
            assert_eq!(observer.number("SELECT COUNT(*) FROM applied WHERE version = 4"), Some(0));
        }
        let applied = C::migrate(C::open(server).await.advisory_lock(&key), migrations(&folder)).await.expect("the rest");
        assert_eq!(applied, versions(&["3", "4"]));
    }

    async fn code_learns_that_its_future_was_dropped<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_code_dropped");
        let sleep = match C::KIND {
            Kind::Postgres => "SELECT pg_sleep(1)",
            Kind::Mysql => "DO SLEEP(1)",
            Kind::Sqlite => unreachable!("these tests are for servers"),
        };
        let (sender, results) = mpsc::channel();
        let source = Code(move |conn: &mut dyn BoxableConnection<C::Backend>| {
            for sql in [sleep, "CREATE TABLE applied (version INT NOT NULL)"] {
                sender.send(conn.batch_execute(sql)).expect("the test listens");
            }
            Ok(())
        });
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        let task = spawn(conn, &key, source);
        let mut observer = C::Observer::open(server);
        wait_until_it_runs(&mut observer, id, sleep);
        task.abort();
        for _ in 0..2 {
            let result = results.recv_timeout(PATIENCE).expect("a result");
            result.expect_err("nobody is there to ask the server");
        }
        wait_until_free(&mut observer, &key);
        assert_eq!(observer.number("SELECT COUNT(*) FROM __diesel_schema_migrations"), Some(0));
    }

    async fn the_harness_of_diesel_async_takes_a_guard<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_harness");
        let folder = folder(&[CREATE]);
        std::fs::write(folder.path().join(CREATE.0).join("down.sql"), "DROP TABLE applied;").expect("a file");
        let conn = Box::new(C::open(server).await);
        let guard = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        let (guard, applied) = C::migrate_unlocked(guard, migrations(&folder));
        assert_eq!(applied.expect("a migration"), versions(&["1"]));
        let mut observer = C::Observer::open(server);
        let lock = observer.advisory_lock(&key).try_acquire().expect("a try");
        assert!(lock.is_none(), "it is held all the time");
        drop(lock);
        let (mut guard, reverted) = C::revert_last(guard, migrations(&folder));
        assert_eq!(reverted.expect("a way back"), "1".into());
        assert!(guard.is_held().await.expect("an answer"));
        let mut conn = *guard.release().await.expect("a release");
        assert_free::<C::Observer>(server, &key);
        let applied = C::migrate(conn.advisory_lock(&key), migrations(&folder)).await.expect("and forth");
        assert_eq!(applied, versions(&["1"]));
    }

    async fn round_trips<C: AsyncMigratable>(server: &Server) {
        let database = FreshDatabase::<C::Observer>::create(server);
        let key = unique_key("async_migration_round_trips");
        let folder = folder(&[CREATE]);
        let proxy = Proxy::start(&database.server);
        let mut conn = C::open_url(proxy.url()).await;
        C::migrate(conn.advisory_lock(&key), migrations(&folder)).await.expect("all is prepared");
        write(folder.path(), INSERT.0, INSERT.1);
        write(folder.path(), "3_insert", "INSERT INTO applied VALUES (3);");
        without_transaction(folder.path(), "3_insert");
        proxy.reset();
        let applied = C::migrate(conn.advisory_lock(&key), migrations(&folder)).await.expect("a migration");
        assert_eq!(applied, versions(&["2", "3"]));
        let (acquire, release) = (1, 1);
        assert_eq!(proxy.round_trips(), acquire + 2 + 4 + 2 + release);
    }
}

on_postgres_async! {
    async fn those_who_wait_for_the_lock_do_not_get_in_the_way_of_create_index_concurrently(server: &Server) {
        type C = AsyncPgConnection;
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let server = &database.server;
        let key = unique_key("async_migration_index");
        let mut observer = diesel::PgConnection::open(server);
        let mut writer = diesel::PgConnection::open(server);
        let folder = folder(&[CREATE]);
        C::migrate(C::open(server).await.advisory_lock(&key), migrations(&folder)).await.expect("the table");
        write(folder.path(), "2_index", "CREATE INDEX CONCURRENTLY applied_index ON applied (version);");
        without_transaction(folder.path(), "2_index");

        // A transaction that wrote to the table holds the index up until the others wait for the lock.
        writer.execute_sql("BEGIN; INSERT INTO applied VALUES (0)");
        let first = spawn(C::open(server).await, &key, migrations(&folder));
        wait_for("the index to wait for the writer", || {
            observer.number("SELECT COUNT(*) FROM pg_stat_progress_create_index WHERE datname = current_database() AND phase LIKE 'waiting for writers%'") == Some(1)
        });
        let mut others = Vec::new();
        for _ in 0..4 {
            others.push(spawn(C::open(server).await, &key, migrations(&folder)));
        }
        wait_for("the others to ask for the lock", || {
            observer.number("SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() \
                AND query LIKE '%pg_%advisory%' AND pid <> pg_backend_pid()") == Some(4)
        });
        writer.execute_sql("COMMIT");

        assert_eq!(join(vec![first]).await, ["2"]);
        assert_eq!(join(others).await, ["", "", "", ""]);
        assert_eq!(observer.number("SELECT COUNT(*) FROM pg_index WHERE indexrelid = 'applied_index'::regclass AND indisvalid"), Some(1));
    }

    async fn a_migration_that_leaves_an_aborted_transaction_releases_the_lock(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let key = unique_key("async_migration_aborted");
        // A transaction that Diesel does not know of.
        let folder = folder(&[("1_abort", "BEGIN;\nINSERT INTO no_such_table VALUES (1);")]);
        without_transaction(folder.path(), "1_abort");
        let mut conn = AsyncPgConnection::open(&database.server).await;
        let error = AsyncPgConnection::migrate(conn.advisory_lock(&key), migrations(&folder))
            .await
            .expect_err("the migration fails");
        assert!(error.to_string().contains("no_such_table"), "{error}");
        assert_free::<diesel::PgConnection>(&database.server, &key);
    }

    async fn a_pooled_connection_can_be_borrowed(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let folder = folder(&[CREATE]);
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(&database.server.url);
        let pool = Pool::builder().max_size(1).build(manager).await.expect("a pool");
        let mut conn = pool.get().await.expect("a connection");
        let lock = conn.advisory_lock("migrations");
        let applied = lock.run_pending_migrations(migrations(&folder)).await.expect("a free lock");
        assert_eq!(applied, versions(&["1"]));
    }

    async fn a_shared_lock_does_not_let_two_migrate_at_once(server: &Server) {
        let key = unique_key("async_migration_shared");
        let folder = folder(&[]);
        let mut reader = diesel::PgConnection::open(server);
        let _lock = reader.advisory_lock(&key).shared().acquire().expect("a free lock");
        let mut conn = AsyncPgConnection::open(server).await;
        let lock = conn.advisory_lock(&key).shared().timeout(Duration::ZERO);
        let error = lock.run_pending_migrations(migrations(&folder)).await.expect_err("a reader has the lock");
        assert!(matches!(error.downcast_ref(), Some(Error::Timeout { .. })), "{error:?}");
    }

    async fn a_dropped_future_leaves_a_borrowed_connection_without_the_lock(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let key = unique_key("async_migration_borrowed");
        let folder = folder(&[("1_sleep", "SELECT pg_sleep(0.5);"), ("2_create", CREATE.1)]);
        without_transaction(folder.path(), "1_sleep");
        let mut conn = AsyncPgConnection::open(&database.server).await;
        let id = conn.backend_id().await;
        let mut observer = diesel::PgConnection::open(&database.server);
        {
            let migrating = conn.advisory_lock(&key).run_pending_migrations(migrations(&folder));
            let runs = tokio::task::spawn_blocking(move || {
                wait_until_it_runs(&mut observer, id, "SELECT pg_sleep");
                observer
            });
            tokio::select! {
                result = migrating => panic!("{result:?}"),
                result = runs => observer = result.expect("it runs"),
            }
        }
        // It answers after the statement that was dropped, and is in step.
        assert_eq!(conn.number("SELECT 4711").await, Some(4711));
        assert_free::<diesel::PgConnection>(&database.server, &key);
        assert_eq!(observer.number("SELECT COUNT(*) FROM __diesel_schema_migrations"), Some(0));
    }
}
