//! MySQL's and MariaDB's named locks.

mod acquire;
mod release;
mod sql;

pub use acquire::MysqlAcquire;
pub use release::MysqlRelease;

use crate::{Dialect, Fence, InvalidKey, LockKey, Mode, OpenTransaction, Statement, Wait};

/// What MySQL (8.0 and later) and MariaDB (10.6 and later) want to be sent.
///
/// # Examples
///
/// ```
/// use dlock_core::{Dialect, Mode, Mysql};
///
/// let key = Mysql::key(&"report".into())?;
/// assert!(Mysql::is_held(&key, Mode::Exclusive).text().contains("IS_USED_LOCK"));
/// # Ok::<(), dlock_core::InvalidKey>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Mysql;

impl Dialect for Mysql {
    type Key = String;
    type Acquire = MysqlAcquire;
    type Release = MysqlRelease;

    const END_SESSION: &'static str = "KILL CONNECTION_ID()";
    const SKIPS_UNREAD_ANSWERS: bool = false;
    // Seen with MySQL 9.7 and MariaDB 11.8. Otherwise they look each second.
    const UNREAD_MESSAGES_HIDE_A_CLOSE: bool = true;

    fn key(key: &LockKey) -> Result<String, InvalidKey> {
        key.to_mysql()
    }

    /// Named locks are exclusive, and transactions do not touch them.
    fn acquire(key: &String, _mode: Mode, wait: Wait, _fence: Option<Fence>) -> MysqlAcquire {
        MysqlAcquire::new(key.clone(), wait)
    }

    fn release(key: &String, _mode: Mode, _fence: Option<Fence>) -> MysqlRelease {
        MysqlRelease::new(key.clone())
    }

    fn acquire_abandonable(
        key: &String,
        mode: Mode,
        wait: Wait,
        fence: Option<Fence>,
    ) -> MysqlAcquire {
        Self::acquire(key, mode, wait, fence).abandonable()
    }

    fn release_abandonable(key: &String, mode: Mode, fence: Option<Fence>) -> MysqlRelease {
        Self::release(key, mode, fence).abandonable()
    }

    fn release_unread(key: &String, _mode: Mode, transaction: OpenTransaction) -> Option<String> {
        Some(sql::release_unread(key, transaction))
    }

    fn is_held(key: &String, _mode: Mode) -> Statement {
        sql::is_held(key)
    }

    fn holders(key: &String) -> Vec<Statement> {
        sql::holders(key)
    }
}
