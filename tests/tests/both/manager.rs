//! Locks of a manager.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dlock_core::LockKey;
use dlock_tests::{Kind, PATIENCE, Proxy, Server, number_from_environment, unique_key, wait_for};

use crate::flavor::*;
use crate::managed::*;
use crate::support::*;

/// The session that holds a lock.
#[track_caller]
fn holder(observer: &mut impl TestConnection, key: &str) -> i64 {
    let holders = holders(observer, LockKey::from(key));
    assert_eq!(holders.len(), 1, "holders of {key}");
    holders[0]
}

#[both]
on_every_server! {
    async fn a_managed_lock_is_held_and_free_after_release_and_after_a_drop<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("managed");
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        assert_eq!(held.key(), &LockKey::from(&key));
        assert!(!held.is_lost());
        holder(&mut observer, &key);
        assert!(locks.lock(&key).try_acquire().await.expect("an answer").is_none());
        held.release().await.expect("a release");
        assert_free(&mut observer, &key);

        drop(locks.lock(&key).acquire().await.expect("a free lock"));
        wait_for("the dropped lock to be free", || holders(&mut observer, LockKey::from(&key)).is_empty());
        locks.close().await;
    }

    async fn a_managed_lock_excludes_others_and_waits_for_them<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("others");
        let mut other = C::open(server).await;
        let mut held = other.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(locks.lock(&key).try_acquire().await.expect("an answer").is_none());
        let begin = Instant::now();
        let limit = Duration::from_millis(150);
        let late = locks.lock(&key).timeout(limit).acquire().await;
        match late {
            Err(Error::Timeout { holders, waited, .. }) => {
                assert!(waited >= limit && begin.elapsed() >= limit, "{waited:?}");
                assert_eq!(holders.len(), 1, "the culprit is named");
            }
            other => panic!("{other:?}"),
        }
        assert!(held.is_held().await.expect("an answer"));

        let waiter = start({
            let (locks, key) = (locks.clone(), key.clone());
            async move || locks.lock(&key).acquire().await.expect("the lock")
        });
        // Likely in the queue by now.
        pause(Duration::from_millis(200)).await;
        held.release().await.expect("a release");
        let managed = waiter.join().await;
        holder(&mut observer, &key);
        managed.release().await.expect("a release");
        assert_free(&mut observer, &key);
        locks.close().await;
    }

    async fn whoever_waits_is_told_and_nothing_is_left_when_a_manager_is_closed<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let (key, taken) = (unique_key("closed"), unique_key("taken"));
        let mut other = C::open(server).await;
        let theirs = other.advisory_lock(&taken).acquire().await.expect("a free lock");
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        let waiters: Vec<_> = [&key, &taken, &taken]
            .map(|key| {
                let (locks, key) = (locks.clone(), key.clone());
                start(async move || locks.lock(&key).acquire().await.map(drop))
            })
            .into();
        // Likely in the queue by now.
        pause(Duration::from_millis(200)).await;
        locks.close().await;
        for waiter in waiters {
            let told = waiter.join().await;
            assert!(matches!(told, Err(Error::ManagerClosed { .. })), "{told:?}");
        }
        assert!(held.is_lost() && lost_within(&held, Duration::ZERO).await);
        let released = held.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        // The server notices soon.
        wait_for("the lock to be free", || holders(&mut observer, LockKey::from(&key)).is_empty());
        let again = locks.lock(&key).acquire().await;
        assert!(matches!(again, Err(Error::ManagerClosed { .. })), "{again:?}");
        theirs.release().await.expect("a release");
    }

    async fn a_manager_that_is_dropped_frees_everything<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let key = unique_key("dropped");
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        drop(locks);
        assert!(lost_within(&held, PATIENCE).await);
        wait_for("the lock to be free", || holders(&mut observer, LockKey::from(&key)).is_empty());
    }

    async fn the_longest_limit_is_like_none<C: LockTest>(server: &Server) {
        let locks = manager::<C>(&server.url).build();
        let (key, taken) = (unique_key("longest"), unique_key("longest_taken"));
        let held = Arc::new(locks.lock(&key).timeout(Duration::MAX).acquire().await.expect("a free lock"));
        let mut other = C::open(server).await;
        let theirs = other.advisory_lock(&taken).acquire().await.expect("a free lock");
        let waiter = start({
            let (locks, taken) = (locks.clone(), taken.clone());
            async move || locks.lock(&taken).timeout(Duration::MAX).acquire().await.expect("the lock")
        });
        let watcher = start({
            let held = Arc::clone(&held);
            async move || lost_within(&held, Duration::MAX).await
        });
        // Likely in the queue by now, and the timer has seen the limit.
        pause(Duration::from_millis(200)).await;
        assert!(!held.is_lost());
        theirs.release().await.expect("a release");
        waiter.join().await.release().await.expect("a release");
        assert!(!held.is_lost());
        locks.close().await;
        assert!(watcher.join().await);
    }

    async fn run_releases_and_keeps_the_error_of_its_body<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let key = unique_key("run");
        let locks = manager::<C>(&server.url).build();
        let seven = locks.lock(&key).run(async |held| {
            assert!(!held.is_lost());
            Ok::<_, Error>(7)
        }).await;
        assert!(matches!(seven, Ok(7)), "{seven:?}");
        assert_free(&mut observer, &key);
        let failed = locks.lock(&key).run(async |_held| Err::<(), _>(Error::from(diesel::result::Error::NotFound))).await;
        assert!(matches!(failed, Err(Error::Database(diesel::result::Error::NotFound))), "{failed:?}");
        assert_free(&mut observer, &key);
        locks.close().await;
    }
}

/// Holds a lock over a network that is cut. Returns when the holder knew, and when another had the lock.
#[both]
async fn cut<C: LockTest>(server: &Server, number: usize, lease: Duration) -> (Duration, Duration) {
    let proxy = Proxy::start(server);
    let locks = manager::<C>(proxy.url()).lease(lease).build();
    let key = unique_key("cut");
    let held = loop {
        match locks.lock(&key).acquire().await {
            Ok(held) => break held,
            // On a busy machine it takes longer than the lease to open a connection.
            Err(Error::NotConnected { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    };
    // Anywhere between two questions.
    pause(Duration::from_micros(7919 * number as u64 % 1_000_000)).await;
    let held = Arc::new(held);
    let begin = Instant::now();
    proxy.silence();
    let waiter = start({
        let (server, held) = (server.clone(), Arc::clone(&held));
        async move || {
            let mut conn = C::open(&server).await;
            let lock = conn
                .advisory_lock(&key)
                .timeout(2 * PATIENCE)
                .acquire()
                .await
                .expect("the lock");
            let granted = begin.elapsed();
            // By the clock, whatever the processors are busy with.
            assert!(held.is_lost(), "two believe that they have it");
            lock.release().await.expect("a release");
            granted
        }
    });
    assert!(lost_within(&held, PATIENCE).await && held.is_lost());
    let lost = begin.elapsed();
    (lost, waiter.join().await)
}

#[both]
on_every_network_server! {
    async fn a_session_that_is_ended_is_told_and_new_locks_work<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let (key, other) = (unique_key("ended"), unique_key("ended_too"));
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        let and = locks.lock(&other).acquire().await.expect("a free lock");
        let id = holder(&mut observer, &key);
        assert_eq!(holder(&mut observer, &other), id, "held locks share a connection");
        let killed = Instant::now();
        observer.kill(id);
        assert!(lost_within(&held, PATIENCE).await);
        assert!(lost_within(&and, PATIENCE).await);
        eprintln!("{server}: lost after {:?}", killed.elapsed());
        assert!(held.is_lost() && and.is_lost());
        let released = held.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        drop(and);
        let again = locks.lock(&key).acquire().await.expect("a free lock");
        assert_ne!(holder(&mut observer, &key), id);
        again.release().await.expect("a release");

        // Before anybody could notice.
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        let id = holder(&mut observer, &key);
        observer.kill(id);
        let released = held.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        locks.close().await;
    }

    async fn locks_on_another_session_are_kept_when_one_is_ended<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("ended_one");
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        let ended = holder(&mut observer, &key);
        // A lock that is waited for is held by the session that waited.
        let (kept, waited) = loop {
            let taken = unique_key("kept");
            let mut other = C::open(server).await;
            let theirs = other.advisory_lock(&taken).acquire().await.expect("a free lock");
            let waiter = start({
                let (locks, taken) = (locks.clone(), taken.clone());
                async move || locks.lock(&taken).acquire().await.expect("the lock")
            });
            // Likely in the queue by now.
            pause(Duration::from_millis(200)).await;
            theirs.release().await.expect("a release");
            let managed = waiter.join().await;
            if holder(&mut observer, &taken) != ended {
                break (managed, taken);
            }
            managed.release().await.expect("a release");
        };
        observer.kill(ended);
        assert!(lost_within(&held, PATIENCE).await);
        // It is asked at least once.
        pause(Duration::from_secs(1)).await;
        assert!(!kept.is_lost());
        assert_ne!(holder(&mut observer, &waited), ended);
        kept.release().await.expect("a release");
        let released = held.release().await;
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        locks.close().await;
    }

    /// `DLOCK_CUTS` sets how often.
    async fn a_holder_knows_before_another_has_the_lock_however_often_the_network_is_cut<C: LockTest>(server: &Server) {
        let asked_for = number_from_environment("DLOCK_CUTS");
        let cuts: usize = asked_for.unwrap_or(8);
        let lease = Duration::from_secs(2);
        // Who asks for many has a machine that does nothing else.
        let latest_grant = lease + asked_for.map_or(PATIENCE, |_| Duration::from_secs(1));
        let (mut closest, mut latest) = (Duration::MAX, Duration::ZERO);
        for first in (0..cuts).step_by(25) {
            let cutting: Vec<_> = (first..cuts.min(first + 25))
                .map(|number| {
                    let server = server.clone();
                    start(async move || cut::<C>(&server, number, lease).await)
                })
                .collect();
            for cut in cutting {
                let (lost, granted) = cut.join().await;
                assert!(granted < latest_grant, "another has it after {granted:?}");
                (closest, latest) = (closest.min(granted.saturating_sub(lost)), latest.max(granted));
            }
        }
        eprintln!("{server}: {cuts} cuts, at least {closest:?} between, another has it after {latest:?} at the latest");
    }

    async fn waiters_whose_connection_dies_wait_on_another<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).build();
        let key = unique_key("dies");
        // The connection is open when the wait begins, and waits: it holds nothing.
        locks.lock(unique_key("first")).acquire().await.expect("a free lock").release().await.expect("a release");
        let mut other = C::open(server).await;
        let held = other.advisory_lock(&key).acquire().await.expect("a free lock");
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let (locks, key) = (locks.clone(), key.clone());
                start(async move || locks.lock(&key).acquire().await.map(drop))
            })
            .collect();
        pause(Duration::from_millis(200)).await;
        let connections = proxy.connections();
        proxy.cut();
        wait_for("a new connection", || proxy.connections() > connections);
        held.release().await.expect("a release");
        for waiter in waiters {
            waiter.join().await.expect("the lock");
        }
        locks.close().await;
    }

    async fn a_lock_that_is_granted_to_nobody_is_released<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("nobody");
        for millis in [1, 3, 10, 30, 100] {
            let mut other = C::open(server).await;
            let held = other.advisory_lock(&key).acquire().await.expect("a free lock");
            let limit = Duration::from_millis(millis);
            let waiter = start({
                let (locks, key) = (locks.clone(), key.clone());
                async move || locks.lock(&key).timeout(limit).acquire().await.map(drop)
            });
            // The grant comes close to the end of the limit.
            pause(limit).await;
            held.release().await.expect("a release");
            match waiter.join().await {
                Ok(()) | Err(Error::Timeout { .. }) => {}
                other => panic!("{other:?}"),
            }
            wait_until_free(&mut observer, &key);
        }
        locks.close().await;
    }

    async fn a_server_that_is_away_is_told_and_comes_back<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let refuses = Arc::new(AtomicU64::new(1));
        let locks = refusing_manager::<C>(proxy.url(), Arc::clone(&refuses)).build();
        let key = unique_key("away");
        let begin = Instant::now();
        for _ in 0..5 {
            let away = locks.lock(&key).acquire().await;
            assert!(matches!(away, Err(Error::NotConnected { .. })), "{away:?}");
        }
        // The pauses are 50 ms, 100 ms and so on.
        assert!(begin.elapsed() >= Duration::from_millis(750), "{:?}", begin.elapsed());
        refuses.store(0, Ordering::SeqCst);
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        refuses.store(1, Ordering::SeqCst);
        proxy.cut();
        assert!(lost_within(&held, PATIENCE).await);
        let limit = Duration::from_millis(50);
        let away = locks.lock(&key).timeout(limit).acquire().await;
        assert!(matches!(away, Err(Error::NotConnected { .. } | Error::Timeout { .. })), "{away:?}");
        refuses.store(0, Ordering::SeqCst);
        let begin = Instant::now();
        while locks.lock(&key).acquire().await.is_err() {
            assert!(begin.elapsed() < PATIENCE, "the server is back");
        }
        locks.close().await;
    }

    /// It holds nothing that could be lost.
    async fn a_connection_that_takes_longer_to_open_than_the_lease_is_none<C: LockTest>(server: &Server) {
        let lease = Duration::from_secs(1);
        let locks = slow_manager::<C>(&server.url, 3 * lease).lease(lease).build();
        let result = locks.lock(unique_key("slow_opening")).acquire().await.map(drop);
        assert!(matches!(result, Err(Error::NotConnected { .. })), "{result:?}");
        locks.close().await;
    }

    /// It has held nothing that could be lost.
    async fn a_session_that_ends_as_it_begins_is_no_connection<C: LockTest>(server: &Server) {
        let locks = manager_of_ended_sessions::<C>(&server.url).build();
        let result = locks.lock(unique_key("ended_at_once")).acquire().await.map(drop);
        assert!(matches!(result, Err(Error::NotConnected { .. })), "{result:?}");
        locks.close().await;
    }

    async fn many_locks_need_two_connections<C: LockTest>(server: &Server) {
        let many = number_from_environment("DLOCK_LOCKS").unwrap_or(MANY);
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).connections(2).build();
        let key = unique_key("many");
        let mut held = Vec::new();
        for number in 0..many {
            held.push(locks.lock((&key[..], number)).acquire().await.expect("a free lock"));
        }
        assert!(proxy.open() <= 2, "{} connections", proxy.open());
        assert!(held.iter().all(|held| !held.is_lost()));
        let mut other = C::open(server).await;
        let last = other.advisory_lock((&key[..], many - 1));
        assert!(last.try_acquire().await.expect("an answer").is_none());
        for held in held {
            held.release().await.expect("a release");
        }
        let _free = other.advisory_lock((&key[..], 0)).try_acquire().await.expect("an answer").expect("a free lock");
        locks.close().await;
    }

    async fn a_thousand_waiters_for_one_lock_need_one_waiting_connection<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).build();
        let key = unique_key("crowd");
        let mut other = C::open(server).await;
        let held = other.advisory_lock(&key).acquire().await.expect("a free lock");
        let inside = Arc::new(AtomicU64::new(0));
        let waiters: Vec<_> = (0..CROWD)
            .map(|_| {
                let (locks, key, inside) = (locks.clone(), key.clone(), Arc::clone(&inside));
                start(async move || {
                    let held = locks.lock(&key).acquire().await.expect("the lock");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two are inside");
                    inside.fetch_sub(1, Ordering::SeqCst);
                    held.release().await.expect("a release");
                })
            })
            .collect();
        // Likely in the queue by now.
        pause(Duration::from_millis(200)).await;
        held.release().await.expect("a release");
        for waiter in waiters {
            waiter.join().await;
        }
        assert!(proxy.connections() <= 3, "{} connections", proxy.connections());
        locks.close().await;
    }

    async fn tasks_that_wait_for_more_locks_than_connections_all_get_theirs<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let theirs = manager::<C>(&server.url).build();
        let locks = manager::<C>(proxy.url()).connections(4).build();
        let key = unique_key("keys");
        let mut held = Vec::new();
        for number in 0..CROWD {
            held.push(theirs.lock((&key[..], number as i64)).acquire().await.expect("a free lock"));
        }
        let waiters: Vec<_> = (0..CROWD)
            .map(|number| {
                let (locks, key) = (locks.clone(), key.clone());
                start(async move || {
                    let held = locks.lock((&key[..], number as i64)).acquire().await.expect("the lock");
                    held.release().await.expect("a release");
                })
            })
            .collect();
        // Likely waiting by now.
        pause(Duration::from_millis(200)).await;
        assert!(proxy.open() <= 4, "{} connections", proxy.open());
        drop(held);
        for waiter in waiters {
            waiter.join().await;
        }
        assert!(proxy.open() <= 4, "{} connections", proxy.open());
        locks.close().await;
        theirs.close().await;
    }

    async fn two_managers_take_turns_on_one_lock<C: LockTest>(server: &Server) {
        let key = unique_key("fair");
        let until = Instant::now() + Duration::from_secs(3);
        let turns: Vec<_> = (0..2).map(|_| Arc::new(AtomicU64::new(0))).collect();
        let mut tasks = Vec::new();
        for turns in &turns {
            let locks = manager::<C>(&server.url).build();
            for _ in 0..16 {
                let (locks, key, turns) = (locks.clone(), key.clone(), Arc::clone(turns));
                tasks.push(start(async move || {
                    while Instant::now() < until {
                        let held = locks.lock(&key).acquire().await.expect("the lock");
                        turns.fetch_add(1, Ordering::SeqCst);
                        held.release().await.expect("a release");
                    }
                }));
            }
        }
        for task in tasks {
            task.join().await;
        }
        let turns: Vec<_> = turns.iter().map(|turns| AtomicU64::load(turns, Ordering::SeqCst)).collect();
        eprintln!("{server}: {turns:?}");
        // How fair it is where processors are free, the simulation shows.
        let few = turns.iter().min().expect("two managers");
        assert!(*few > 50 * 64, "{turns:?}");
    }
}

/// What a session says to end itself.
pub(crate) fn end_of_session(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "SELECT pg_terminate_backend(pg_backend_pid())",
        Kind::Mysql => "KILL CONNECTION_ID()",
        Kind::Sqlite => unreachable!("BUG: it is no server"),
    }
}

/// The locks that two connections hold, unless `DLOCK_LOCKS` says how many: the second part of `.ci/run` says 10,000.
const MANY: i64 = 1_000;
const CROWD: usize = 1_000;

#[both]
on_postgres! {
    async fn readers_of_a_manager_share_one_hold_and_exclude_writers(server: &Server) {
        let mut observer = <PgConnection as LockTest>::observer(server);
        let proxy = Proxy::start(server);
        let locks = manager::<PgConnection>(proxy.url()).build();
        let key = unique_key("readers");
        let mut readers = Vec::new();
        for _ in 0..200 {
            readers.push(locks.lock(&key).shared().acquire().await.expect("a shared lock"));
        }
        // While readers move to a new hold there are two.
        wait_for("one hold for all", || holders(&mut observer, LockKey::from(&key)).len() == 1);
        let writer = locks.lock(&key).timeout(Duration::from_millis(30)).acquire().await;
        assert!(matches!(writer, Err(Error::Timeout { .. })), "{writer:?}");
        let writer = start({
            let (locks, key) = (locks.clone(), key.clone());
            async move || locks.lock(&key).acquire().await.expect("the lock").release().await
        });
        drop(readers);
        writer.join().await.expect("a release");
        assert_free(&mut observer, &key);
        locks.close().await;
    }

    async fn a_session_that_others_share_is_refused(server: &Server) {
        let locks = shared_session_manager(&server.url).build();
        let refused = locks.lock(unique_key("pooled")).acquire().await;
        match refused {
            Err(Error::Unsupported { source, .. }) => assert!(source.to_string().contains("pooler"), "{source}"),
            other => panic!("{other:?}"),
        }
    }
}
