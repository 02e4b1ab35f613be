//! SQLite as one more server: a database file of its own for each test, looked at by processes and file locks rather than
//! by asking dlock.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use diesel::{
    Connection, SqliteConnection,
    connection::SimpleConnection,
    dsl::sql,
    sql_types::{BigInt, Nullable, Text},
};
use dlock_diesel::SqliteLocksExt;
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};

use crate::{Kind, Server, TestConnection, connection::value, start::tie_to_this_process};

/// A folder for databases, which goes when this process ends.
fn folder() -> Result<&'static Path, String> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = FOLDER.get_or_init(|| {
        let folder = tempfile::Builder::new()
            .prefix("dlock-sqlite-")
            .tempdir()
            .map_err(|error| format!("cannot make a folder for SQLite: {error}"))?;
        let mut supervisor = Command::new("sh")
            .args(["-c", "trap '' INT; read -r line; rm -rf \"$FOLDER\""])
            .env("FOLDER", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start sh: {error}"))?;
        tie_to_this_process(supervisor.stdin.take().expect("BUG: stdin is piped"));
        Ok(folder.keep())
    });
    made.as_deref().map_err(Clone::clone)
}

/// SQLite, with a database of its own.
pub(crate) fn sqlite_server() -> Result<Server, String> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = folder()?.join(format!("{}-{count}.db", process::id()));
    let url = path.to_str().ok_or("a temporary folder that is no UTF-8")?;
    let mut conn = SqliteConnection::establish(url).map_err(|error| error.to_string())?;
    conn.batch_execute("PRAGMA journal_mode = WAL")
        .map_err(|error| error.to_string())?;
    let version = conn.text("SELECT sqlite_version()").unwrap_or_default();
    Ok(Server {
        kind: Kind::Sqlite,
        name: format!("SQLite {version}"),
        url: url.to_owned(),
    })
}

/// Whether the byte of the lock file is locked that is so while the lock is held.
pub fn is_locked_on_disk(database: &str, number: u64) -> bool {
    is_locked(database, 4 * number)
}

/// Whether the byte of the lock file is locked that is so while a process waits for others.
pub fn is_awaited_on_disk(database: &str, number: u64) -> bool {
    is_locked(database, 4 * number + 1)
}

/// Whether the byte of the lock file is locked that is so while a process waits for readers.
pub fn is_claimed_on_disk(database: &str, number: u64) -> bool {
    is_locked(database, 4 * number + 3)
}

fn is_locked(database: &str, at: u64) -> bool {
    let Ok(file) = File::options()
        .read(true)
        .write(true)
        .open(format!("{database}-dlock"))
    else {
        return false;
    };
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: at as _,
        l_len: 1,
        l_pid: 0,
    };
    // This open file is another one than dlock's, also in the same process.
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).expect("a lock file can be asked");
    libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

/// The process of a session, and whether it is the first of that process.
fn process_of(session: i64) -> (u32, bool) {
    (session as u32, session >> 32 == 0)
}

impl TestConnection for SqliteConnection {
    const KIND: Kind = Kind::Sqlite;

    #[track_caller]
    fn open_url(url: &str) -> Self {
        let mut conn = match Self::establish(url) {
            Ok(conn) => conn,
            Err(error) => panic!("cannot open {url}: {error}"),
        };
        conn.execute_sql("PRAGMA busy_timeout = 20000");
        conn.enable_advisory_locks().expect("SQLite can have locks");
        conn
    }

    #[track_caller]
    fn number(&mut self, query: &str) -> Option<i64> {
        value(self, query, sql::<Nullable<BigInt>>)
    }

    #[track_caller]
    fn text(&mut self, query: &str) -> Option<String> {
        value(self, query, sql::<Nullable<Text>>)
    }

    /// The process id, and above it the connections that this process had before.
    fn backend_id(&mut self) -> i64 {
        self.number("SELECT dlock_session()")
            .expect("a session has an id")
    }

    fn holder_id(backend_id: i64) -> i64 {
        process_of(backend_id).0.into()
    }

    #[track_caller]
    fn kill(&mut self, _backend_id: i64) {
        panic!("a connection to SQLite cannot be ended by another: use `on_every_network_server!`");
    }

    #[track_caller]
    fn cancel(&mut self, _backend_id: i64) {
        panic!(
            "a wait on SQLite cannot be cancelled by another connection: use `on_every_network_server!`"
        );
    }

    fn is_connected(&mut self, backend_id: i64) -> bool {
        let (process, _) = process_of(backend_id);
        if process == process::id() {
            return session_state(backend_id) > 0;
        }
        // The dead that their parent has not met yet are no processes any more.
        let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let state = status
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    }

    fn is_waiting(&mut self, backend_id: i64) -> bool {
        let (process, is_first) = process_of(backend_id);
        if process == process::id() {
            return is_waiting_here(backend_id);
        }
        assert!(
            is_first,
            "which connection of another process waits is not to be seen"
        );
        let files = fs::read_dir(format!("/proc/{process}/fdinfo"))
            .into_iter()
            .flatten();
        files.flatten().any(|file| {
            let info = fs::read_to_string(file.path()).unwrap_or_default();
            let waits = |line: &str| {
                let range: Vec<u64> = line
                    .split_whitespace()
                    .skip(7)
                    .filter_map(|number| number.parse().ok())
                    .collect();
                line.contains("OFDLCK")
                    && matches!(range[..], [first, last] if (first..=last).any(|at| at % 4 == 1))
            };
            info.lines().any(waits)
        })
    }
}

/// Whether a connection of this process waits for a lock.
pub fn is_waiting_here(session: i64) -> bool {
    session_state(session) == 2
}

/// Of a connection of this process: 0 is closed, 1 open, 2 waiting for a lock. Any connection can tell.
fn session_state(session: i64) -> i64 {
    let mut conn = SqliteConnection::establish(":memory:").expect("a database in memory");
    conn.enable_advisory_locks().expect("locks in memory");
    let query = format!("SELECT dlock_session_state({session})");
    conn.number(&query).expect("a state")
}
