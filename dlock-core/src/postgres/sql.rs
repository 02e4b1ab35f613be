//! The SQL text of PostgreSQL's locks.
//!
//! Functions and types are named with their schema, and functions stand in place of operators (`texteq` for `=`), so
//! that PostgreSQL's own are called whatever `search_path` says. Statements with binds are sent prepared. A message
//! that holds BEGIN, a savepoint or settings in front of the lock cannot be prepared: there the key is a constant,
//! which pg_stat_statements replaces.

mod check;
mod locks;
mod managed;
mod message;
mod parts;
mod prepared;
mod semaphore;
mod several;
mod token;
mod tokens;
mod turn;

pub(super) use check::*;
pub(super) use locks::*;
pub(super) use managed::*;
pub(super) use message::*;
pub(super) use parts::Scope;
pub(super) use prepared::*;
pub(super) use semaphore::*;
pub(super) use several::*;
pub(super) use token::*;
pub(super) use tokens::*;
pub(super) use turn::*;
