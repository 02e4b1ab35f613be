use std::ops::DerefMut;
use std::pin::Pin;

use diesel::QueryResult;
use diesel_async::{AsyncConnection, AsyncConnectionCore};
use dlock_core::{Dialect, Holder, Statement};
use dlock_diesel::LockBackend;
use dlock_diesel::glue::{CoreQuery, HolderColumns, HolderRow, Value, to_holder};

use crate::{AdvisoryLock, Error, session, transaction};

/// A backend of which async connections can be locked: `Pg`, `Mysql` and `Sqlite`.
///
/// It cannot be implemented elsewhere.
///
/// # Examples
///
/// ```
/// fn is_lock_backend<DB: dlock_diesel_async::AsyncLockBackend>() {}
///
/// is_lock_backend::<diesel::pg::Pg>();
/// is_lock_backend::<diesel::mysql::Mysql>();
/// ```
pub trait AsyncLockBackend: LockBackend {
    #[doc(hidden)]
    fn value<C>(
        conn: &mut C,
        statement: Statement,
    ) -> impl Future<Output = QueryResult<Option<i64>>> + Send
    where
        C: AsyncConnection<Backend = Self>;

    #[doc(hidden)]
    fn rows<C>(
        conn: &mut C,
        statement: Statement,
    ) -> impl Future<Output = QueryResult<Vec<Holder>>> + Send
    where
        C: AsyncConnection<Backend = Self>;

    /// Sends a message whose answer nobody reads, from where nothing can be awaited. `false` if it certainly failed.
    #[doc(hidden)]
    fn send_unread<C>(conn: &mut C, message: &str) -> bool
    where
        C: AsyncConnection<Backend = Self>,
    {
        session::poll_once(conn.batch_execute(message));
        true
    }

    // Boxed, since rustc cannot prove yet that such a future is `Send`:
    // <https://github.com/rust-lang/rust/issues/100013>.
    #[doc(hidden)]
    fn transaction<'a, M, F, T, E>(lock: AdvisoryLock<M>, f: F) -> BoxFuture<'a, Result<T, E>>
    where
        M: DerefMut<Target: LockConnection<Backend = Self>> + Send + 'a,
        for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
            + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<Error> + Send + 'a;
}

/// An async Diesel connection to a server that has locks: an
/// [`AsyncPgConnection`](https://docs.rs/diesel-async/latest/diesel_async/struct.AsyncPgConnection.html), an
/// [`AsyncMysqlConnection`](https://docs.rs/diesel-async/latest/diesel_async/struct.AsyncMysqlConnection.html), and what
/// derefs to them, such as a pooled one.
///
/// It is implemented for all of them.
///
/// # Examples
///
/// ```
/// fn is_lock_connection<C: dlock_diesel_async::LockConnection>() {}
///
/// is_lock_connection::<diesel_async::AsyncPgConnection>();
/// is_lock_connection::<Box<diesel_async::AsyncMysqlConnection>>();
/// ```
pub trait LockConnection: AsyncConnection<Backend: AsyncLockBackend> {}

impl<C: AsyncConnection<Backend: AsyncLockBackend>> LockConnection for C {}

/// An async closure whose future is [`Send`], as diesel-async's `transaction` takes it.
///
/// It is implemented for all of them.
///
/// # Examples
///
/// ```
/// fn takes<F>(f: F)
/// where
///     for<'r> F: dlock_diesel_async::AsyncFunc<&'r mut u32, bool, Fut: Send>,
/// {
/// }
///
/// takes(async |number: &mut u32| *number == 0);
/// ```
pub trait AsyncFunc<T, R>:
    AsyncFnOnce(T) -> R + FnOnce(T) -> <Self as AsyncFunc<T, R>>::Fut
{
    /// What it returns.
    type Fut: Future<Output = R>;
}

impl<F, T, Fut, R> AsyncFunc<T, R> for F
where
    F: AsyncFnOnce(T) -> R + FnOnce(T) -> Fut,
    Fut: Future<Output = R>,
{
    type Fut = Fut;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the server of a connection wants to be sent.
pub(crate) type DialectOf<C> = <<C as AsyncConnectionCore>::Backend as LockBackend>::Dialect;

/// A key as the server of a connection takes it.
pub(crate) type KeyOf<C> = <DialectOf<C> as Dialect>::Key;

/// A type for each number, by which Diesel finds the prepared statement.
macro_rules! value {
    ($conn:ident, $statement:ident, $($number:literal)*) => {
        match $statement.number {
            $(Some($number) => {
                CoreQuery::<Value, $number>::new($statement).get_result($conn).await
            })*
            Some(number) => unreachable!("BUG: no type for the statement {number}"),
            None => CoreQuery::<Value>::new($statement).get_result($conn).await,
        }
    };
}

macro_rules! async_lock_backend {
    ($backend:ty, $transaction:path) => {
        impl AsyncLockBackend for $backend {
            async fn value<C>(conn: &mut C, statement: Statement) -> QueryResult<Option<i64>>
            where
                C: AsyncConnection<Backend = Self>,
            {
                value!(conn, statement, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
            }

            async fn rows<C>(conn: &mut C, statement: Statement) -> QueryResult<Vec<Holder>>
            where
                C: AsyncConnection<Backend = Self>,
            {
                let rows: Vec<HolderRow> = CoreQuery::<HolderColumns>::new(statement)
                    .load(conn)
                    .await?;
                Ok(rows.into_iter().map(to_holder).collect())
            }

            fn transaction<'a, M, F, T, E>(
                lock: AdvisoryLock<M>,
                f: F,
            ) -> BoxFuture<'a, Result<T, E>>
            where
                M: DerefMut<Target: LockConnection<Backend = Self>> + Send + 'a,
                for<'r> F: AsyncFnOnce(&'r mut M::Target) -> Result<T, E>
                    + AsyncFunc<&'r mut M::Target, Result<T, E>, Fut: Send>
                    + Send
                    + 'a,
                T: Send + 'a,
                E: From<Error> + Send + 'a,
            {
                Box::pin($transaction(lock, f))
            }
        }
    };
}

#[cfg(feature = "postgres")]
mod postgres {
    use diesel::pg::Pg;
    use diesel_async::RunQueryDsl;

    use super::*;

    async_lock_backend!(Pg, transaction::with_lock_inside);
}

#[cfg(feature = "mysql")]
mod mysql {
    use diesel::mysql::Mysql;
    use diesel_async::RunQueryDsl;

    use super::*;

    async_lock_backend!(Mysql, transaction::with_lock_around);
}
