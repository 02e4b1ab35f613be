//! What both crates promise, and what the tests of both use: `#[both]` compiles it for sync and for async connections.
//!
//! The two differ in what `crate::flavor` names.

pub(crate) mod app_error;
mod background;
pub(crate) mod connection;
#[path = "../fresh_database/mod.rs"]
pub(crate) mod fresh_database;
pub(crate) mod observe;
pub(crate) mod round_trips;
pub(crate) mod table;
pub(crate) mod user;

mod acquire;
mod check;
pub(crate) mod environment;
mod errors;
pub(crate) mod fencing;
mod guard;
mod holders;
pub(crate) mod inside_transaction;
mod losses;
mod managed_semaphores;
mod managed_several;
mod managed_tokens;
pub(crate) mod manager;
mod restarts;
pub(crate) mod semaphore;
mod several;
pub(crate) mod transaction;
mod waiting;
