//! Locks for SQLite, which has none: they are this process's, and those of the operating system.

#[cfg(unix)]
mod file;
#[cfg(not(unix))]
#[path = "sqlite/no_file.rs"]
mod file;
mod functions;
mod lock;
mod os;
mod others;
#[cfg(feature = "r2d2")]
mod r2d2;
mod session;
mod table;
mod trouble;

use diesel::sqlite::SqliteConnection;

#[cfg(feature = "r2d2")]
pub use self::r2d2::EnableAdvisoryLocks;
pub(crate) use table::{forget, give_up, is_open, is_waiting};
pub(crate) use trouble::explain;

use diesel::QueryResult;
use dlock_core::{Sqlite, Statement};

use crate::Error;
use trouble::Trouble;

/// What a statement of the core asks for, for when it fails.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    request: Option<i64>,
    releases: bool,
}

impl Asked {
    /// Before it is sent.
    pub fn new(statement: &Statement) -> Self {
        Self {
            request: Sqlite::request(statement),
            releases: Sqlite::is_release(statement),
        }
    }

    /// The request's number.
    pub fn request(self) -> Option<i64> {
        self.request
    }

    /// A request that failed is given up by its number, for which the connection is not needed: SQLite may refuse to
    /// prepare another statement while others write.
    pub fn settle(self, answer: QueryResult<Option<i64>>) -> QueryResult<Option<i64>> {
        answer.or_else(|error| {
            if let Some(request) = self.request {
                let was_there = give_up(request);
                forget(request);
                if was_there && self.releases {
                    return Ok(Some(1));
                }
            }
            Err(explain(error))
        })
    }
}

/// Makes SQLite connections ready for locks.
///
/// SQLite has no locks of its own, so a connection has to be told once, right after it was opened. Without it, the first
/// lock fails with [`Error::Unsupported`], which names this line.
///
/// # Examples
///
/// ```
/// use diesel::prelude::*;
/// use dlock_diesel::{AdvisoryLockExt, SqliteLocksExt};
///
/// let mut conn = SqliteConnection::establish(":memory:")?;
/// conn.enable_advisory_locks()?;
/// let lock = conn.advisory_lock("report").acquire()?;
/// lock.release()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
#[cfg_attr(
    feature = "r2d2",
    doc = "For a pool of r2d2 there is [`EnableAdvisoryLocks`]."
)]
#[cfg_attr(
    not(feature = "r2d2"),
    doc = "For a pool of r2d2 there is the feature `r2d2`."
)]
///
/// # What appears beside the database
///
/// One empty file, `NAME-dlock` for the database `NAME`, when the first lock is asked for: its bytes are locked, by the
/// operating system, without being there. It stays; it may be deleted when no process has the database open. The
/// database itself is not touched, and neither are SQLite's own locks: a lock is held across transactions, while other
/// connections write. Only the schema is read, by SQLite, once, when a connection is made ready; while others write that
/// may have to wait, for up to 5 seconds, unless the connection has a `busy_timeout` of its own.
///
/// # Whom it keeps apart
///
/// All connections to the same file, in all processes of one host. Who waits for a connection of the same process is
/// woken, first come, first served. Between processes there is no queue: who waits asks again, after a fiftieth of the
/// time that it has waited, at least 0.5 and at most 10 milliseconds; and a process that has had its turn leaves the lock
/// to others that wait.
///
/// Who waits to hold a lock alone while others share it goes before those who come later to share it, in whatever process
/// they are: these wait, and [`try_acquire`](crate::AdvisoryLock::try_acquire) gives them `None`, as on PostgreSQL. A
/// connection that shares the lock already shares it again at once; and one that holds another lock for which somebody
/// waits goes before the writer, lest they wait in a circle. After a writer it is the turn of all that wait.
///
/// Just after its turn a process that wants a lock alone may be told for 15 milliseconds that it is taken where another one
/// only waits for it. A writer that is stopped (SIGSTOP) while it waits, or whose place a forked child keeps, delays readers by
/// a quarter of a second every now and then.
///
/// A crash, SIGKILL or the end of a process frees its locks at once, and its place before others; but a child that was
/// forked and runs no other program keeps those of a parent that ends, until it ends too or opens a connection of its own
/// and makes it ready. (A child's copies of guards free nothing.)
///
/// Databases in memory, and temporary ones, are no files: all of a process share one set of locks.
///
/// A connection belongs to the version of this crate that has made it ready: another one in the same program refuses to
/// do so. On connections of their own two versions exclude each other as two processes do, but not on macOS, and not on
/// databases in memory.
///
/// A database that is renamed, moved or replaced while connections to it are open has a new set of locks under its new
/// name. The old connections get no locks any more, and [`is_held`](crate::AdvisoryLockGuard::is_held) and
/// [`release`](crate::AdvisoryLockGuard::release) tell that what they held is lost; a process that still has some gets
/// none on new connections either. Close all connections first, as SQLite wants it.
///
/// # Where it does not work
///
/// [`Error::Unsupported`] says so, when the first lock is asked for:
///
/// - in a folder that this user may not write to, unless the file `NAME-dlock` is there and may be written to;
/// - on a network file system, where SQLite itself must not be used;
/// - with databases in files, on systems other than Linux (64 bit), Android and macOS.
///
/// Deadlocks are found among the connections of one process, and where two processes hold a lock shared and both wait to
/// hold it alone. A circle of several locks and several processes is not: set a
/// [`timeout`](crate::AdvisoryLock::timeout). A database that has two names (hard links) has two sets of locks. On macOS
/// the locks of a process end if it opens and closes `NAME-dlock` by itself.
pub trait SqliteLocksExt {
    /// Makes this connection ready for locks. Once is enough, and once more does nothing.
    ///
    /// # Examples
    ///
    /// See [`SqliteLocksExt`].
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if the connection cannot be asked, its file is gone, or another version of this crate has made it
    /// ready.
    fn enable_advisory_locks(&mut self) -> Result<(), Error>;
}

impl SqliteLocksExt for SqliteConnection {
    fn enable_advisory_locks(&mut self) -> Result<(), Error> {
        Ok(functions::enable(self)?)
    }
}
