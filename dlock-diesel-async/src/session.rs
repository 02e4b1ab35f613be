//! What Diesel knows of the session behind a connection.

use std::num::NonZeroU32;
use std::pin::pin;
use std::task::{Context, Waker};

use diesel::QueryResult;
use diesel::connection::TransactionManagerStatus;
use diesel_async::{AsyncConnection, TransactionManager};
use dlock_core::Dialect;

use crate::backend::{AsyncLockBackend, DialectOf, LockConnection};

/// How many transactions and savepoints of Diesel are open; a raw BEGIN is not seen.
pub(crate) type Depth = Option<NonZeroU32>;

fn status<C: AsyncConnection>(conn: &mut C) -> &mut TransactionManagerStatus {
    C::TransactionManager::transaction_manager_status_mut(conn)
}

/// The depth, or an error where the connection is broken: also if a BEGIN or COMMIT of diesel-async was dropped, so that
/// nobody knows whether a transaction is open.
pub(crate) fn depth<C: AsyncConnection>(conn: &mut C) -> QueryResult<Depth> {
    let depth = status(conn).transaction_depth()?;
    if depth.is_none() && C::TransactionManager::is_broken_transaction_manager(conn) {
        return Err(diesel::result::Error::BrokenTransactionManager);
    }
    Ok(depth)
}

/// Whether the open transaction is the one of `begin_test_transaction`, the only kind with which a connection does not
/// count as broken, and none was begun in it: that would be a real one in production.
pub(crate) fn in_test_transaction<C: AsyncConnection>(conn: &mut C) -> bool {
    depth(conn).is_ok_and(|depth| depth == NonZeroU32::new(1))
        && !C::TransactionManager::is_broken_transaction_manager(conn)
}

/// Tells Diesel that a transaction has begun.
pub(crate) fn began_transaction<C: AsyncConnection>(conn: &mut C) -> QueryResult<()> {
    use diesel::connection::TransactionDepthChange::IncreaseDepth;
    match status(conn) {
        TransactionManagerStatus::Valid(status) => status.change_transaction_depth(IncreaseDepth),
        TransactionManagerStatus::InError => Err(diesel::result::Error::BrokenTransactionManager),
    }
}

/// Rolls back what was begun since `base`.
pub(crate) async fn roll_back_to<C: AsyncConnection>(conn: &mut C, base: Depth) -> QueryResult<()> {
    while depth(conn)? > base {
        C::TransactionManager::rollback_transaction(conn).await?;
    }
    Ok(())
}

/// Marks the connection broken, so that a pool discards it.
pub(crate) fn mark_broken<C: AsyncConnection>(conn: &mut C) {
    status(conn).set_in_error();
}

/// Ends the server's session, which frees all that it holds, and marks the connection broken. SQLite's is rolled back, and
/// what it holds is given up by each guard.
pub(crate) async fn end<C: LockConnection>(conn: &mut C) {
    // Marked first: this future may be dropped.
    mark_broken(conn);
    // An error is what ending the own session answers, and a connection that is gone as well.
    let _ = conn.batch_execute(DialectOf::<C>::END_SESSION).await;
}

/// Sends a message whose answer nobody reads, from where nothing can be awaited.
///
/// On PostgreSQL the first poll hands it to the driver's task, behind all that was sent before; on MySQL it writes it to
/// the socket, and there the answer that is not read would be taken for that of the next query, so that the connection
/// has to be marked broken.
pub(crate) fn send_unread<C: LockConnection>(conn: &mut C, message: &str) -> bool {
    <C::Backend as AsyncLockBackend>::send_unread(conn, message)
}

pub(crate) fn poll_once(future: impl Future) {
    let _ = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
}
