//! Distributed locks on the database you already have, for [`diesel_async`].
//!
//! **It is being written, and not yet tested as `dlock-diesel` is: do not rely on it.** It has the same names with
//! `.await` and async closures, and its guard is itself an [`AsyncConnection`](diesel_async::AsyncConnection).
//!
//! # Features
//!
//! - `postgres` (default): locks on PostgreSQL connections.
//! - `mysql` (default): locks on MySQL and MariaDB connections.
//! - `sqlite`: locks on `SyncConnectionWrapper<SqliteConnection>`.
//! - `sqlalchemy-dlock`: the exact keys of that Python library, so that both can share a lock.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(unused, reason = "some of it is for one server only")
)]

mod backend;
mod drive;
mod ext;
mod guard;
mod lock;
mod session;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;
mod xact;

pub use backend::{AsyncFunc, AsyncLockBackend, LockConnection};
pub use dlock_diesel::{
    Error, Holder, InvalidKey, LockBackend, LockKey, Mode, SharedLocks, TransactionLocks,
};
pub use ext::AdvisoryLockExt;
pub use guard::AdvisoryLockGuard;
pub use lock::AdvisoryLock;
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteLocksExt;
pub use xact::AdvisoryXactLock;
