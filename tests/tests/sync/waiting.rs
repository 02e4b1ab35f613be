//! Where a lock is waited for, and for how long.

use std::time::{Duration, Instant};

use diesel::{PgConnection, connection::SimpleConnection};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Proxy, Server, TestConnection, on_every_network_server, on_every_server, on_postgres,
    unique_key, wait_for,
};

use crate::observe::{LockTestConnection, assert_free, assert_held, in_background, on_connection};

on_every_server! {
    fn without_a_limit_it_waits_until_the_lock_is_free<C: LockTestConnection>(server: &Server) {
        let key = unique_key("no_limit");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiter = in_background(server, {
            let key = key.clone();
            move |mut conn: C, stage| {
                let lock = conn.advisory_lock(&key).acquire().expect("the lock");
                stage.say("acquired");
                stage.pause();
                lock.release().expect("a release");
            }
        });
        let started = Instant::now();
        wait_for("the session to wait still", || {
            observer.is_waiting(waiter.id) && started.elapsed() > Duration::from_millis(1_200)
        });
        lock.release().expect("a release");
        waiter.says("acquired");
        assert_held(&mut observer, &key, waiter.id);
        waiter.go_on();
        waiter.join();
        assert_free(&mut observer, &key);
    }

    fn a_timeout_is_never_early_and_not_much_late<C: LockTestConnection>(server: &Server) {
        let key = unique_key("timeouts");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let holder_id = holder.backend_id();
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        for limit in [
            Duration::ZERO,
            Duration::from_nanos(1),
            Duration::from_millis(1),
            Duration::from_millis(250),
            Duration::from_millis(1_500),
        ] {
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: C, _| {
                    let late = || {
                        let started = Instant::now();
                        let result = conn.advisory_lock(&key).timeout(limit).acquire();
                        let elapsed = started.elapsed();
                        let Err(Error::Timeout { waited, .. }) = result else {
                            panic!("{limit:?}: {result:?}");
                        };
                        assert!(limit <= waited && waited <= elapsed, "{limit:?}: {waited:?}, {elapsed:?}");
                        elapsed - limit
                    };
                    // A busy machine is late at times, but not each time.
                    let in_time = std::iter::repeat_with(late).take(8).any(|late| late < Duration::from_millis(200));
                    assert!(in_time, "{limit:?} took 200 ms more each time");
                }
            });
            let id = waiter.id;
            waiter.join();
            assert!(!observer.is_waiting(id));
            assert_held(&mut observer, &key, holder_id);
        }
    }

    fn with_a_limit_it_waits_in_the_servers_queue<C: LockTestConnection>(server: &Server) {
        let key = unique_key("queue");
        let mut observer = C::open(server);
        for limit in [Duration::from_millis(59_999), Duration::from_secs(3_000_000), Duration::MAX] {
            let mut holder = C::open(server);
            let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                move |mut conn: C, stage| {
                    let lock = conn.advisory_lock(&key).timeout(limit).acquire().expect("the lock");
                    stage.say("acquired");
                    stage.pause();
                    lock.release().expect("a release");
                }
            });
            let started = Instant::now();
            wait_for("the session to wait still", || {
                observer.is_waiting(waiter.id) && started.elapsed() > Duration::from_millis(300)
            });
            lock.release().expect("a release");
            waiter.says("acquired");
            assert_held(&mut observer, &key, waiter.id);
            waiter.go_on();
            waiter.join();
            assert_free(&mut observer, &key);
        }
    }

    fn a_free_lock_is_granted_whatever_the_limit<C: LockTestConnection>(server: &Server) {
        let key = unique_key("free");
        let (mut conn, mut observer) = (C::open(server), C::open(server));
        let id = conn.backend_id();
        for limit in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            let lock = conn.advisory_lock(&key).timeout(limit).acquire().expect("a free lock");
            assert_held(&mut observer, &key, id);
            lock.release().expect("a release");
            let lock = conn.advisory_lock(&key).timeout(limit).poll_every(limit).acquire().expect("a free lock");
            assert_held(&mut observer, &key, id);
            lock.release().expect("a release");
            assert_free(&mut observer, &key);
        }
    }

    fn a_timeout_leaves_nothing_in_the_queue<C: LockTestConnection>(server: &Server) {
        let key = unique_key("ghost");
        let (mut holder, mut conn, mut observer) = (C::open(server), C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        for _ in 0..5 {
            let error = conn.advisory_lock(&key).timeout(Duration::from_millis(20)).acquire().map(drop);
            assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        }
        lock.release().expect("a release");
        assert_free(&mut observer, &key);
        assert_eq!(conn.number("SELECT 1"), Some(1));
        assert_free(&mut observer, &key);
    }

    fn polling_keeps_its_limit<C: LockTestConnection>(server: &Server) {
        let key = unique_key("poll_limit");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let limit = Duration::from_millis(150);
        // The last pause is cut short, also where the interval is longer than the limit.
        for interval in [Duration::ZERO, Duration::from_millis(40), Duration::from_secs(3_600)] {
            let started = Instant::now();
            let result = conn.advisory_lock(&key).timeout(limit).poll_every(interval).acquire();
            assert!(matches!(result, Err(Error::Timeout { waited, .. }) if waited >= limit), "{result:?}");
            assert!(started.elapsed() >= limit);
            assert!(started.elapsed() < Duration::from_secs(10));
        }
    }
}

on_every_network_server! {
    fn polling_asks_again_and_again_and_never_queues<C: LockTestConnection>(server: &Server) {
        let key = unique_key("poll");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        for limit in [None, Some(Duration::MAX)] {
            let proxy = Proxy::start(server);
            let poller = on_connection(C::open_url(proxy.url()), {
                let key = key.clone();
                move |mut conn: C, stage| {
                    let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(10));
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let lock = lock.acquire();
                    stage.say(format!("{}", lock.is_ok()));
                    stage.pause();
                    drop(lock);
                }
            });
            proxy.reset();
            wait_for("many polls", || {
                assert!(!observer.is_waiting(poller.id), "it is in the queue");
                proxy.round_trips() > 20
            });
            assert!(!poller.is_finished());
            // Cancelled, it would say so.
            drop_and_join(&mut observer, &key, poller);
        }
        lock.release().expect("a release");
        assert_free(&mut observer, &key);
    }

    fn polling_ends_with_the_lock<C: LockTestConnection>(server: &Server) {
        let key = unique_key("poll_lock");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let proxy = Proxy::start(server);
        let poller = on_connection(C::open_url(proxy.url()), {
            let key = key.clone();
            move |mut conn: C, stage| {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(10)).acquire().expect("the lock");
                stage.say("acquired");
                stage.pause();
                lock.release().expect("a release");
            }
        });
        proxy.reset();
        wait_for("some polls", || proxy.round_trips() > 5);
        lock.release().expect("a release");
        poller.says("acquired");
        assert_held(&mut observer, &key, poller.id);
        poller.go_on();
        poller.join();
        assert_free(&mut observer, &key);
    }
}

/// Ends a poller by ending its session.
fn drop_and_join<C: LockTestConnection>(
    observer: &mut C,
    key: &str,
    poller: crate::observe::Background<()>,
) {
    observer.kill(poller.id);
    poller.says("false");
    poller.go_on();
    let id = poller.id;
    poller.join();
    assert!(!observer.holder_ids(&key.into()).contains(&id));
}

/// A database for one test, dropped at its end. `CREATE INDEX CONCURRENTLY` waits for all old snapshots of its database.
struct Database {
    admin: PgConnection,
    name: String,
    url: String,
}

impl Database {
    fn create(server: &Server) -> Self {
        let mut admin = PgConnection::open(server);
        let name = unique_key("d").replace(['/', '-'], "_");
        admin.execute_sql(&format!("CREATE DATABASE {name} TEMPLATE template0"));
        let (start, _) = server.url.rsplit_once('/').expect("a URL with a database");
        let url = format!("{start}/{name}");
        Self { admin, name, url }
    }

    fn open(&self) -> PgConnection {
        PgConnection::open_url(&self.url)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let _ = self
            .admin
            .batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name));
    }
}

on_postgres! {
    fn a_poller_lets_an_index_be_built_concurrently_and_a_queued_waiter_does_not(server: &Server) {
        let database = Database::create(server);
        let key = unique_key("index");
        let [mut builder, mut observer] = [(); 2].map(|()| database.open());
        builder.execute_sql("CREATE TABLE indexed (id int); INSERT INTO indexed VALUES (1)");
        let builder_id = builder.backend_id();
        let blocked = format!(
            "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE pid = {builder_id} \
             AND l.locktype = 'virtualxid' AND NOT l.granted AND a.wait_event = 'virtualxid'"
        );

        let building = |builder: PgConnection, name: &'static str, key: String| {
            on_connection(builder, move |mut builder, stage| {
                let mut lock = builder.advisory_lock(&key).acquire().expect("a free lock");
                stage.say("locked");
                stage.pause();
                lock.execute_sql(&format!("CREATE INDEX CONCURRENTLY {name} ON indexed (id)"));
                stage.say("built");
                stage.pause();
                lock.release().expect("a release");
                builder
            })
        };

        let build = building(builder, "while_polled", key.clone());
        build.says("locked");
        let proxy = Proxy::start(&Server { url: database.url.clone(), ..server.clone() });
        let poller = on_connection(PgConnection::open_url(proxy.url()), {
            let key = key.clone();
            move |mut conn, _| {
                conn.advisory_lock(&key).poll_every(Duration::from_millis(5)).acquire().map(drop).expect("the lock");
            }
        });
        proxy.reset();
        wait_for("some polls", || proxy.round_trips() > 5);
        build.go_on();
        build.says("built");
        assert!(!poller.is_finished(), "it polls all the time");
        build.go_on();
        let builder = build.join();
        poller.join();

        let build = building(builder, "while_queued", key.clone());
        build.says("locked");
        let waiter = on_connection(database.open(), {
            let key = key.clone();
            move |mut conn, _| conn.advisory_lock(&key).acquire().map(drop).expect_err("cancelled")
        });
        waiter.waits(&mut observer);
        build.go_on();
        wait_for("the index to be blocked by the waiter's snapshot", || observer.number(&blocked) == Some(1));
        assert!(observer.is_waiting(waiter.id) && !build.is_finished());
        observer.cancel(waiter.id);
        assert!(matches!(waiter.join(), Error::Interrupted { .. }));
        build.says("built");
        build.go_on();
        drop(build.join());
    }

    fn a_poller_has_no_snapshot_between_its_questions(server: &Server) {
        let key = unique_key("snapshot");
        let [mut holder, mut observer] = [(); 2].map(|()| PgConnection::open(server));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let poller = in_background(server, {
            let key = key.clone();
            move |mut conn: PgConnection, _| {
                conn.advisory_lock(&key).poll_every(Duration::from_millis(50)).acquire().map(drop).expect("the lock");
            }
        });
        let idle = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND state = 'idle' \
             AND backend_xmin IS NULL AND query LIKE '%pg_try_advisory_lock%'",
            poller.id
        );
        for _ in 0..3 {
            wait_for("the poller to be idle", || observer.number(&idle) == Some(1));
        }
        assert!(!poller.is_finished());
        lock.release().expect("a release");
        poller.join();
    }
}
