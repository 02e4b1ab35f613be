//! Where a lock is waited for, and for how long.

use std::time::{Duration, Instant};

use dlock_core::LockKey;
use dlock_tests::{Proxy, Server, unique_key, wait_for};

use crate::both::fresh_database::FreshDatabase;
use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(30);

#[both]
on_every_server! {
    async fn a_wait_is_in_the_servers_queue_with_and_without_a_limit<C: LockTest>(server: &Server) {
        let key = unique_key("queue");
        let mut observer = C::observer(server);
        for (limit, at_least) in [
            (None, 1_200),
            (Some(Duration::from_millis(59_999)), 300),
            (Some(Duration::from_secs(3_000_000)), 300),
            (Some(Duration::MAX), 300),
        ] {
            let mut holder = C::open(server).await;
            let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
            let waiter = in_background(server, {
                let key = key.clone();
                async move |mut conn: C, stage: Stage| {
                    let lock = conn.advisory_lock(&key);
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.say("acquired");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            waiter.still_waits(&mut observer, Duration::from_millis(at_least));
            held.release().await.expect("a release");
            waiter.says("acquired");
            assert_held_by(&mut observer, &key, waiter.id);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn a_timeout_is_never_early_and_not_much_late<C: LockTest>(server: &Server) {
        let key = unique_key("timeouts");
        let (mut holder, mut observer) = (C::open(server).await, C::observer(server));
        let holder_id = holder.backend_id().await;
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let mut conn = C::open(server).await;
        let id = conn.backend_id().await;
        for limit in [
            Duration::ZERO,
            Duration::from_nanos(1),
            Duration::from_millis(1),
            Duration::from_millis(250),
            Duration::from_millis(1_500),
        ] {
            // A busy machine is late at times, but not each time.
            let mut in_time = false;
            for _ in 0..8 {
                let started = Instant::now();
                let result = conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop);
                let elapsed = started.elapsed();
                let Err(Error::Timeout { waited, .. }) = result else {
                    panic!("{limit:?}: {result:?}");
                };
                assert!(limit <= waited && waited <= elapsed, "{limit:?}: {waited:?}, {elapsed:?}");
                in_time = elapsed - limit < Duration::from_millis(200);
                if in_time {
                    break;
                }
            }
            assert!(in_time, "{limit:?} took 200 ms more each time");
            assert!(!observer.is_waiting(id));
            assert_held_by(&mut observer, &key, holder_id);
        }
        held.release().await.expect("a release");
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn a_free_lock_is_granted_whatever_the_limit<C: LockTest>(server: &Server) {
        let key = unique_key("free");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        for limit in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            let lock = conn.advisory_lock(&key).timeout(limit).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            let lock = conn.advisory_lock(&key).timeout(limit).poll_every(limit).acquire().await.expect("a free lock");
            assert_held_by(&mut observer, &key, id);
            lock.release().await.expect("a release");
            assert_free(&mut observer, &key);
        }
    }

    async fn a_timeout_leaves_nothing_in_the_queue<C: LockTest>(server: &Server) {
        let key = unique_key("ghost");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        assert!(try_lock(&mut observer, &key));
        for _ in 0..5 {
            let error = conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
            assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        }
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
        assert_free(&mut observer, &key);
    }

    async fn polling_keeps_its_limit<C: LockTest>(server: &Server) {
        let key = unique_key("poll_limit");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        assert!(try_lock(&mut observer, &key));
        let limit = Duration::from_millis(150);
        // The last pause is cut short, also where the interval is longer than the limit.
        for interval in [Duration::ZERO, Duration::from_millis(40), Duration::from_secs(3_600)] {
            let started = Instant::now();
            let result = conn.advisory_lock(&key).timeout(limit).poll_every(interval).acquire().await.map(drop);
            assert!(matches!(result, Err(Error::Timeout { waited, .. }) if waited >= limit), "{result:?}");
            assert!(started.elapsed() >= limit);
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        unlock(&mut observer, &key);
    }
}

#[both]
on_every_network_server! {
    async fn polling_asks_again_and_again_never_queues_and_ends_with_the_lock<C: LockTest>(server: &Server) {
        let key = unique_key("poll");
        let (mut holder, mut observer) = (C::open(server).await, C::observer(server));
        for limit in [None, Some(Duration::MAX)] {
            let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
            let proxy = Proxy::start(server);
            let poller = on_connection(C::open_url(proxy.url()).await, {
                let key = key.clone();
                async move |mut conn: C, stage: Stage| {
                    let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(10));
                    let lock = match limit {
                        Some(limit) => lock.timeout(limit),
                        None => lock,
                    };
                    let lock = lock.acquire().await.expect("the lock");
                    stage.say("acquired");
                    stage.pause().await;
                    lock.release().await.expect("a release");
                }
            })
            .await;
            proxy.reset();
            wait_for("many polls", || {
                assert!(!observer.is_waiting(poller.id), "it is in the queue");
                proxy.round_trips() > 20
            });
            assert!(!poller.is_finished());
            held.release().await.expect("a release");
            poller.says("acquired");
            assert_held_by(&mut observer, &key, poller.id);
            poller.go_on();
            poller.join().await;
            assert_free(&mut observer, &key);
        }
    }

    async fn polling_ends_with_the_session<C: LockTest>(server: &Server) {
        let key = unique_key("poll_killed");
        let (mut holder, mut observer) = (C::open(server).await, C::observer(server));
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let proxy = Proxy::start(server);
        let poller = on_connection(C::open_url(proxy.url()).await, {
            let key = key.clone();
            async move |mut conn: C, _| {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(10));
                lock.acquire().await.map(drop).is_ok()
            }
        })
        .await;
        proxy.reset();
        wait_for("some polls", || proxy.round_trips() > 5);
        let id = poller.id;
        observer.kill(id);
        assert!(!poller.join().await);
        assert!(!holders(&mut observer, &key).contains(&id));
        held.release().await.expect("a release");
        assert_free(&mut observer, &key);
    }
}

/// Builds an index under a lock, step by step.
#[both]
async fn build_index(
    conn: PgConnection,
    name: &'static str,
    key: &str,
) -> Background<PgConnection> {
    let key = LockKey::from(key);
    let build = on_connection(conn, async move |mut conn: PgConnection, stage: Stage| {
        let lock = conn.advisory_lock(&key).acquire().await;
        let mut lock = lock.expect("a free lock");
        stage.say("locked");
        stage.pause().await;
        let sql = format!("CREATE INDEX CONCURRENTLY {name} ON indexed (id)");
        lock.execute_sql(&sql).await;
        stage.say("built");
        stage.pause().await;
        lock.release().await.expect("a release");
        conn
    });
    let build = build.await;
    build.says("locked");
    build
}

#[both]
on_postgres! {
    /// It waits for all old snapshots of its database.
    async fn an_index_is_built_concurrently_while_others_poll_or_wait_for_the_lock(server: &Server) {
        let database = FreshDatabase::<diesel::PgConnection>::create(server);
        let server = database.server.clone();
        let key = unique_key("index");
        let mut observer = PgConnection::observer(&server);
        observer.execute_sql("CREATE TABLE indexed (id int); INSERT INTO indexed VALUES (1)");

        let build = build_index(PgConnection::open(&server).await, "while_polled", &key).await;
        let proxy = Proxy::start(&server);
        let poller = on_connection(PgConnection::open_url(proxy.url()).await, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(5)).acquire().await;
                lock.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        proxy.reset();
        wait_for("some polls", || proxy.round_trips() > 5);
        build.go_on();
        build.says("built");
        assert!(!poller.is_finished(), "it polls all the time");
        build.go_on();
        let builder = build.join().await;
        poller.join().await;

        let build = build_index(builder, "while_queued", &key).await;
        let waiter = in_background(&server, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let lock = conn.advisory_lock(&key).acquire().await;
                lock.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        waiter.waits(&mut observer);
        build.go_on();
        // At the latest when the turn is over, and before either looks for a deadlock, which it is.
        build.says("built");
        assert!(!waiter.is_finished(), "it waits all the time");
        build.go_on();
        drop(build.join().await);
        waiter.join().await;
    }

    async fn a_poller_has_no_snapshot_between_its_questions(server: &Server) {
        let key = unique_key("snapshot");
        let (mut holder, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let poller = in_background(server, {
            let key = key.clone();
            async move |mut conn: PgConnection, _| {
                let lock = conn.advisory_lock(&key).poll_every(Duration::from_millis(50)).acquire().await;
                lock.expect("the lock").release().await.expect("a release");
            }
        })
        .await;
        let idle = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND state = 'idle' \
             AND backend_xmin IS NULL AND query LIKE '%pg_try_advisory_lock%'",
            poller.id
        );
        for _ in 0..3 {
            wait_for("the poller to be idle", || observer.number(&idle) == Some(1));
        }
        assert!(!poller.is_finished());
        held.release().await.expect("a release");
        poller.join().await;
    }
}
