//! Distributed locks for [diesel-async](diesel_async), on the database you already have.
//!
//! It has the names of [`dlock_diesel`], whose pages say what each method does. The pages here say what is different.
//! The locks are the same: sync and async applications can share one.
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
//! let mut lock = conn.advisory_lock(("billing", "user/001")).acquire().await?;
//! diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut lock).await?;
//! lock.release().await?;
//!
//! // Gives up, at once or after a while.
//! if let Some(lock) = conn.advisory_lock(("billing", "report")).try_acquire().await? {
//!     lock.release().await?;
//! }
//! let lock = conn.advisory_lock(("billing", "report")).timeout(Duration::from_millis(250)).acquire().await?;
//! lock.release().await?;
//!
//! // Releases on every path.
//! conn.advisory_lock(("billing", "report")).run(async |conn| build(conn).await).await?;
//! // A transaction under a lock that is free only after COMMIT.
//! conn.advisory_lock(("bank", "account/1")).transaction(async |conn| move_money(conn).await).await?;
//! # Ok(()) }
//! ```
//!
//! - [`AdvisoryLockExt`] adds [`advisory_lock`](AdvisoryLockExt::advisory_lock) to every connection and, on PostgreSQL,
//!   [`advisory_xact_lock`](AdvisoryLockExt::advisory_xact_lock).
//! - [`AdvisoryLock`] is a lock that is not held yet. [`AdvisoryLockGuard`] is one that is held. [`AdvisoryXactLock`]
//!   is one that ends with the open transaction.
//! - [`AdvisorySemaphore`] lets a number of sessions in at once. [`AdvisorySemaphoreGuard`] is one of its permits.
//! - [`LockManager`] holds any number of locks over a few connections of its own, and tells a holder of a loss.
//! - [`LockKey`] is the name of a lock: text, bytes, a number or a pair of numbers.
//! - [`Error`] has one variant for each thing that a caller can act on.
//!
//! It runs on tokio, as diesel-async's connections do, on one thread or many, with tokio's timer enabled. Its futures
//! are [`Send`].
//!
//! # Dropped futures
//!
//! You can drop every future at any point: with `tokio::time::timeout`, `tokio::select!`, an aborted task, or a client
//! that hangs up. No lock stays behind for ever, no abandoned wait gets the lock later and keeps it, and no pool hands
//! out a connection that is out of step. `docs/design.md` in the repository has a table of what is free when.
//!
//! A dropped future can cost the connection, which is then marked broken. So prefer what needs no dropping:
//!
//! | instead of | write | because |
//! |---|---|---|
//! | `timeout(limit, lock.acquire())` | `lock.timeout(limit).acquire()` | you keep the connection |
//! | `drop(guard)` | `guard.release().await` | the lock is free when it returns |
//! | a wait that will be dropped | `lock.cancel_with(..).acquire()` | it leaves the server's queue at once |
//!
//! # Pools
//!
//! Give an owned connection to [`AdvisoryLock::new`], or borrow it. A lock needs its connection while it waits and
//! while it is held, so a pool has to be larger than the number of locks that wait or are held at once.
//!
//! bb8 closes a broken connection when it comes back. deadpool closes it at the next `get()` that meets it: until then
//! its session lives on, and keeps what is free only "when the connection is closed".
//!
//! **mobc** of diesel-async 0.9.1 and 0.9.2 keeps the broken connections and closes the healthy ones
//! ([diesel_async#290](https://github.com/diesel-rs/diesel_async/pull/290)). Let it check a connection before it hands
//! it out:
//!
//! ```
//! use diesel_async::pooled_connection::{
//!     AsyncDieselConnectionManager, ManagerConfig, PoolableConnection, RecyclingMethod,
//! };
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
//! - It does not replace a [`tokio::sync::Mutex`] among the tasks of one process, which costs no round trip.
//! - The [limits of `dlock_diesel`](dlock_diesel#what-it-is-not) apply.
//!
//! # Features
//!
//! - `postgres` (default): locks on PostgreSQL connections.
//! - `mysql` (default): locks on MySQL and MariaDB connections.
//! - `sqlite`: locks on `SyncConnectionWrapper<SqliteConnection>`. Each connection needs one call of
//!   `enable_advisory_locks()`.
//! - `migrations`: `AdvisoryLock::run_pending_migrations` runs the pending migrations of `diesel_migrations` under a
//!   lock.
//! - `tracing`: spans and events of the crate `tracing`: each request for a lock, long waits, and locks that were lost.
//! - `uuid`: a UUID is a key, the same one as its hyphenated text.
//! - `sqlalchemy-dlock`, `django-pglock`, `sqlx`, `with-advisory-lock`, `distributed-lock`: `LockKey` takes the exact
//!   locks of that library, with a function of its name (`LockKey::sqlx(..)`, `LockKey::django_pglock(..)`). Programs
//!   that use it and programs that use dlock then exclude each other.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(unused, reason = "some of it is for one server only")
)]

mod acquire;
mod backend;
mod body;
mod cancel;
mod check;
mod ext;
mod guard;
mod holders;
mod lock;
mod manager;
#[cfg(feature = "migrations")]
mod migrations;
mod run;
mod semaphore;
mod semaphore_guard;
mod session;
mod several;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;
mod xact;

pub use backend::{AsyncFunc, AsyncLockBackend, LockConnection};
#[cfg(feature = "postgres")]
pub use dlock_diesel::PostgresKey;
pub use dlock_diesel::{
    Error, FencingToken, Finding, Held, Holder, InvalidKey, LockBackend, LockKey, Mode, Report,
    Severity, SharedLocks, TransactionLocks,
};
pub use ext::AdvisoryLockExt;
pub use guard::AdvisoryLockGuard;
pub use lock::AdvisoryLock;
pub use manager::{
    LockManager, LockManagerBuilder, ManagedLock, ManagedLockGuard, ManagedSemaphore,
    ManagedSemaphoreGuard,
};
pub use semaphore::AdvisorySemaphore;
pub use semaphore_guard::AdvisorySemaphoreGuard;
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteLocksExt;
pub use xact::AdvisoryXactLock;
