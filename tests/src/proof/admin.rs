//! The controller's own way to the server: past every proxy, and again and again while the server is down.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::sql_types::{BigInt, Nullable, Text};
use diesel::{Connection, MysqlConnection, PgConnection, RunQueryDsl, SqliteConnection};
use dlock_diesel::{AdvisoryLockExt, LockKey, SqliteLocksExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::proof::world::{SEMAPHORE, lock_key};
use crate::{Kind, Server};

/// How long a server may be down.
const PATIENCE: Duration = Duration::from_secs(60);

/// Kills a server by SIGKILL. It must run on this machine.
///
/// # Errors
///
/// If nobody knows its process.
pub fn kill_server(server: &Server) -> Result<(), String> {
    Admin::connect(server.kind, &server.url)?.kill_server()
}

pub(crate) enum Admin {
    Postgres(PgConnection),
    Mysql(MysqlConnection),
    Sqlite(SqliteConnection),
}

macro_rules! each {
    ($admin:expr, $conn:ident => $work:expr) => {
        match $admin {
            Admin::Postgres($conn) => $work,
            Admin::Mysql($conn) => $work,
            Admin::Sqlite($conn) => $work,
        }
    };
}

impl Admin {
    pub(crate) fn connect(kind: Kind, url: &str) -> Result<Self, String> {
        let connected = match kind {
            Kind::Postgres => PgConnection::establish(url).map(Self::Postgres),
            Kind::Mysql => MysqlConnection::establish(url).map(Self::Mysql),
            Kind::Sqlite => SqliteConnection::establish(url).map(Self::Sqlite),
        };
        let mut admin = connected.map_err(|error| error.to_string())?;
        if let Self::Sqlite(conn) = &mut admin {
            let ready =
                conn.batch_execute("PRAGMA journal_mode = WAL; PRAGMA busy_timeout = 20000");
            ready.map_err(|error| error.to_string())?;
            conn.enable_advisory_locks()
                .map_err(|error| error.to_string())?;
        }
        Ok(admin)
    }

    /// Tries for a minute.
    pub(crate) fn connect_again(kind: Kind, url: &str) -> Result<Self, String> {
        let begin = Instant::now();
        loop {
            match Self::connect(kind, url) {
                Ok(admin) => return Ok(admin),
                Err(error) if begin.elapsed() > PATIENCE => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    pub(crate) fn execute(&mut self, statement: &str) -> Result<(), String> {
        each!(self, conn => conn.batch_execute(statement))
            .map_err(|error| format!("{statement}: {error}"))
    }

    pub(crate) fn number(&mut self, query: &str) -> Result<Option<i64>, String> {
        each!(self, conn => sql::<Nullable<BigInt>>(query).get_result(conn))
            .map_err(|error| format!("{query}: {error}"))
    }

    fn text(&mut self, query: &str) -> Result<Option<String>, String> {
        each!(self, conn => sql::<Nullable<Text>>(query).get_result(conn))
            .map_err(|error| format!("{query}: {error}"))
    }

    /// A session of the workers, at random.
    pub(crate) fn any_session(&mut self) -> Result<Option<i64>, String> {
        self.number(match self {
            Self::Postgres(_) => {
                "SELECT (SELECT pid::bigint FROM pg_stat_activity WHERE datname = current_database() \
                 AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT 1)"
            }
            Self::Mysql(_) => {
                "SELECT (SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = DATABASE() \
                 AND id <> CONNECTION_ID() ORDER BY RAND() LIMIT 1)"
            }
            Self::Sqlite(_) => "SELECT NULL",
        })
    }

    /// Ends a session. It may have gone before.
    pub(crate) fn end(&mut self, session: i64) -> Result<(), String> {
        let ended = match self {
            Self::Postgres(_) => {
                return self
                    .number(&format!(
                        "SELECT pg_terminate_backend({session})::int::bigint"
                    ))
                    .map(drop);
            }
            _ => self.execute(&format!("KILL {session}")),
        };
        ended.or_else(|error| {
            if error.contains("Unknown thread") {
                Ok(())
            } else {
                Err(error)
            }
        })
    }

    /// Cancels the statement of a session. It may have gone before.
    pub(crate) fn cancel(&mut self, session: i64) -> Result<(), String> {
        let ended = match self {
            Self::Postgres(_) => {
                return self
                    .number(&format!("SELECT pg_cancel_backend({session})::int::bigint"))
                    .map(drop);
            }
            _ => self.execute(&format!("KILL QUERY {session}")),
        };
        ended.or_else(|error| {
            if error.contains("Unknown thread") {
                Ok(())
            } else {
                Err(error)
            }
        })
    }

    /// Takes locks until the server has no room for more. They are free when this connection ends.
    pub(crate) fn fill(&mut self) -> Result<(), String> {
        // Not many more than there is room for: the server makes all the numbers first.
        match self.number("SELECT count(pg_advisory_lock(i)) FROM generate_series(1, 200000) i") {
            Ok(_) => Err("the table of locks has no end".to_owned()),
            // "You might need to increase max_locks_per_transaction."
            Err(error) if error.contains("out of shared memory") => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Kills the server by SIGKILL. It must run on this machine.
    pub(crate) fn kill_server(&mut self) -> Result<(), String> {
        let path = match self {
            Self::Postgres(_) => "SELECT current_setting('data_directory') || '/postmaster.pid'",
            Self::Mysql(_) => "SELECT @@pid_file",
            Self::Sqlite(_) => return Err("SQLite is no server".to_owned()),
        };
        let path = self.text(path)?.unwrap_or_default();
        let file = match self {
            // It may see another root of the file system.
            Self::Postgres(_) => self
                .text("SELECT pg_read_file('postmaster.pid')")?
                .unwrap_or_default(),
            _ => std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?,
        };
        let pid = file
            .lines()
            .next()
            .and_then(|line| line.trim().parse().ok());
        let pid = pid.ok_or_else(|| format!("{path} has no process"))?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)
            .map_err(|error| format!("the server {pid}: {error}"))
    }

    /// Waits until a lock is free: `false` if it is not, within the limit.
    pub(crate) fn is_free(
        &mut self,
        run: &str,
        key: &str,
        limit: Duration,
    ) -> Result<bool, String> {
        let key = LockKey::from(lock_key(run, key));
        let got = each!(self, conn => conn.advisory_lock(key).timeout(limit).acquire().and_then(|lock| lock.release().map(drop)));
        match got {
            Ok(()) => Ok(true),
            Err(dlock_diesel::Error::Timeout { .. }) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The same of one more permit of the semaphore, which is kept.
    pub(crate) fn is_permitted(&mut self, run: &str, limit: Duration) -> Result<bool, String> {
        let (key, permits) = (LockKey::from(lock_key(run, SEMAPHORE.0)), SEMAPHORE.1);
        let got = each!(self, conn => {
            let got = conn.advisory_semaphore(key, permits).timeout(limit).acquire();
            got.map(std::mem::forget)
        });
        match got {
            Ok(()) => Ok(true),
            Err(dlock_diesel::Error::Timeout { .. }) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }
}
