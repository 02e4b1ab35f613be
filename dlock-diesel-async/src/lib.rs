//! Distributed locks on the database you already have, for [diesel-async](diesel_async): PostgreSQL's advisory locks and
//! MySQL's and MariaDB's named locks as extensions of async Diesel connections.
//!
//! They need no table, no lease and no clock, and the server frees them when the connection of their holder dies.
//!
//! ```no_run
//! use std::time::Duration;
//! use diesel::prelude::*;
//! use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
//! use dlock_diesel_async::{AdvisoryLockExt, Error};
//!
//! # diesel::table! { accounts { id -> Integer, balance -> Integer } }
//! # async fn build(conn: &mut AsyncPgConnection) -> Result<(), Error> { todo!() }
//! # async fn move_money(conn: &mut AsyncPgConnection) -> Result<(), Error> { todo!() }
//! # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let mut conn = AsyncPgConnection::establish("postgres://localhost/app").await?;
//! // Waits until the lock is free. The guard is itself a connection.
//! let mut lock = conn.advisory_lock("user/001").acquire().await?;
//! diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut lock).await?;
//! lock.release().await?;
//!
//! // Gives up, at once or after a while.
//! if let Some(lock) = conn.advisory_lock("report").try_acquire().await? {
//!     lock.release().await?;
//! }
//! let lock = conn.advisory_lock("report").timeout(Duration::from_millis(250)).acquire().await?;
//! lock.release().await?;
//!
//! // Releases on every path.
//! conn.advisory_lock("report").run(async |conn| build(conn).await).await?;
//! // A transaction under a lock that is free only after COMMIT.
//! conn.advisory_lock("account/1").transaction(async |conn| move_money(conn).await).await?;
//! # Ok(()) }
//! ```
//!
//! - [`AdvisoryLockExt`] gives every connection [`advisory_lock`](AdvisoryLockExt::advisory_lock) and, on PostgreSQL,
//!   [`advisory_xact_lock`](AdvisoryLockExt::advisory_xact_lock).
//! - [`AdvisoryLock`] is a lock that is not held yet, [`AdvisoryLockGuard`] one that is, [`AdvisoryXactLock`] one that
//!   ends with the transaction.
//! - [`LockKey`] is its name: text, bytes, a number or a pair of them.
//! - [`Error`] tells what a caller can act on.
//!
//! The names are those of [`dlock_diesel`], and so are the locks: a sync and an async application can share one.
//!
//! # Dropped futures
//!
//! Every future can be dropped at any point, by `tokio::time::timeout`, `tokio::select!`, a task that is aborted or a
//! client that hangs up: no lock stays behind, nobody in the server's queue takes it later, and no pool hands the
//! connection to the next user out of step. [`AdvisoryLock::acquire`] and [`AdvisoryLockGuard`] say for each case when
//! the lock is free again.
//!
//! That may cost the connection, which is then marked broken. So prefer what needs no dropping:
//!
//! | instead of | write | for then |
//! |---|---|---|
//! | `timeout(limit, lock.acquire())` | `lock.timeout(limit).acquire()` | the connection stays, and the error says who has the lock |
//! | `drop(guard)` | `guard.release().await` | the lock is free when it returns, and on MySQL the connection stays |
//! | a wait that will be dropped | [`cancel_with`](AdvisoryLock::cancel_with) | the place in the server's queue is free at once |
//!
//! # Pools
//!
//! Give an owned connection to [`AdvisoryLock::new`], or borrow it. A lock needs one connection and no second, as long as
//! it waits and is held; so a pool must be greater than the number of locks that wait or are held at once.
//!
//! A connection that was marked broken is closed by bb8 when it comes back, and by deadpool at the next `get()` that meets
//! it: until then its session lives on, and what is "free when the connection is closed" is not free.
//!
//! **mobc** of diesel-async 0.9.1 and 0.9.2 keeps the broken connections and closes the healthy ones
//! ([diesel_async#290](https://github.com/diesel-rs/diesel_async/pull/290) turned its question round). Have it look at a
//! connection before it hands it out:
//!
//! ```
//! use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, PoolableConnection, RecyclingMethod};
//! use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
//!
//! let mut config = ManagerConfig::default();
//! config.recycling_method = RecyclingMethod::CustomFunction(Box::new(|conn: &mut AsyncPgConnection| {
//!     Box::pin(async move {
//!         if conn.is_broken() {
//!             return Err(diesel::result::Error::BrokenTransactionManager);
//!         }
//!         conn.batch_execute("SELECT 1").await
//!     })
//! }));
//! let manager = AsyncDieselConnectionManager::new_with_config("postgres://localhost/app", config);
//! ```
//!
//! # What it is not
//!
//! - It is no substitute for a unique constraint or `SELECT .. FOR UPDATE` where a row is what you protect.
//! - It excludes who asks for the same key on the same server (PostgreSQL: the same database), and nobody else. Behind
//!   PgBouncer in transaction mode, use [`AdvisoryLock::transaction`] or transaction locks only; on clusters that
//!   accept writes on several nodes (Galera, group replication) such locks are local to a node.
//! - It is no substitute for a [`tokio::sync::Mutex`] among the tasks of one process, which costs no round trip.
//! - A holder whose connection has died may still be running. Where that matters, let what it writes to check.
//!
//! # Features
//!
//! - `postgres` (default): locks on PostgreSQL connections.
//! - `mysql` (default): locks on MySQL and MariaDB connections.
//! - `sqlite`: locks on `SyncConnectionWrapper<SqliteConnection>`.
//! - `migrations`: runs the pending migrations of `diesel_migrations` under a lock.
//! - `sqlalchemy-dlock`: the exact keys of that Python library, so that both can share a lock.
//!
//! It runs on tokio, as diesel-async's connections do, on runtimes of one thread or of many (with their timer enabled),
//! and its futures are [`Send`].
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
#[cfg(feature = "migrations")]
mod migrations;
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
