//! Semaphores: how many are inside, who is next, and what stays behind.

use std::time::{Duration, Instant};

use dlock_core::LockKey;
use dlock_tests::{Kind, Proxy, Server, unique_key, wait_for};

use crate::both::environment::HOSTILE;
use crate::both::fresh_database::FreshDatabase;
use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

/// The lock of a slot.
pub(crate) fn slot(key: &str, slot: u32) -> LockKey {
    LockKey::from(key).semaphore_lock(Some(slot))
}

/// The lock that waiting sessions queue for.
pub(crate) fn gate(key: &str) -> LockKey {
    LockKey::from(key).semaphore_lock(None)
}

/// All slots and the gate are free.
#[track_caller]
pub(crate) fn assert_all_free<O: TestConnection>(observer: &mut O, key: &str, permits: u32) {
    for number in 0..permits {
        assert_free(observer, slot(key, number));
    }
    assert_free(observer, gate(key));
}

/// A session that waits for a slot and takes it, which it tells.
#[both]
async fn waiter<C: LockTest>(server: &Server, key: &str, permits: u32) -> Background<u32> {
    let key = key.to_owned();
    in_background(server, async move |mut conn: C, stage: Stage| {
        let inside = conn
            .advisory_semaphore(&key, permits)
            .acquire()
            .await
            .expect("a slot");
        let slot = inside.slot();
        stage.say("inside");
        stage.pause().await;
        inside.release().await.expect("a release");
        slot
    })
    .await
}

/// The session that has the gate and looks for a free slot. On PostgreSQL a try has it too, for a moment and shared.
pub(crate) fn looking<O: TestConnection>(observer: &mut O, key: &str) -> Vec<i64> {
    if O::KIND != Kind::Postgres {
        return holders(observer, gate(key));
    }
    let sql = format!(
        "SELECT string_agg(pid::text, ' ') FROM pg_locks WHERE granted AND mode = 'ExclusiveLock' AND {}",
        pg_locks_of(&gate(key))
    );
    let ids = observer.text(&sql).unwrap_or_default();
    let ids = ids.split_whitespace();
    ids.map(|id| id.parse().expect("a number")).collect()
}

/// Waits until it is the one that looks for a free slot. When its turn ends, it is not, for a moment.
#[track_caller]
fn looks<O: TestConnection, T: Send + 'static>(
    waiter: &Background<T>,
    observer: &mut O,
    key: &str,
) {
    wait_for("the session to have the gate", || {
        assert!(!waiter.is_finished(), "it waits");
        looking(observer, key) == [waiter.id]
    });
}

/// How often a test tries again what goes wrong where a turn ends in the middle.
const ATTEMPTS: usize = 20;

#[both]
on_every_server! {
    async fn each_session_inside_has_a_slot_of_its_own<C: LockTest>(server: &Server) {
        let key = unique_key("slots");
        let mut observer = C::observer(server);
        let mut inside = Vec::new();
        for _ in 0..3 {
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let semaphore = AdvisorySemaphore::new(Box::new(conn), &key, 3);
            assert_eq!(semaphore.key(), &LockKey::from(&key));
            let mut guard = semaphore.acquire().await.expect("a free slot");
            assert_eq!(guard.backend_id().await, id);
            assert_eq!(guard.key(), &LockKey::from(&key));
            assert!(guard.is_held().await.expect("an answer"));
            assert_held_by(&mut observer, slot(&key, guard.slot()), id);
            inside.push(guard);
        }
        let mut slots: Vec<u32> = inside.iter().map(|guard| guard.slot()).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2]);
        assert_free(&mut observer, gate(&key));
        // Not a lock of that name.
        assert_free(&mut observer, &key);

        let mut conn = C::open(server).await;
        assert!(conn.advisory_semaphore(&key, 3).try_acquire().await.expect("a try").is_none());
        let last = inside.pop().expect("three");
        let freed = last.slot();
        last.release().await.expect("a release");
        assert_free(&mut observer, slot(&key, freed));
        let guard = conn.advisory_semaphore(&key, 3).try_acquire().await.expect("a try").expect("a free slot");
        assert_eq!(guard.slot(), freed);
        guard.release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
        for guard in inside {
            guard.release().await.expect("a release");
        }
        assert_all_free(&mut observer, &key, 3);
    }

    async fn a_try_gives_the_connection_back<C: LockTest>(server: &Server) {
        let key = unique_key("try_or_return");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::observer(server);
        let held = holder.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        let back = AdvisorySemaphore::new(&mut conn, &key, 1).try_acquire_or_return().await.expect("a try");
        let back = back.expect_err("the connection");
        held.release().await.expect("a release");
        let again = AdvisorySemaphore::new(back, &key, 1).try_acquire_or_return().await.expect("a try");
        again.ok().expect("the slot").release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn numbers_of_permits_that_no_semaphore_has_are_refused<C: LockTest>(server: &Server) {
        let key = unique_key("permits");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        for (permits, words) in [(0, "at least 1"), (1001, "at most 1000"), (u32::MAX, "at most 1000")] {
            let mut semaphore = conn.advisory_semaphore(&key, permits);
            let refused = semaphore.holders().await.expect_err("no such semaphore");
            assert!(matches!(refused, Error::InvalidKey(_)), "{refused:?}");
            let refused = semaphore.acquire().await.map(drop).expect_err("no such semaphore");
            assert!(matches!(refused, Error::InvalidKey(_)), "{refused:?}");
            assert!(refused.to_string().contains(words), "{refused}");
            let tried = conn.advisory_semaphore(&key, permits).try_acquire().await;
            assert!(matches!(tried, Err(Error::InvalidKey(_))));
        }
        let empty = conn.advisory_semaphore("", 1).acquire().await.map(drop);
        assert!(matches!(empty, Err(Error::InvalidKey(_))), "{empty:?}");
        let most = conn.advisory_semaphore(&key, 1000).acquire().await.expect("a free slot");
        assert!(most.slot() < 1000);
        most.release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_waiting_session_takes_the_slot_that_becomes_free<C: LockTest>(server: &Server) {
        let key = unique_key("wait");
        let mut observer = C::observer(server);
        let (mut first, mut second) = (C::open(server).await, C::open(server).await);
        let first = first.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        let second = second.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        let waiter = waiter::<C>(server, &key, 2).await;
        looks(&waiter, &mut observer, &key);
        let freed = second.slot();
        second.release().await.expect("a release");
        waiter.says("inside");
        assert_held_by(&mut observer, slot(&key, freed), waiter.id);
        assert_free(&mut observer, gate(&key));
        first.release().await.expect("a release");
        waiter.go_on();
        assert_eq!(waiter.join().await, freed);
        assert_all_free(&mut observer, &key, 2);
    }

    async fn waiting_sessions_take_turns_in_the_order_in_which_they_came<C: LockTest>(server: &Server) {
        let key = unique_key("order");
        let mut observer = C::observer(server);
        let mut holder = C::open(server).await;
        // The order holds within a turn, so the whole is tried again where the machine was slow.
        for attempt in 0.. {
            let held = holder.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
            let started = Instant::now();
            let first = waiter::<C>(server, &key, 1).await;
            looks(&first, &mut observer, &key);
            let second = waiter::<C>(server, &key, 1).await;
            wait_for("the second to queue", || observer.is_waiting(second.id));
            let third = waiter::<C>(server, &key, 1).await;
            wait_for("the third to queue", || observer.is_waiting(third.id));
            held.release().await.expect("a release");
            let mut order = Vec::new();
            while order.len() < 3 {
                wait_for("one to be inside", || holders(&mut observer, slot(&key, 0)).len() == 1);
                let inside = holders(&mut observer, slot(&key, 0));
                let waiter = [&first, &second, &third].into_iter().find(|waiter| inside == [waiter.id]);
                let waiter = waiter.expect("one of the three");
                order.push(waiter.id);
                waiter.go_on();
                wait_for("it to leave", || holders(&mut observer, slot(&key, 0)) != inside);
            }
            let slow = started.elapsed() > Duration::from_millis(600);
            let ids = [first.id, second.id, third.id];
            for waiter in [first, second, third] {
                waiter.join().await;
            }
            if order == ids {
                break;
            }
            assert!(slow && attempt < ATTEMPTS, "{order:?}, not {ids:?}");
        }
        assert_all_free(&mut observer, &key, 1);
    }

    async fn a_newcomer_does_not_overtake_those_who_wait<C: LockTest>(server: &Server) {
        let key = unique_key("newcomer");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        let waiter = waiter::<C>(server, &key, 1).await;
        // Slot 1 is free all the time.
        let mut conn = C::open(server).await;
        for attempt in 0.. {
            looks(&waiter, &mut observer, &key);
            match conn.advisory_semaphore(&key, 2).try_acquire().await.expect("a try") {
                None => break,
                Some(inside) => drop(inside.release().await.expect("a release")),
            }
            assert!(attempt < ATTEMPTS, "others wait");
        }
        unlock(&mut observer, slot(&key, 0));
        waiter.says("inside");
        let inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        assert_eq!(inside.slot(), 1);
        inside.release().await.expect("a release");
        waiter.go_on();
        waiter.join().await;
        assert_all_free(&mut observer, &key, 2);
    }

    async fn a_session_that_has_a_slot_never_waits_for_those_who_wait_for_it<C: LockTest>(server: &Server) {
        let key = unique_key("own");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut outer = conn.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        let id = outer.backend_id().await;
        let waiter = waiter::<C>(server, &key, 1).await;
        looks(&waiter, &mut observer, &key);
        // A turn of the other one would end, too, but a try does not wait for that.
        let inner = outer.advisory_semaphore(&key, 1).try_acquire().await.expect("a try").expect("its own slot");
        assert_eq!(inner.slot(), 0);
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, slot(&key, 0), id);
        outer.release().await.expect("a release");
        waiter.says("inside");
        waiter.go_on();
        waiter.join().await;
        assert_clean(&mut conn, &mut observer).await;
        assert_all_free(&mut observer, &key, 1);
    }

    async fn different_numbers_of_permits_share_their_slots<C: LockTest>(server: &Server) {
        let key = unique_key("union");
        let mut observer = C::observer(server);
        let mut inside = Vec::new();
        for permits in [1, 2, 2, 3, 3] {
            let conn = Box::new(C::open(server).await);
            let semaphore = AdvisorySemaphore::new(conn, &key, permits);
            if let Some(guard) = semaphore.try_acquire().await.expect("a try") {
                assert!(guard.slot() < permits);
                inside.push(guard);
            }
        }
        assert_eq!(inside.len(), 3);
        for guard in inside {
            guard.release().await.expect("a release");
        }
        assert_all_free(&mut observer, &key, 3);
    }

    async fn a_timeout_is_in_time_names_those_inside_and_leaves_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("timeout");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::observer(server);
        let holder_id = C::holder_id(holder.backend_id().await);
        let held = holder.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        // What the session was granted before is not taken for an answer.
        let before = conn.advisory_semaphore(unique_key("before"), 9).acquire().await.expect("a free slot");
        before.release().await.expect("a release");
        for limit in [0, 1, 250, 1_300] {
            let limit = Duration::from_millis(limit);
            let mut late = Vec::new();
            loop {
                let started = Instant::now();
                let result = conn.advisory_semaphore(&key, 1).timeout(limit).acquire().await.map(drop);
                let elapsed = started.elapsed();
                let Err(Error::Timeout { waited, holders, key: named, .. }) = result else {
                    panic!("{limit:?}: {result:?}");
                };
                assert!(limit <= waited && waited <= elapsed, "{limit:?}: {waited:?}");
                assert_eq!(named, LockKey::from(&key));
                let granted: Vec<i64> = holders.iter().filter(|holder| holder.granted).map(|h| h.backend_id).collect();
                assert_eq!(granted, [holder_id], "{holders:?}");
                assert_free(&mut observer, gate(&key));
                // A busy machine is late at times, but not each time.
                late.push(waited);
                if waited < limit + late.len() as u32 * Duration::from_millis(60) {
                    break;
                }
                assert!(late.len() < 8, "{limit:?}: {late:?}");
            }
            let tried = conn.advisory_semaphore(&key, 1).timeout(limit).try_acquire().await;
            assert!(tried.expect("a try").is_none());
        }
        held.release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
        assert_all_free(&mut observer, &key, 1);
    }

    async fn holders_are_those_inside_and_those_who_wait<C: LockTest>(server: &Server) {
        let key = unique_key("holders");
        let mut observer = C::observer(server);
        let mut conn = C::open(server).await;
        let mut inside = conn.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        let id = C::holder_id(inside.backend_id().await);
        let waiter = waiter::<C>(server, &key, 1).await;
        for attempt in 0.. {
            looks(&waiter, &mut observer, &key);
            let holders = inside.holders().await.expect("an answer");
            assert!(holders[0].granted && holders[0].backend_id == id, "{holders:?}");
            let waiting: Vec<i64> = holders.iter().filter(|holder| !holder.granted).map(|h| h.backend_id).collect();
            // MySQL shows waiting sessions only to whom it may concern.
            if C::KIND == Kind::Mysql || waiting == [C::holder_id(waiter.id)] {
                break;
            }
            assert!(attempt < ATTEMPTS, "{holders:?}");
        }
        inside.release().await.expect("a release");
        waiter.says("inside");
        waiter.go_on();
        waiter.join().await;
    }

    async fn polling_finds_the_slot_that_becomes_free<C: LockTest>(server: &Server) {
        let key = unique_key("poll");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        let poller = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let semaphore = conn.advisory_semaphore(&key, 1).poll_every(SHORT);
                let inside = semaphore.acquire().await.expect("a slot");
                stage.say("inside");
                inside.release().await.expect("a release");
            }
        })
        .await;
        // A session in the queue would have the gate nearly all the time. A try has it for a moment at most.
        let mut free = 0;
        for _ in 0..40 {
            if try_lock(&mut observer, gate(&key)) {
                unlock(&mut observer, gate(&key));
                free += 1;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(free >= 10, "the gate is free {free} times of 40");
        assert!(!poller.is_finished());
        unlock(&mut observer, slot(&key, 0));
        poller.says("inside");
        poller.join().await;
        assert_all_free(&mut observer, &key, 1);
    }

    async fn run_and_transaction_release_after_success_and_after_an_error<C: LockTest>(server: &Server) {
        let key = unique_key("run");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let (ran_key, ran_server) = (key.clone(), server);
        let ran: Result<u32, AppError> = conn
            .advisory_semaphore(&key, 1)
            .run(async |conn| {
                assert_held_by(&mut C::observer(ran_server), slot(&ran_key, 0), conn.backend_id().await);
                Ok(7)
            })
            .await;
        assert!(matches!(ran, Ok(7)), "{ran:?}");
        assert_all_free(&mut observer, &key, 1);
        let failed: Result<(), AppError> =
            conn.advisory_semaphore(&key, 1).run(async |_| Err(AppError::Own)).await;
        assert!(matches!(failed, Err(AppError::Own)), "{failed:?}");
        assert_all_free(&mut observer, &key, 1);
        let done: Result<u32, AppError> = conn
            .advisory_semaphore(&key, 1)
            .transaction(async |conn| {
                assert_eq!(depth(conn), 1);
                assert_held_by(&mut C::observer(ran_server), slot(&ran_key, 0), id);
                Ok(8)
            })
            .await;
        assert!(matches!(done, Ok(8)), "{done:?}");
        let failed: Result<(), AppError> =
            conn.advisory_semaphore(&key, 1).transaction(async |_| Err(AppError::Own)).await;
        assert!(matches!(failed, Err(AppError::Own)), "{failed:?}");
        assert_all_free(&mut observer, &key, 1);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_open_transaction_is_refused_unless_allowed<C: LockTest>(server: &Server) {
        let key = unique_key("in_transaction");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        begin(&mut conn).await;
        let refused = conn.advisory_semaphore(&key, 2).acquire().await.map(drop);
        assert!(matches!(refused, Err(Error::InTransaction { .. })), "{refused:?}");
        let refused: Result<(), Error> =
            conn.advisory_semaphore(&key, 2).inside_transaction().transaction(async |_| Ok(())).await;
        assert!(matches!(refused, Err(Error::InTransaction { .. })), "{refused:?}");
        let inside = conn.advisory_semaphore(&key, 2).inside_transaction().acquire().await.expect("a free slot");
        assert_held_by(&mut observer, slot(&key, inside.slot()), id);
        inside.release().await.expect("a release");
        assert_all_free(&mut observer, &key, 2);

        assert!(try_lock(&mut observer, slot(&key, 0)));
        let late = conn.advisory_semaphore(&key, 1).inside_transaction().timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        unlock(&mut observer, slot(&key, 0));
        commit(&mut conn).await;
        assert_all_free(&mut observer, &key, 2);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_test_transaction_is_let_through<C: LockTest>(server: &Server) {
        let key = unique_key("test_transaction");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        conn.begin_test_transaction().await.expect("a test transaction");
        let inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        inside.release().await.expect("a release");
        let ran: Result<(), Error> = conn.advisory_semaphore(&key, 2).transaction(async |_| Ok(())).await;
        ran.expect("a transaction");
        assert_all_free(&mut observer, &key, 2);
    }

    async fn a_slot_that_was_lost_is_reported<C: LockTest>(server: &Server) {
        let key = unique_key("not_held");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        inside.batch_execute(C::RELEASE_ALL).await.expect("a release of all");
        assert!(!inside.is_held().await.expect("an answer"));
        let released = inside.release().await.map(drop);
        assert!(matches!(released, Err(Error::NotHeld { .. })), "{released:?}");
        assert_all_free(&mut observer, &key, 2);
    }

    async fn a_dropped_guard_frees_its_slot<C: LockTest>(server: &Server) {
        let key = unique_key("dropped");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let inside = conn.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        drop(inside);
        wait_until_free(&mut observer, slot(&key, 0));
        assert_all_free(&mut observer, &key, 1);
    }

    async fn never_more_are_inside_than_permits<C: LockTest>(server: &Server) {
        const PERMITS: u32 = 3;
        let key = unique_key("stress");
        let mut observer = C::observer(server);
        let inside = std::sync::Arc::new(std::sync::atomic::AtomicI64::new(0));
        let mut workers = Vec::new();
        for _ in 0..8 {
            let (key, inside) = (key.clone(), inside.clone());
            let worker = in_background(server, async move |mut conn: C, _| {
                let mut most = 0;
                for _ in 0..12 {
                    let guard = conn.advisory_semaphore(&key, PERMITS).acquire().await.expect("a slot");
                    let now = 1 + inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    most = most.max(now);
                    yield_now().await;
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    guard.release().await.expect("a release");
                }
                most
            });
            workers.push(worker.await);
        }
        for worker in workers {
            assert!(worker.join().await <= PERMITS.into());
        }
        assert_all_free(&mut observer, &key, PERMITS);
    }
}

#[both]
on_every_network_server! {
    async fn the_end_of_a_session_frees_its_slot_and_the_gate<C: LockTest>(server: &Server) {
        let key = unique_key("crash");
        let mut observer = C::observer(server);
        let mut holder = C::open(server).await;
        let holder_id = holder.backend_id().await;
        let held = holder.advisory_semaphore(&key, 1).acquire().await.expect("a free slot");
        let killed = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, _| conn.advisory_semaphore(&key, 1).acquire().await.map(drop).is_err()
        })
        .await;
        looks(&killed, &mut observer, &key);
        let waiter = waiter::<C>(server, &key, 1).await;
        waiter.waits(&mut observer);
        kill(&mut observer, killed.id);
        assert!(killed.join().await, "its wait fails");
        looks(&waiter, &mut observer, &key);
        kill(&mut observer, holder_id);
        waiter.says("inside");
        assert_held_by(&mut observer, slot(&key, 0), waiter.id);
        let lost = held.release().await.map(drop);
        assert!(lost.is_err(), "{lost:?}");
        waiter.go_on();
        waiter.join().await;
        assert_all_free(&mut observer, &key, 1);
    }

    async fn an_interrupted_wait_leaves_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("interrupted");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        for _ in 0..5 {
            let waiter = in_background(server, {
                let key = key.clone();
                async move |mut conn: C, _| {
                    let result = conn.advisory_semaphore(&key, 1).acquire().await.map(drop);
                    (conn, result)
                }
            })
            .await;
            waiter.is_cancelled(&mut observer, |observer| looking(observer, &key) == [waiter.id]);
            let (mut conn, result) = waiter.join().await;
            assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
            assert_free(&mut observer, gate(&key));
            assert_clean(&mut conn, &mut observer).await;
        }
        unlock(&mut observer, slot(&key, 0));
        assert_all_free(&mut observer, &key, 1);
    }

    async fn a_free_slot_takes_one_round_trip_and_its_release_one<C: LockTest>(server: &Server) {
        let key = unique_key("trips");
        let (mut conn, proxy): (C, Proxy) = open_counted(server).await;
        let mut trips = (0, 0);
        for _ in 0..3 {
            proxy.reset();
            let inside = conn.advisory_semaphore(&key, 4).acquire().await.expect("a free slot");
            let acquired = proxy.round_trips();
            proxy.reset();
            inside.release().await.expect("a release");
            trips = (acquired, proxy.round_trips());
        }
        assert_eq!(trips, (1, 1));
        proxy.reset();
        let inside = conn.advisory_semaphore(&key, 4).try_acquire().await.expect("a try").expect("a free slot");
        inside.release().await.expect("a release");
        assert_eq!(proxy.round_trips(), 2);
        for permits in [0, 1001] {
            proxy.reset();
            let _ = conn.advisory_semaphore(&key, permits).acquire().await.map(drop);
            assert_eq!(proxy.round_trips(), 0);
        }
    }
}

#[both]
on_every_network_server! {
    async fn a_wait_takes_as_many_round_trips_as_the_page_says<C: LockTest>(server: &Server) {
        let (mut conn, proxy): (C, Proxy) = open_counted(server).await;
        let id = conn.backend_id().await;
        let mut observer = C::observer(server);
        // MySQL's statement that waits is prepared each time.
        let expected = match C::KIND {
            Kind::Postgres => 4,
            _ => 3,
        };
        for attempt in 0.. {
            let key = unique_key("trips_wait");
            assert!(try_lock(&mut observer, slot(&key, 0)));
            proxy.reset();
            let holder = std::thread::spawn({
                let key = key.clone();
                move || {
                    wait_for("the wait", || looking(&mut observer, &key) == [id]);
                    unlock(&mut observer, slot(&key, 0));
                    observer
                }
            });
            let inside = conn.advisory_semaphore(&key, 1).acquire().await.expect("a slot");
            let trips = proxy.round_trips();
            observer = holder.join().expect("the holder's assertions");
            inside.release().await.expect("a release");
            assert!(trips >= expected, "{trips}");
            // The first time it prepares what is kept. A slow machine needs a second turn.
            if attempt > 0 && trips == expected {
                break;
            }
            assert!(attempt < ATTEMPTS, "{trips}");
        }
    }
}

/// Whatever comes of it, a slot is waited for and given up, and then taken.
#[both]
async fn waits_and_takes(server: &Server, conn: &mut PgConnection) {
    let key = unique_key("waits_and_takes");
    let mut observer = PgConnection::observer(server);
    assert!(try_lock(&mut observer, slot(&key, 0)));
    for limit in [Duration::ZERO, SHORT, Duration::from_millis(1_100)] {
        let late = conn
            .advisory_semaphore(&key, 1)
            .timeout(limit)
            .acquire()
            .await
            .map(drop);
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        assert_free(&mut observer, gate(&key));
    }
    unlock(&mut observer, slot(&key, 0));
    let mut inside = conn
        .advisory_semaphore(&key, 1)
        .timeout(LONG)
        .acquire()
        .await
        .expect("a free slot");
    assert!(inside.is_held().await.expect("an answer"));
    inside.release().await.expect("a release");
    assert_all_free(&mut observer, &key, 1);
}

#[both]
on_postgres! {
    async fn a_role_that_may_only_connect_can_wait(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let mut admin = PgConnection::observer(&database.server);
        admin.execute_sql("REVOKE ALL ON LANGUAGE plpgsql FROM PUBLIC");
        let user = TestUser::create(PgConnection::observer(server), &database.server, "");
        let mut conn = PgConnection::open_url(user.url()).await;
        conn.batch_execute("DO $$ BEGIN END $$").await.expect_err("no PL/pgSQL");
        waits_and_takes(&database.server, &mut conn).await;
    }

    async fn a_hostile_search_path_changes_nothing(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        PgConnection::observer(&database.server).execute_sql(HOSTILE);
        let mut conn = PgConnection::open(&database.server).await;
        conn.execute_sql("SET search_path = hostile, pg_catalog").await;
        waits_and_takes(&database.server, &mut conn).await;
    }

    async fn limits_of_the_user_do_not_cut_a_wait_short_and_stay(server: &Server) {
        let key = unique_key("user_limits");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: PgConnection, stage: Stage| {
                conn.execute_sql("SET statement_timeout = '700ms'; SET lock_timeout = '500ms'").await;
                let inside = conn.advisory_semaphore(&key, 1).acquire().await.expect("a slot");
                stage.say("inside");
                inside.release().await.expect("a release");
                let statement = conn.text("SELECT current_setting('statement_timeout')").await;
                let lock = conn.text("SELECT current_setting('lock_timeout')").await;
                assert_eq!([statement, lock], [Some("700ms".into()), Some("500ms".into())]);
            }
        })
        .await;
        let started = Instant::now();
        wait_for("a wait in a later turn", || {
            assert!(!waiter.is_finished(), "the wait was cut short");
            started.elapsed() > Duration::from_millis(1_500)
        });
        unlock(&mut observer, slot(&key, 0));
        waiter.says("inside");
        waiter.join().await;
        assert_all_free(&mut observer, &key, 1);
    }

    async fn a_session_that_has_forgotten_its_statements_goes_on(server: &Server) {
        let key = unique_key("deallocated");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        for _ in 0..2 {
            let mut inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
            inside.execute_sql("DEALLOCATE ALL").await;
            inside.release().await.expect("a release");
            let inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
            inside.release().await.expect("a release");
            conn.execute_sql("DEALLOCATE ALL").await;
            let inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
            inside.release().await.expect("a release");
        }
        assert_all_free(&mut observer, &key, 2);
    }

    async fn a_slot_is_released_in_an_aborted_transaction(server: &Server) {
        let key = unique_key("aborted");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        begin(&mut conn).await;
        let mut inside = conn.advisory_semaphore(&key, 2).inside_transaction().acquire().await.expect("a free slot");
        inside.batch_execute("SELECT 1 / 0").await.expect_err("a division by zero");
        inside.release().await.expect("a release");
        assert_all_free(&mut observer, &key, 2);
        roll_back(&mut conn).await;
        begin(&mut conn).await;
        conn.batch_execute("SELECT 1 / 0").await.expect_err("a division by zero");
        let refused = conn.advisory_semaphore(&key, 2).inside_transaction().acquire().await.map(drop);
        assert!(refused.is_err());
        roll_back(&mut conn).await;
        assert_clean(&mut conn, &mut observer).await;
        assert_all_free(&mut observer, &key, 2);
    }

    /// VACUUM and CREATE INDEX CONCURRENTLY wait for old snapshots.
    async fn a_wait_breathes(server: &Server) {
        let key = unique_key("breathes");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, slot(&key, 0)));
        let first = waiter::<PgConnection>(server, &key, 1).await;
        let second = waiter::<PgConnection>(server, &key, 1).await;
        looks(&first, &mut observer, &key);
        for waiter in [&first, &second] {
            let started = format!("SELECT max(query_start)::text FROM pg_stat_activity WHERE pid = {}", waiter.id);
            let begun = observer.text(&started);
            wait_for("its next statement", || observer.text(&started) != begun);
        }
        unlock(&mut observer, slot(&key, 0));
        for _ in 0..2 {
            wait_for("one to be inside", || holders(&mut observer, slot(&key, 0)).len() == 1);
            let inside = holders(&mut observer, slot(&key, 0));
            let waiter = [&first, &second].into_iter().find(|waiter| inside == [waiter.id]);
            waiter.expect("one of the two").go_on();
            wait_for("it to leave", || holders(&mut observer, slot(&key, 0)) != inside);
        }
        first.join().await;
        second.join().await;
        assert_all_free(&mut observer, &key, 1);
    }
}
