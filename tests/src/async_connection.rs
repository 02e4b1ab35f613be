use std::time::Duration;

use diesel::sql_types::{BigInt, Nullable, Text};
use diesel::{MysqlConnection, PgConnection, SqliteConnection};
use diesel_async::pooled_connection::PoolableConnection;
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection, RunQueryDsl};
use dlock_diesel_async::{LockConnection, SqliteLocksExt};

use crate::{Kind, Server, TestConnection, server::without_password};

/// An async Diesel connection, as the tests use it. What it does is looked at by an [`Observer`](Self::Observer).
pub trait AsyncTestConnection: LockConnection + PoolableConnection + Send + 'static {
    /// The sync connection to the same servers. It looks at this one's session, and blocks the thread meanwhile.
    type Observer: TestConnection;

    /// Which servers it opens.
    const KIND: Kind;

    /// Opens a connection to `server`.
    ///
    /// # Panics
    ///
    /// If the server does not answer.
    fn open(server: &Server) -> impl Future<Output = Self> + Send {
        Self::open_url(&server.url)
    }

    /// What opens a connection to `url` and to nowhere else.
    ///
    /// mysql_async asks the server for the path of its socket and, if there is such a file, goes on there: past a
    /// [`Proxy`](crate::Proxy). <https://docs.rs/mysql_async/latest/mysql_async/struct.OptsBuilder.html#method.prefer_socket>
    fn direct_url(url: &str) -> String {
        url.to_owned()
    }

    /// Opens a connection to `url`: that of a [`Proxy`](crate::Proxy), for one.
    ///
    /// # Panics
    ///
    /// If no server answers.
    fn open_url(url: &str) -> impl Future<Output = Self> + Send {
        async move {
            match Self::establish(&Self::direct_url(url)).await {
                Ok(conn) => conn,
                Err(error) => panic!("cannot connect to {}: {error}", without_password(url)),
            }
        }
    }

    /// The one number (or truth, as 1 or 0) that a `SELECT` returns.
    ///
    /// # Panics
    ///
    /// If the query fails, or does not return one row.
    fn number(&mut self, sql: &str) -> impl Future<Output = Option<i64>> + Send;

    /// The one text that a `SELECT` returns.
    ///
    /// # Panics
    ///
    /// If the query fails, or does not return one row.
    fn text(&mut self, sql: &str) -> impl Future<Output = Option<String>> + Send;

    /// Sends statements whose answers do not matter.
    ///
    /// # Panics
    ///
    /// If one fails.
    fn execute_sql(&mut self, sql: &str) -> impl Future<Output = ()> + Send {
        async move {
            if let Err(error) = self.batch_execute(sql).await {
                panic!("{sql}: {error}");
            }
        }
    }

    /// This session.
    fn backend_id(&mut self) -> impl Future<Output = i64> + Send;

    /// Cancels, from another connection, the statement that runs when this is awaited: for
    /// [`cancel_with`](dlock_diesel_async::AdvisoryLock::cancel_with).
    fn cancellation(&self) -> impl Future<Output = ()> + Send + 'static;
}

/// By Diesel's own queries.
macro_rules! asks_by_diesel {
    () => {
        async fn number(&mut self, query: &str) -> Option<i64> {
            let rows = diesel::dsl::sql::<Nullable<BigInt>>(query).load(self).await;
            only(query, rows)
        }

        async fn text(&mut self, query: &str) -> Option<String> {
            let rows = diesel::dsl::sql::<Nullable<Text>>(query).load(self).await;
            only(query, rows)
        }
    };
}

impl AsyncTestConnection for AsyncPgConnection {
    type Observer = PgConnection;

    const KIND: Kind = Kind::Postgres;

    async fn number(&mut self, sql: &str) -> Option<i64> {
        let text = self.text(sql).await?;
        match text.as_str() {
            "true" => Some(1),
            "false" => Some(0),
            text => match text.parse() {
                Ok(number) => Some(number),
                Err(error) => panic!("{sql}: {text:?} is no number: {error}"),
            },
        }
    }

    async fn text(&mut self, query: &str) -> Option<String> {
        // The column is a text, whatever its type was.
        let query = format!("SELECT value::text FROM ({query}) AS answer (value)");
        let rows = diesel::dsl::sql::<Nullable<Text>>(&query).load(self).await;
        only(&query, rows)
    }

    async fn backend_id(&mut self) -> i64 {
        let id = self.number("SELECT pg_backend_pid()").await;
        id.expect("a backend has an id")
    }

    fn cancellation(&self) -> impl Future<Output = ()> + Send + 'static {
        let token = self.cancel_token();
        async move {
            // Whether it came in time is for the test to see.
            let _ = token.cancel_query(tokio_postgres::NoTls).await;
        }
    }
}

impl AsyncTestConnection for AsyncMysqlConnection {
    type Observer = MysqlConnection;

    const KIND: Kind = Kind::Mysql;

    fn direct_url(url: &str) -> String {
        let sign = if url.contains('?') { '&' } else { '?' };
        format!("{url}{sign}prefer_socket=false")
    }

    asks_by_diesel!();

    async fn backend_id(&mut self) -> i64 {
        let id = self.number("SELECT CAST(CONNECTION_ID() AS SIGNED)").await;
        id.expect("a connection has an id")
    }

    fn cancellation(&self) -> impl Future<Output = ()> + Send + 'static {
        let token = self.cancel_token();
        async move {
            let _ = token.cancel_query().await;
        }
    }
}

impl AsyncTestConnection for SyncConnectionWrapper<SqliteConnection> {
    type Observer = SqliteConnection;

    const KIND: Kind = Kind::Sqlite;

    async fn open_url(url: &str) -> Self {
        let mut conn = match Self::establish(url).await {
            Ok(conn) => conn,
            Err(error) => panic!("cannot open {url}: {error}"),
        };
        conn.execute_sql("PRAGMA busy_timeout = 20000").await;
        let enabled = conn.enable_advisory_locks().await;
        enabled.expect("SQLite can have locks");
        conn
    }

    asks_by_diesel!();

    async fn backend_id(&mut self) -> i64 {
        let id = self.number("SELECT dlock_session()").await;
        id.expect("a session has an id")
    }

    fn cancellation(&self) -> impl Future<Output = ()> + Send + 'static {
        std::future::poll_fn(|_| -> std::task::Poll<()> {
            panic!("a wait on SQLite needs no cancel: use `on_every_network_server_async!`")
        })
    }
}

/// The only row.
fn only<T>(query: &str, rows: diesel::QueryResult<Vec<T>>) -> T {
    match rows.map(<[T; 1]>::try_from) {
        Ok(Ok([row])) => row,
        Ok(Err(rows)) => panic!("{query}: {} rows, not one", rows.len()),
        Err(error) => panic!("{query}: {error}"),
    }
}

/// Makes tests that run on every one of [`async_servers`](crate::async_servers) and on SQLite, generic over the
/// connection type.
///
/// Each runs on a runtime of its own with two threads, so that sync observers may block one. A bound may also be a trait
/// of one's own, with [`AsyncTestConnection`] as a supertrait, that is implemented for `AsyncPgConnection`,
/// `AsyncMysqlConnection` and `SyncConnectionWrapper<SqliteConnection>`. For the rest, see
/// [`on_every_server!`](crate::on_every_server).
#[macro_export]
macro_rules! on_every_server_async {
    ($(
        $(#[$attribute:meta])*
        async fn $name:ident<$Conn:ident: $bound:path>($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            async fn body<$Conn: $bound>($server: $Server) $body
            type Sqlite = $crate::diesel_async::sync_connection_wrapper::SyncConnectionWrapper<
                $crate::diesel::SqliteConnection,
            >;
            $crate::run_on_every_server_async(
                |server| $crate::block_on(body::<$crate::diesel_async::AsyncPgConnection>(server)),
                |server| $crate::block_on(body::<$crate::diesel_async::AsyncMysqlConnection>(server)),
                |server| $crate::block_on(body::<Sqlite>(server)),
            );
        }
    )*};
}

/// As [`on_every_server_async!`], without SQLite: for what needs a server as a process of its own. See
/// [`on_every_network_server!`](crate::on_every_network_server).
#[macro_export]
macro_rules! on_every_network_server_async {
    ($(
        $(#[$attribute:meta])*
        async fn $name:ident<$Conn:ident: $bound:path>($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            async fn body<$Conn: $bound>($server: $Server) $body
            $crate::run_on_every_network_server_async(
                |server| $crate::block_on(body::<$crate::diesel_async::AsyncPgConnection>(server)),
                |server| $crate::block_on(body::<$crate::diesel_async::AsyncMysqlConnection>(server)),
            );
        }
    )*};
}

/// Makes async tests that run on every PostgreSQL of [`async_servers`](crate::async_servers); there must be one.
#[macro_export]
macro_rules! on_postgres_async {
    ($(
        $(#[$attribute:meta])*
        async fn $name:ident($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            async fn body($server: $Server) $body
            $crate::run_on_async($crate::Kind::Postgres, |server| $crate::block_on(body(server)));
        }
    )*};
}

/// Makes async tests that run on every MySQL and MariaDB of [`async_servers`](crate::async_servers); there must be one.
#[macro_export]
macro_rules! on_mysql_async {
    ($(
        $(#[$attribute:meta])*
        async fn $name:ident($server:ident: $Server:ty) $body:block
    )*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            async fn body($server: $Server) $body
            $crate::run_on_async($crate::Kind::Mysql, |server| $crate::block_on(body(server)));
        }
    )*};
}

/// Runs a future on a runtime of its own, with two threads besides this one.
#[doc(hidden)]
#[track_caller]
pub fn block_on<F: Future>(future: F) -> F::Output {
    // A test that hangs fails; the slowest takes a tenth of this.
    const LIMIT: Duration = Duration::from_secs(300);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let limited = runtime.block_on(async { tokio::time::timeout(LIMIT, future).await });
    limited.unwrap_or_else(|_| panic!("not done within {} s", LIMIT.as_secs()))
}
