//! r2d2's way to set up new connections.

use diesel::r2d2::{CustomizeConnection, Error};
use diesel::sqlite::SqliteConnection;

use super::functions;

/// Makes each connection of an r2d2 pool [ready for locks](crate::SqliteLocksExt).
///
/// # Examples
///
/// ```
/// use diesel::r2d2::{ConnectionManager, Pool};
/// use diesel::sqlite::SqliteConnection;
/// use dlock_diesel::{AdvisoryLock, EnableAdvisoryLocks};
///
/// let pool = Pool::builder()
///     .max_size(2)
///     .connection_customizer(Box::new(EnableAdvisoryLocks))
///     .build(ConnectionManager::<SqliteConnection>::new(":memory:"))?;
/// let lock = AdvisoryLock::new(pool.get()?, ("billing", "report")).acquire()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct EnableAdvisoryLocks;

impl CustomizeConnection<SqliteConnection, Error> for EnableAdvisoryLocks {
    fn on_acquire(&self, conn: &mut SqliteConnection) -> Result<(), Error> {
        functions::enable(conn).map_err(Error::QueryError)
    }
}
