//! All ways to ask for a lock.

use std::time::Duration;

use dlock_tests::PATIENCE;

use super::*;
use crate::plan::{Call, Holder, Way};

/// Granted if the lock was free, and otherwise a timeout.
#[track_caller]
fn assert_outcome<T>(result: Result<T, Error>, taken: bool) -> Option<T> {
    match result {
        Ok(value) if !taken => Some(value),
        Err(Error::Timeout { .. }) if taken => None,
        Ok(_) => panic!("granted although it was taken"),
        Err(error) => panic!("{error:?}"),
    }
}

/// Asks for a lock of the session or, with its own transaction, of that.
#[both]
async fn ask<C: LockConnection>(lock: AdvisoryLock<&mut C>, way: Way, taken: bool) {
    match way {
        Way::Release => {
            let guard = assert_outcome(lock.acquire().await, taken);
            if let Some(mut guard) = guard {
                assert!(guard.is_held().await.expect("an answer"));
                guard.fencing_token().await.expect("a token");
                guard.release().await.expect("a release");
            }
        }
        Way::Drop => drop(assert_outcome(lock.acquire().await, taken)),
        Way::Try => {
            // Whether it is free does not matter here.
            if let Some(guard) = lock.try_acquire().await.expect("an answer") {
                guard.release().await.expect("a release");
            }
        }
        Way::Poll => {
            let lock = lock.poll_every(Duration::from_millis(3));
            if let Some(guard) = assert_outcome(lock.acquire().await, taken) {
                guard.release().await.expect("a release");
            }
        }
        _ => {
            let result = lock.transaction(async |_| Ok::<_, Error>(())).await;
            assert_outcome(result, taken);
        }
    }
}

#[both]
pub(crate) async fn ask_anywhere<C: LockConnection>(conn: &mut C, call: &Call) {
    let lock = conn.advisory_lock(&call.key).timeout(limit(call));
    ask(lock, call.way, call.holder == Holder::Stays).await;
}

#[both]
pub(crate) async fn ask_postgres(conn: &mut PgConnection, call: &Call) {
    let taken = call.holder == Holder::Stays;
    match call.way {
        Way::IsolatedTransaction => {
            let level = "SET default_transaction_isolation = 'repeatable read'";
            conn.execute_sql(level).await;
            ask(lock(conn, call), call.way, taken).await;
            conn.execute_sql("RESET default_transaction_isolation")
                .await;
        }
        Way::InTransaction | Way::InsideTransaction | Way::InsideFailedTransaction => {
            begin(conn).await;
            match call.way {
                Way::InTransaction => {
                    let lock = conn.advisory_xact_lock(&call.key).timeout(limit(call));
                    let lock = if call.shared { lock.shared() } else { lock };
                    assert_outcome(lock.acquire().await, taken);
                }
                Way::InsideTransaction => {
                    let lock = lock(conn, call).inside_transaction();
                    ask(lock, Way::Release, taken).await;
                }
                _ => {
                    let lock = lock(conn, call).inside_transaction();
                    if let Some(mut guard) = assert_outcome(lock.acquire().await, taken) {
                        let failed = guard.batch_execute("SELECT 1 / 0").await;
                        failed.expect_err("a division by zero");
                        guard.release().await.expect("a release");
                    }
                }
            }
            roll_back(conn).await;
        }
        way => ask(lock(conn, call), way, taken).await,
    }
}

fn lock<'conn>(
    conn: &'conn mut PgConnection,
    call: &Call,
) -> AdvisoryLock<&'conn mut PgConnection> {
    let lock = conn.advisory_lock(&call.key).timeout(limit(call));
    if call.shared { lock.shared() } else { lock }
}

fn limit(call: &Call) -> Duration {
    match call.holder {
        Holder::Nobody | Holder::Stays => call.limit,
        Holder::Releases => call.limit + PATIENCE,
    }
}

type Transactions<C> = <C as Connection>::TransactionManager;

#[both]
async fn begin(conn: &mut PgConnection) {
    let begun = Transactions::<PgConnection>::begin_transaction(conn).await;
    begun.expect("a transaction begins");
}

#[both]
async fn roll_back(conn: &mut PgConnection) {
    let rolled_back = Transactions::<PgConnection>::rollback_transaction(conn).await;
    rolled_back.expect("the transaction rolls back");
}
