//! Servers, with drivers that are written in Rust.

use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection};

use super::database::{Connect, Result, cannot_connect};

/// Like `diesel::PgConnection`, without libpq.
pub(crate) type PgConnection = AsyncConnectionWrapper<AsyncPgConnection>;
/// Like `diesel::MysqlConnection`, without libmysqlclient.
pub(crate) type MysqlConnection = AsyncConnectionWrapper<AsyncMysqlConnection>;

impl Connect for PgConnection {}
impl Connect for MysqlConnection {}

pub(crate) async fn connect_async<C: AsyncConnection>(url: &str) -> Result<C> {
    let conn = C::establish(url).await;
    Ok(conn.map_err(|error| cannot_connect(url, &error))?)
}
