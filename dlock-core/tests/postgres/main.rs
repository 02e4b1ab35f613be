//! The machines of PostgreSQL: answer by answer, and with every server that there can be.
#![cfg(feature = "postgres")]

mod begin;
mod common;
mod inside;
mod names;
#[path = "../postgres_server/mod.rs"]
mod postgres_server;
mod questions;
mod release;
#[path = "../script/mod.rs"]
mod script;
mod session;
mod statements;
mod transaction;
mod turns;
mod walk;
