//! Futures of several locks that are dropped, after any number of polls: none of the locks stays behind.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server_async, on_every_server_async, unique_key,
    wait_for, wait_for_within,
};
use tokio::time::sleep;

use crate::both::transaction::open_at;
use crate::cancellation::{FREE_IN_STEP, free_once_closed};
use crate::support::*;

/// Of a sweep: more than any of the conversations takes.
const MOST_POLLS: u32 = 40;

/// The output, unless it is not there after so many polls or the time has passed; then it is dropped.
async fn within_polls<F: Future>(future: F, mut polls: u32) -> Option<F::Output> {
    let mut future = pin!(future);
    let limited = poll_fn(|context| {
        if polls == 0 {
            return Poll::Ready(None);
        }
        polls -= 1;
        let poll = future.as_mut().poll(context);
        match poll {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polls == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    });
    let waits = sleep(Duration::from_millis(20));
    tokio::select! {
        biased;
        output = limited => output,
        () = waits => None,
    }
}

fn keys(name: &str) -> [LockKey; 3] {
    [1, 2, 3].map(|n| LockKey::namespaced(unique_key(name), n))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Acquire,
    Try,
    Timeout,
    Poll,
    Release,
    Run,
    Transaction,
    Inside,
}

const CALLS: [Call; 8] = [
    Call::Acquire,
    Call::Try,
    Call::Timeout,
    Call::Poll,
    Call::Release,
    Call::Run,
    Call::Transaction,
    Call::Inside,
];

/// Makes the call and drops it after so many polls. Whether it was done before.
async fn call<C: LockTest>(conn: &mut C, call: Call, keys: &[LockKey; 3], polls: u32) -> bool {
    let short = Duration::from_millis(5);
    match call {
        Call::Acquire => {
            let done = within_polls(conn.advisory_locks(keys).acquire(), polls).await;
            done.map(drop).is_some()
        }
        Call::Try => {
            let done = within_polls(conn.advisory_locks(keys).try_acquire(), polls).await;
            done.map(drop).is_some()
        }
        Call::Timeout => {
            let acquire = conn.advisory_locks(keys).timeout(short).acquire();
            within_polls(acquire, polls).await.map(drop).is_some()
        }
        Call::Poll => {
            let acquire = conn.advisory_locks(keys).poll_every(short).acquire();
            within_polls(acquire, polls).await.map(drop).is_some()
        }
        Call::Release => {
            let Ok(Some(lock)) = conn.advisory_locks(keys).try_acquire().await else {
                return true;
            };
            within_polls(lock.release(), polls)
                .await
                .map(drop)
                .is_some()
        }
        Call::Run => {
            let run = conn.advisory_locks(keys).run(async |conn| {
                conn.execute_sql("SELECT 1").await;
                Ok::<_, Error>(())
            });
            within_polls(run, polls).await.is_some()
        }
        Call::Transaction => {
            let transaction = conn.advisory_locks(keys).transaction(async |conn| {
                conn.execute_sql("SELECT 1").await;
                Ok::<_, Error>(())
            });
            within_polls(transaction, polls).await.is_some()
        }
        Call::Inside => {
            begin(conn).await;
            let acquire = conn.advisory_locks(keys).inside_transaction().acquire();
            within_polls(acquire, polls).await.map(drop).is_some()
        }
    }
}

/// Drops each call after each number of polls, while this one of the locks is taken by another connection.
async fn sweep<C: LockTest>(server: &Server, call_made: Call, level: &str, taken: Option<usize>) {
    let keys = keys("several_sweep");
    let mut observer = C::observer(server);
    if let Some(taken) = taken {
        assert!(try_lock(&mut observer, &keys[taken]));
    }
    let free = |observer: &mut C::Observer| {
        let mut keys = keys.iter().enumerate();
        keys.all(|(index, key)| Some(index) == taken || holders(observer, key).is_empty())
    };
    for polls in 0..MOST_POLLS {
        let mut conn: C = open_at(server, level).await;
        // Once with everything prepared.
        if taken.is_none() && polls % 2 == 0 && call_made != Call::Inside {
            call(&mut conn, call_made, &keys, u32::MAX).await;
            conn = match C::KIND {
                // A guard that is dropped leaves the connection broken.
                Kind::Mysql => open_at(server, level).await,
                _ => conn,
            };
        }
        let done = call(&mut conn, call_made, &keys, polls).await;
        drop(conn);
        wait_for_within(
            free_once_closed(if C::KIND == Kind::Sqlite {
                Kind::Postgres
            } else {
                C::KIND
            }),
            format!("{call_made:?} dropped after {polls} polls at {level}, {taken:?} taken"),
            || free(&mut observer),
        );
        if done && taken.is_none() {
            break;
        }
        // From here on it only waits.
        if taken.is_some() && polls > 7 {
            break;
        }
    }
    if let Some(taken) = taken {
        unlock(&mut observer, &keys[taken]);
    }
}

on_every_server_async! {
    async fn a_future_that_is_dropped_leaves_none_of_the_locks<C: LockTest>(server: &Server) {
        for made in CALLS {
            sweep::<C>(server, made, "read committed", None).await;
        }
        for made in [Call::Acquire, Call::Poll, Call::Transaction, Call::Inside] {
            sweep::<C>(server, made, "read committed", Some(1)).await;
        }
        for taken in [0, 2] {
            sweep::<C>(server, Call::Acquire, "read committed", Some(taken)).await;
        }
    }

    async fn a_transaction_that_is_dropped_at_another_level_leaves_none<C: LockTest>(server: &Server) {
        for taken in [None, Some(1)] {
            sweep::<C>(server, Call::Transaction, "repeatable read", taken).await;
        }
    }

    /// The guard around it keeps its lock, which is one of them.
    async fn a_wait_that_is_dropped_leaves_the_outer_hold<C: LockTest>(server: &Server) {
        let keys = keys("several_outer_hold");
        let mut observer = C::observer(server);
        for taken in 0..3 {
            let mut canceller = C::observer(server);
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let outer_key = &keys[(taken + 1) % 3];
            assert!(try_lock(&mut observer, &keys[taken]));
            let mut outer = AdvisoryLock::new(Box::new(conn), outer_key).acquire().await.expect("a free lock");
            if C::KIND == Kind::Sqlite {
                let acquire = outer.advisory_locks(&keys).acquire();
                assert!(within_polls(acquire, u32::MAX).await.is_none());
            } else {
                let cancel = async move {
                    tokio::task::spawn_blocking(move || canceller.cancel(id)).await.expect("a cancel");
                };
                let acquire = outer.advisory_locks(&keys).cancel_with(cancel).acquire();
                tokio::select! {
                    acquired = acquire => panic!("the lock is taken: {:?}", acquired.map(drop)),
                    () = async {
                        while !observer.is_waiting(id) {
                            sleep(Duration::from_millis(5)).await;
                        }
                    } => {}
                }
                // The cancel runs.
                let begin = std::time::Instant::now();
                while observer.is_waiting(id) && begin.elapsed() < FREE_IN_STEP {
                    sleep(Duration::from_millis(5)).await;
                }
            }
            let others = keys.iter().filter(|key| *key != &keys[taken] && *key != outer_key);
            for key in others {
                let begin = std::time::Instant::now();
                while !holders(&mut observer, key).is_empty() && begin.elapsed() < FREE_IN_STEP {
                    sleep(Duration::from_millis(5)).await;
                }
                assert_free(&mut observer, key);
            }
            assert_eq!(holders(&mut observer, outer_key), [id]);
            drop(outer);
            wait_for("the end of the outer hold", || holders(&mut observer, outer_key).is_empty());
            unlock(&mut observer, &keys[taken]);
        }
    }
}

on_every_network_server_async! {
    async fn a_dropped_guard_of_several_frees_all<C: LockTest>(server: &Server) {
        let keys = keys("several_guard");
        let mut observer = C::observer(server);
        for transaction in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_locks(&keys).acquire().await.expect("free locks");
            if transaction {
                begin(&mut *lock).await;
            }
            drop(lock);
            for key in &keys {
                wait_for_within(FREE_IN_STEP, key, || holders(&mut observer, key).is_empty());
            }
            drop(conn);
        }
    }
}
