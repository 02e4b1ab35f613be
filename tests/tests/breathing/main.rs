//! A long wait on PostgreSQL breathes: it is cut into turns, and between two turns the session holds no snapshot. What
//! that gives others, what it costs, and what a wait keeps across its turns.
//!
//! Each test has databases of its own on a server of its own, and on those of `TEST_URLS`. The cases of a test run at the
//! same time: nearly all of their time they wait.

#[path = "../fresh_database/mod.rs"]
mod fresh_database;

mod deadlocks;
mod limits;
mod log;
mod others;
mod readers;
mod settings;
mod support;
