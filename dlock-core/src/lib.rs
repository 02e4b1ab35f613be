//! Keys, modes and the conversations with each server, without I/O: the core of `dlock-diesel` and
//! `dlock-diesel-async`.
//!
//! Applications use one of those two crates. They re-export these types:
//!
//! - [`LockKey`]: the name of a lock, and its form on each server;
//! - [`Mode`]: exclusive, or shared by many readers;
//! - [`Holder`]: a session that holds a lock or waits for it;
//! - [`FencingToken`]: a number greater than those of earlier holders;
//! - [`Report`]: what a check of the locks on a connection has found.
//!
//! Everything else is hidden and not part of the API. The three crates depend on each other's exact version.
//!
//! # Features
//!
//! - `postgres` (default): PostgreSQL's advisory locks.
//! - `mysql` (default): the named locks of MySQL and MariaDB.
//! - `sqlite`: locks for SQLite.
//! - `uuid`: keys from UUIDs.
//! - `sqlalchemy-dlock` and `django-pglock` (Python), `sqlx` (Rust), `with-advisory-lock` (Ruby), `distributed-lock`
//!   (.NET): the exact keys of that library. Programs that use it and programs that use dlock then exclude each other.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(
        dead_code,
        unused_imports,
        unused_macros,
        reason = "some of it is for one server only"
    )
)]

mod holder;
mod key;
mod mode;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[doc(hidden)]
pub mod proto;
mod report;
#[cfg(feature = "sqlite")]
mod sqlite;
mod token;

pub use holder::Holder;
pub use key::{InvalidKey, LockKey, PostgresKey};
pub use mode::Mode;
pub use report::{Finding, Report, Severity};
pub use token::FencingToken;
