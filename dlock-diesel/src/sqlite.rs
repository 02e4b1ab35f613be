//! Locks for SQLite, which has none of its own.
//!
//! The connections of one process queue in memory. Between processes, the operating system locks bytes of a file beside
//! the database.
//!
//! Imports go one way, downwards:
//!
//! ```text
//! r2d2
//! functions          the SQL functions that the core's statements call
//! session            one connection; the loop in which it waits
//! table              all databases of this process, behind one mutex
//! database           the locks of one database
//! queue  file_locks  who may go in this process; turns with other processes
//!        holders     the answer to "who holds it?"
//!        processes   which processes have locked a byte
//!        lock_file   the file, and its bytes
//!        byte_lock   the operating system's locks
//! ```
//!
//! `function_error` is for all of them.

#[cfg(unix)]
mod byte_lock;
mod database;
mod file_locks;
mod function_error;
mod functions;
mod holders;
mod lock_file;
mod processes;
mod queue;
#[cfg(feature = "r2d2")]
mod r2d2;
mod session;
mod table;

use diesel::sqlite::SqliteConnection;
use dlock_core::proto::{Answer, Request};

use crate::Error;

#[cfg(feature = "r2d2")]
pub use self::r2d2::EnableAdvisoryLocks;
pub use function_error::explain;
pub use table::{forget, give_up};

/// Gives up the request of a statement that failed, by its number. This needs no statement: while other connections
/// write, SQLite may refuse to prepare one.
pub fn settle(request: Option<Request>, mut answer: Answer) -> Answer {
    if let (Some(request), Answer::Error(error)) = (request, &mut answer) {
        error.given_up = give_up(request);
        forget(request);
    }
    answer
}

/// Makes SQLite connections ready for locks.
///
/// SQLite has no locks of its own. Call [`enable_advisory_locks`](Self::enable_advisory_locks) on each connection once,
/// right after opening it. Without it, the first lock fails with [`Error::Unsupported`], which names this call.
///
/// # Examples
///
/// ```
/// use diesel::prelude::*;
/// use dlock_diesel::{AdvisoryLockExt, SqliteLocksExt};
///
/// let mut conn = SqliteConnection::establish(":memory:")?;
/// conn.enable_advisory_locks()?;
/// let lock = conn.advisory_lock(("billing", "report")).acquire()?;
/// lock.release()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
#[cfg_attr(
    feature = "r2d2",
    doc = "In an r2d2 pool, [`EnableAdvisoryLocks`] makes this call."
)]
#[cfg_attr(not(feature = "r2d2"), doc = "For r2d2 pools, see the feature `r2d2`.")]
///
/// # The file beside the database
///
/// The first lock on the database `NAME` creates one empty file, `NAME-dlock`. The operating system locks bytes of it
/// that do not exist. The file stays, and keeps the last fencing token. You may delete it when no process has the
/// database open.
///
/// dlock changes neither the database nor SQLite's own locks: a lock is held across transactions, and while other
/// connections write. SQLite reads the schema once, when a connection is made ready. If other connections write at that
/// moment, this waits for up to 5 seconds, or longer if the connection has a longer `busy_timeout`.
///
/// # Which connections exclude each other
///
/// All connections to the same file, in all processes of one host. Databases in memory and temporary databases are not
/// files: all of them in one process share one set of locks.
///
/// *Within a process*, waiting connections are served in the order in which they came, and woken at once.
///
/// *Between processes* there is no queue. A waiting process tries again after a fiftieth of the time that it has
/// waited, at least 0.5 and at most 10 milliseconds. A process that has had its turn leaves the lock to others that
/// wait. For 15 ms after its turn, a process that asks for an exclusive lock may be refused although the lock is free,
/// because another process is waiting for it.
///
/// *Writers go before new readers.* While a connection waits to hold a lock alone that others share, new readers wait
/// behind it, in whatever process they are, and [`try_acquire`](crate::AdvisoryLock::try_acquire) gives them `None`, as
/// on PostgreSQL. There are two exceptions. A connection that shares the lock can share it again at once. A connection
/// that holds another lock for which somebody waits goes before the writer, because otherwise they could wait for each
/// other. After a writer, all readers that wait have their turn. While a waiting writer is stopped (SIGSTOP), or a
/// forked child keeps the place of one that has ended, readers are delayed by a quarter of a second every now and then.
///
/// *Versions of this crate.* A connection belongs to the version that made it ready, and another version in the same
/// program refuses to do so again. On connections of their own, two versions exclude each other as two processes do,
/// except on macOS and on databases in memory.
///
/// # When locks end
///
/// When a process ends, for whatever reason, its locks and its places in queues are freed at once. One exception: a
/// forked child that has not called `exec` keeps its parent's locks until it exits or makes a connection of its own
/// ready. The child's copies of guards free nothing.
///
/// A database that is renamed, moved or replaced while connections to it are open has a new set of locks under its new
/// name. The old connections get no more locks, and [`is_held`](crate::AdvisoryLockGuard::is_held) and
/// [`release`](crate::AdvisoryLockGuard::release) report that what they held is lost. As long as a process has such
/// connections, its new connections get no locks either. Close all connections first, as SQLite requires.
///
/// # Where it does not work
///
/// The first lock fails with [`Error::Unsupported`]:
///
/// - in a folder that this user may not write to, unless the file `NAME-dlock` exists and this user may write to it;
/// - on a network file system, or on one that a virtual machine shares with its host, where SQLite itself must not be
///   used;
/// - for a database that is mounted without its folder, as in `docker run -v app.db:/data/app.db`: others do not see
///   the lock file. Mount the folder;
/// - for a database with two names (hard links), each of which would have its own locks;
/// - for databases in files, on systems other than 64-bit Linux, 64-bit Android and macOS.
///
/// Deadlocks are found among the connections of one process, and where two processes share a lock and both wait to hold
/// it alone. A circle of several locks in several processes is not found: set a
/// [`timeout`](crate::AdvisoryLock::timeout).
///
/// On macOS, the locks of a process end when other code
/// in it opens and closes `NAME-dlock`.
pub trait SqliteLocksExt {
    /// Makes this connection ready for locks. A second call does nothing.
    ///
    /// # Examples
    ///
    /// See [`SqliteLocksExt`].
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if a statement on the connection fails, its file is gone, or another version of this crate
    /// has made it ready.
    fn enable_advisory_locks(&mut self) -> Result<(), Error>;
}

impl SqliteLocksExt for SqliteConnection {
    fn enable_advisory_locks(&mut self) -> Result<(), Error> {
        Ok(functions::enable(self)?)
    }
}
