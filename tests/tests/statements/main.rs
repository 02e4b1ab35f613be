//! Servers keep statistics of each statement text that they see: PostgreSQL's `pg_stat_statements` and MySQL's statement
//! digests. dlock sends few different ones, whatever the keys, the limits and the number of calls.

#![expect(
    clippy::duplicate_mod,
    reason = "the calls are compiled for sync and for async connections"
)]

#[path = "../fresh_database/mod.rs"]
mod fresh_database;

mod asynchronous;
mod mysql;
mod other;
mod plan;
mod postgres;
mod semaphores;
mod several;
mod sync;
