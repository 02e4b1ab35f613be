//! Locks for SQLite, which has none: SQL functions that dlock-diesel adds to a connection stand in the place of a
//! server's.

mod acquire;
mod holders;
mod release;
mod sql;

pub use acquire::SqliteAcquire;
pub use release::SqliteRelease;

use std::fmt;

use crate::{Dialect, Fence, Holder, InvalidKey, LockKey, Mode, OpenTransaction, Statement, Wait};

/// What the SQL functions of dlock want to be asked. They are there on a connection that was enabled.
///
/// [`holders`](Dialect::holders) answers with one text: see [`read_holders`](Self::read_holders).
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Mode, Sqlite};
///
/// let key = Sqlite::key(&"report".into())?;
/// assert!(Sqlite::is_held(&key, Mode::Exclusive).text().contains("dlock_is_held(?, "));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Sqlite;

impl Sqlite {
    /// The answer to a request: the lock is granted.
    pub const GRANTED: i64 = 1;
    /// The answer to a request: somebody else has the lock.
    pub const BUSY: i64 = 0;
    /// The answer to a request: it was given up by its number.
    pub const GIVEN_UP: i64 = -1;

    /// The constraint of an error which says that this connection, or this database, can have no locks.
    pub const UNSUPPORTED: &'static str = "dlock_unsupported";

    /// The constraint of an error which says that who has the lock waits for this session.
    pub const DEADLOCK: &'static str = "dlock_deadlock";

    /// The request that the statement is for: it is to be given up if nobody reads the answer.
    ///
    /// If the statement fails, whoever sent it gives the request up by that number, too.
    pub fn request(statement: &Statement) -> Option<i64> {
        sql::request(statement)
    }

    /// Whether the statement releases its request, rather than to ask for it.
    pub fn is_release(statement: &Statement) -> bool {
        sql::is_release(statement)
    }

    /// The answer to [`holders`](Dialect::holders): each holder behind the number of its session, which tells the
    /// connections of a process apart.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{Holder, Sqlite};
    ///
    /// let holder = Holder::from_columns(4711, Some("billing".into()), None, 1, 1, Some(7));
    /// let text = Sqlite::write_holders(&[(1, holder.clone())]);
    /// assert_eq!(Sqlite::read_holders(&text), [holder]);
    /// ```
    pub fn write_holders(holders: &[(i64, Holder)]) -> String {
        holders::write(holders)
    }

    /// Reads what [`write_holders`](Self::write_holders) wrote.
    pub fn read_holders(text: &str) -> Vec<Holder> {
        holders::read(text)
    }
}

/// A key as dlock's SQL functions take it, together with the number under which one request for it is known: its hold,
/// or its place in the queue, is given up by that number, also from where the connection cannot be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SqliteKey {
    /// The key: see [`LockKey::to_sqlite`].
    pub key: u64,
    /// The request. No other one in this process has the same.
    pub request: i64,
}

impl fmt::Debug for SqliteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SqliteKey({})", self.key)
    }
}

impl Dialect for Sqlite {
    type Key = SqliteKey;
    type Acquire = SqliteAcquire;
    type Release = SqliteRelease;

    /// Frees nothing: the connection would go on, and the work under outer guards with it. A hold is given up by its number.
    const END_SESSION: &'static str = sql::ROLL_BACK;
    const SKIPS_UNREAD_ANSWERS: bool = true;

    fn key(key: &LockKey) -> Result<SqliteKey, InvalidKey> {
        Ok(SqliteKey {
            key: key.to_sqlite()?,
            request: crate::fence::unique() as i64,
        })
    }

    /// Transactions do not touch these locks.
    fn acquire(key: &SqliteKey, mode: Mode, wait: Wait, _fence: Option<Fence>) -> SqliteAcquire {
        SqliteAcquire::new(*key, mode, wait)
    }

    fn release(key: &SqliteKey, _mode: Mode, _fence: Option<Fence>) -> SqliteRelease {
        SqliteRelease::new(*key)
    }

    /// Only what cannot be done without the connection: the hold itself is given up by its number.
    fn release_unread(
        _key: &SqliteKey,
        _mode: Mode,
        transaction: OpenTransaction,
    ) -> Option<String> {
        (transaction == OpenTransaction::RollBack).then(|| sql::ROLL_BACK.into())
    }

    fn is_held(key: &SqliteKey, _mode: Mode) -> Statement {
        sql::is_held(*key)
    }

    fn holders(key: &SqliteKey) -> Vec<Statement> {
        vec![sql::holders(*key)]
    }
}
