//! Several locks of a manager, as one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dlock_core::LockKey;
use dlock_tests::{PATIENCE, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::managed::*;
use crate::support::*;

#[both]
on_every_server! {
    async fn several_managed_locks_are_held_and_free_as_one<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let keys = [unique_key("one"), unique_key("two"), unique_key("three")];
        let wanted = locks.locks([&keys[0], &keys[1], &keys[2], &keys[0]]);
        assert_eq!(wanted.keys().count(), 4);
        let held = wanted.acquire().await.expect("free locks");
        assert_eq!(held.key(), &LockKey::from(&keys[0]));
        for key in &keys {
            assert_eq!(holders(&mut observer, LockKey::from(key)).len(), 1);
            let mut other = C::open(server).await;
            assert!(other.advisory_lock(key).try_acquire().await.expect("an answer").is_none());
        }
        held.fencing_token().await.expect("a token");
        assert!(!held.is_lost());
        held.release().await.expect("a release");
        for key in &keys {
            assert_free(&mut observer, key);
        }
        drop(locks.locks(&keys).acquire().await.expect("free locks"));
        for key in &keys {
            wait_until_free(&mut observer, key);
        }
        let nothing = locks.locks(Vec::<String>::new()).acquire().await;
        assert!(matches!(nothing, Err(Error::InvalidKey(_))), "{nothing:?}");
        locks.close().await;
    }

    async fn without_one_of_several_managed_locks_none_is_held<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let keys = [unique_key("one"), unique_key("two"), unique_key("three")];
        for taken in &keys {
            let mut other = C::open(server).await;
            let theirs = other.advisory_lock(taken).acquire().await.expect("a free lock");
            assert!(locks.locks(&keys).try_acquire().await.expect("an answer").is_none());
            let limit = Duration::from_millis(100);
            let late = locks.locks(&keys).timeout(limit).acquire().await;
            match late {
                Err(Error::Timeout { key, waited, .. }) => {
                    assert_eq!(key, LockKey::from(taken), "the one that was taken");
                    assert!(waited >= limit, "{waited:?}");
                }
                other => panic!("{other:?}"),
            }
            for key in keys.iter().filter(|key| *key != taken) {
                wait_until_free(&mut observer, key);
            }
            let waiter = start({
                let (locks, keys) = (locks.clone(), keys.clone());
                async move || locks.locks(&keys).acquire().await.expect("the locks")
            });
            theirs.release().await.expect("a release");
            let held = waiter.join().await;
            held.release().await.expect("a release");
        }
        locks.close().await;
    }

    async fn tasks_that_want_several_locks_in_any_order_do_not_deadlock<C: LockTest>(server: &Server) {
        let keys = [unique_key("a"), unique_key("b"), unique_key("c")];
        let inside: Arc<Vec<_>> = Arc::new(keys.iter().map(|_| AtomicUsize::new(0)).collect());
        let managers = [manager::<C>(&server.url).build(), manager::<C>(&server.url).connections(2).build()];
        let mut tasks = Vec::new();
        for locks in &managers {
            for number in 0..6_usize {
                let (locks, keys, inside) = (locks.clone(), keys.clone(), Arc::clone(&inside));
                tasks.push(start(async move || {
                    for _ in 0..5 {
                        let (one, two) = (number % 3, (number + 1 + number / 3) % 3);
                        let held = locks.locks([&keys[one], &keys[two]]).acquire().await.expect("the locks");
                        for key in [one, two] {
                            assert_eq!(inside[key].fetch_add(1, Ordering::SeqCst), 0, "two are inside");
                        }
                        for key in [one, two] {
                            inside[key].fetch_sub(1, Ordering::SeqCst);
                        }
                        held.release().await.expect("a release");
                    }
                }));
            }
        }
        for task in tasks {
            task.join().await;
        }
        for locks in managers {
            locks.close().await;
        }
    }
}

#[both]
on_every_network_server! {
    async fn the_loss_of_one_of_several_locks_is_the_loss_of_all<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let keys = [unique_key("one"), unique_key("two")];
        let held = locks.locks(&keys).acquire().await.expect("free locks");
        let id = holders(&mut observer, LockKey::from(&keys[0]))[0];
        observer.kill(id);
        assert!(lost_within(&held, PATIENCE).await);
        assert!(held.is_lost());
        let token = held.fencing_token().await;
        assert!(matches!(token, Err(Error::Lost { .. })), "{token:?}");
        wait_for("both to be free", || {
            keys.iter().all(|key| holders(&mut observer, LockKey::from(key)).is_empty())
        });
        let again = locks.locks(&keys).acquire().await.expect("free locks");
        let released = held.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        assert_eq!(holders(&mut observer, LockKey::from(&keys[1])).len(), 1);
        again.release().await.expect("a release");
        locks.close().await;
    }
}
