//! Distributed locks on the database you already have, for [Diesel](https://diesel.rs): PostgreSQL's advisory locks
//! and MySQL's and MariaDB's named locks as extensions of Diesel connections; and the same on SQLite, which has none, for
//! the processes of one host.
//!
//! They need no table, no lease and no clock, and the server frees them when the connection of their holder dies.
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
//! let mut lock = conn.advisory_lock("user/001").acquire()?;
//! diesel::update(accounts::table.find(1)).set(accounts::balance.eq(0)).execute(&mut *lock)?;
//! lock.release()?; // or drop it
//!
//! // Gives up, at once or after a while.
//! if let Some(_lock) = conn.advisory_lock("report").try_acquire()? { /* .. */ }
//! let lock = conn.advisory_lock("report").timeout(Duration::from_millis(250)).acquire()?;
//! drop(lock);
//!
//! // Releases on every path.
//! conn.advisory_lock("report").run(|conn| build(conn))?;
//! // A transaction under a lock that is free only after COMMIT.
//! conn.advisory_lock("account/1").transaction(|conn| move_money(conn))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`AdvisoryLockExt`] gives every connection [`advisory_lock`](AdvisoryLockExt::advisory_lock) and, on PostgreSQL,
//!   [`advisory_xact_lock`](AdvisoryLockExt::advisory_xact_lock).
//! - [`AdvisoryLock`] is a lock that is not held yet, [`AdvisoryLockGuard`] one that is, [`AdvisoryXactLock`] one that
//!   ends with the transaction.
//! - [`LockKey`] is its name: text, bytes, a number or a pair of them.
//! - [`Error`] tells what a caller can act on.
//!
//! # What it is not
//!
//! - It is no substitute for a unique constraint or `SELECT .. FOR UPDATE` where a row is what you protect.
//! - It excludes who asks for the same key on the same server (PostgreSQL: the same database), and nobody else. Behind
//!   PgBouncer in transaction mode, use [`AdvisoryLock::transaction`] or transaction locks only; on clusters that
//!   accept writes on several nodes (Galera, group replication) such locks are local to a node.
//! - A holder whose connection has died may still be running. Where that matters, let what it writes to check.
//!
//! # Features
//!
//! - `postgres` (default): locks on PostgreSQL connections.
//! - `mysql` (default): locks on MySQL and MariaDB connections.
//! - `sqlite`: locks on SQLite connections, of the database file. Once for each connection: `conn.enable_advisory_locks()`.
//! - `r2d2`: `EnableAdvisoryLocks` for r2d2's pools of SQLite connections.
//! - `migrations`: runs the pending migrations of `diesel_migrations` under a lock.
//! - `sqlalchemy-dlock`: the exact keys of that Python library, so that both can share a lock.
//!
//! None of them but `sqlite`, which needs SQLite, needs a C library: whichever of Diesel's connections you use brings its
//! own.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(unused, reason = "some of it is for one server only")
)]

mod backend;
mod drive;
mod error;
mod ext;
#[doc(hidden)]
pub mod glue;
mod guard;
mod lock;
#[cfg(feature = "migrations")]
mod migrations;
mod query;
mod session;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transaction;
mod xact;

pub use backend::{LockBackend, LockConnection, SharedLocks, TransactionLocks};
pub use dlock_core::{Holder, InvalidKey, LockKey, Mode};
pub use error::Error;
pub use ext::AdvisoryLockExt;
pub use guard::AdvisoryLockGuard;
pub use lock::AdvisoryLock;
#[cfg(all(feature = "sqlite", feature = "r2d2"))]
pub use sqlite::EnableAdvisoryLocks;
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteLocksExt;
pub use xact::AdvisoryXactLock;
