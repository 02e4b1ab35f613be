mod load;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;

use diesel::backend::Backend;
use diesel::connection::LoadConnection;
use diesel::prelude::*;
use diesel::result::Error as DieselError;
use dlock_core::proto::manager::ManagedDialect;
use dlock_core::proto::{Answer, Ask, Dialect, Request, Statement, TransactionDialect};

/// A Diesel backend that has locks: `Pg`, `Mysql` and `Sqlite`.
///
/// You cannot implement it for other backends.
///
/// # Examples
///
/// ```
/// fn is_lock_backend<DB: dlock_diesel::LockBackend>() {}
///
/// is_lock_backend::<diesel::pg::Pg>();
/// is_lock_backend::<diesel::mysql::Mysql>();
/// ```
#[diagnostic::on_unimplemented(
    message = "dlock has no locks for the backend `{Self}`",
    note = "there are locks for `Pg`, `Mysql` and `Sqlite`, each behind the feature of dlock-diesel of its name",
    note = "for `#[derive(MultiConnection)]`, match the enum and lock the connection inside"
)]
pub trait LockBackend: Backend + sealed::Sealed + Sized {
    #[doc(hidden)]
    type Dialect: ManagedDialect;

    #[doc(hidden)]
    fn load<C>(conn: &mut C, statement: Statement) -> Answer
    where
        C: LoadConnection<Backend = Self>;

    /// SQLite: frees a hold without the connection. It never waits.
    #[doc(hidden)]
    fn give_up(_request: Request) {}

    #[doc(hidden)]
    fn transaction<C, T, E>(
        conn: &mut C,
        ask: Ask,
        f: impl FnOnce(&mut C) -> Result<T, E>,
    ) -> Result<T, E>
    where
        C: LockConnection<Backend = Self>,
        E: From<DieselError>;
}

/// A backend whose locks many readers can share: `Pg` and `Sqlite`.
///
/// # Examples
///
/// ```
/// fn has_shared_locks<DB: dlock_diesel::SharedLocks>() {}
///
/// has_shared_locks::<diesel::pg::Pg>();
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no shared locks",
    label = "every lock is exclusive here",
    note = "MySQL's and MariaDB's named locks know one holder only: leave out `.shared()` to take the lock \
            exclusively, \
            or read inside a transaction with `SELECT .. FOR SHARE` on a row of your own"
)]
pub trait SharedLocks: LockBackend {}

/// A backend whose open transaction can hold a lock until it ends: `Pg`.
///
/// # Examples
///
/// ```
/// fn has_transaction_locks<DB: dlock_diesel::TransactionLocks>() {}
///
/// has_transaction_locks::<diesel::pg::Pg>();
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no locks that end with the transaction",
    label = "a lock outlives the transaction here",
    note = "use `conn.advisory_lock(key).transaction(|conn| ..)`, which locks before BEGIN and releases after COMMIT"
)]
pub trait TransactionLocks: sealed::TransactionLocks {}

/// A Diesel connection to a server that has locks: a
/// [`PgConnection`](https://docs.diesel.rs/2.3.x/diesel/pg/struct.PgConnection.html), a
/// [`MysqlConnection`](https://docs.diesel.rs/2.3.x/diesel/mysql/struct.MysqlConnection.html), a
/// [`SqliteConnection`](https://docs.diesel.rs/2.3.x/diesel/sqlite/struct.SqliteConnection.html), a pooled one, or a
/// wrapper of yours.
///
/// It is implemented for all of them.
///
/// # Examples
///
/// ```
/// use diesel::pg::PgConnection;
/// use diesel::r2d2::{ConnectionManager, PooledConnection};
///
/// fn is_lock_connection<C: dlock_diesel::LockConnection>() {}
///
/// is_lock_connection::<PgConnection>();
/// is_lock_connection::<PooledConnection<ConnectionManager<PgConnection>>>();
/// ```
pub trait LockConnection: LoadConnection<Backend: LockBackend> {}

impl<C: LoadConnection<Backend: LockBackend>> LockConnection for C {}

/// The core's dialect for the server of a connection.
pub(crate) type DialectOf<C> = <<C as Connection>::Backend as LockBackend>::Dialect;

/// A key in the form that the server of a connection takes.
pub(crate) type KeyOf<C> = <DialectOf<C> as Dialect>::Key;

pub(crate) mod sealed {
    use super::{LockBackend, TransactionDialect};

    pub trait Sealed {}

    pub trait TransactionLocks: LockBackend<Dialect: TransactionDialect> {}
}
