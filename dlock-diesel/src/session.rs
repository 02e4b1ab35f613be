//! What Diesel knows of the session behind a connection.

use std::num::NonZeroU32;

use diesel::connection::{TransactionManager, TransactionManagerStatus};
use diesel::prelude::*;
use dlock_core::proto::{Depth, Dialect, Session};

use crate::LockConnection;
use crate::backend::DialectOf;
use crate::shared::{self, status, trace};

fn status<C: Connection>(conn: &mut C) -> &mut TransactionManagerStatus {
    C::TransactionManager::transaction_manager_status_mut(conn)
}

/// How many transactions are open, or an error if the connection is broken.
pub(crate) fn session<C: Connection>(conn: &mut C) -> QueryResult<Session> {
    let depth = status::depth(status(conn))?;
    // An open transaction makes a connection count as broken, except the one of `begin_test_transaction`. A transaction
    // that is begun inside it stands for a real one.
    let test_transaction =
        depth == NonZeroU32::new(1) && !C::TransactionManager::is_broken_transaction_manager(conn);
    Ok(Session {
        depth,
        test_transaction,
    })
}

/// Tells Diesel that dlock has begun a transaction.
pub(crate) fn began_transaction<C: Connection>(conn: &mut C) -> QueryResult<()> {
    status::began(status(conn))
}

/// SQLite: begins a transaction that writes from the start, or a savepoint if a transaction is open.
pub(crate) fn begin_immediate<C: Connection>(conn: &mut C) -> QueryResult<()> {
    if session(conn)?.depth.is_some() {
        return C::TransactionManager::begin_transaction(conn);
    }
    conn.batch_execute("BEGIN IMMEDIATE")?;
    began_transaction(conn)
}

/// Rolls back all transactions and savepoints that were begun since `base`.
pub(crate) fn roll_back_to<C: Connection>(conn: &mut C, base: Depth) -> QueryResult<()> {
    while session(conn)?.depth > base {
        C::TransactionManager::rollback_transaction(conn)?;
    }
    Ok(())
}

/// Marks the connection broken, so that a pool discards it.
///
/// On a `PgConnection`, Diesel removes the mark after the next query that succeeds.
pub(crate) fn mark_broken<C: Connection>(conn: &mut C) {
    trace::marked_broken();
    status::mark_broken(status(conn));
}

/// Ends the server's session, which frees everything that it holds, and marks the connection broken. The mark alone
/// would not free a lock on a connection that is still used.
///
/// Returns `true` if the session is still there: SQLite only rolls back.
pub(crate) fn end<C: LockConnection>(conn: &mut C) -> bool {
    let mut is_there = true;
    for message in DialectOf::<C>::END_SESSION {
        match conn.batch_execute(message) {
            Ok(()) => is_there = true,
            Err(error) => {
                is_there = false;
                if shared::is_lost(&error) {
                    break;
                }
            }
        }
    }
    trace::session_ended();
    status::mark_broken(status(conn));
    is_there
}
