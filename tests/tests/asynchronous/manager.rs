//! Managers: dropped futures, panics, and runtimes that end.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, PATIENCE, Server, TestConnection, on_every_network_server_async,
    unique_key, wait_for,
};
use tokio::runtime::{Builder, Handle};
use tokio::time::{sleep, timeout};

use crate::managed::manager;
use crate::support::*;

on_every_network_server_async! {
    async fn a_waiter_that_is_dropped_leaves_at_any_moment<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("left");
        for round in 0..40_u64 {
            let mut other = C::open(server).await;
            let held = other.advisory_lock(&key).acquire().await.expect("a free lock");
            let waiters: Vec<_> = (0..3)
                .map(|_| {
                    let (locks, key) = (locks.clone(), key.clone());
                    tokio::spawn(async move { locks.lock(&key).acquire().await.map(drop) })
                })
                .collect();
            sleep(Duration::from_micros(400 * (round % 10))).await;
            // Its turn may come in the same moment.
            let [first, second, third] = &waiters[..] else { unreachable!() };
            if round % 2 == 0 {
                first.abort();
            }
            held.release().await.expect("a release");
            if round % 4 == 1 {
                first.abort();
            }
            second.abort();
            let _ = third;
            for waiter in waiters {
                match timeout(PATIENCE, waiter).await.expect("nobody waits for ever") {
                    Ok(result) => result.expect("the lock"),
                    Err(error) => assert!(error.is_cancelled()),
                }
            }
            wait_until_free(&mut observer, &key);
        }
        locks.close().await;
    }

    async fn a_panic_in_the_body_frees_the_lock_and_a_loss_ends_the_body<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("body");
        let panics = tokio::spawn({
            let (locks, key) = (locks.clone(), key.clone());
            async move {
                locks.lock(&key).run(async |_held| -> Result<(), Error> { panic_quietly() }).await
            }
        });
        assert!(panics.await.expect_err("a panic").is_panic());
        wait_until_free(&mut observer, &key);

        let dropped = Arc::new(AtomicBool::new(false));
        struct Sets(Arc<AtomicBool>);
        impl Drop for Sets {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let runs = tokio::spawn({
            let (locks, key, sets) = (locks.clone(), key.clone(), Sets(Arc::clone(&dropped)));
            async move {
                locks.lock(&key).run(async |_held| -> Result<(), Error> {
                    let _sets = sets;
                    std::future::pending().await
                }).await
            }
        });
        wait_for("the lock to be held", || !holders(&mut observer, &key).is_empty());
        let id = holders(&mut observer, &key)[0];
        observer.kill(id);
        let lost = timeout(PATIENCE, runs).await.expect("it ends").expect("no panic");
        assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
        assert!(dropped.load(Ordering::SeqCst));
        locks.close().await;
    }

    async fn a_token_that_nobody_waits_for_changes_nothing<C: LockTest>(server: &Server) {
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(unique_key("dropped_token")).acquire().await.expect("a free lock");
        let mut last = held.fencing_token().await.expect("a token");
        for micros in [0, 1, 50, 200, 500, 2000] {
            let _ = timeout(Duration::from_micros(micros), held.fencing_token()).await;
            let token = held.fencing_token().await.expect("a token");
            assert!(token > last);
            last = token;
        }
        held.release().await.expect("it is still held");
        locks.close().await;
    }

    async fn a_wait_for_a_loss_that_is_dropped_leaves_no_waker_in_the_manager<C: LockTest>(server: &Server) {
        struct Nothing;
        impl Wake for Nothing {
            fn wake(self: Arc<Self>) {}
        }
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(unique_key("wakers")).acquire().await.expect("a free lock");
        let nothing = Arc::new(Nothing);
        let waker = Waker::from(Arc::clone(&nothing));
        let before = Arc::strong_count(&nothing);
        for _ in 0..3 {
            let mut lost = Box::pin(held.lost());
            assert!(lost.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            assert_eq!(Arc::strong_count(&nothing), before + 1);
            drop(lost);
            assert_eq!(Arc::strong_count(&nothing), before);
        }
        held.release().await.expect("a release");
        locks.close().await;
    }

    async fn a_manager_that_is_closed_leaves_no_task<C: LockTest>(server: &Server) {
        let before = Handle::current().metrics().num_alive_tasks();
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(unique_key("tasks")).acquire().await.expect("a free lock");
        locks.close().await;
        drop(held);
        let begin = Instant::now();
        // The driver's own tasks end soon.
        while Handle::current().metrics().num_alive_tasks() > before {
            assert!(begin.elapsed() < PATIENCE, "tasks are left");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

dlock_tests::on_every_network_server! {
    fn a_runtime_that_ends_frees_everything_and_tells_everybody<C: Twin>(server: &Server) {
        let mut observer = <C::Async as LockTest>::observer(server);
        let key = unique_key("runtime");
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let locks = manager::<C::Async>(&server.url).build();
        let held = runtime.block_on(locks.lock(&key).acquire()).expect("a free lock");
        runtime.shutdown_background();
        wait_until_free(&mut observer, &key);

        let another = Builder::new_current_thread().enable_all().build().expect("a runtime");
        another.block_on(async {
            timeout(PATIENCE, held.lost()).await.expect("a loss that is told");
            let closed = timeout(PATIENCE, locks.lock(&key).acquire()).await.expect("an answer");
            assert!(matches!(closed, Err(Error::ManagerClosed { .. })), "{closed:?}");
            timeout(PATIENCE, locks.close()).await.expect("it is closed");
        });
        drop(held);
    }

    fn a_runtime_that_ends_before_the_manager_has_run_closes_it<C: Twin>(server: &Server) {
        let key = unique_key("runtime_at_once");
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let locks = manager::<C::Async>(&server.url).build();
        let mut request = Box::pin(locks.lock(&key).acquire());
        // The tasks of the manager are spawned, and never polled.
        runtime.block_on(poll_fn(|cx| {
            assert!(request.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        }));
        drop(runtime);

        let another = Builder::new_current_thread().enable_all().build().expect("a runtime");
        another.block_on(async {
            // It may hear first that its connection is gone.
            let ended = timeout(PATIENCE, request).await.expect("an answer");
            let is_told = matches!(ended, Err(Error::ManagerClosed { .. } | Error::NotConnected { .. }));
            assert!(is_told, "{ended:?}");
            for _ in 0..2 {
                let lock = locks.lock(&key).timeout(Duration::from_millis(100));
                let closed = timeout(PATIENCE, lock.acquire()).await.expect("an answer");
                assert!(matches!(closed, Err(Error::ManagerClosed { .. })), "{closed:?}");
            }
            timeout(PATIENCE, locks.close()).await.expect("it is closed");
        });
    }
}

/// The async connection to the same servers.
trait Twin: dlock_tests::TestConnection {
    type Async: LockTest + AsyncTestConnection;
}

impl Twin for diesel::PgConnection {
    type Async = diesel_async::AsyncPgConnection;
}

impl Twin for diesel::MysqlConnection {
    type Async = diesel_async::AsyncMysqlConnection;
}
