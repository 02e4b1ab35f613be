//! What `../both` calls by one name, of async connections.

pub(crate) use diesel_async::{
    AsyncConnection as Connection, AsyncMysqlConnection as MysqlConnection,
    AsyncPgConnection as PgConnection, RunQueryDsl, SimpleAsyncConnection as SimpleConnection,
    TransactionManager,
};
pub(crate) use dlock_diesel_async::{
    AdvisoryLock, AdvisoryLockExt, AdvisorySemaphore, Error, Held, Report, Severity,
};
pub(crate) use dlock_sync_or_async::with_await as both;
pub(crate) use dlock_tests::{
    AsyncTestConnection, TestConnection, on_every_network_server_async as on_every_network_server,
    on_every_server_async as on_every_server, on_mysql_async as on_mysql,
    on_postgres_async as on_postgres,
};

pub(crate) type SqliteConnection =
    diesel_async::sync_connection_wrapper::SyncConnectionWrapper<diesel::SqliteConnection>;
