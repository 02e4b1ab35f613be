//! Exclusion, holds that stack, and the sync crate's locks.

use std::time::{Duration, Instant};

use diesel::PgConnection;
use diesel_async::AsyncPgConnection;
use dlock_diesel::AdvisoryLockExt as SyncAdvisoryLockExt;
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error, LockKey, Mode};
use dlock_tests::{
    AsyncTestConnection, Kind, Server, TestConnection, on_every_network_server_async,
    on_postgres_async, unique_key, wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

on_every_network_server_async! {
    async fn a_held_lock_excludes_other_connections_until_it_is_released<C: LockTest>(server: &Server) {
        let key = unique_key("async_excludes");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        for _ in 0..3 {
            let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
        }
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lock_that_was_not_acquired_locks_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("async_not_acquired");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let lock = conn.advisory_lock(&key);
        assert_free(&mut observer, &key);
        let acquire = lock.acquire(); // and not polled
        assert_free(&mut observer, &key);
        drop(acquire);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn the_guard_is_the_session_that_holds_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_session");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let id = lock.backend_id().await;
        assert_held_by(&mut observer, &key, id);
        let conn = lock.release().await.expect("a release");
        assert_eq!(conn.backend_id().await, id);
    }

    async fn try_acquire_is_none_while_another_holds_the_lock_and_some_afterwards<C: LockTest>(server: &Server) {
        let key = unique_key("async_try");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::Observer::open(server);
        let (holder_id, id) = (holder.backend_id().await, conn.backend_id().await);
        let held = holder.advisory_lock(&key).try_acquire().await.expect("a try").expect("a free lock");
        assert!(conn.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        assert_held_by(&mut observer, &key, holder_id);
        held.release().await.expect("a release");
        let lock = conn.advisory_lock(&key).try_acquire().await.expect("a try").expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn try_acquire_with_a_timeout_waits_up_to_it<C: LockTest>(server: &Server) {
        let key = unique_key("async_try_timeout");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::Observer::open(server);
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let limit = Duration::from_millis(120);
        let started = Instant::now();
        assert!(conn.advisory_lock(&key).timeout(limit).try_acquire().await.expect("a try").is_none());
        assert!(started.elapsed() >= limit);

        let waiter = on_connection(conn, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let lock = conn.advisory_lock(&key).timeout(LONG).try_acquire().await.expect("a try");
                stage.pause().await;
                lock.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        held.release().await.expect("a release");
        waiter.holds(&mut observer, &key);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
    }

    async fn three_waiters_are_served_in_the_order_in_which_they_came<C: LockTest>(server: &Server) {
        let key = unique_key("async_fifo");
        let (mut holder, mut observer) = (C::open(server).await, C::Observer::open(server));
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let mut waiters = Vec::new();
        for limit in [None, Some(LONG), None] {
            let key = key.clone();
            let waiter = in_task(server, async move |mut conn: C, stage: Stage| {
                let lock = conn.advisory_lock(&key);
                let lock = match limit {
                    Some(limit) => lock.timeout(limit),
                    None => lock,
                };
                let lock = lock.acquire().await.expect("the lock");
                stage.pause().await;
                lock.release().await.expect("a release");
            })
            .await;
            waiter.waits(&mut observer);
            waiters.push(waiter);
        }
        held.release().await.expect("a release");
        for waiter in waiters {
            waiter.holds(&mut observer, &key);
            waiter.go_on();
            waiter.join().await;
        }
        assert_free(&mut observer, &key);
    }

    /// Reads, yields and writes again, without protection of its own.
    async fn eight_tasks_in_contention_over_two_keys_lose_no_update<C: LockTest>(server: &Server) {
        const TASKS: i64 = 8;
        const ROUNDS: i64 = 12;
        let mut observer = C::Observer::open(server);
        let counters = [(); 2].map(|()| (unique_key("async_contention"), Table::counter(server)));
        let mut tasks = Vec::new();
        for task in 0..TASKS {
            let counters = counters.clone();
            tasks.push(in_task(server, async move |mut conn: C, _| {
                for round in 0..ROUNDS {
                    // In the order of the keys if it takes both, lest there be a deadlock.
                    let ways = (task + round) % 4;
                    match ways {
                        0 | 1 => {
                            let (key, counter) = &counters[ways as usize];
                            let mut lock = conn.advisory_lock(key).acquire().await.expect("the lock");
                            counter.increment(&mut *lock).await.expect("an update");
                            lock.release().await.expect("a release");
                        }
                        2 => {
                            let (key, counter) = &counters[0];
                            let run = conn.advisory_lock(key).timeout(LONG);
                            run.run(async |conn| counter.increment(conn).await.map_err(Error::from)).await.expect("the lock");
                        }
                        _ => {
                            let mut first = conn.advisory_lock(&counters[0].0).acquire().await.expect("the lock");
                            let mut both = first.advisory_lock(&counters[1].0).acquire().await.expect("the lock");
                            for (_, counter) in &counters {
                                counter.increment(&mut **both).await.expect("an update");
                            }
                            both.release().await.expect("a release");
                            first.release().await.expect("a release");
                        }
                    }
                }
            }).await);
        }
        for task in tasks {
            task.join().await;
        }
        let of_each_way = TASKS * ROUNDS / 4;
        assert_eq!(counters[0].1.value(&mut observer), 3 * of_each_way);
        assert_eq!(counters[1].1.value(&mut observer), 2 * of_each_way);
        for (key, _) in &counters {
            assert_free(&mut observer, key);
        }
    }

    async fn a_lock_that_is_held_twice_is_released_twice<C: LockTest>(server: &Server) {
        let key = unique_key("async_twice");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let mut inner = outer.advisory_lock(&key).acquire().await.expect("held already");
        let third = inner.advisory_lock(&key).timeout(SHORT).try_acquire().await.expect("a try").expect("held already");
        third.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        assert!(outer.is_held().await.expect("an answer"));
        outer.advisory_lock(&key).run(async |_| Ok::<_, Error>(())).await.expect("held already");
        outer.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("held already");
        assert_held_by(&mut observer, &key, id);
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn locks_on_several_keys_stack_on_one_connection<C: LockTest>(server: &Server) {
        let keys = [(); 3].map(|()| unique_key("async_stack"));
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        let mut first = conn.advisory_lock(&keys[0]).acquire().await.expect("a free lock");
        let mut second = first.advisory_lock(&keys[1]).acquire().await.expect("a free lock");
        let third = second.advisory_lock(&keys[2]).acquire().await.expect("a free lock");
        for key in &keys {
            assert_held_by(&mut observer, key, id);
        }
        third.release().await.expect("a release");
        assert_free(&mut observer, &keys[2]);
        second.release().await.expect("a release");
        assert_free(&mut observer, &keys[1]);
        assert_held_by(&mut observer, &keys[0], id);
        first.release().await.expect("a release");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_failed_inner_lock_leaves_the_outer_one<C: LockTest>(server: &Server) {
        let (key, busy) = (unique_key("async_outer"), unique_key("async_inner"));
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let id = conn.backend_id().await;
        assert!(try_lock(&mut observer, &busy));
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(outer.advisory_lock(&busy).try_acquire().await.expect("a try").is_none());
        assert_held_by(&mut observer, &key, id);
        let error = outer.advisory_lock(&busy).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_held_by(&mut observer, &key, id);
        let error = outer.advisory_lock("").acquire().await.map(drop);
        assert!(matches!(error, Err(Error::InvalidKey(_))), "{error:?}");
        assert_held_by(&mut observer, &key, id);
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
        unlock(&mut observer, &busy);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lock_can_own_its_connection_and_move_to_another_task<C: LockTest>(server: &Server) {
        let key = unique_key("async_owned");
        let mut observer = C::Observer::open(server);
        let conn = Box::new(C::open(server).await);
        let mut lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        let id = lock.backend_id().await;
        assert_held_by(&mut observer, &key, id);
        let task = tokio::spawn(async move {
            assert!(lock.is_held().await.expect("an answer"));
            lock.release().await.expect("a release")
        });
        let mut conn: Box<C> = task.await.expect("the task's assertions");
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id().await, id);

        // Dropped elsewhere with its connection, it is released all the same.
        let lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        tokio::spawn(async move { drop(lock) }).await.expect("a drop");
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    async fn the_sync_crate_and_this_one_exclude_each_other_by_every_form_of_key<C: LockTest>(server: &Server) {
        let text = unique_key("async_forms");
        let number = text.bytes().fold(0, |hash: i64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let uppercase = text.to_uppercase() + " É\0🦀 ";
        let bytes = [b"\xff\xfe".as_slice(), text.as_bytes()].concat();
        let keys = [
            LockKey::from(&text),
            LockKey::from(uppercase),
            LockKey::from("long/".repeat(40) + &text),
            LockKey::from(bytes),
            LockKey::from(number),
            LockKey::from(pair),
            LockKey::namespaced(&text, 7),
            LockKey::namespaced("billing", LockKey::namespaced(&text, (1, -1))),
        ];
        let (mut conn, mut sync) = (C::open(server).await, C::Observer::open(server));
        let (id, sync_id) = (conn.backend_id().await, sync.backend_id());
        let mut observer = C::Observer::open(server);
        for key in &keys {
            let lock = conn.advisory_lock(key).acquire().await.expect("a free lock");
            assert_eq!(holders(&mut observer, key), [id], "{key}");
            assert!(SyncAdvisoryLockExt::advisory_lock(&mut sync, key).try_acquire().expect("a try").is_none(), "{key}");
            let other_keys = keys.iter().filter(|other| *other != key);
            for other in other_keys {
                let free = SyncAdvisoryLockExt::advisory_lock(&mut sync, other).try_acquire().expect("a try");
                free.unwrap_or_else(|| panic!("{other} is not {key}")).release().expect("a release");
            }
            lock.release().await.expect("a release");

            let lock = SyncAdvisoryLockExt::advisory_lock(&mut sync, key).acquire().expect("a free lock");
            assert_eq!(holders(&mut observer, key), [sync_id], "{key}");
            assert!(conn.advisory_lock(key).try_acquire().await.expect("a try").is_none(), "{key}");
            let error = conn.advisory_lock(key).timeout(SHORT).transaction(async |_| Ok(())).await;
            assert!(matches!(error, Err(Error::Timeout { .. })), "{key}: {error:?}");
            lock.release().expect("a release");
            assert_free(&mut observer, key);
        }
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_waiter_of_this_crate_is_granted_what_the_sync_crate_releases<C: LockTest>(server: &Server) {
        let key = unique_key("async_after_sync");
        let (mut sync, mut observer) = (C::Observer::open(server), C::Observer::open(server));
        let held = SyncAdvisoryLockExt::advisory_lock(&mut sync, &key).acquire().expect("a free lock");
        let waiter = in_task(server, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let lock = conn.advisory_lock(&key).acquire().await.expect("the lock");
                stage.pause().await;
                lock.release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        held.release().expect("a release");
        waiter.holds(&mut observer, &key);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
    }

    async fn an_empty_key_is_refused_and_nothing_is_sent<C: LockTest>(server: &Server) {
        let (mut conn, proxy) = open_counted::<C>(server).await;
        for key in [LockKey::from(""), LockKey::from(b""), LockKey::namespaced("a", ""), LockKey::namespaced("", "a")] {
            let errors = [
                conn.advisory_lock(&key).acquire().await.map(drop),
                conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop),
                conn.advisory_lock(&key).poll_every(SHORT).acquire().await.map(drop),
                conn.advisory_lock(&key).try_acquire().await.map(drop),
                conn.advisory_lock(&key).run(async |_| Ok(())).await,
                conn.advisory_lock(&key).transaction(async |_| Ok(())).await,
                conn.advisory_lock(&key).holders().await.map(drop),
            ];
            for error in errors {
                match error {
                    Err(Error::InvalidKey(invalid)) => assert_eq!(invalid.key(), &key),
                    other => panic!("{key}: {other:?}"),
                }
            }
        }
        assert_eq!(proxy.round_trips(), 0);
        assert_clean(&mut conn, &mut C::Observer::open(server)).await;
    }

    async fn is_held_is_asked_of_the_server<C: LockTest>(server: &Server) {
        let key = unique_key("async_is_held");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(lock.is_held().await.expect("an answer"));
        lock.execute_sql(C::RELEASE_ALL).await;
        assert!(!lock.is_held().await.expect("an answer"));
        assert!(try_lock(&mut observer, &key));
        assert!(!lock.is_held().await.expect("an answer"), "another session holds it");
        unlock(&mut observer, &key);
        let id = lock.backend_id().await;
        kill(&mut observer, id);
        let error = lock.is_held().await;
        assert!(matches!(error, Err(Error::Database(_))), "{error:?}");
    }

    async fn holders_are_those_who_hold_the_lock_and_who_wait_for_it<C: LockTest>(server: &Server) {
        let key = unique_key("async_holders");
        let (mut conn, mut observer) = (C::open(server).await, C::Observer::open(server));
        assert_eq!(conn.advisory_lock(&key).holders().await.expect("holders"), []);
        let id = conn.backend_id().await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let waiter = in_task(server, {
            let key = key.clone();
            async move |mut conn: C, _| {
                assert_eq!(conn.advisory_lock(&key).holders().await.expect("holders")[0].mode, Mode::Exclusive);
                conn.advisory_lock(&key).acquire().await.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        let seen = lock.holders().await.expect("holders");
        assert_eq!((seen[0].backend_id, seen[0].granted), (id, true), "{seen:?}");
        assert!(seen[0].user.is_some() && seen[0].since.is_some(), "{seen:?}");
        // MySQL and MariaDB may not show it.
        let waiters: Vec<_> = seen[1..].iter().map(|holder| (holder.backend_id, holder.granted)).collect();
        let all = [(waiter.id, false)];
        assert!(waiters == all || C::KIND == Kind::Mysql && waiters.is_empty(), "{seen:?}");
        lock.release().await.expect("a release");
        waiter.join().await;
        assert_free(&mut observer, &key);
    }
}

/// How the locks on a key are held.
fn modes(observer: &mut PgConnection, key: &str) -> String {
    let sql = format!(
        "SELECT string_agg(mode, ' ' ORDER BY mode) FROM pg_locks WHERE granted AND {}",
        pg_locks_of(&key.into())
    );
    observer.text(&sql).unwrap_or_default()
}

on_postgres_async! {
    async fn readers_share_a_lock_and_exclude_writers(server: &Server) {
        let key = unique_key("async_readers");
        let mut observer = PgConnection::open(server);
        let mut first = AsyncPgConnection::open(server).await;
        let mut second = AsyncPgConnection::open(server).await;
        let mut writer = AsyncPgConnection::open(server).await;
        let reader = first.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let other = second.advisory_lock(&key).shared().timeout(LONG).acquire().await.expect("a shared lock");
        assert_eq!(modes(&mut observer, &key), "ShareLock ShareLock");
        assert!(writer.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        reader.release().await.expect("a release");
        let error = writer.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        other.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }

    async fn a_writer_excludes_readers_and_both_wait_in_the_queue(server: &Server) {
        let key = unique_key("async_writer");
        let mut observer = PgConnection::open(server);
        let mut holder = AsyncPgConnection::open(server).await;
        for waits_for in [Mode::Shared, Mode::Exclusive] {
            let lock = holder.advisory_lock(&key);
            let lock = match waits_for {
                Mode::Exclusive => lock.shared(),
                _ => lock,
            };
            let held = lock.acquire().await.expect("a free lock");
            let waiter = in_task(server, {
                let key = key.clone();
                async move |mut conn: AsyncPgConnection, stage: Stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = match waits_for {
                        Mode::Shared => lock.shared(),
                        _ => lock,
                    };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            waiter.waits(&mut observer);
            held.release().await.expect("a release");
            waiter.holds(&mut observer, &key);
            let mode = match waits_for {
                Mode::Shared => "ShareLock",
                _ => "ExclusiveLock",
            };
            assert_eq!(modes(&mut observer, &key), mode);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn a_shared_hold_stacks_with_an_exclusive_one_and_stays_when_that_is_released(server: &Server) {
        let key = unique_key("async_upgrade");
        let mut observer = PgConnection::open(server);
        let mut conn = AsyncPgConnection::open(server).await;
        let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let mut exclusive = shared.advisory_lock(&key).acquire().await.expect("an upgrade");
        assert_eq!(modes(&mut observer, &key), "ExclusiveLock ShareLock");
        assert!(exclusive.is_held().await.expect("an answer"));
        exclusive.release().await.expect("a release");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        assert!(shared.is_held().await.expect("an answer"));
        shared.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn of_two_upgrades_one_is_a_deadlock_and_keeps_its_shared_lock(server: &Server) {
        let key = unique_key("async_two_upgrades");
        let mut observer = PgConnection::open(server);
        let mut tasks = Vec::new();
        for _ in 0..2 {
            let key = key.clone();
            tasks.push(
                in_task(server, async move |mut conn: AsyncPgConnection, stage: Stage| {
                    let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a shared lock");
                    stage.pause().await;
                    let upgraded = match shared.advisory_lock(&key).acquire().await {
                        Ok(exclusive) => {
                            exclusive.release().await.expect("a release");
                            true
                        }
                        Err(Error::Deadlock { .. }) => false,
                        Err(error) => panic!("{error:?}"),
                    };
                    assert!(shared.is_held().await.expect("an answer"));
                    shared.release().await.expect("a release");
                    upgraded
                })
                .await,
            );
        }
        let mut ids = [tasks[0].id, tasks[1].id];
        ids.sort_unstable();
        wait_for("two readers", || holders(&mut observer, &key) == ids);
        for task in &tasks {
            task.go_on();
        }
        let mut upgraded = Vec::new();
        for task in tasks {
            upgraded.push(task.join().await);
        }
        upgraded.sort_unstable();
        assert_eq!(upgraded, [false, true]);
        assert_free(&mut observer, &key);
    }
}
