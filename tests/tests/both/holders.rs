//! Who has a lock, as far as the server lets this user see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dlock_core::{Holder, LockKey, Mode};
use dlock_tests::{Kind, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);

/// Times come from the server's clock, on MySQL and MariaDB in whole seconds.
const CLOCK: Duration = Duration::from_secs(3);

#[track_caller]
fn assert_plausible(holder: &Holder, started: SystemTime) {
    let since = holder.since.expect("a time");
    assert!(since >= started - CLOCK, "{since:?}, {started:?}");
    assert!(since <= SystemTime::now() + CLOCK, "{since:?}");
}

/// The user of the server's URL.
fn user_of(server: &Server) -> Option<&str> {
    let (_, rest) = server.url.split_once("://")?; // SQLite has none
    rest.split([':', '@']).next()
}

/// Waits for the lock and gives it back.
#[both]
async fn wait_and_release<C: LockTest>(server: &Server, key: &str) -> Background<()> {
    let key = key.to_owned();
    in_background(server, async move |mut conn: C, _| {
        let lock = conn.advisory_lock(&key).acquire().await;
        lock.expect("the lock").release().await.expect("a release");
    })
    .await
}

/// Whether the server tells this connection who waits: PostgreSQL always, the others where they collect it.
fn sees_waiters<O: TestConnection>(observer: &mut O) -> bool {
    match O::KIND {
        Kind::Postgres | Kind::Sqlite => true,
        Kind::Mysql => observer.number(
            "SELECT COUNT(*) FROM performance_schema.setup_instruments \
             WHERE NAME = 'wait/lock/metadata/sql/mdl' AND ENABLED = 'YES' AND @@performance_schema = 1",
        ) == Some(1),
    }
}

#[both]
on_every_server! {
    async fn nobody_holds_a_free_lock<C: LockTest>(server: &Server) {
        let mut conn = C::open(server).await;
        assert_eq!(conn.advisory_lock(unique_key("free")).holders().await.expect("holders"), []);
    }

    async fn the_holder_is_told_with_its_user_and_since_when<C: LockTest>(server: &Server) {
        let key = unique_key("holder");
        let started = SystemTime::now();
        let (mut holder, mut other) = (C::open(server).await, C::open(server).await);
        let id = C::holder_id(holder.backend_id().await);
        let mut lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let from_outside = other.advisory_lock(&key).holders().await.expect("holders");
        let from_inside = lock.holders().await.expect("holders");
        for holders in [from_outside, from_inside] {
            let [holder] = &holders[..] else {
                panic!("{holders:?}");
            };
            assert_eq!(holder.backend_id, id);
            assert_eq!(holder.user.as_deref(), user_of(server));
            assert_eq!(holder.mode, Mode::Exclusive);
            assert!(holder.granted);
            assert_plausible(holder, started);
            assert!(holder.to_string().starts_with(&id.to_string()), "{holder}");
        }
        lock.release().await.expect("a release");
        assert_eq!(other.advisory_lock(&key).holders().await.expect("holders"), []);
    }

    async fn waiters_come_after_the_holder_in_their_order<C: LockTest>(server: &Server) {
        let key = unique_key("waiters");
        let started = SystemTime::now();
        let (mut holder, mut other) = (C::open(server).await, C::open(server).await);
        let mut observer = C::observer(server);
        let id = holder.backend_id().await;
        let mut lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let mut waiters = Vec::new();
        for _ in 0..2 {
            let waiter = wait_and_release::<C>(server, &key).await;
            waiter.waits(&mut observer);
            waiters.push(waiter);
        }
        let from_outside = other.advisory_lock(&key).holders().await.expect("holders");
        let from_inside = lock.holders().await.expect("holders");
        for holders in [from_outside, from_inside] {
            let told: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.granted)).collect();
            if sees_waiters(&mut observer) {
                let mut told = told;
                if C::KIND == Kind::Mysql {
                    // Its times are whole seconds.
                    told[1..].sort_by_key(|(id, _)| waiters.iter().position(|waiter| waiter.id == *id));
                }
                let expected = [(id, true), (waiters[0].id, false), (waiters[1].id, false)];
                assert_eq!(told, expected.map(|(id, granted)| (C::holder_id(id), granted)));
            } else {
                assert_eq!(told, [(id, true)]);
            }
            for holder in &holders {
                assert_eq!(holder.user.as_deref(), user_of(server));
                assert_eq!(holder.mode, Mode::Exclusive);
                assert_plausible(holder, started);
            }
        }
        lock.release().await.expect("a release");
        for waiter in waiters {
            waiter.join().await;
        }
        assert_free(&mut observer, &key);
    }

    async fn keys_that_look_alike_have_holders_of_their_own<C: LockTest>(server: &Server) {
        let key = unique_key("alike");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let _lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        for other in [format!("{key} "), format!(" {key}"), key.to_uppercase(), format!("{key}\0"), key.replace('/', "_")] {
            assert_eq!(conn.advisory_lock(&other).holders().await.expect("holders"), [], "{other:?}");
        }
    }

    async fn a_timeout_names_the_key_the_wait_and_the_holder<C: LockTest>(server: &Server) {
        let key = unique_key("culprit");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        if C::KIND == Kind::Postgres {
            holder.execute_sql("SET application_name = 'the culprit'").await;
        }
        let id = C::holder_id(holder.backend_id().await);
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let errors = [
            conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop),
            conn.advisory_lock(&key).timeout(SHORT).poll_every(SHORT).acquire().await.map(drop),
            conn.advisory_lock(&key).timeout(SHORT).run(async |_| Ok(())).await,
            conn.advisory_lock(&key).timeout(SHORT).transaction(async |_| Ok(())).await,
        ];
        for error in errors {
            let message = error.as_ref().expect_err("it is held").to_string();
            let Err(Error::Timeout { key: timed_out, waited, holders, .. }) = error else {
                panic!("{error:?}");
            };
            assert_eq!(timed_out, LockKey::from(&key));
            assert!(waited >= SHORT, "{waited:?}");
            let holders: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.granted)).collect();
            assert_eq!(holders, [(id, true)]);
            assert!(message.starts_with(&format!("lock {key:?} was not free within ")), "{message}");
            assert!(message.contains(&format!(": held by {id}")), "{message}");
            if C::KIND == Kind::Postgres {
                assert!(message.contains("the culprit"), "{message}");
            }
        }
        held.release().await.expect("a release");
        assert_clean(&mut conn, &mut C::observer(server)).await;
    }
}

#[both]
on_every_network_server! {
    /// A server that looks for the holder twice may find one and then none.
    async fn holders_that_come_and_go_are_no_error<C: LockTest>(server: &Server) {
        let key = unique_key("come_and_go");
        let user = TestUser::create(C::observer(server), server, "");
        let mut conn = C::open_url(user.url()).await;
        let asked = Arc::new(AtomicBool::new(false));
        let busy = in_background(server, {
            let (key, asked) = (key.clone(), Arc::clone(&asked));
            async move |mut conn: C, _| {
                while !AtomicBool::load(&asked, Ordering::Relaxed) {
                    let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
                    lock.release().await.expect("a release");
                }
            }
        })
        .await;
        let mut failed = None;
        for _ in 0..500 {
            match conn.advisory_lock(&key).holders().await {
                Ok(holders) => failed = failed.or((holders.len() > 1).then(|| format!("{holders:?}"))),
                Err(error) => failed = failed.or(Some(error.to_string())),
            }
        }
        asked.store(true, Ordering::Relaxed);
        busy.join().await;
        assert_eq!(failed, None);
    }

    async fn a_user_without_privileges_sees_less_and_no_error<C: LockTest>(server: &Server) {
        let key = unique_key("restricted");
        let user = TestUser::create(C::observer(server), server, "");
        let (mut holder, mut conn) = (C::open(server).await, C::open_url(user.url()).await);
        let id = holder.backend_id().await;
        let lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().await.expect("no error");
        let [seen] = &holders[..] else {
            panic!("{holders:?}");
        };
        assert_eq!((seen.backend_id, seen.mode, seen.granted), (id, Mode::Exclusive, true));
        assert_eq!(seen.since, None, "{seen:?}");
        if C::KIND == Kind::Mysql {
            assert_eq!(seen.user, None);
        }
        let error = conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(&error, Err(Error::Timeout { holders, .. }) if holders.len() == 1), "{error:?}");
        lock.release().await.expect("a release");
        // It can lock, too, and sees itself.
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let own = lock.holders().await.expect("no error");
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].user.as_deref(), Some(&*user));
    }
}

#[both]
on_every_network_server! {
    async fn what_is_named_to_end_a_holder_ends_it<C: LockTest>(server: &Server) {
        let key = unique_key("how_to_end");
        let mut observer = C::observer(server);
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let id = holder.backend_id().await;
        let lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let error = conn.advisory_lock(&key).timeout(Duration::ZERO).acquire().await.map(drop).expect_err("held");
        let message = error.to_string();
        let (_, statement) = message.split_once("; to end that session: ").expect("a remedy");
        observer.execute_sql(statement);
        wait_for("the end of the session", || !observer.is_connected(id));
        assert_free(&mut observer, &key);
        drop(lock);
    }
}

#[both]
on_postgres! {
    async fn application_names_are_told(server: &Server) {
        let key = unique_key("application");
        let (mut holder, mut conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        holder.execute_sql("SET application_name = 'billing'").await;
        let id = holder.backend_id().await;
        let lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().await.expect("holders");
        assert_eq!(holders[0].application_name.as_deref(), Some("billing"));
        assert_eq!(holders[0].to_string(), format!("{id} (billing)"));
        let error = conn.advisory_lock(&key).timeout(Duration::ZERO).acquire().await.map(drop).expect_err("held");
        let message = error.to_string();
        assert!(message.contains(&format!(": held by {id} (billing), busy or idle since 20")), "{message}");
        let end = format!(" UTC; to end that session: SELECT pg_terminate_backend({id})");
        assert!(message.ends_with(&end), "{message}");
        lock.release().await.expect("a release");
    }

    async fn shared_holders_and_a_waiting_writer_are_told_apart(server: &Server) {
        let key = unique_key("modes");
        let mut observer = PgConnection::observer(server);
        let (mut first, mut second) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let mut other = PgConnection::open(server).await;
        let mut ids = [first.backend_id().await, second.backend_id().await];
        ids.sort_unstable();
        let readers = [
            first.advisory_lock(&key).shared().acquire().await.expect("a shared lock"),
            second.advisory_lock(&key).shared().acquire().await.expect("a shared lock"),
        ];
        let writer = wait_and_release::<PgConnection>(server, &key).await;
        writer.waits(&mut observer);
        let holders = other.advisory_lock(&key).holders().await.expect("holders");
        let told: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.mode, holder.granted)).collect();
        assert_eq!(
            told,
            [
                (ids[0], Mode::Shared, true),
                (ids[1], Mode::Shared, true),
                (writer.id, Mode::Exclusive, false),
            ]
        );
        for reader in readers {
            reader.release().await.expect("a release");
        }
        writer.join().await;
    }

    async fn a_transactions_lock_has_holders_too(server: &Server) {
        let key = unique_key("xact");
        let (mut holder, mut conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let id = holder.backend_id().await;
        let transaction = holder.advisory_lock(&key).transaction(async |holder| {
            let from_inside = holder.advisory_xact_lock(&key).holders().await?;
            let from_outside = conn.advisory_lock(&key).holders().await?;
            for holders in [from_inside, from_outside] {
                assert_eq!(holders.iter().map(|holder| holder.backend_id).collect::<Vec<_>>(), [id]);
            }
            Ok::<_, Error>(())
        });
        transaction.await.expect("a transaction");
    }

    async fn numbers_and_pairs_are_not_mixed_up(server: &Server) {
        let seed = unique_key("numbers");
        let number = seed.bytes().fold(-3, |hash: i64, byte| hash.wrapping_mul(41).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let (mut holder, mut conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let lock = holder.advisory_lock(number).acquire().await.expect("a free lock");
        assert_eq!(conn.advisory_lock(number).holders().await.expect("holders").len(), 1);
        assert_eq!(conn.advisory_lock(pair).holders().await.expect("holders"), []);
        lock.release().await.expect("a release");
        let _lock = holder.advisory_lock(pair).acquire().await.expect("a free lock");
        assert_eq!(conn.advisory_lock(pair).holders().await.expect("holders").len(), 1);
        assert_eq!(conn.advisory_lock(number).holders().await.expect("holders"), []);
    }
}

#[both]
on_mysql! {
    async fn there_are_no_application_names(server: &Server) {
        let key = unique_key("application");
        let (mut holder, mut conn) = (MysqlConnection::open(server).await, MysqlConnection::open(server).await);
        let id = holder.backend_id().await;
        let _lock = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().await.expect("holders");
        assert_eq!(holders[0].application_name, None);
        assert_eq!(holders[0].to_string(), format!("{id} (user {})", user_of(server).expect("a user")));
    }
}
