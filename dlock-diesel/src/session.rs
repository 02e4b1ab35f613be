//! What Diesel knows of the session behind a connection.

use std::num::NonZeroU32;

use diesel::connection::{TransactionManager, TransactionManagerStatus};
use diesel::prelude::*;
use dlock_core::Dialect;

use crate::LockConnection;
use crate::backend::DialectOf;

/// How many transactions and savepoints of Diesel are open; a raw BEGIN is not seen.
pub(crate) type Depth = Option<NonZeroU32>;

fn status<C: Connection>(conn: &mut C) -> &mut TransactionManagerStatus {
    C::TransactionManager::transaction_manager_status_mut(conn)
}

/// The depth, or an error where the connection is broken.
pub(crate) fn depth<C: Connection>(conn: &mut C) -> QueryResult<Depth> {
    status(conn).transaction_depth()
}

/// Whether the open transaction is the one of `begin_test_transaction`, the only kind with which a connection does not
/// count as broken, and none was begun in it: that would be a real one in production.
pub(crate) fn in_test_transaction<C: Connection>(conn: &mut C) -> bool {
    depth(conn).is_ok_and(|depth| depth == NonZeroU32::new(1))
        && !C::TransactionManager::is_broken_transaction_manager(conn)
}

/// Tells Diesel that a transaction has begun.
pub(crate) fn began_transaction<C: Connection>(conn: &mut C) -> QueryResult<()> {
    use diesel::connection::TransactionDepthChange::IncreaseDepth;
    match status(conn) {
        TransactionManagerStatus::Valid(status) => status.change_transaction_depth(IncreaseDepth),
        TransactionManagerStatus::InError => Err(diesel::result::Error::BrokenTransactionManager),
    }
}

/// Begins a transaction that may write, or a savepoint in the one that is open. SQLite only.
pub(crate) fn begin_immediate<C: Connection>(conn: &mut C) -> QueryResult<()> {
    if depth(conn)?.is_some() {
        return C::TransactionManager::begin_transaction(conn);
    }
    conn.batch_execute("BEGIN IMMEDIATE")?;
    began_transaction(conn)
}

/// Rolls back what was begun since `base`.
pub(crate) fn roll_back_to<C: Connection>(conn: &mut C, base: Depth) -> QueryResult<()> {
    while depth(conn)? > base {
        C::TransactionManager::rollback_transaction(conn)?;
    }
    Ok(())
}

/// Marks the connection broken, so that a pool discards it.
///
/// On a `PgConnection` the next good query heals the mark.
pub(crate) fn mark_broken<C: Connection>(conn: &mut C) {
    status(conn).set_in_error();
}

/// Ends the server's session, which frees all that it holds, and marks the connection broken. `true` if the session is
/// there, rolled back: SQLite's cannot be ended.
///
/// The mark alone would leave a lock in the hands of whoever goes on with the connection.
pub(crate) fn end<C: LockConnection>(conn: &mut C) -> bool {
    // An error is what ending the own session answers, and a connection that is gone as well.
    let is_there = conn.batch_execute(DialectOf::<C>::END_SESSION).is_ok();
    mark_broken(conn);
    is_there
}
