//! `dlock-diesel-async` on SQLite: what is dropped frees at once what it held or waited for. No server is needed here.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::sql_types::BigInt;
use diesel::sqlite::SqliteConnection;
use diesel::{ConnectionError, QueryableByName};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, bb8, deadpool};
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_async::{AsyncConnection, RunQueryDsl, SimpleAsyncConnection, TransactionManager};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error, LockKey, SqliteLocksExt};
use dlock_tests::{
    Process, TestConnection, dlock_child, is_claimed_on_disk, is_locked_on_disk, wait_for,
};
use tempfile::TempDir;

type Conn = SyncConnectionWrapper<SqliteConnection>;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(60);

/// A folder with a database, which goes with it.
struct Database {
    _folder: TempDir,
    path: PathBuf,
}

impl Database {
    fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let path = folder.path().join("app.db");
        let database = Self {
            _folder: folder,
            path,
        };
        database
            .look()
            .execute_sql("PRAGMA journal_mode = WAL; CREATE TABLE t (n INTEGER NOT NULL)");
        database
    }

    fn url(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    async fn open(&self) -> Conn {
        let mut conn = Conn::establish(self.url()).await.expect("a connection");
        conn.batch_execute("PRAGMA busy_timeout = 20000")
            .await
            .expect("a pragma");
        conn.enable_advisory_locks().await.expect("SQLite");
        conn
    }

    /// A connection that looks at the others.
    fn look(&self) -> SqliteConnection {
        SqliteConnection::open_url(self.url())
    }

    /// As the operating system sees it: by nobody, in any process.
    #[track_caller]
    fn assert_free(&self, key: &str) {
        let number = LockKey::from(key).to_sqlite().expect("a valid key");
        assert!(!is_locked_on_disk(self.url(), number), "{key} is locked");
        use dlock_diesel::AdvisoryLockExt;
        let mut conn = self.look();
        assert!(
            conn.advisory_lock(key)
                .try_acquire()
                .expect("a try")
                .is_some(),
            "{key} is not free"
        );
    }

    #[track_caller]
    fn assert_held(&self, key: &str) {
        let number = LockKey::from(key).to_sqlite().expect("a valid key");
        assert!(is_locked_on_disk(self.url(), number), "{key} is not locked");
        use dlock_diesel::AdvisoryLockExt;
        let mut conn = self.look();
        assert!(
            conn.advisory_lock(key)
                .try_acquire()
                .expect("a try")
                .is_none(),
            "{key} is free"
        );
    }

    fn pool_config(&self) -> AsyncDieselConnectionManager<Conn> {
        let mut config = ManagerConfig::<Conn>::default();
        config.custom_setup = Box::new(|url| {
            Box::pin(async move {
                let mut conn = Conn::establish(url).await?;
                let enabled = conn.enable_advisory_locks().await;
                enabled.map_err(|error| ConnectionError::BadConnection(error.to_string()))?;
                Ok(conn)
            })
        });
        AsyncDieselConnectionManager::new_with_config(self.url(), config)
    }
}

/// On a runtime of several threads, and on one of a single thread.
fn on_every_runtime<F: Future<Output = ()> + Send + 'static>(test: impl Fn() -> F) {
    let multi = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let multi = multi.expect("a runtime");
    // In a task, as applications have it.
    multi
        .block_on(async { tokio::spawn(test()).await })
        .expect("no panic");
    let single = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    single.expect("a runtime").block_on(test());
}

async fn session(conn: &mut Conn) -> i64 {
    number(conn, "SELECT dlock_session() AS n").await
}

async fn number(conn: &mut Conn, sql: &str) -> i64 {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        n: i64,
    }
    let row: Row = diesel::sql_query(sql)
        .get_result(conn)
        .await
        .expect("a row");
    row.n
}

fn is_waiting(session: i64) -> bool {
    dlock_tests::is_waiting_here(session)
}

/// Until the session is in the queue. The runtime goes on.
async fn until_it_waits(session: i64) {
    let begin = Instant::now();
    while !is_waiting(session) {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "it does not wait"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn is_broken(conn: &mut Conn) -> bool {
    <Conn as AsyncConnection>::TransactionManager::is_broken_transaction_manager(conn)
}

/// The connection works, is in no transaction, and holds nothing.
async fn assert_clean(conn: &mut Conn) {
    assert!(!is_broken(conn));
    assert_eq!(number(conn, "SELECT 1 AS n").await, 1);
    assert_eq!(number(conn, "SELECT dlock_release_all() AS n").await, 0);
    conn.batch_execute("BEGIN; ROLLBACK")
        .await
        .expect("no transaction is open");
}

#[test]
fn it_does_what_the_sync_one_does() {
    on_every_runtime(async || {
        let database = Database::new();
        let (mut conn, mut other) = (database.open().await, database.open().await);
        let mut lock = conn
            .advisory_lock("a")
            .acquire()
            .await
            .expect("a free lock");
        assert!(lock.is_held().await.expect("an answer"));
        database.assert_held("a");
        assert!(
            other
                .advisory_lock("a")
                .try_acquire()
                .await
                .expect("a try")
                .is_none()
        );
        let error = other
            .advisory_lock("a")
            .timeout(SHORT)
            .acquire()
            .await
            .map(drop);
        match error.expect_err("taken") {
            Error::Timeout { holders, .. } => {
                assert_eq!(holders[0].backend_id, i64::from(std::process::id()));
            }
            error => panic!("{error:?}"),
        }
        let error = other
            .advisory_lock("a")
            .timeout(SHORT)
            .poll_every(SHORT / 3)
            .acquire()
            .await;
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        drop(error);
        // It stacks, and each guard frees its own.
        let inner = lock
            .advisory_lock("a")
            .acquire()
            .await
            .expect("its own lock");
        inner.release().await.expect("a release");
        database.assert_held("a");
        lock.release().await.expect("a release");
        database.assert_free("a");

        let reading = conn
            .advisory_lock("a")
            .shared()
            .acquire()
            .await
            .expect("a free lock");
        other
            .advisory_lock("a")
            .shared()
            .acquire()
            .await
            .expect("shared")
            .release()
            .await
            .expect("a release");
        assert!(
            other
                .advisory_lock("a")
                .try_acquire()
                .await
                .expect("a try")
                .is_none()
        );
        reading.release().await.expect("a release");

        let n = conn
            .advisory_lock("a")
            .run(async |conn| Ok::<_, Error>(number(conn, "SELECT 7 AS n").await))
            .await;
        assert_eq!(n.expect("a number"), 7);
        conn.advisory_lock("a")
            .transaction(async |conn| {
                conn.batch_execute("INSERT INTO t VALUES (1)").await?;
                Ok::<_, Error>(())
            })
            .await
            .expect("a transaction");
        let error: Result<(), Error> = conn
            .advisory_lock("a")
            .transaction(async |conn| {
                conn.batch_execute("INSERT INTO t VALUES (2)").await?;
                conn.batch_execute("no SQL").await?;
                Ok(())
            })
            .await;
        assert!(error.is_err());
        assert_eq!(number(&mut other, "SELECT COUNT(*) AS n FROM t").await, 1);
        database.assert_free("a");
        assert_clean(&mut conn).await;
    });
}

#[test]
fn a_connection_that_was_not_enabled_says_which_line_is_missing() {
    on_every_runtime(async || {
        let mut conn = Conn::establish(":memory:").await.expect("a connection");
        let error = conn
            .advisory_lock("a")
            .acquire()
            .await
            .map(drop)
            .expect_err("no locks");
        let Error::Unsupported { source, .. } = error else {
            panic!("{error:?}")
        };
        assert!(
            source.to_string().contains("conn.enable_advisory_locks()"),
            "{source}"
        );
        conn.enable_advisory_locks().await.expect("SQLite");
        let mut lock = conn
            .advisory_lock("async memory")
            .acquire()
            .await
            .expect("a free lock");
        lock.enable_advisory_locks().await.expect("once more");
        assert!(lock.is_held().await.expect("an answer"));
    });
}

#[test]
fn a_wait_that_is_dropped_leaves_the_queue_at_once_and_the_connection_fit() {
    on_every_runtime(async || {
        let database = Database::new();
        let (mut holder, mut conn) = (database.open().await, database.open().await);
        let lock = holder
            .advisory_lock("a")
            .acquire()
            .await
            .expect("a free lock");
        let id = session(&mut conn).await;
        for limit in [None, Some(LONG)] {
            let mut outer = conn
                .advisory_lock("outer")
                .acquire()
                .await
                .expect("a free lock");
            {
                let waiting = outer.advisory_lock("a");
                let waiting = match limit {
                    Some(limit) => waiting.timeout(limit),
                    None => waiting,
                };
                let mut waiting = Box::pin(waiting.acquire());
                tokio::select! {
                    _ = &mut waiting => panic!("it is taken"),
                    () = until_it_waits(id) => {}
                }
                let begin = Instant::now();
                drop(waiting);
                // It did not wait for the holder.
                assert!(
                    begin.elapsed() < Duration::from_secs(2),
                    "{:?}",
                    begin.elapsed()
                );
                assert!(!is_waiting(id));
            }
            assert!(!is_broken(&mut outer));
            database.assert_held("outer");
            outer.release().await.expect("the outer lock is held");
            assert_clean(&mut conn).await;
        }
        lock.release().await.expect("a release");
        database.assert_free("a");
    });
}

#[test]
fn a_wait_for_another_process_that_is_dropped_leaves_nothing() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut process =
            Process::spawn_without_servers(dlock_child!("--url", database.url(), "hold", "a"));
        assert!(process.line().starts_with("connected "));
        process.expect_line("acquired");
        let mut conn = database.open().await;
        for _ in 0..5 {
            let result = tokio::time::timeout(SHORT, conn.advisory_lock("a").acquire()).await;
            assert!(result.is_err());
        }
        assert_clean(&mut conn).await;
        process.send("");
        process.expect_line("released");
        database.assert_free("a");
    });
}

#[test]
fn a_writer_that_is_dropped_while_it_waits_for_readers_lets_others_in() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut process = Process::spawn_without_servers(dlock_child!(
            "--url",
            database.url(),
            "hold-shared",
            "a"
        ));
        assert!(process.line().starts_with("connected "));
        process.expect_line("acquired");
        let mut conn = database.open().await;
        let mut reading = conn
            .advisory_lock("a")
            .shared()
            .acquire()
            .await
            .expect("shared");
        let number = LockKey::from("a").to_sqlite().expect("a valid key");
        let is_claimed = || is_claimed_on_disk(database.url(), number);
        for _ in 0..5 {
            let mut writer = Box::pin(reading.advisory_lock("a").acquire());
            while !is_claimed() {
                let result = tokio::time::timeout(Duration::from_millis(1), &mut writer).await;
                assert!(result.is_err());
            }
            drop(writer);
            assert!(!is_claimed());
        }
        let mut other = Process::spawn_without_servers(dlock_child!(
            "--url",
            database.url(),
            "hold-shared",
            "a"
        ));
        assert!(other.line().starts_with("connected "));
        other.expect_line("acquired");
        assert!(reading.is_held().await.expect("an answer"));
    });
}

#[test]
fn a_wait_that_is_dropped_as_it_is_granted_leaves_nothing() {
    // On a runtime of several threads the grant and the drop race.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let database = Database::new();
        let (mut holder, mut conn) = (database.open().await, database.open().await);
        let id = session(&mut conn).await;
        let (mut granted, mut dropped) = (0, 0);
        for round in 0..300u64 {
            let lock = holder
                .advisory_lock("a")
                .acquire()
                .await
                .expect("a free lock");
            let waiting = tokio::time::timeout(LONG, async {
                tokio::select! {
                    lock = conn.advisory_lock("a").acquire() => {
                        lock.expect("the lock").release().await.expect("a release");
                        true
                    }
                    () = async {
                        until_it_waits(id).await;
                        // Another task, so that the runtime's threads are at it.
                        let other = tokio::spawn(tokio::task::yield_now());
                        drop(lock);
                        for _ in 0..round % 8 {
                            tokio::task::yield_now().await;
                        }
                        if round % 3 == 0 {
                            thread::sleep(Duration::from_micros(round));
                        }
                        other.await.expect("no panic");
                    } => false,
                }
            });
            if waiting.await.expect("in time") {
                granted += 1;
            } else {
                dropped += 1;
            }
            assert!(!is_broken(&mut conn));
            database.assert_free("a");
        }
        assert_clean(&mut conn).await;
        println!("granted {granted} times, dropped {dropped} times");
        assert!(
            dropped > 10,
            "granted {granted} times, dropped {dropped} times"
        );
    });
}

#[test]
fn a_future_that_is_dropped_after_any_number_of_polls_leaves_nothing() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut conn = database.open().await;
        for polls in 0..6 {
            {
                let mut acquiring = Box::pin(conn.advisory_lock("a").acquire());
                for _ in 0..polls {
                    if poll_once(acquiring.as_mut()).await {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            database.assert_free("a");
            let lock = conn
                .advisory_lock("a")
                .acquire()
                .await
                .expect("a free lock");
            {
                let mut releasing = Box::pin(lock.release());
                for _ in 0..polls {
                    if poll_once(releasing.as_mut()).await {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            database.assert_free("a");
            assert_clean(&mut conn).await;
        }
    });
}

/// Whether it is ready. What it returns is dropped.
async fn poll_once<F: Future + Unpin>(mut future: F) -> bool {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(std::pin::Pin::new(&mut future).poll(context).is_ready())
    })
    .await
}

#[test]
fn a_wait_that_is_dropped_before_a_thread_was_free_for_it_is_none() {
    use dlock_diesel::AdvisoryLockExt as _;
    let database = Database::new();
    let mut holder = database.look();
    let lock = holder.advisory_lock("a").acquire().expect("a free lock");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut conn = database.open().await;
        let busy = tokio::task::spawn_blocking(|| thread::sleep(Duration::from_millis(200)));
        {
            let mut waiting = Box::pin(
                dlock_diesel_async::AdvisoryLockExt::advisory_lock(&mut conn, "a").acquire(),
            );
            assert!(!poll_once(waiting.as_mut()).await);
        }
        busy.await.expect("no panic");
        assert_clean(&mut conn).await;
    });
    drop(lock);
    database.assert_free("a");
}

#[test]
fn a_guard_that_is_dropped_frees_its_lock_at_once_and_the_connection_stays() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut conn = database.open().await;
        let mut outer = conn
            .advisory_lock("a")
            .acquire()
            .await
            .expect("a free lock");
        drop(
            outer
                .advisory_lock("a")
                .acquire()
                .await
                .expect("its own lock"),
        );
        database.assert_held("a");
        drop(outer);
        database.assert_free("a");
        assert_clean(&mut conn).await;
    });
}

#[test]
fn a_guard_that_is_dropped_without_a_runtime_frees_its_lock() {
    let database = Database::new();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let lock = runtime.block_on(async {
        let conn = Box::new(database.open().await);
        AdvisoryLock::new(conn, "a")
            .acquire()
            .await
            .expect("a free lock")
    });
    database.assert_held("a");
    drop(runtime);
    database.assert_held("a");
    drop(lock);
    database.assert_free("a");
}

#[test]
fn an_open_transaction_is_rolled_back_before_the_lock_is_free() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut observer = database.look();
        for _ in 0..30 {
            let mut conn = database.open().await;
            let mut lock = conn
                .advisory_lock("a")
                .acquire()
                .await
                .expect("a free lock");
            <Conn as AsyncConnection>::TransactionManager::begin_transaction(&mut *lock)
                .await
                .expect("it begins");
            lock.batch_execute("INSERT INTO t VALUES (1)")
                .await
                .expect("a row");
            let mut next = database.look();
            let id = next.backend_id();
            let next = thread::spawn(move || {
                use dlock_diesel::AdvisoryLockExt;
                next.execute_sql("PRAGMA busy_timeout = 0");
                let mut lock = next.advisory_lock("a").acquire().expect("the lock");
                // Nobody writes any more, and nothing was written.
                lock.execute_sql("BEGIN IMMEDIATE; ROLLBACK");
                assert_eq!(lock.number("SELECT COUNT(*) FROM t"), Some(0));
            });
            wait_for("who comes next", || is_waiting(id));
            drop(lock);
            next.join().expect("its assertions");
            assert!(is_broken(&mut conn));
        }
        observer.execute_sql("PRAGMA busy_timeout = 0; BEGIN IMMEDIATE; ROLLBACK");
        database.assert_free("a");
    });
}

/// Who ends in SQL the transaction that Diesel has begun breaks the connection, as far as Diesel knows. It goes on all the
/// same, and so does the work under the outer guards.
#[test]
fn a_transaction_that_breaks_the_connection_frees_no_outer_lock() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut conn = database.open().await;
        let mut outer = conn
            .advisory_lock("a")
            .acquire()
            .await
            .expect("a free lock");
        let result: Result<(), Error> = outer
            .advisory_lock("b")
            .transaction(async |conn| {
                conn.batch_execute("ROLLBACK").await?;
                Err(diesel::result::Error::RollbackTransaction.into())
            })
            .await;
        result.expect_err("the error");
        database.assert_free("b");
        assert!(outer.is_held().await.expect("an answer"));
        database.assert_held("a");
        drop(outer);
        database.assert_free("a");
        assert!(is_broken(&mut conn));
    });
}

#[test]
fn a_transaction_that_is_dropped_is_rolled_back_before_the_lock_is_free() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let database = Database::new();
        let mut observer = database.look();
        for _ in 0..20 {
            let mut conn = database.open().await;
            {
                let (say, said) = tokio::sync::oneshot::channel();
                let transaction = conn.advisory_lock("a").transaction(async |conn| {
                    conn.batch_execute("INSERT INTO t VALUES (1)").await?;
                    say.send(()).expect("somebody listens");
                    std::future::pending::<()>().await;
                    Ok::<_, Error>(())
                });
                tokio::select! {
                    result = transaction => panic!("it goes on for ever: {result:?}"),
                    inserted = said => inserted.expect("it has been inserted"),
                }
            }
            database.assert_free("a");
            observer.execute_sql("PRAGMA busy_timeout = 0; BEGIN IMMEDIATE; ROLLBACK");
            assert_eq!(observer.number("SELECT COUNT(*) FROM t"), Some(0));
            assert!(is_broken(&mut conn));
        }
    });
}

#[test]
fn a_transaction_that_is_dropped_as_it_begins_leaves_none_open() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut observer = database.look();
        // BEGIN IMMEDIATE waits for who writes.
        observer.execute_sql("PRAGMA busy_timeout = 0; BEGIN IMMEDIATE");
        let mut conn = database.open().await;
        conn.batch_execute("PRAGMA busy_timeout = 300")
            .await
            .expect("a pragma");
        {
            let transaction = conn
                .advisory_lock("a")
                .transaction(async |_| Ok::<_, Error>(()));
            assert!(tokio::time::timeout(SHORT, transaction).await.is_err());
        }
        observer.execute_sql("ROLLBACK");
        database.assert_free("a");
        observer.execute_sql("BEGIN IMMEDIATE; ROLLBACK");
        drop(conn);
    });
}

/// As many are dropped as the runtime has threads.
#[test]
fn transactions_that_are_dropped_as_they_begin_let_another_writer_go_on() {
    const BUSY_TIMEOUT: Duration = Duration::from_secs(20);
    on_every_runtime(async || {
        let database = Database::new();
        let mut writer = database.open().await;
        let begin = Instant::now();
        let (say, said) = tokio::sync::oneshot::channel();
        let (end, mut ended) = tokio::sync::oneshot::channel();
        let writing = tokio::spawn(async move {
            let written = writer.advisory_lock("w").transaction(async move |conn| {
                say.send(()).expect("somebody listens");
                while ended.try_recv().is_err() {
                    conn.batch_execute("INSERT INTO t VALUES (1)").await?;
                    tokio::time::sleep(SHORT / 2).await;
                }
                Ok::<_, Error>(())
            });
            written.await
        });
        said.await.expect("it writes");
        let mut dropped = Vec::new();
        for key in ["a", "b"] {
            let mut conn = database.open().await;
            let millis = BUSY_TIMEOUT.as_millis();
            conn.batch_execute(&format!("PRAGMA busy_timeout = {millis}"))
                .await
                .expect("a pragma");
            dropped.push(tokio::spawn(async move {
                let transaction = conn
                    .advisory_lock(key)
                    .transaction(async |_| Ok::<_, Error>(()));
                // Long enough to have asked for the lock, on a busy machine too.
                let limit = Duration::from_secs(1);
                assert!(tokio::time::timeout(limit, transaction).await.is_err());
                assert!(is_broken(&mut conn));
                let timeout = number(&mut conn, "SELECT timeout AS n FROM pragma_busy_timeout");
                assert_eq!(timeout.await, BUSY_TIMEOUT.as_millis() as i64);
            }));
        }
        for dropped in dropped {
            dropped.await.expect("no panic");
        }
        end.send(()).expect("it still writes");
        assert!(begin.elapsed() < BUSY_TIMEOUT / 2, "{:?}", begin.elapsed());
        writing.await.expect("no panic").expect("it commits");
        for key in ["w", "a", "b"] {
            database.assert_free(key);
        }
    });
}

#[test]
fn a_transaction_waits_for_another_writer_as_long_as_busy_timeout_says_and_leaves_that_as_it_is() {
    on_every_runtime(async || {
        for (millis, released) in [(0, false), (10, false), (300, false), (60_000, true)] {
            let database = Database::new();
            let mut observer = database.look();
            observer.execute_sql("PRAGMA busy_timeout = 0; BEGIN IMMEDIATE");
            let mut conn = database.open().await;
            conn.batch_execute(&format!("PRAGMA busy_timeout = {millis}"))
                .await
                .expect("a pragma");
            let begin = Instant::now();
            let (result, ()) = tokio::join!(
                conn.advisory_lock("a")
                    .transaction(async |_| Ok::<_, Error>(())),
                async {
                    if released {
                        tokio::time::sleep(2 * SHORT).await;
                        observer.execute_sql("ROLLBACK");
                    }
                }
            );
            if released {
                result.expect("a transaction");
            } else {
                let error = result.expect_err("another one writes");
                assert!(format!("{error:?}").contains("locked"), "{error:?}");
                assert!(begin.elapsed() >= Duration::from_millis(millis));
            }
            assert!(begin.elapsed() < Duration::from_secs(30));
            let timeout = number(&mut conn, "SELECT timeout AS n FROM pragma_busy_timeout");
            assert_eq!(timeout.await, i64::try_from(millis).expect("a number"));
            assert_clean(&mut conn).await;
        }
    });
}

#[test]
fn a_transaction_that_is_dropped_after_any_number_of_polls_leaves_none_open() {
    on_every_runtime(async || {
        let database = Database::new();
        let mut observer = database.look();
        observer.execute_sql("PRAGMA busy_timeout = 0");
        let mut conn = database.open().await;
        for round in 0..120 {
            let millis = 1000 + round;
            conn.batch_execute(&format!("PRAGMA busy_timeout = {millis}"))
                .await
                .expect("a pragma");
            {
                let mut transaction = Box::pin(
                    conn.advisory_lock("a")
                        .transaction(async |_| Ok::<_, Error>(())),
                );
                for poll in 0..round % 12 {
                    if poll_once(transaction.as_mut()).await {
                        break;
                    }
                    // It is dropped while a statement runs, or when it has ended and nobody has asked for the answer.
                    if poll + 1 < round % 12 || round % 3 == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            }
            let timeout = number(&mut conn, "SELECT timeout AS n FROM pragma_busy_timeout");
            assert_eq!(timeout.await, millis);
            database.assert_free("a");
            observer.execute_sql("BEGIN IMMEDIATE; ROLLBACK");
            if is_broken(&mut conn) {
                conn = database.open().await;
            }
        }
    });
}

#[test]
fn a_panic_and_an_aborted_task_free_the_lock() {
    on_every_runtime(async || {
        let database = Arc::new(Database::new());
        let panicking = tokio::spawn({
            let database = Arc::clone(&database);
            async move {
                let mut conn = database.open().await;
                let _lock = conn
                    .advisory_lock("a")
                    .acquire()
                    .await
                    .expect("a free lock");
                std::panic::resume_unwind(Box::new("as asked"));
            }
        });
        assert!(panicking.await.is_err());
        database.assert_free("a");
        let (say, said) = tokio::sync::oneshot::channel();
        let aborted = tokio::spawn({
            let database = Arc::clone(&database);
            async move {
                let mut conn = database.open().await;
                let _lock = conn
                    .advisory_lock("a")
                    .acquire()
                    .await
                    .expect("a free lock");
                say.send(()).expect("the test listens");
                std::future::pending::<()>().await;
            }
        });
        said.await.expect("the lock");
        database.assert_held("a");
        aborted.abort();
        assert!(aborted.await.is_err());
        database.assert_free("a");
    });
}

#[test]
fn pools_keep_connections_whose_waits_were_dropped() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let database = Database::new();
        let pool = bb8::Pool::builder()
            .max_size(2)
            .build(database.pool_config())
            .await
            .expect("a pool");
        let lock = AdvisoryLock::new(pool.get().await.expect("a connection"), "a")
            .acquire()
            .await
            .expect("a free lock");
        let mut ids = Vec::new();
        for _ in 0..3 {
            let mut conn = pool.get().await.expect("a connection");
            ids.push(session(&mut conn).await);
            assert!(
                tokio::time::timeout(SHORT, conn.advisory_lock("a").acquire())
                    .await
                    .is_err()
            );
        }
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        drop(lock);
        database.assert_free("a");

        let pool = deadpool::Pool::builder(database.pool_config())
            .max_size(1)
            .build()
            .expect("a pool");
        let lock = AdvisoryLock::new(pool.get().await.expect("a connection"), "a")
            .acquire()
            .await
            .expect("a free lock");
        database.assert_held("a");
        drop(lock);
        database.assert_free("a");
        assert_clean(&mut pool.get().await.expect("a connection")).await;
    });
}

#[test]
fn tasks_that_contend_and_give_up_count_exactly() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let database = Arc::new(Database::new());
        let count = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..8u64)
            .map(|task| {
                let (database, count) = (Arc::clone(&database), Arc::clone(&count));
                tokio::spawn(async move {
                    let mut conn = database.open().await;
                    let mut added = 0;
                    for round in 0..100u64 {
                        let limit = Duration::from_micros(50 + (task * 97 + round * 31) % 1500);
                        let adding = conn.advisory_lock("a").run(async |_| {
                            // Read, and written later: two at once would lose one.
                            let read = AtomicU64::load(&count, Ordering::SeqCst);
                            tokio::task::yield_now().await;
                            count.store(read + 1, Ordering::SeqCst);
                            added += 1;
                            Ok::<_, Error>(())
                        });
                        let _ = tokio::time::timeout(limit, adding).await;
                    }
                    assert_clean(&mut conn).await;
                    added
                })
            })
            .collect();
        let mut added = 0u64;
        for task in tasks {
            added += task.await.expect("no panic");
        }
        assert_eq!(AtomicU64::load(&count, Ordering::SeqCst), added);
        println!("added {added} of 800");
        assert!(added > 0);
        database.assert_free("a");
    });
}

#[test]
fn a_wait_blocks_no_other_task_of_a_single_thread() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let database = Database::new();
        let (mut holder, mut conn, mut writer) = (
            database.open().await,
            database.open().await,
            database.open().await,
        );
        let lock = holder
            .advisory_lock("a")
            .acquire()
            .await
            .expect("a free lock");
        let id = session(&mut conn).await;
        let acquired = tokio::join!(
            async { conn.advisory_lock("a").acquire().await.map(drop) },
            async {
                until_it_waits(id).await;
                for _ in 0..10 {
                    writer
                        .batch_execute("INSERT INTO t VALUES (1)")
                        .await
                        .expect("a write");
                }
                lock.release().await.expect("a release");
            }
        );
        acquired.0.expect("the lock");
        database.assert_free("a");
        wait_for("nobody", || !is_waiting(id));
    });
}
