//! The calls of the sync crate.

pub(crate) use diesel::connection::{SimpleConnection, TransactionManager};
pub(crate) use diesel::{Connection, PgConnection};
pub(crate) use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error, LockConnection};
pub(crate) use dlock_sync_or_async::without_await as both;
pub(crate) use dlock_tests::TestConnection;

#[path = "calls.rs"]
mod calls;

pub(crate) use calls::*;
