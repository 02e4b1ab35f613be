//! What a database lock is, without I/O: the core of `dlock-diesel` and `dlock-diesel-async`.
//!
//! Applications want one of those crates. This one has the parts that both share, each in a file of its own:
//!
//! - [`LockKey`]: the name of a lock, and how it becomes what a server takes;
//! - [`Mode`] and [`Wait`]: how a lock is asked for;
//! - [`Dialect`], for [`Postgres`], [`Mysql`] and [`Sqlite`]: all that is known of a kind of server, as small state machines
//!   ([`Machine`]) that say what to send next and are told the answer. They do no I/O and have no clock, so that every
//!   answer that a server can give is tested without one.
//!
//! # Features
//!
//! - `postgres` (default): PostgreSQL's advisory locks.
//! - `mysql` (default): MySQL's and MariaDB's named locks.
//! - `sqlite`: locks for SQLite.
//! - `sqlalchemy-dlock`: the exact keys of that Python library, so that both can share a lock.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod dialect;
mod error;
mod fence;
mod holder;
mod key;
mod machine;
mod mode;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlalchemy-dlock")]
mod sqlalchemy_dlock;
#[cfg(feature = "sqlite")]
mod sqlite;
mod statement;
mod wait;

pub use dialect::{Dialect, OpenTransaction, TransactionDialect};
pub use error::{Failure, Reason};
pub use fence::Fence;
pub use holder::Holder;
#[cfg(feature = "postgres")]
pub use key::PostgresKey;
pub use key::{InvalidKey, LockKey};
pub use machine::{Abandoned, Answer, Machine, Outcome, Step};
pub use mode::Mode;
#[cfg(feature = "mysql")]
pub use mysql::{Mysql, MysqlAcquire, MysqlRelease};
#[cfg(feature = "postgres")]
pub use postgres::{Postgres, PostgresAcquire, PostgresBegin, PostgresRelease};
#[cfg(feature = "sqlite")]
pub use sqlite::{Sqlite, SqliteAcquire, SqliteKey, SqliteRelease};
pub use statement::{Nonce, OutOfStep, Piece, Statement};
pub use wait::Wait;
