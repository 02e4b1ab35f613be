//! What the examples share.

use diesel_async::AsyncConnection;

mod database;

pub(crate) use database::{Database, Result, cannot_connect, exit_code};

/// Calls an async function that is generic over the connection, with the type for `DATABASE_URL` and that URL.
macro_rules! on_database {
    ($function:ident) => {
        match $crate::support::Database::from_env() {
            Ok($crate::support::Database::Postgres(url)) => {
                $function::<diesel_async::AsyncPgConnection>(&url).await
            }
            Ok($crate::support::Database::Mysql(url)) => {
                $function::<diesel_async::AsyncMysqlConnection>(&url).await
            }
            Err(error) => Err(error),
        }
    };
}
pub(crate) use on_database;

pub(crate) async fn connect<C: AsyncConnection>(url: &str) -> Result<C> {
    let conn = C::establish(url).await;
    conn.map_err(|error| cannot_connect(url, &error))
}
