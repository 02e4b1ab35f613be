//! Several locks as one: every conversation with a small server of each kind, each of them abandoned at every step.

#![cfg(all(feature = "postgres", feature = "mysql", feature = "sqlite"))]

#[path = "several/mysql.rs"]
mod mysql;
#[path = "several/postgres.rs"]
mod postgres;
#[path = "several/sqlite.rs"]
mod sqlite;
#[path = "several/transaction.rs"]
mod transaction;
#[path = "several/walk.rs"]
mod walk;
