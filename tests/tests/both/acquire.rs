//! Exclusion, holds that stack, and who owns the connection.

use std::borrow::Cow;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use dlock_core::{LockKey, Mode};
use dlock_tests::{Server, unique_key, wait_for};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);
/// Less than the first turn of a wait on PostgreSQL.
const WITHIN_A_TURN: Duration = Duration::from_millis(750);

#[both]
on_every_server! {
    async fn a_held_lock_excludes_other_connections_until_it_is_released<C: LockTest>(server: &Server) {
        let key = unique_key("excludes");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
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
        let key = unique_key("not_acquired");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let lock = conn.advisory_lock(&key);
        assert_free(&mut observer, &key);
        drop(lock);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn the_guard_is_the_session_that_holds_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("session");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let id = lock.backend_id().await;
        assert_held_by(&mut observer, &key, id);
        assert!(lock.is_held().await.expect("an answer"));
        let conn: &mut C = lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id().await, id);
        assert_clean(conn, &mut observer).await;
    }

    async fn try_acquire_is_none_while_another_holds_the_lock_and_some_afterwards<C: LockTest>(server: &Server) {
        let key = unique_key("try");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::observer(server);
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
        let key = unique_key("try_timeout");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let mut observer = C::observer(server);
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let limit = Duration::from_millis(120);
        let started = Instant::now();
        assert!(conn.advisory_lock(&key).timeout(limit).try_acquire().await.expect("a try").is_none());
        assert!(started.elapsed() >= limit);

        let waiter = on_connection(conn, {
            let key = key.clone();
            async move |mut conn: C, stage: Stage| {
                let lock = conn.advisory_lock(&key).timeout(LONG).try_acquire().await.expect("a try");
                stage.say("returned");
                stage.pause().await;
                lock.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        held.release().await.expect("a release");
        waiter.says("returned");
        assert_held_by(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.join().await;
        assert_free(&mut observer, &key);
    }

    async fn three_waiters_are_served_in_the_order_in_which_they_came<C: LockTest>(server: &Server) {
        let key = unique_key("fifo");
        let (mut holder, mut observer) = (C::open(server).await, C::observer(server));
        // On PostgreSQL that holds within a turn, and a busy machine may take longer than one.
        for _ in 0..8 {
            let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
            let conns = [C::open(server).await, C::open(server).await, C::open(server).await];
            let (told, order) = channel();
            let started = Instant::now();
            let mut waiters = Vec::new();
            for (number, conn) in conns.into_iter().enumerate() {
                let (key, told) = (key.clone(), told.clone());
                let waiter = on_connection(conn, async move |mut conn: C, _| {
                    let lock = conn.advisory_lock(&key);
                    let lock = if number == 1 { lock.timeout(LONG) } else { lock };
                    let lock = lock.acquire().await.expect("the lock");
                    told.send(number).expect("the test listens");
                    lock.release().await.expect("a release");
                })
                .await;
                waiter.waits(&mut observer);
                waiters.push(waiter);
            }
            held.release().await.expect("a release");
            for waiter in waiters {
                waiter.join().await;
            }
            if started.elapsed() < WITHIN_A_TURN {
                assert_eq!(order.try_iter().collect::<Vec<_>>(), [0, 1, 2]);
                assert_free(&mut observer, &key);
                return;
            }
        }
        panic!("this machine is too slow");
    }

    /// Each reads and writes again, without protection of its own.
    async fn eight_in_contention_over_two_keys_lose_no_update<C: LockTest>(server: &Server) {
        const CONNECTIONS: i64 = 8;
        const ROUNDS: i64 = 28;
        let mut observer = C::observer(server);
        let counters = [(); 2].map(|()| (unique_key("contention"), Table::counter(server)));
        let mut contenders = Vec::new();
        for number in 0..CONNECTIONS {
            let counters = counters.clone();
            contenders.push(in_background(server, async move |mut conn: C, _| {
                for round in 0..ROUNDS {
                    // In the order of the keys if it takes both, lest there be a deadlock.
                    let ways = (number + round) % 4;
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
                            run.run(async |conn| counter.increment(conn).await).await.expect("the lock");
                        }
                        _ => {
                            let mut first = conn.advisory_lock(&counters[0].0).acquire().await.expect("the lock");
                            let mut both = (*first).advisory_lock(&counters[1].0).acquire().await.expect("the lock");
                            for (_, counter) in &counters {
                                counter.increment(&mut *both).await.expect("an update");
                            }
                            both.release().await.expect("a release");
                            first.release().await.expect("a release");
                        }
                    }
                }
            }).await);
        }
        for contender in contenders {
            contender.join().await;
        }
        let of_each_way = CONNECTIONS * ROUNDS / 4;
        assert_eq!(counters[0].1.value(&mut observer), 3 * of_each_way);
        assert_eq!(counters[1].1.value(&mut observer), 2 * of_each_way);
        for (key, _) in &counters {
            assert_free(&mut observer, key);
        }
    }

    async fn a_lock_and_its_guard_know_their_key_and_show_it<C: LockTest>(server: &Server) {
        let key = LockKey::namespaced("acquire", unique_key("key"));
        let mut conn = C::open(server).await;
        let lock = conn.advisory_lock(&key);
        assert_eq!(lock.key(), &key);
        assert!(format!("{lock:?}").contains(&key.to_string()), "{lock:?}");
        let guard = lock.acquire().await.expect("a free lock");
        assert_eq!(guard.key(), &key);
        assert!(format!("{guard:?}").contains(&key.to_string()), "{guard:?}");
    }

    async fn is_held_tells_what_the_server_says<C: LockTest>(server: &Server) {
        let key = unique_key("is_held");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(lock.is_held().await.expect("an answer"));
        lock.execute_sql(C::RELEASE_ALL).await;
        assert_free(&mut observer, &key);
        assert!(!lock.is_held().await.expect("an answer"));
        assert!(try_lock(&mut observer, &key));
        assert!(!lock.is_held().await.expect("an answer"), "another session holds it");
        unlock(&mut observer, &key);
        let error = lock.release().await.map(drop);
        assert!(matches!(error, Err(Error::NotHeld { .. })), "{error:?}");
    }

    async fn holds_of_one_connection_stack_and_each_guard_undoes_its_own<C: LockTest>(server: &Server) {
        let key = unique_key("stack");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let mut middle = outer.advisory_lock(&key).try_acquire().await.expect("a try").expect("held already");
        let mut inner = middle.advisory_lock(&key).timeout(LONG).acquire().await.expect("held already");
        let innermost = inner.advisory_lock(&key).timeout(SHORT).try_acquire().await.expect("a try");
        innermost.expect("held already").release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        assert!(middle.is_held().await.expect("an answer"));
        middle.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        assert!(outer.is_held().await.expect("an answer"));

        outer.advisory_lock(&key).run(async |_| Ok::<_, Error>(())).await.expect("held already");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).run(async |_| Err::<(), _>(AppError::Own)).await.expect_err("its own");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("held already");
        assert_held_by(&mut observer, &key, id);
        outer.advisory_lock(&key).transaction(async |_| Err::<(), _>(AppError::Own)).await.expect_err("its own");
        assert_held_by(&mut observer, &key, id);
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn locks_on_several_keys_stack_on_one_connection<C: LockTest>(server: &Server) {
        let keys = [(); 3].map(|()| unique_key("stack_keys"));
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
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
        assert_free(&mut observer, &keys[0]);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn an_inner_lock_that_fails_leaves_the_outer_one<C: LockTest>(server: &Server) {
        let (key, busy) = (unique_key("outer"), unique_key("inner"));
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
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
        unlock(&mut observer, &busy);
        assert_free(&mut observer, &busy);
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_lock_can_own_its_connection_and_move_elsewhere<C: LockTest>(server: &Server) {
        let key = unique_key("owned");
        let mut observer = C::observer(server);
        let conn = Box::new(C::open(server).await);
        let mut lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        let id = lock.backend_id().await;
        assert_held_by(&mut observer, &key, id);
        let release = async move || {
            assert!(lock.is_held().await.expect("an answer"));
            lock.release().await.expect("a release")
        };
        let mut conn: Box<C> = elsewhere(release).await;
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id().await, id);

        // Dropped elsewhere with its connection, it is released all the same.
        let lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        elsewhere(async move || drop(lock)).await;
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    async fn keys_come_in_many_forms<C: LockTest>(server: &Server) {
        let text = unique_key("forms");
        let number = text.bytes().fold(0, |hash: i64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let text_key = LockKey::from(&text);
        holds::<C>(server, text.as_str(), &text_key).await;
        holds::<C>(server, text.clone(), &text_key).await;
        holds::<C>(server, &text, &text_key).await;
        holds::<C>(server, Cow::from(&text), &text_key).await;
        holds::<C>(server, text.as_bytes(), &text_key).await;
        holds::<C>(server, text.clone().into_bytes(), &text_key).await;
        holds::<C>(server, &text_key, &text_key).await;
        holds::<C>(server, number, &number.into()).await;
        holds::<C>(server, pair, &pair.into()).await;
        let namespaced = LockKey::namespaced(&text, 7);
        holds::<C>(server, namespaced.clone(), &namespaced).await;
    }
}

#[both]
on_every_network_server! {
    async fn is_held_fails_when_the_connection_is_gone<C: LockTest>(server: &Server) {
        let key = unique_key("is_held_gone");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        kill(&mut observer, id);
        let error = lock.is_held().await;
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
        drop(lock);
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
        assert_clean(&mut conn, &mut C::observer(server)).await;
    }
}

/// Asserts that a lock on `key` is a lock on `expected`.
#[both]
async fn holds<C: LockTest>(server: &Server, key: impl Into<LockKey>, expected: &LockKey) {
    let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
    let id = conn.backend_id().await;
    let lock = conn.advisory_lock(key).acquire().await;
    let lock = lock.expect("a free lock");
    assert_held_by(&mut observer, expected, id);
    lock.release().await.expect("a release");
    assert_free(&mut observer, expected);
}

#[both]
on_postgres! {
    async fn readers_share_a_lock_and_exclude_writers(server: &Server) {
        let key = unique_key("readers");
        let mut observer = PgConnection::observer(server);
        let (mut first, mut second) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let mut writer = PgConnection::open(server).await;
        let reader = first.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let other = second.advisory_lock(&key).shared().timeout(LONG).acquire().await.expect("a shared lock");
        assert_eq!(modes(&mut observer, &key), "ShareLock ShareLock");
        assert!(writer.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        reader.release().await.expect("a release");
        assert!(writer.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        let error = writer.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        other.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }

    async fn a_writer_excludes_readers(server: &Server) {
        let key = unique_key("writer");
        let mut observer = PgConnection::observer(server);
        let (mut reader, mut writer) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let lock = writer.advisory_lock(&key).acquire().await.expect("a free lock");
        assert_eq!(modes(&mut observer, &key), "ExclusiveLock");
        assert!(reader.advisory_lock(&key).shared().try_acquire().await.expect("a try").is_none());
        let error = reader.advisory_lock(&key).shared().timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        lock.release().await.expect("a release");
        let lock = reader.advisory_lock(&key).shared().try_acquire().await.expect("a try").expect("a free lock");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        lock.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }

    async fn a_writer_waits_for_readers_and_a_reader_for_writers(server: &Server) {
        let key = unique_key("writer_waits");
        let mut observer = PgConnection::observer(server);
        let mut holder = PgConnection::open(server).await;
        for mode in [Mode::Exclusive, Mode::Shared] {
            let lock = holder.advisory_lock(&key);
            let lock = if mode == Mode::Exclusive { lock.shared() } else { lock };
            let held = lock.acquire().await.expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                async move |mut conn: PgConnection, stage: Stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = if mode == Mode::Shared { lock.shared() } else { lock };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.say("acquired");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            waiter.waits(&mut observer);
            held.release().await.expect("a release");
            waiter.says("acquired");
            assert_eq!(modes(&mut observer, &key), format!("{mode:?}Lock").replace("Shared", "Share"));
            assert_held_by(&mut observer, &key, waiter.id);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn a_reader_upgrades_when_it_is_the_last_one(server: &Server) {
        let key = unique_key("upgrade");
        let mut observer = PgConnection::observer(server);
        let (mut other, mut conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let other_reader = other.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let upgrader = in_background(server, {
            let key = key.clone();
            async move |mut conn: PgConnection, stage: Stage| {
                let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a shared lock");
                assert!(shared.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
                let mut exclusive = shared.advisory_lock(&key).acquire().await.expect("an upgrade");
                assert!(exclusive.is_held().await.expect("an answer"));
                stage.say("upgraded");
                stage.pause().await;
                exclusive.release().await.expect("a release");
                assert!(shared.is_held().await.expect("an answer"));
                stage.say("downgraded");
                stage.pause().await;
                shared.release().await.expect("a release");
                conn
            }
        })
        .await;
        upgrader.waits(&mut observer);
        other_reader.release().await.expect("a release");
        upgrader.says("upgraded");
        assert_eq!(modes(&mut observer, &key), "ExclusiveLock ShareLock");
        assert!(conn.advisory_lock(&key).shared().try_acquire().await.expect("a try").is_none());
        upgrader.go_on();
        upgrader.says("downgraded");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        let reader = conn.advisory_lock(&key).shared().try_acquire().await.expect("a try").expect("a shared lock");
        reader.release().await.expect("a release");
        upgrader.go_on();
        let mut conn = upgrader.join().await;
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_failed_upgrade_leaves_the_shared_hold(server: &Server) {
        let key = unique_key("failed_upgrade");
        let mut observer = PgConnection::observer(server);
        let (mut other, mut conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let other_reader = other.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a shared lock");
        let error = shared.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_eq!(modes(&mut observer, &key), "ShareLock ShareLock");
        other_reader.release().await.expect("a release");
        assert!(shared.is_held().await.expect("an answer"));
        shared.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }

    /// The modes are two locks to the server: each guard undoes its own.
    async fn a_shared_guard_under_an_exclusive_one_leaves_it_alone(server: &Server) {
        let key = unique_key("guard_modes");
        let mut observer = PgConnection::observer(server);
        let mut conn = PgConnection::open(server).await;
        let id = conn.backend_id().await;
        let mut outer = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let inner = outer.advisory_lock(&key).shared().acquire().await.expect("held already");
        inner.release().await.expect("a release");
        assert_held_by(&mut observer, &key, id);
        assert!(outer.is_held().await.expect("an answer"));
        outer.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }

    async fn is_held_tells_shared_from_exclusive(server: &Server) {
        let key = unique_key("is_held_mode");
        let mut conn = PgConnection::open(server).await;
        let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a free lock");
        let exclusive = shared.advisory_lock(&key).acquire().await.expect("an upgrade");
        exclusive.release().await.expect("a release");
        assert!(shared.is_held().await.expect("an answer"));
        shared.execute_sql(PgConnection::RELEASE_ALL).await;
        assert!(!shared.is_held().await.expect("an answer"));
        let mut exclusive = shared.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(exclusive.is_held().await.expect("an answer"));
        exclusive.release().await.expect("a release");
    }

    async fn numbers_and_pairs_are_what_other_programs_lock(server: &Server) {
        let seed = unique_key("numbers");
        let number = seed.bytes().fold(-1, |hash: i64, byte| hash.wrapping_mul(37).wrapping_add(byte.into()));
        let (first, second) = ((number >> 32) as i32, number as i32);
        let (mut conn, mut other) = (PgConnection::open(server).await, PgConnection::observer(server));
        let lock = conn.advisory_lock(number).acquire().await.expect("a free lock");
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_lock('{number}'::bigint)")), Some(0));
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_xact_lock('{first}'::int, '{second}'::int)")), Some(1));
        lock.release().await.expect("a release");
        let lock = conn.advisory_lock((first, second)).acquire().await.expect("a free lock");
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_lock('{first}'::int, '{second}'::int)")), Some(0));
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_xact_lock('{number}'::bigint)")), Some(1));
        lock.release().await.expect("a release");
    }

    async fn the_ends_of_the_ranges_of_numbers_are_keys(server: &Server) {
        for key in [LockKey::from(i64::MIN), i64::MAX.into(), (i32::MIN, i32::MAX).into(), (-1).into()] {
            let (mut holder, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
            let id = holder.backend_id().await;
            // These are the same in all processes that test on this server.
            let lock = holder.advisory_lock(&key).acquire().await.expect("the lock");
            assert_held_by(&mut observer, &key, id);
            // The queue and the transaction have SQL texts of their own.
            let waiter = in_background(server, {
                let key = key.clone();
                async move |mut conn: PgConnection, _| {
                    conn.advisory_lock(&key).acquire().await.expect("the lock").release().await.expect("a release");
                    conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await.expect("the lock");
                }
            })
            .await;
            waiter.waits(&mut observer);
            lock.release().await.expect("a release");
            waiter.join().await;
        }
    }
}
