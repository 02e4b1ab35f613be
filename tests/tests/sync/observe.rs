//! Looks at locks from other connections, and runs connections in threads.

use std::{
    ops::Deref,
    panic::resume_unwind,
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

use diesel::{MysqlConnection, PgConnection, SqliteConnection, connection::LoadConnection};
use dlock_core::{Dialect, PostgresKey};
use dlock_diesel::{AdvisoryLockExt, LockBackend, LockKey};
use dlock_tests::{PATIENCE, Server, TestConnection, is_locked_on_disk, wait_for};

/// A connection that can see who holds a lock without the help of what is tested.
pub(crate) trait LockTestConnection:
    TestConnection + LoadConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>>
{
    /// Frees every lock of this session, behind the back of its guards.
    const RELEASE_ALL: &str;

    /// The sessions that hold the lock.
    fn holder_ids(&mut self, key: &LockKey) -> Vec<i64>;
}

impl LockTestConnection for PgConnection {
    const RELEASE_ALL: &str = "SELECT pg_advisory_unlock_all()";

    fn holder_ids(&mut self, key: &LockKey) -> Vec<i64> {
        ids(self.text(&format!(
            "SELECT string_agg(DISTINCT pid::text, ' ') FROM pg_locks WHERE granted AND {}",
            pg_locks_of(key)
        )))
    }
}

/// The condition for the rows of a key in `pg_locks`.
pub(crate) fn pg_locks_of(key: &LockKey) -> String {
    let (classid, objid, objsubid) = match key.to_postgres().expect("a valid key") {
        PostgresKey::BigInt(key) => ((key >> 32) as u32, key as u32, 1),
        PostgresKey::Pair(first, second) => (first as u32, second as u32, 2),
    };
    format!(
        "locktype = 'advisory' AND classid = {classid} AND objid = {objid} AND objsubid = {objsubid} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
}

impl LockTestConnection for MysqlConnection {
    const RELEASE_ALL: &str = "DO RELEASE_ALL_LOCKS()";

    fn holder_ids(&mut self, key: &LockKey) -> Vec<i64> {
        // Names are ASCII.
        let name = key.to_mysql().expect("a valid key").replace('\'', "''");
        let name = name.replace('\\', "\\\\");
        ids(self.text(&format!("SELECT CAST(IS_USED_LOCK('{name}') AS CHAR)")))
    }
}

impl LockTestConnection for SqliteConnection {
    const RELEASE_ALL: &str = "SELECT dlock_release_all()";

    fn holder_ids(&mut self, key: &LockKey) -> Vec<i64> {
        sqlite_holder_ids(self, key)
    }
}

/// Whom dlock's own table tells, and what the operating system says of the lock file.
pub(crate) fn sqlite_holder_ids(conn: &mut SqliteConnection, key: &LockKey) -> Vec<i64> {
    let number = key.to_sqlite().expect("a valid key");
    let path = conn.text("SELECT file FROM pragma_database_list WHERE name = 'main'");
    if !is_locked_on_disk(&path.expect("a path"), number) {
        return Vec::new();
    }
    let table = conn.text(&format!("SELECT dlock_holders({number})"));
    let table = table.unwrap_or_default();
    let granted = table.lines().filter_map(|line| {
        let parts: Vec<&str> = line.split(' ').collect();
        (parts[3] == "1").then(|| parts[0].parse().expect("a number"))
    });
    let mut ids: Vec<i64> = granted.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn ids(text: Option<String>) -> Vec<i64> {
    let text = text.unwrap_or_default();
    let mut ids: Vec<i64> = text
        .split_whitespace()
        .map(|id| id.parse().expect("a number"))
        .collect();
    ids.sort_unstable();
    ids
}

/// Asserts, from the observer's connection, that `holder` alone has the lock and that nobody else can take it.
#[track_caller]
pub(crate) fn assert_held<C: LockTestConnection>(
    observer: &mut C,
    key: impl Into<LockKey>,
    holder: i64,
) {
    let key = key.into();
    assert_ne!(observer.backend_id(), holder, "the observer is another one");
    assert_eq!(observer.holder_ids(&key), [holder], "who holds {key}");
    let taken = observer.advisory_lock(&key).try_acquire().expect("a try");
    assert!(taken.is_none(), "{key} is held by {holder}, and granted");
}

/// Asserts, from the observer's connection, that nobody has the lock and that it can be taken.
#[track_caller]
pub(crate) fn assert_free<C: LockTestConnection>(observer: &mut C, key: impl Into<LockKey>) {
    let key = key.into();
    assert_eq!(
        observer.holder_ids(&key),
        Vec::<i64>::new(),
        "who holds {key}"
    );
    let lock = observer.advisory_lock(&key).try_acquire().expect("a try");
    let lock = lock.unwrap_or_else(|| panic!("{key} is held by nobody, but not granted"));
    lock.release().expect("a release");
}

/// What happens on another connection, in a thread of its own.
pub(crate) struct Background<T> {
    pub(crate) id: i64,
    thread: JoinHandle<T>,
    said: Receiver<String>,
    told: Sender<()>,
}

/// The thread's end of [`Background`].
pub(crate) struct Stage {
    say: Sender<String>,
    go_on: Receiver<()>,
}

impl Stage {
    /// Tells the test how far it has come.
    pub(crate) fn say(&self, what: impl Into<String>) {
        // A test that has failed does not listen any more.
        let _ = self.say.send(what.into());
    }

    /// Waits until the test says that it may go on.
    pub(crate) fn pause(&self) {
        self.go_on
            .recv_timeout(PATIENCE)
            .expect("the test goes on in time");
    }
}

/// Runs `work` with a connection of its own.
pub(crate) fn in_background<C: LockTestConnection, T: Send + 'static>(
    server: &Server,
    work: impl FnOnce(C, &Stage) -> T + Send + 'static,
) -> Background<T> {
    on_connection(C::open(server), work)
}

/// Runs `work` with this connection.
pub(crate) fn on_connection<C: LockTestConnection, T: Send + 'static>(
    mut conn: C,
    work: impl FnOnce(C, &Stage) -> T + Send + 'static,
) -> Background<T> {
    let id = conn.backend_id();
    let (say, said) = channel();
    let (told, go_on) = channel();
    Background {
        id,
        thread: thread::spawn(move || work(conn, &Stage { say, go_on })),
        said,
        told,
    }
}

impl<T> Background<T> {
    /// Waits until the server shows that it waits for a lock.
    #[track_caller]
    pub(crate) fn waits<C: LockTestConnection>(&self, observer: &mut C) {
        wait_for(format!("session {} to wait for a lock", self.id), || {
            observer.is_waiting(self.id)
        });
    }

    /// Waits until the thread says `expected`.
    #[track_caller]
    pub(crate) fn says(&self, expected: &str) {
        assert_eq!(self.said.recv_timeout(PATIENCE).as_deref(), Ok(expected));
    }

    /// Whether the last thing that the thread said is `expected`. What it says else is dropped.
    pub(crate) fn has_said(&self, expected: &str) -> bool {
        self.said.try_recv().is_ok_and(|said| said == expected)
    }

    /// The next thing that the thread says.
    #[track_caller]
    pub(crate) fn hear(&self) -> String {
        self.said.recv_timeout(PATIENCE).expect("the thread speaks")
    }

    /// Lets the thread go on.
    pub(crate) fn go_on(&self) {
        self.told.send(()).expect("the thread is there");
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// What the thread returns.
    #[track_caller]
    pub(crate) fn join(self) -> T {
        wait_for("the end of the thread", || self.thread.is_finished());
        match self.thread.join() {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// A user (on PostgreSQL a role) for one test, dropped at its end.
pub(crate) struct TestUser<C: LockTestConnection> {
    admin: C,
    name: String,
    url: String,
}

impl<C: LockTestConnection> TestUser<C> {
    /// A user without any privileges but to connect, and with `options` as `CREATE USER` takes them.
    pub(crate) fn create(server: &Server, options: &str) -> Self {
        let mut admin = C::open(server);
        let mut name = dlock_tests::unique_key("u").replace(['/', '-'], "_");
        // MySQL's names have at most 32 characters.
        name.truncate(32);
        let (start, database) = server.url.rsplit_once('/').expect("a URL with a database");
        let (scheme, rest) = start.split_once("://").expect("a URL with a scheme");
        let address = rest.rsplit_once('@').map_or(rest, |(_, address)| address);
        let url = format!("{scheme}://{name}:secret@{address}/{database}");
        match server.kind {
            dlock_tests::Kind::Postgres => {
                admin.execute_sql(&format!("CREATE USER {name} PASSWORD 'secret' {options}"))
            }
            dlock_tests::Kind::Mysql => {
                admin.execute_sql(&format!(
                    "CREATE USER {name} IDENTIFIED BY 'secret' {options}"
                ));
                // Any privilege, to connect to the database.
                admin.execute_sql(&format!("GRANT CREATE ROUTINE ON {database}.* TO {name}"));
            }
            dlock_tests::Kind::Sqlite => panic!("SQLite has no users"),
        }
        Self { admin, name, url }
    }

    /// A connection of this user.
    pub(crate) fn open(&self) -> C {
        C::open_url(&self.url)
    }

    /// Its administrator.
    pub(crate) fn admin(&mut self) -> &mut C {
        &mut self.admin
    }
}

impl<C: LockTestConnection> Deref for TestUser<C> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

impl<C: LockTestConnection> Drop for TestUser<C> {
    fn drop(&mut self) {
        let _ = self
            .admin
            .batch_execute(&format!("DROP USER {}", self.name));
    }
}
