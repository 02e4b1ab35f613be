//! How a session comes to hold a lock. This module is not part of the API: it changes without notice.
//!
//! # Theory of operation
//!
//! What is asked for is a value ([`Ask`]). A [`Dialect`] turns it into a conversation (a [`Machine`]), which says what
//! to send and is given the answers. It ends with what the session now holds (a [`Hold`]), which goes into the guard.
//! Another machine takes the hold back. Nothing here does I/O, reads a clock or knows Diesel: the two Diesel crates
//! send, hand the answers back, and report how many transactions are open ([`Session`]).
//!
//! A conversation can end in the middle, because a future was dropped. Then [`Machine::abandon`] says what is still to
//! be done without waiting, and [`Dialect::part`] says the same for a hold whose guard is dropped. `docs/design.md` has
//! the whole as a table.

mod ask;
mod check;
mod condition;
mod dialect;
mod either;
mod failure;
mod hold;
mod machine;
pub mod manager;
mod name_holders;
mod question;
mod several;
mod statement;
mod still_there;
mod token;
mod unique;
mod wait;

pub use ask::{Ask, Depth, Session};
pub use condition::Condition;
pub use dialect::{Dialect, TransactionDialect};
pub use failure::{Aftermath, Cause, ErrorFields, Failure, Reason};
pub use hold::{Hold, Parting, Request};
pub use machine::{Abandoned, Answer, Machine, Step};
pub use several::MOST_LOCKS;
pub use statement::{Bind, Binds, Columns, Prepared, Rows, Statement};
pub use still_there::{AreYouThere, StillThere};
pub use wait::Wait;

pub(crate) use check::{Check, Facts};
pub(crate) use either::Either;
pub(crate) use hold::OpenTransaction;
pub(crate) use name_holders::NameHolders;
pub(crate) use question::{Question, Read};
pub(crate) use several::{NoTry, ReleaseEach, Several, Steps, Tried, TriedEnd, in_order};
pub(crate) use token::{DrawToken, token};
pub(crate) use unique::{Savepoint, unique, unique_nonzero};
pub(crate) use wait::{AfterBusy, Waiting};

#[cfg(feature = "mysql")]
pub use crate::mysql::Mysql;
#[cfg(feature = "postgres")]
pub use crate::postgres::Postgres;
#[cfg(feature = "sqlite")]
pub use crate::sqlite::Sqlite;
