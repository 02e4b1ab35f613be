//! Semaphores of a manager.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use dlock_core::LockKey;
use dlock_tests::{PATIENCE, Proxy, Server, unique_key, wait_for};

use crate::both::semaphore::{assert_all_free, gate, slot};
use crate::flavor::*;
use crate::managed::*;
use crate::support::*;

#[both]
on_every_server! {
    async fn managed_slots_are_those_of_other_sessions<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("managed_slots");
        let mut other = C::open(server).await;
        let theirs = other.advisory_semaphore(&key, 3).acquire().await.expect("a free slot");
        let one = locks.semaphore(&key, 3).acquire().await.expect("a free slot");
        let two = locks.semaphore(&key, 3).try_acquire().await.expect("an answer").expect("a free slot");
        assert_eq!(one.key(), &LockKey::from(&key));
        let mut slots = [theirs.slot(), one.slot(), two.slot()];
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2]);
        for inside in [&one, &two] {
            assert_eq!(holders(&mut observer, slot(&key, inside.slot())).len(), 1);
        }
        assert!(locks.semaphore(&key, 3).try_acquire().await.expect("an answer").is_none());
        let limit = Duration::from_millis(100);
        let late = locks.semaphore(&key, 3).timeout(limit).acquire().await;
        match late {
            Err(Error::Timeout { waited, .. }) => assert!(waited >= limit, "{waited:?}"),
            other => panic!("{other:?}"),
        }
        let freed = theirs.slot();
        theirs.release().await.expect("a release");
        let three = locks.semaphore(&key, 3).acquire().await.expect("the slot");
        assert_eq!(three.slot(), freed);
        assert!(one.fencing_token().await.expect("a token") < three.fencing_token().await.expect("a token"));
        drop(two);
        for inside in [one, three] {
            assert!(!inside.is_lost());
            inside.release().await.expect("a release");
        }
        wait_for("the dropped slot to be free", || {
            (0..3).all(|number| holders(&mut observer, slot(&key, number)).is_empty())
        });
        let wrong = locks.semaphore(&key, 0).acquire().await;
        assert!(matches!(wrong, Err(Error::InvalidKey(_))), "{wrong:?}");
        locks.close().await;
        wait_for("the gate to be free", || holders(&mut observer, gate(&key)).is_empty());
    }

    async fn never_more_than_the_permits_are_inside_and_all_get_in<C: LockTest>(server: &Server) {
        const PERMITS: u32 = 3;
        let mut observer = C::observer(server);
        let key = unique_key("inside");
        let inside: Arc<Vec<_>> = Arc::new((0..PERMITS).map(|_| AtomicUsize::new(0)).collect());
        let managers = [manager::<C>(&server.url).build(), manager::<C>(&server.url).build()];
        let mut tasks = Vec::new();
        for locks in &managers {
            for _ in 0..8 {
                let (locks, key, inside) = (locks.clone(), key.clone(), Arc::clone(&inside));
                tasks.push(start(async move || {
                    for _ in 0..10 {
                        let permit = locks.semaphore(&key, PERMITS).acquire().await.expect("a slot");
                        let there = &inside[permit.slot() as usize];
                        assert_eq!(there.fetch_add(1, Ordering::SeqCst), 0, "two have one slot");
                        pause(Duration::from_micros(200)).await;
                        there.fetch_sub(1, Ordering::SeqCst);
                        permit.release().await.expect("a release");
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
        wait_for("all to be free", || {
            (0..PERMITS).all(|number| holders(&mut observer, slot(&key, number)).is_empty())
        });
        assert_all_free(&mut observer, &key, PERMITS);
    }

    async fn a_body_runs_inside_and_its_slot_is_free_afterwards<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let key = unique_key("run_inside");
        let locks = manager::<C>(&server.url).build();
        let number = locks.semaphore(&key, 2).run(async |inside| Ok::<_, Error>(inside.slot())).await;
        assert!(number.expect("it runs") < 2);
        assert_all_free(&mut observer, &key, 2);
        let failed = locks.semaphore(&key, 2).run(async |_inside| Err::<(), _>(Error::from(diesel::result::Error::NotFound))).await;
        assert!(matches!(failed, Err(Error::Database(diesel::result::Error::NotFound))), "{failed:?}");
        assert_all_free(&mut observer, &key, 2);
        locks.close().await;
    }
}

#[both]
on_every_network_server! {
    async fn many_slots_need_two_connections<C: LockTest>(server: &Server) {
        const SLOTS: u32 = 100;
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).connections(2).build();
        let key = unique_key("many_slots");
        let mut inside = Vec::new();
        for _ in 0..SLOTS {
            inside.push(locks.semaphore(&key, SLOTS).acquire().await.expect("a free slot"));
        }
        assert!(proxy.open() <= 2, "{} connections", proxy.open());
        let mut slots: Vec<_> = inside.iter().map(|inside| inside.slot()).collect();
        slots.sort_unstable();
        assert!(slots.into_iter().eq(0..SLOTS));
        let mut other = C::open(server).await;
        assert!(other.advisory_semaphore(&key, SLOTS).try_acquire().await.expect("an answer").is_none());
        inside.pop().expect("a slot").release().await.expect("a release");
        let theirs = other.advisory_semaphore(&key, SLOTS).try_acquire().await.expect("an answer");
        drop(theirs.expect("the slot"));
        drop(inside);
        locks.close().await;
    }

    async fn a_crowd_waits_for_slots_over_one_waiting_connection<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).build();
        let key = unique_key("crowd_inside");
        let mut other = C::open(server).await;
        let theirs = other.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        let inside = Arc::new(AtomicU64::new(0));
        let waiters: Vec<_> = (0..200)
            .map(|_| {
                let (locks, key, inside) = (locks.clone(), key.clone(), Arc::clone(&inside));
                start(async move || {
                    let permit = locks.semaphore(&key, 1).acquire().await.expect("a slot");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two are inside");
                    inside.fetch_sub(1, Ordering::SeqCst);
                    permit.release().await.expect("a release");
                })
            })
            .collect();
        // Likely in the queue by now.
        pause(Duration::from_millis(200)).await;
        theirs.release().await.expect("a release");
        for waiter in waiters {
            waiter.join().await;
        }
        assert!(proxy.connections() <= 3, "{} connections", proxy.connections());
        locks.close().await;
    }

    async fn a_slot_on_a_lost_connection_is_told_and_is_free_for_others<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("lost_slot");
        let mut other = C::open(server).await;
        let theirs = other.advisory_semaphore(&key, 3).acquire().await.expect("a free slot");
        let one = locks.semaphore(&key, 3).acquire().await.expect("a free slot");
        let two = locks.semaphore(&key, 3).acquire().await.expect("a free slot");
        let id = holders(&mut observer, slot(&key, one.slot()))[0];
        assert_eq!(holders(&mut observer, slot(&key, two.slot())), [id], "slots share a connection");
        observer.kill(id);
        for inside in [&one, &two] {
            assert!(lost_within(inside, PATIENCE).await);
            assert!(inside.is_lost());
        }
        // The others go on, and the slots that were lost are free.
        let slots = [one.slot(), two.slot()];
        let again = locks.semaphore(&key, 3).acquire().await.expect("a free slot");
        assert!(slots.contains(&again.slot()));
        let released = one.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        drop(two);
        // A guard that has lost its slot does not release the slot of another.
        assert_eq!(holders(&mut observer, slot(&key, again.slot())).len(), 1);
        again.release().await.expect("a release");
        theirs.release().await.expect("a release");
        locks.close().await;
    }

    async fn a_holder_of_a_slot_knows_that_the_network_is_silent_before_another_has_it<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).lease(Duration::from_secs(2)).build();
        let key = unique_key("silent_slot");
        // A machine that is very busy may lose a lease.
        let inside = loop {
            if let Ok(inside) = locks.semaphore(&key, 1).acquire().await {
                break inside;
            }
        };
        proxy.silence();
        let mut other = C::open(server).await;
        let theirs = other.advisory_semaphore(&key, 1).acquire().await.expect("the slot");
        // By the clock, whatever the processors are busy with.
        assert!(inside.is_lost(), "two believe that they have it");
        assert!(lost_within(&inside, PATIENCE).await);
        theirs.release().await.expect("a release");
    }
}
