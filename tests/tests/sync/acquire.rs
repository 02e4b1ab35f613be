//! Exclusion, holds that stack, and who owns the connection.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use diesel::PgConnection;
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error, LockKey, Mode};
use dlock_tests::{
    Proxy, Server, TestConnection, on_every_network_server, on_every_server, on_postgres,
    unique_key,
};

use crate::observe::{
    LockTestConnection, assert_free, assert_held, in_background, on_connection, pg_locks_of,
};

const LONG: Duration = Duration::from_secs(60);

on_every_server! {
    fn a_held_lock_excludes_other_connections_until_it_is_released<C: LockTestConnection>(server: &Server) {
        let key = unique_key("excludes");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        assert_held(&mut observer, &key, id);
        lock.release().expect("a release");
        assert_free(&mut observer, &key);

        let lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        assert_held(&mut observer, &key, id);
        drop(lock);
        assert_free(&mut observer, &key);
    }

    fn a_lock_that_was_not_acquired_locks_nothing<C: LockTestConnection>(server: &Server) {
        let key = unique_key("not_acquired");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let lock = conn.advisory_lock(&key);
        assert_free(&mut observer, &key);
        drop(lock);
    }

    fn the_guard_is_the_session_that_holds_the_lock<C: LockTestConnection>(server: &Server) {
        let key = unique_key("session");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        let id = lock.backend_id();
        assert_held(&mut observer, &key, id);
        let conn = lock.release().expect("a release");
        assert_eq!(conn.backend_id(), id);
    }

    fn try_acquire_is_none_while_another_holds_the_lock_and_some_afterwards<C: LockTestConnection>(server: &Server) {
        let key = unique_key("try");
        let (mut holder, mut conn, mut observer) = (C::open(server), C::open(server), C::open(server));
        let (holder_id, id) = (holder.backend_id(), conn.backend_id());
        let held = holder.advisory_lock(&key).try_acquire().expect("a try").expect("a free lock");
        assert!(conn.advisory_lock(&key).try_acquire().expect("a try").is_none());
        assert_held(&mut observer, &key, holder_id);
        held.release().expect("a release");
        let lock = conn.advisory_lock(&key).try_acquire().expect("a try").expect("a free lock");
        assert_held(&mut observer, &key, id);
        lock.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn try_acquire_with_a_timeout_waits_up_to_it<C: LockTestConnection>(server: &Server) {
        let key = unique_key("try_timeout");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");

        let limit = Duration::from_millis(120);
        let started = Instant::now();
        assert!(observer.advisory_lock(&key).timeout(limit).try_acquire().expect("a try").is_none());
        assert!(started.elapsed() >= limit);

        let waiter = in_background(server, {
            let key = key.clone();
            move |mut conn: C, stage| {
                let lock = conn.advisory_lock(&key).timeout(LONG).try_acquire().expect("a try");
                stage.say("returned");
                stage.pause();
                lock.expect("the lock").release().expect("a release");
            }
        });
        waiter.waits(&mut observer);
        lock.release().expect("a release");
        waiter.says("returned");
        assert_held(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.join();
        assert_free(&mut observer, &key);
    }

    fn three_waiters_are_served_in_the_order_in_which_they_came<C: LockTestConnection>(server: &Server) {
        let key = unique_key("fifo");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiters = [1, 2, 3].map(|_| {
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: C, stage| {
                    let lock = conn.advisory_lock(&key).acquire().expect("the lock");
                    stage.say("acquired");
                    stage.pause();
                    lock.release().expect("a release");
                }
            });
            waiter.waits(&mut observer);
            waiter
        });
        lock.release().expect("a release");
        for waiter in waiters {
            waiter.says("acquired");
            assert_held(&mut observer, &key, waiter.id);
            waiter.go_on();
            waiter.join();
        }
        assert_free(&mut observer, &key);
    }

    fn a_lock_and_its_guard_know_their_key_and_show_it<C: LockTestConnection>(server: &Server) {
        let key = LockKey::namespaced("acquire", unique_key("key"));
        let mut conn = C::open(server);
        let lock = conn.advisory_lock(&key);
        assert_eq!(lock.key(), &key);
        assert!(format!("{lock:?}").contains(&key.to_string()), "{lock:?}");
        let guard = lock.acquire().expect("a free lock");
        assert_eq!(guard.key(), &key);
        assert!(format!("{guard:?}").contains(&key.to_string()), "{guard:?}");
    }

    fn is_held_tells_what_the_server_says<C: LockTestConnection>(server: &Server) {
        let key = unique_key("is_held");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        assert!(lock.is_held().expect("an answer"));
        lock.execute_sql(C::RELEASE_ALL);
        assert_free(&mut observer, &key);
        assert!(!lock.is_held().expect("an answer"));

        // Somebody else's hold is not ours.
        let other = observer.advisory_lock(&key).acquire().expect("a free lock");
        assert!(!lock.is_held().expect("an answer"));
        other.release().expect("a release");
        assert!(matches!(lock.release(), Err(Error::NotHeld { .. })));
    }

    fn holds_of_one_connection_stack_and_each_guard_undoes_its_own<C: LockTestConnection>(server: &Server) {
        let key = unique_key("stack");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut outer = conn.advisory_lock(&key).acquire().expect("a free lock");
        let mut middle = outer.advisory_lock(&key).try_acquire().expect("a try").expect("its own lock");
        let inner = middle.advisory_lock(&key).timeout(LONG).acquire().expect("its own lock");
        inner.release().expect("a release");
        assert_held(&mut observer, &key, id);
        assert!(middle.is_held().expect("an answer"));
        drop(middle);
        assert_held(&mut observer, &key, id);
        assert!(outer.is_held().expect("an answer"));
        outer.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn an_inner_lock_that_fails_leaves_the_outer_one<C: LockTestConnection>(server: &Server) {
        let (key, busy) = (unique_key("outer"), unique_key("inner"));
        let (mut conn, mut holder, mut observer) = (C::open(server), C::open(server), C::open(server));
        let id = conn.backend_id();
        let held = holder.advisory_lock(&busy).acquire().expect("a free lock");
        let mut outer = conn.advisory_lock(&key).acquire().expect("a free lock");

        assert!(outer.advisory_lock(&busy).try_acquire().expect("a try").is_none());
        assert_held(&mut observer, &key, id);
        let error = outer.advisory_lock(&busy).timeout(Duration::from_millis(20)).acquire().map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_held(&mut observer, &key, id);
        let error = outer.advisory_lock("").acquire().map(drop);
        assert!(matches!(error, Err(Error::InvalidKey(_))), "{error:?}");
        assert_held(&mut observer, &key, id);

        held.release().expect("a release");
        assert_free(&mut observer, &busy);
        outer.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn a_lock_can_own_its_connection_and_move_to_another_thread<C: LockTestConnection>(server: &Server) {
        let key = unique_key("owned");
        let mut observer = C::open(server);
        let mut lock = AdvisoryLock::new(Box::new(C::open(server)), &key).acquire().expect("a free lock");
        let id = lock.backend_id();
        assert_held(&mut observer, &key, id);
        let thread = std::thread::spawn(move || {
            assert!(lock.is_held().expect("an answer"));
            lock.release().expect("a release")
        });
        let mut conn: Box<C> = thread.join().expect("the thread's assertions");
        assert_free(&mut observer, &key);
        assert_eq!(conn.backend_id(), id);

        // Dropped elsewhere, it is released there.
        let lock = AdvisoryLock::new(conn, &key).acquire().expect("a free lock");
        assert_held(&mut observer, &key, id);
        std::thread::spawn(move || drop(lock)).join().expect("a drop");
        dlock_tests::wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
    }

    fn keys_come_in_many_forms<C: LockTestConnection>(server: &Server) {
        let text = unique_key("forms");
        let number = text.bytes().fold(0, |hash: i64, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let text_key = LockKey::from(&text);
        holds::<C>(server, text.as_str(), &text_key);
        holds::<C>(server, text.clone(), &text_key);
        holds::<C>(server, &text, &text_key);
        holds::<C>(server, Cow::from(&text), &text_key);
        holds::<C>(server, text.as_bytes(), &text_key);
        holds::<C>(server, text.clone().into_bytes(), &text_key);
        holds::<C>(server, &text_key, &text_key);
        holds::<C>(server, number, &number.into());
        holds::<C>(server, pair, &pair.into());
        let namespaced = LockKey::namespaced(&text, 7);
        holds::<C>(server, namespaced.clone(), &namespaced);
    }
}

on_every_network_server! {
    fn is_held_fails_when_the_connection_is_gone<C: LockTestConnection>(server: &Server) {
        let key = unique_key("is_held_gone");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        observer.kill(id);
        dlock_tests::wait_for("the end of the session", || !observer.is_connected(id));
        assert!(matches!(lock.is_held(), Err(Error::Database(_))));
        drop(lock);
        assert_free(&mut observer, &key);
    }

    fn an_interrupted_inner_wait_leaves_the_outer_lock<C: LockTestConnection>(server: &Server) {
        let (key, busy) = (unique_key("outer_cancel"), unique_key("inner_cancel"));
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let held = holder.advisory_lock(&busy).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let (key, busy) = (key.clone(), busy.clone());
            move |mut conn: C, stage| {
                let mut outer = conn.advisory_lock(&key).acquire().expect("a free lock");
                let error = outer.advisory_lock(&busy).acquire().expect_err("cancelled");
                stage.say(format!("{error:?}"));
                stage.pause();
                outer.release().expect("the outer lock is held");
            }
        });
        waiter.waits(&mut observer);
        observer.cancel(waiter.id);
        let error = waiter.hear();
        assert!(error.starts_with("Interrupted"), "{error}");
        assert_held(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.join();
        held.release().expect("a release");
        assert_free(&mut observer, &key);
        assert_free(&mut observer, &busy);
    }

    fn an_empty_key_is_refused_and_nothing_is_sent<C: LockTestConnection>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        proxy.reset();
        for key in [LockKey::from(""), LockKey::from(b""), LockKey::namespaced("a", ""), LockKey::namespaced("", "a")] {
            let errors = [
                conn.advisory_lock(&key).acquire().map(drop),
                conn.advisory_lock(&key).timeout(Duration::from_millis(1)).acquire().map(drop),
                conn.advisory_lock(&key).poll_every(Duration::from_millis(1)).acquire().map(drop),
                conn.advisory_lock(&key).try_acquire().map(drop),
                conn.advisory_lock(&key).run(|_| Ok(())),
                conn.advisory_lock(&key).transaction(|_| Ok(())),
                conn.advisory_lock(&key).holders().map(drop),
            ];
            for error in errors {
                match error {
                    Err(Error::InvalidKey(invalid)) => assert_eq!(invalid.key(), &key),
                    other => panic!("{key}: {other:?}"),
                }
            }
        }
        assert_eq!(proxy.round_trips(), 0);
        assert_eq!(conn.number("SELECT 1"), Some(1));
    }
}

/// Asserts that a lock on `key` is a lock on `expected`.
#[track_caller]
fn holds<C: LockTestConnection>(server: &Server, key: impl Into<LockKey>, expected: &LockKey) {
    let (mut conn, mut observer) = (C::open(server), C::open(server));
    let id = conn.backend_id();
    let lock = conn.advisory_lock(key).acquire().expect("a free lock");
    assert_held(&mut observer, expected, id);
    lock.release().expect("a release");
    assert_free(&mut observer, expected);
}

/// How the locks on a key are held, and by how many.
fn modes(observer: &mut PgConnection, key: &str) -> String {
    observer
        .text(&format!(
            "SELECT string_agg(mode, ' ' ORDER BY mode) FROM pg_locks WHERE granted AND {}",
            pg_locks_of(&key.into())
        ))
        .unwrap_or_default()
}

on_postgres! {
    fn readers_share_a_lock_and_exclude_writers(server: &Server) {
        let key = unique_key("readers");
        let [mut first, mut second, mut writer, mut observer] = [(); 4].map(|()| PgConnection::open(server));
        let reader = first.advisory_lock(&key).shared().acquire().expect("a free lock");
        let other = second.advisory_lock(&key).shared().timeout(LONG).acquire().expect("a shared lock");
        assert_eq!(modes(&mut observer, &key), "ShareLock ShareLock");
        assert!(writer.advisory_lock(&key).try_acquire().expect("a try").is_none());
        reader.release().expect("a release");
        assert!(writer.advisory_lock(&key).try_acquire().expect("a try").is_none());
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        other.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn a_writer_excludes_readers(server: &Server) {
        let key = unique_key("writer");
        let [mut reader, mut writer, mut observer] = [(); 3].map(|()| PgConnection::open(server));
        let lock = writer.advisory_lock(&key).acquire().expect("a free lock");
        assert_eq!(modes(&mut observer, &key), "ExclusiveLock");
        assert!(reader.advisory_lock(&key).shared().try_acquire().expect("a try").is_none());
        let error = reader.advisory_lock(&key).shared().timeout(Duration::from_millis(20)).acquire().map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        lock.release().expect("a release");
        let lock = reader.advisory_lock(&key).shared().try_acquire().expect("a try").expect("a free lock");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        lock.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn a_writer_waits_for_readers_and_a_reader_for_writers(server: &Server) {
        let key = unique_key("writer_waits");
        let mut observer = PgConnection::open(server);
        for mode in [Mode::Exclusive, Mode::Shared] {
            let mut holder = PgConnection::open(server);
            let lock = holder.advisory_lock(&key);
            let lock = if mode == Mode::Exclusive { lock.shared() } else { lock }.acquire().expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: PgConnection, stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = if mode == Mode::Shared { lock.shared() } else { lock }.acquire().expect("the lock");
                    stage.say("acquired");
                    stage.pause();
                    lock.release().expect("a release");
                }
            });
            waiter.waits(&mut observer);
            lock.release().expect("a release");
            waiter.says("acquired");
            assert_eq!(modes(&mut observer, &key), format!("{mode:?}Lock").replace("Shared", "Share"));
            assert_eq!(observer.holder_ids(&LockKey::from(&key)), [waiter.id]);
            waiter.go_on();
            waiter.join();
            assert_free(&mut observer, &key);
        }
    }

    fn a_reader_upgrades_when_it_is_the_last_one(server: &Server) {
        let key = unique_key("upgrade");
        let [mut other, mut conn, mut observer] = [(); 3].map(|()| PgConnection::open(server));
        let other_reader = other.advisory_lock(&key).shared().acquire().expect("a free lock");
        let upgrader = on_connection(PgConnection::open(server), {
            let key = key.clone();
            move |mut conn, stage| {
                let mut shared = conn.advisory_lock(&key).shared().acquire().expect("a shared lock");
                assert!(shared.advisory_lock(&key).try_acquire().expect("a try").is_none());
                let mut exclusive = shared.advisory_lock(&key).acquire().expect("an upgrade");
                assert!(exclusive.is_held().expect("an answer"));
                stage.say("upgraded");
                stage.pause();
                exclusive.release().expect("a release");
                assert!(shared.is_held().expect("an answer"));
                stage.say("downgraded");
                stage.pause();
                shared.release().expect("a release");
            }
        });
        upgrader.waits(&mut observer);
        other_reader.release().expect("a release");
        upgrader.says("upgraded");
        assert_eq!(modes(&mut observer, &key), "ExclusiveLock ShareLock");
        assert!(conn.advisory_lock(&key).shared().try_acquire().expect("a try").is_none());
        upgrader.go_on();
        upgrader.says("downgraded");
        assert_eq!(modes(&mut observer, &key), "ShareLock");
        let reader = conn.advisory_lock(&key).shared().try_acquire().expect("a try").expect("a shared lock");
        reader.release().expect("a release");
        upgrader.go_on();
        upgrader.join();
        assert_free(&mut observer, &key);
    }

    fn a_failed_upgrade_leaves_the_shared_hold(server: &Server) {
        let key = unique_key("failed_upgrade");
        let [mut other, mut conn, mut observer] = [(); 3].map(|()| PgConnection::open(server));
        let other_reader = other.advisory_lock(&key).shared().acquire().expect("a free lock");
        let mut shared = conn.advisory_lock(&key).shared().acquire().expect("a shared lock");
        let error = shared.advisory_lock(&key).timeout(Duration::from_millis(20)).acquire().map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert_eq!(modes(&mut observer, &key), "ShareLock ShareLock");
        other_reader.release().expect("a release");
        assert!(shared.is_held().expect("an answer"));
        shared.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn is_held_tells_shared_from_exclusive(server: &Server) {
        let key = unique_key("is_held_mode");
        let mut conn = PgConnection::open(server);
        let mut shared = conn.advisory_lock(&key).shared().acquire().expect("a free lock");
        let exclusive = shared.advisory_lock(&key).acquire().expect("an upgrade");
        exclusive.release().expect("a release");
        assert!(shared.is_held().expect("an answer"));
        shared.execute_sql(PgConnection::RELEASE_ALL);
        assert!(!shared.is_held().expect("an answer"));
        let mut exclusive = shared.advisory_lock(&key).acquire().expect("a free lock");
        assert!(exclusive.is_held().expect("an answer"));
        exclusive.release().expect("a release");
    }

    fn numbers_and_pairs_are_what_other_programs_lock(server: &Server) {
        let seed = unique_key("numbers");
        let number = seed.bytes().fold(-1, |hash: i64, byte| hash.wrapping_mul(37).wrapping_add(byte.into()));
        let (first, second) = ((number >> 32) as i32, number as i32);
        let [mut conn, mut other] = [(); 2].map(|()| PgConnection::open(server));
        let lock = conn.advisory_lock(number).acquire().expect("a free lock");
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_lock('{number}'::bigint)")), Some(0));
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_xact_lock('{first}'::int, '{second}'::int)")), Some(1));
        lock.release().expect("a release");
        let lock = conn.advisory_lock((first, second)).acquire().expect("a free lock");
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_lock('{first}'::int, '{second}'::int)")), Some(0));
        assert_eq!(other.number(&format!("SELECT pg_try_advisory_xact_lock('{number}'::bigint)")), Some(1));
        lock.release().expect("a release");
    }

    fn the_ends_of_the_ranges_of_numbers_are_keys(server: &Server) {
        for key in [LockKey::from(i64::MIN), i64::MAX.into(), (i32::MIN, i32::MAX).into(), (-1).into()] {
            let [mut holder, mut observer] = [(); 2].map(|()| PgConnection::open(server));
            let id = holder.backend_id();
            // These are the same in all processes that test on this server.
            let lock = holder.advisory_lock(&key).acquire().expect("the lock");
            assert_held(&mut observer, &key, id);
            // The queue and the transaction have SQL texts of their own.
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: PgConnection, _| {
                    conn.advisory_lock(&key).acquire().expect("the lock").release().expect("a release");
                    conn.advisory_lock(&key).transaction(|_| Ok::<_, Error>(())).expect("the lock");
                }
            });
            waiter.waits(&mut observer);
            lock.release().expect("a release");
            waiter.join();
        }
    }
}
