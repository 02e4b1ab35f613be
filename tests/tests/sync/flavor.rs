//! What `../both` calls by one name, of sync connections.

pub(crate) use diesel::connection::{SimpleConnection, TransactionManager};
pub(crate) use diesel::{Connection, MysqlConnection, PgConnection, RunQueryDsl, SqliteConnection};
pub(crate) use dlock_diesel::{
    AdvisoryLock, AdvisoryLockExt, AdvisorySemaphore, Error, Held, Report, Severity,
};
pub(crate) use dlock_sync_or_async::without_await as both;
pub(crate) use dlock_tests::{
    TestConnection, on_every_network_server, on_every_server, on_mysql, on_postgres,
};
