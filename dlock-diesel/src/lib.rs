//! Distributed locks for [Diesel](https://diesel.rs), on the database you already have.
//!
//! On PostgreSQL they are advisory locks, on MySQL and MariaDB named locks. On SQLite they are locks of the operating
//! system, between the processes of one host. They need no table, no lease and no clock: the server frees a lock when
//! its holder's connection ends.
//!
//! ```no_run
//! use std::time::Duration;
//! use diesel::prelude::*;
//! use dlock_diesel::AdvisoryLockExt;
//!
//! # diesel::table! { accounts { id -> Integer, balance -> Integer } }
//! # fn build(conn: &mut PgConnection) -> QueryResult<()> { todo!() }
//! # fn move_money(conn: &mut PgConnection) -> QueryResult<()> { todo!() }
//! # let mut conn = PgConnection::establish("postgres://localhost/app")?;
//! // Waits until the lock is free. The guard derefs to the connection.
//! let mut lock = conn.advisory_lock(("billing", "user/001")).acquire()?;
//! diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut *lock)?;
//! lock.release()?; // or drop it
//!
//! // Gives up, at once or after a while.
//! if let Some(_lock) = conn.advisory_lock(("billing", "report")).try_acquire()? { /* .. */ }
//! let lock = conn.advisory_lock(("billing", "report")).timeout(Duration::from_millis(250)).acquire()?;
//! drop(lock);
//!
//! // Releases on every path.
//! conn.advisory_lock(("billing", "report")).run(|conn| build(conn))?;
//! // A transaction under a lock that is free only after COMMIT.
//! conn.advisory_lock(("bank", "account/1")).transaction(|conn| move_money(conn))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`AdvisoryLockExt`] adds [`advisory_lock`](AdvisoryLockExt::advisory_lock) to every connection and, on PostgreSQL,
//!   [`advisory_xact_lock`](AdvisoryLockExt::advisory_xact_lock).
//! - [`advisory_locks`](AdvisoryLockExt::advisory_locks) takes several locks as one: all or none, without deadlocks.
//! - [`AdvisoryLock`] is a lock that is not held yet. [`AdvisoryLockGuard`] is one that is held. [`AdvisoryXactLock`]
//!   is one that ends with the open transaction.
//! - [`AdvisorySemaphore`] lets a number of sessions in at once. [`AdvisorySemaphoreGuard`] is one of its permits.
//! - [`LockManager`] holds any number of locks over a few connections of its own, and tells a holder of a loss.
//! - [`LockKey`] is the name of a lock: text, bytes, a number or a pair of numbers.
//! - [`Error`] has one variant for each thing that a caller can act on.
//!
//! # Waiting on PostgreSQL
//!
//! A session that waits in PostgreSQL's queue holds a snapshot, which stops VACUUM and `CREATE INDEX CONCURRENTLY` in
//! the whole database. So a wait of dlock *breathes*: it is cut into turns, and between two turns the session holds no
//! snapshot.
//!
//! - The first turn lasts 0.9 seconds. When it ends without a grant, the server's log gets one ERROR line: "canceling
//!   statement due to lock timeout".
//! - Later turns write nothing into the log. They last 0.9 times `deadlock_timeout` (1.8 times in a session that holds
//!   other locks), and grow to 60 seconds for an exclusive wait behind shared holders. For a role that
//!   may not use PL/pgSQL, each turn leaves an ERROR line.
//! - First come, first served holds within a turn.
//! - Inside an open transaction, breathing helps only VACUUM, and only at READ COMMITTED before the transaction has
//!   written.
//!
//! # When the network is silent
//!
//! A host that disappears says nothing. Every call then waits for the limits of the connection, also a
//! [`timeout`](AdvisoryLock::timeout), because the server counts that. Set these limits, or TCP takes a quarter of an
//! hour, or for ever:
//!
//! - PostgreSQL, in the URL, for libpq:
//!   `?tcp_user_timeout=10000&keepalives_idle=10&keepalives_interval=5&keepalives_count=3`
//! - MySQL and MariaDB: the clients have no parameter for it. On Linux, for all connections of the host:
//!   `sysctl -w net.ipv4.tcp_keepalive_time=10 net.ipv4.tcp_keepalive_intvl=5 net.ipv4.tcp_keepalive_probes=3
//!   net.ipv4.tcp_retries2=5`
//!
//! [`check_advisory_locks`](AdvisoryLockExt::check_advisory_locks) reports the server's own limits, which free the
//! locks of a client that is gone.
//!
//! # What it is not
//!
//! - It does not replace a unique constraint, or `SELECT .. FOR UPDATE` where a row is what you protect.
//! - It excludes only sessions that ask for the same key on the same server (on PostgreSQL: in the same database).
//!   Behind PgBouncer in transaction mode, use only [`AdvisoryLock::transaction`] at READ COMMITTED and
//!   [`AdvisoryXactLock`]. Clusters that accept writes on several nodes (Galera, group replication) have separate locks
//!   on each node, and so does a standby. A standby and a Galera node are refused with [`Error::Unsupported`].
//! - It does not stop a holder that has lost its connection. That holder may still be running. Where that matters, have
//!   the system it writes to reject stale writers by a [fencing token](AdvisoryLockGuard::fencing_token).
//!
//! # Features
//!
//! - `postgres` (default): locks on PostgreSQL connections.
//! - `mysql` (default): locks on MySQL and MariaDB connections.
//! - `sqlite`: locks on SQLite connections. Each connection needs one call of `enable_advisory_locks()`.
//! - `r2d2`: `EnableAdvisoryLocks`, which makes that call in r2d2 pools.
//! - `migrations`: `AdvisoryLock::run_pending_migrations` runs the pending migrations of `diesel_migrations` under a
//!   lock.
//! - `tracing`: spans and events of the crate `tracing`: each request for a lock, long waits, and locks that were lost.
//! - `uuid`: a UUID is a key, the same one as its hyphenated text.
//! - `sqlalchemy-dlock`, `django-pglock`, `sqlx`, `with-advisory-lock`, `distributed-lock`: `LockKey` takes the exact
//!   locks of that library, with a function of its name (`LockKey::sqlx(..)`, `LockKey::django_pglock(..)`). Programs
//!   that use it and programs that use dlock then exclude each other.
//!
//! Only `sqlite` adds a C library. The others use the one that your Diesel connection brings.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(unused, reason = "some of it is for one server only")
)]

mod acquire;
mod backend;
mod body;
mod check;
mod error;
mod ext;
mod guard;
mod held;
mod holders;
mod lock;
mod manager;
#[cfg(feature = "migrations")]
mod migrations;
mod query;
mod run;
mod semaphore;
mod semaphore_guard;
mod session;
mod several;
#[doc(hidden)]
pub mod shared;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;
mod xact;

pub use backend::{LockBackend, LockConnection, SharedLocks, TransactionLocks};
#[cfg(feature = "postgres")]
pub use dlock_core::PostgresKey;
pub use dlock_core::{FencingToken, Finding, Holder, InvalidKey, LockKey, Mode, Report, Severity};
pub use error::Error;
pub use ext::AdvisoryLockExt;
pub use guard::AdvisoryLockGuard;
pub use held::Held;
pub use lock::AdvisoryLock;
pub use manager::{
    LockManager, LockManagerBuilder, ManagedLock, ManagedLockGuard, ManagedSemaphore,
    ManagedSemaphoreGuard,
};
pub use semaphore::AdvisorySemaphore;
pub use semaphore_guard::AdvisorySemaphoreGuard;
#[cfg(all(feature = "sqlite", feature = "r2d2"))]
pub use sqlite::EnableAdvisoryLocks;
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteLocksExt;
pub use xact::AdvisoryXactLock;
