//! What a connection is asked that takes locks.

use dlock_tests::{Kind, Proxy, Server};

use crate::flavor::*;
use crate::support::*;

/// The session holds no lock at all.
#[both]
pub(crate) async fn assert_holds_nothing<C: LockTest>(
    conn: &mut C,
    observer: &mut impl TestConnection,
) {
    let backend_id = conn.backend_id().await;
    assert_ne!(observer.backend_id(), backend_id, "ask another connection");
    let held = match C::KIND {
        Kind::Postgres => observer.number(&format!(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {backend_id}"
        )),
        // How many there were.
        Kind::Mysql => {
            let release_all = "SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)";
            conn.number(release_all).await
        }
        Kind::Sqlite => conn.number("SELECT dlock_release_all()").await,
    };
    assert_eq!(held, Some(0), "locks that session {backend_id} holds");
}

/// Whether a transaction is open on the server, aborted or not.
#[both]
pub(crate) async fn in_transaction<C: LockTest>(
    conn: &mut C,
    observer: &mut impl TestConnection,
) -> bool {
    match C::KIND {
        Kind::Postgres => {
            let id = conn.backend_id().await;
            let sql = format!("SELECT state FROM pg_stat_activity WHERE pid = {id}");
            observer.text(&sql).as_deref() != Some("idle")
        }
        // Refused in a transaction, with error 1568.
        Kind::Mysql => {
            let set = conn.batch_execute("SET TRANSACTION READ WRITE").await;
            set.is_err()
        }
        // Refused in a transaction.
        Kind::Sqlite => conn.batch_execute("BEGIN; ROLLBACK").await.is_err(),
    }
}

/// The session is in step, in no transaction, and holds no lock; Diesel thinks so, too.
#[both]
pub(crate) async fn assert_clean<C: LockTest>(conn: &mut C, observer: &mut impl TestConnection) {
    // First, for on PostgreSQL the next query mends what Diesel thinks.
    assert!(!is_broken(conn), "the connection counts as broken");
    assert_eq!(depth(conn), 0, "Diesel's transactions");
    for number in [4711, 4712] {
        let answer = conn.number(&format!("SELECT {number}")).await;
        assert_eq!(answer, Some(number), "the connection is in step");
    }
    let open = in_transaction(conn, observer).await;
    assert!(!open, "a transaction is open");
    assert_holds_nothing(conn, observer).await;
}

/// How many transactions Diesel thinks are open.
#[track_caller]
pub(crate) fn depth<C: Connection>(conn: &mut C) -> u32 {
    C::TransactionManager::transaction_manager_status_mut(conn)
        .transaction_depth()
        .expect("the connection is not broken")
        .map_or(0, u32::from)
}

/// Begins a transaction by hand, in the transaction that is open if there is one.
#[both]
pub(crate) async fn begin<C: Connection>(conn: &mut C) {
    let begun = C::TransactionManager::begin_transaction(conn).await;
    begun.expect("a transaction begins");
}

/// Commits what [`begin`] began.
#[both]
pub(crate) async fn commit<C: Connection>(conn: &mut C) {
    let committed = C::TransactionManager::commit_transaction(conn).await;
    committed.expect("the transaction commits");
}

/// Rolls back what [`begin`] began.
#[both]
pub(crate) async fn roll_back<C: Connection>(conn: &mut C) {
    let rolled_back = C::TransactionManager::rollback_transaction(conn).await;
    rolled_back.expect("the transaction rolls back");
}

/// A connection by way of a proxy that has counted nothing yet, and counts nothing that has not been asked for.
#[both]
pub(crate) async fn open_counted<C: LockTest>(server: &Server) -> (C, Proxy) {
    let proxy = Proxy::start(server);
    let mut conn = C::open_url(proxy.url()).await;
    // tokio-postgres may still be closing the statements with which the connection was set up: this comes after them.
    conn.execute_sql("SELECT 1").await;
    proxy.reset();
    (conn, proxy)
}
