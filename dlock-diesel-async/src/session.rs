//! What Diesel knows of the session behind a connection.

use std::num::NonZeroU32;

use diesel::QueryResult;
use diesel::connection::TransactionManagerStatus;
use diesel::result::Error as DieselError;
use diesel_async::{AsyncConnection, TransactionManager};
use dlock_core::proto::{Depth, Dialect, Session};
use dlock_diesel::shared::{self, status, trace};

use crate::backend::{AsyncLockBackend, DialectOf, LockConnection};

fn status<C: AsyncConnection>(conn: &mut C) -> &mut TransactionManagerStatus {
    C::TransactionManager::transaction_manager_status_mut(conn)
}

/// How many transactions are open, or an error if the connection is broken. A connection is also broken if a BEGIN or
/// COMMIT of diesel-async was dropped, because nobody knows whether a transaction is open.
pub(crate) fn session<C: AsyncConnection>(conn: &mut C) -> QueryResult<Session> {
    let depth = status::depth(status(conn))?;
    let broken = C::TransactionManager::is_broken_transaction_manager(conn);
    if depth.is_none() && broken {
        return Err(DieselError::BrokenTransactionManager);
    }
    // An open transaction makes a connection count as broken, except the one of `begin_test_transaction`. A transaction
    // that is begun inside it stands for a real one.
    let test_transaction = depth == NonZeroU32::new(1) && !broken;
    Ok(Session {
        depth,
        test_transaction,
    })
}

/// The session of a guard that is dropped. `None` if somebody has marked the connection broken: a wait may be pending
/// on it. After a BEGIN that was dropped, a transaction may be open.
pub(crate) fn parting_session<C: AsyncConnection>(conn: &mut C) -> Option<Session> {
    let depth = status::depth(status(conn)).ok()?;
    Some(session(conn).unwrap_or(Session {
        depth: depth.or(Some(NonZeroU32::MIN)),
        test_transaction: false,
    }))
}

/// Tells Diesel that dlock has begun a transaction.
pub(crate) fn began_transaction<C: AsyncConnection>(conn: &mut C) -> QueryResult<()> {
    status::began(status(conn))
}

/// Rolls back all transactions and savepoints that were begun since `base`.
pub(crate) async fn roll_back_to<C: LockConnection>(conn: &mut C, base: Depth) -> QueryResult<()> {
    while session(conn)?.depth > base {
        C::Backend::to_the_end(C::TransactionManager::rollback_transaction(conn)).await?;
    }
    Ok(())
}

/// Marks the connection broken, so that a pool discards it.
pub(crate) fn mark_broken<C: AsyncConnection>(conn: &mut C) {
    trace::marked_broken();
    status::mark_broken(status(conn));
}

/// Ends the server's session, which frees everything that it holds, and marks the connection broken. SQLite only rolls
/// back: there, each guard gives up its own hold.
pub(crate) async fn end<C: LockConnection>(conn: &mut C) {
    // Marked first, because this future may be dropped.
    trace::session_ended();
    status::mark_broken(status(conn));
    for message in DialectOf::<C>::END_SESSION {
        let ended = C::Backend::to_the_end(conn.batch_execute(message)).await;
        if ended.is_err_and(|error| shared::is_lost(&error)) {
            break;
        }
    }
}

/// The same for a connection that gives answers to earlier questions: what it was asked last may still be waiting.
pub(crate) fn end_unread<C: LockConnection>(conn: &mut C) {
    trace::session_ended();
    status::mark_broken(status(conn));
    for message in DialectOf::<C>::END_SESSION {
        C::Backend::send_unread(conn, message);
    }
}
