#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;

use std::pin::{Pin, pin};
use std::task::{Context, Waker};

use diesel::QueryResult;
use diesel::result::Error as DieselError;
use diesel_async::{AsyncConnection, AsyncConnectionCore, TransactionManager};
use dlock_core::proto::{Answer, Ask, Dialect, Statement};
use dlock_diesel::LockBackend;

/// A backend whose async connections have locks: `Pg`, `Mysql` and `Sqlite`.
///
/// You cannot implement it for other backends.
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
    /// Whether an answer can fail to come, because the network does not carry it.
    #[doc(hidden)]
    const HAS_NETWORK: bool = true;

    #[doc(hidden)]
    fn load<C>(conn: &mut C, statement: Statement) -> impl Future<Output = Answer> + Send
    where
        C: AsyncConnection<Backend = Self>;

    /// Sends a message whose answer nobody will read, without waiting. `false`: it certainly failed.
    ///
    /// On PostgreSQL the first poll hands the message to the driver's task, behind everything that was sent before. On
    /// MySQL the first poll writes it to the socket.
    #[doc(hidden)]
    fn send_unread<C>(conn: &mut C, message: &str) -> bool
    where
        C: AsyncConnection<Backend = Self>,
    {
        // Where a task has used up its budget, tokio would not even try to write.
        let sending = pin!(tokio::task::unconstrained(conn.batch_execute(message)));
        let _ = sending.poll(&mut Context::from_waker(Waker::noop()));
        true
    }

    /// Begins a transaction that writes from the start, where there is such a thing.
    #[doc(hidden)]
    fn begin_writing<C>(conn: &mut C) -> impl Future<Output = QueryResult<()>> + Send
    where
        C: AsyncConnection<Backend = Self>,
    {
        C::TransactionManager::begin_transaction(conn)
    }

    /// Ends even if it is dropped, where the driver would panic.
    #[doc(hidden)]
    fn to_the_end<T>(future: impl Future<Output = T> + Send) -> impl Future<Output = T> + Send {
        future
    }

    // Boxed, because rustc cannot yet prove that such a future is `Send`:
    // <https://github.com/rust-lang/rust/issues/100013>.
    #[doc(hidden)]
    fn transaction<'a, C, F, T, E>(
        conn: &'a mut C,
        ask: Ask,
        cancel: Option<Cancel>,
        f: F,
    ) -> BoxFuture<'a, Result<T, E>>
    where
        C: LockConnection<Backend = Self>,
        for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
            + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
            + Send
            + 'a,
        T: Send + 'a,
        E: From<DieselError> + Send + 'a;
}

/// An async Diesel connection to a server that has locks: an
/// [`AsyncPgConnection`](https://docs.rs/diesel-async/latest/diesel_async/struct.AsyncPgConnection.html), an
/// [`AsyncMysqlConnection`](https://docs.rs/diesel-async/latest/diesel_async/struct.AsyncMysqlConnection.html), or what
/// derefs to one, such as a pooled connection.
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

/// An async closure whose future is [`Send`], in the form that diesel-async's `transaction` takes it.
///
/// It is implemented for all such closures.
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
    /// The future that the closure returns.
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

/// What cancels a wait from another connection.
pub(crate) type Cancel = BoxFuture<'static, ()>;

/// The core's dialect for the server of a connection.
pub(crate) type DialectOf<C> = <<C as AsyncConnectionCore>::Backend as LockBackend>::Dialect;

/// A key in the form that the server of a connection takes.
pub(crate) type KeyOf<C> = <DialectOf<C> as Dialect>::Key;
