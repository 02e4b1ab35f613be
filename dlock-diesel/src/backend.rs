use std::ops::DerefMut;

use diesel::backend::Backend;
use diesel::connection::LoadConnection;
use diesel::prelude::*;
use dlock_core::{Dialect, Holder, Statement, TransactionDialect};

use crate::query::{CoreQuery, HolderColumns, HolderRow, Value, to_holder};
use crate::{AdvisoryLock, Error, transaction};

/// A Diesel backend that has locks: `Pg`, `Mysql` and `Sqlite`.
///
/// It cannot be implemented elsewhere.
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
    /// All that is known of the server.
    type Dialect: Dialect;

    #[doc(hidden)]
    fn value<C>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>>
    where
        C: LoadConnection<Backend = Self>;

    #[doc(hidden)]
    fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Vec<Holder>>
    where
        C: LoadConnection<Backend = Self>;

    /// Frees a hold without the connection, also from where nothing can be awaited. `None` where only the server can.
    #[doc(hidden)]
    const GIVE_UP: Option<fn(&<Self::Dialect as Dialect>::Key)> = None;

    #[doc(hidden)]
    fn transaction<M, T, E>(
        lock: AdvisoryLock<M>,
        f: impl FnOnce(&mut M::Target) -> Result<T, E>,
    ) -> Result<T, E>
    where
        M: DerefMut<Target: LockConnection<Backend = Self>>,
        E: From<Error>;
}

/// A backend whose locks can be shared by many readers: `Pg` and `Sqlite`.
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
    note = "MySQL's and MariaDB's named locks know one holder only: leave out `.shared()` to take the lock exclusively, \
            or read inside a transaction with `SELECT .. FOR SHARE` on a row of your own"
)]
pub trait SharedLocks: LockBackend {}

/// A backend whose transactions can hold locks that end with them: PostgreSQL.
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
pub trait TransactionLocks: LockBackend<Dialect: TransactionDialect> {}

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

/// What the server of a connection wants to be sent.
pub(crate) type DialectOf<C> = <<C as Connection>::Backend as LockBackend>::Dialect;

/// A key as the server of a connection takes it.
pub(crate) type KeyOf<C> = <DialectOf<C> as Dialect>::Key;

mod sealed {
    pub trait Sealed {}
}

/// A type for each number, by which Diesel finds the prepared statement.
macro_rules! value {
    ($conn:ident, $statement:ident, $($number:literal)*) => {
        match $statement.number {
            $(Some($number) => CoreQuery::<Value, $number>::new($statement).get_result($conn),)*
            Some(number) => unreachable!("BUG: no type for the statement {number}"),
            None => CoreQuery::<Value>::new($statement).get_result($conn),
        }
    };
}

macro_rules! lock_backend {
    ($backend:ty, $dialect:ty, $transaction:path) => {
        impl sealed::Sealed for $backend {}

        impl LockBackend for $backend {
            type Dialect = $dialect;

            fn value<C>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>>
            where
                C: LoadConnection<Backend = Self>,
            {
                value!(conn, statement, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }

            fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Vec<Holder>>
            where
                C: LoadConnection<Backend = Self>,
            {
                let rows: Vec<HolderRow> = CoreQuery::<HolderColumns>::new(statement).load(conn)?;
                Ok(rows.into_iter().map(to_holder).collect())
            }

            fn transaction<M, T, E>(
                lock: AdvisoryLock<M>,
                f: impl FnOnce(&mut M::Target) -> Result<T, E>,
            ) -> Result<T, E>
            where
                M: DerefMut<Target: LockConnection<Backend = Self>>,
                E: From<Error>,
            {
                $transaction(lock, f)
            }
        }
    };
}

#[cfg(feature = "postgres")]
mod postgres {
    use super::*;
    use diesel::pg::Pg;

    lock_backend!(Pg, dlock_core::Postgres, transaction::with_lock_inside);
    impl SharedLocks for Pg {}
    impl TransactionLocks for Pg {}
}

#[cfg(feature = "mysql")]
mod mysql {
    use super::*;
    use diesel::mysql::Mysql;

    lock_backend!(Mysql, dlock_core::Mysql, transaction::with_lock_around);
}

#[cfg(feature = "sqlite")]
mod sqlite {
    use super::*;
    use diesel::sql_types;
    use diesel::sqlite::Sqlite;
    use dlock_core::SqliteKey;

    use crate::sqlite::{self, Asked, explain};

    impl sealed::Sealed for Sqlite {}
    impl SharedLocks for Sqlite {}

    impl LockBackend for Sqlite {
        type Dialect = dlock_core::Sqlite;

        fn value<C>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>>
        where
            C: LoadConnection<Backend = Self>,
        {
            let asked = Asked::new(&statement);
            asked.settle(CoreQuery::<Value>::new(statement).get_result(conn))
        }

        fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Vec<Holder>>
        where
            C: LoadConnection<Backend = Self>,
        {
            let query = CoreQuery::<sql_types::Text>::new(statement);
            let text: String = query.get_result(conn).map_err(explain)?;
            Ok(dlock_core::Sqlite::read_holders(&text))
        }

        const GIVE_UP: Option<fn(&SqliteKey)> = Some(|key| {
            sqlite::give_up(key.request);
            sqlite::forget(key.request);
        });

        fn transaction<M, T, E>(
            lock: AdvisoryLock<M>,
            f: impl FnOnce(&mut M::Target) -> Result<T, E>,
        ) -> Result<T, E>
        where
            M: DerefMut<Target: LockConnection<Backend = Self>>,
            E: From<Error>,
        {
            transaction::with_lock_around_writers(lock, f)
        }
    }
}
