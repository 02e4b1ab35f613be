//! The calls of the async crate.

pub(crate) use diesel_async::{
    AsyncConnection as Connection, AsyncPgConnection as PgConnection,
    SimpleAsyncConnection as SimpleConnection, TransactionManager,
};
pub(crate) use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error, LockConnection};
pub(crate) use dlock_sync_or_async::with_await as both;
pub(crate) use dlock_tests::AsyncTestConnection as TestConnection;

#[path = "calls.rs"]
mod calls;

pub(crate) use calls::*;
