//! Shared by the examples: finds the database that `DATABASE_URL` names, and says what to do if it cannot.
#![allow(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "each example uses a part of it"
)]

mod database;
mod servers;

pub(crate) use database::*;
pub(crate) use servers::*;

/// Calls a generic function with the connection type of the database, and with its URL.
macro_rules! on_database {
    ($database:expr, $function:ident $(, $argument:expr)*) => {
        $database.and_then(|database| match &database {
            $crate::support::Database::Postgres(url) => {
                $function::<$crate::support::PgConnection>(url $(, $argument)*)
            }
            $crate::support::Database::Mysql(url) => {
                $function::<$crate::support::MysqlConnection>(url $(, $argument)*)
            }
            $crate::support::Database::Sqlite(url, _) => {
                $function::<diesel::SqliteConnection>(url $(, $argument)*)
            }
        })
    };
}
pub(crate) use on_database;

/// Like `on_database`, without SQLite.
macro_rules! on_server {
    ($database:expr, $function:ident) => {
        $database.and_then(|database| match &database {
            $crate::support::Database::Postgres(url) => {
                $function::<$crate::support::PgConnection>(url)
            }
            $crate::support::Database::Mysql(url) => {
                $function::<$crate::support::MysqlConnection>(url)
            }
            $crate::support::Database::Sqlite(..) => Err(
                "this example needs a server: on SQLite, one transaction writes at a time anyway"
                    .into(),
            ),
        })
    };
}
pub(crate) use on_server;

/// Like `on_server`, for async functions and connections.
macro_rules! on_server_async {
    ($function:ident) => {
        match $crate::support::Database::from_env() {
            Ok($crate::support::Database::Postgres(url)) => {
                $function::<diesel_async::AsyncPgConnection>(&url).await
            }
            Ok($crate::support::Database::Mysql(url)) => {
                $function::<diesel_async::AsyncMysqlConnection>(&url).await
            }
            Ok($crate::support::Database::Sqlite(..)) => Err("this example needs a server".into()),
            Err(error) => Err(error),
        }
    };
}
pub(crate) use on_server_async;
