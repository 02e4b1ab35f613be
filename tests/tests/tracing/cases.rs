//! Written once: `super` has the sync or the async names.

use std::time::Duration;

use diesel_migrations::FileBasedMigrations;
use dlock_tests::{Kind, Server, TestConnection, unique_key, wait_for};
use tracing::Level;

use super::*;
use crate::collect::{Told, shown, spans, told as all_told, watch};

const LOST: &str = "lock lost";
const SLOW: &str = "waiting for more than a second";

/// On a slow machine, every wait may pass a second.
fn told(key: &str) -> Vec<Told> {
    let mut told = all_told(key);
    told.retain(|told| told.message() != SLOW);
    told
}

fn messages(told: &[Told]) -> Vec<&str> {
    told.iter().map(Told::message).collect()
}

/// The name of a kind of server.
fn server_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "PostgreSQL",
        Kind::Mysql => "MySQL or MariaDB",
        Kind::Sqlite => "SQLite",
    }
}

#[both]
on_every_server! {
    async fn each_request_is_a_span_with_its_outcome<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_outcome");
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let limit = Duration::from_millis(50);
        assert!(conn.advisory_lock(&key).try_acquire().await.expect("an answer").is_none());
        assert!(conn.advisory_lock(&key).timeout(limit).try_acquire().await.expect("an answer").is_none());
        let late = conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop);
        let Err(Error::Timeout { holders, .. }) = late else { panic!("{late:?}") };
        held.release().await.expect("a release");
        conn.advisory_lock(&key).poll_every(limit).acquire().await.expect("a free lock").release().await.expect("a release");
        conn.advisory_lock(&key).run(async |_conn| Ok::<(), Error>(())).await.expect("a free lock");

        let shown = shown(&key);
        let spans = spans("dlock.acquire", &shown);
        let seen: Vec<_> = spans.iter().map(|span| (span.of("wait"), span.of("outcome"))).collect();
        assert_eq!(seen, [
            ("no limit", "acquired"),
            ("try", "taken"),
            ("at most 50ms", "taken"),
            ("at most 50ms", "timeout"),
            ("no limit, every 50ms", "acquired"),
            ("no limit", "acquired"),
        ]);
        for span in &spans {
            assert_eq!((span.of("server"), span.of("mode")), (server_name(server.kind), "exclusive"));
            assert_eq!((span.of("permits"), span.of("error")), ("", ""));
        }
        let waited = |number: usize| spans[number].of("waited_ms").parse::<u64>().expect("a number");
        assert!(waited(2) >= 50 && waited(3) >= 50, "{spans:?}");
        // The timeout tells who has the lock.
        let told = told(&shown);
        assert_eq!(messages(&told), ["gave up waiting"]);
        assert_eq!(told[0].level, Level::INFO);
        assert_eq!(told[0].fields.of("held_by"), holders[0].to_string());
        assert_eq!(told[0].fields.of("waited_for_by"), "");
        assert_eq!(self::spans("dlock.release", &shown).len(), 3);
    }

    async fn several_locks_and_semaphores_are_spans<C: Lockable>(server: &Server) {
        watch();
        let (one, other) = (unique_key("trace_one"), unique_key("trace_other"));
        let mut conn = C::open(server).await;
        conn.advisory_locks([&one, &other]).acquire().await.expect("free locks").release().await.expect("a release");
        let both = format!("{}, {}", shown(&one), shown(&other));
        let spans = crate::collect::spans("dlock.acquire", &both);
        assert_eq!(spans.len(), 1);
        assert_eq!((spans[0].of("outcome"), spans[0].of("permits")), ("acquired", ""));

        let mut inside = C::open(server).await;
        let permit = inside.advisory_semaphore(&one, 1).acquire().await.expect("a free slot");
        assert!(conn.advisory_semaphore(&one, 1).try_acquire().await.expect("an answer").is_none());
        permit.release().await.expect("a release");
        let spans = crate::collect::spans("dlock.acquire", &shown(&one));
        let seen: Vec<_> = spans.iter().map(|span| (span.of("permits"), span.of("outcome"))).collect();
        assert_eq!(seen, [("1", "acquired"), ("1", "taken")]);
    }

    async fn a_transaction_and_its_lock_are_a_span<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_transaction");
        let mut conn = C::open(server).await;
        conn.advisory_lock(&key).transaction(async |_conn| Ok::<(), Error>(())).await.expect("a free lock");
        let spans = spans("dlock.acquire", &shown(&key));
        assert_eq!(spans.len(), 1);
        assert_eq!(spans[0].of("outcome"), "acquired");
    }

    async fn a_wait_of_more_than_a_second_is_told_while_it_waits<C: Lockable>(server: &Server) {
        watch();
        let (key, short) = (unique_key("trace_slow"), unique_key("trace_short"));
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let held = holder.advisory_locks([&key, &short]).acquire().await.expect("free locks");
        // With a limit of less than a second there is nothing to tell.
        conn.advisory_lock(&short).timeout(Duration::from_millis(900)).acquire().await.map(drop).expect_err("it is taken");
        let waiter = start({
            let key = key.clone();
            async move || {
                let lock = AdvisoryLock::new(Box::new(conn), key);
                lock.acquire().await.expect("a free lock").release().await.map(drop).expect("a release");
            }
        });
        let shown = shown(&key);
        wait_for("the wait to be told", || !all_told(&shown).is_empty());
        let told = all_told(&shown);
        assert_eq!(messages(&told), [SLOW]);
        let span = told[0].span.as_ref().expect("it is in the span of its request");
        assert_eq!((told[0].level, span.name), (Level::INFO, "dlock.acquire"));
        assert_eq!(span.fields.of("outcome"), "", "it still waits");
        held.release().await.expect("a release");
        waiter.join().await;
        let spans = spans("dlock.acquire", &shown);
        assert_eq!(spans[0].of("outcome"), "acquired");
        let waited: u64 = spans[0].of("waited_ms").parse().expect("a number");
        assert!(waited >= 1000, "{waited}");
        assert_eq!(messages(&all_told(&shown)), [SLOW], "once");
        assert_eq!(messages(&all_told(&crate::collect::shown(&short))), ["gave up waiting"]);
    }

    async fn a_managed_lock_is_a_span_and_its_wait_is_told<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_managed");
        let locks = manager::<C>(server).build();
        let mut other = C::open(server).await;
        let held = other.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(locks.lock(&key).try_acquire().await.expect("an answer").is_none());
        let limit = Duration::from_millis(50);
        locks.lock(&key).timeout(limit).acquire().await.map(drop).expect_err("it is taken");
        let waiter = start({
            let (locks, key) = (locks.clone(), key.clone());
            async move || locks.lock(key).acquire().await.expect("a free lock").release().await.expect("a release")
        });
        let shown = shown(&key);
        let slow = || all_told(&shown).into_iter().find(|told| told.message() == SLOW);
        wait_for("the wait to be told", || slow().is_some());
        held.release().await.expect("a release");
        waiter.join().await;
        let spans = spans("dlock.acquire", &shown);
        let seen: Vec<_> = spans.iter().map(|span| (span.of("wait"), span.of("outcome"))).collect();
        // The first one is not managed.
        assert_eq!(seen, [
            ("no limit", "acquired"),
            ("try", "taken"),
            ("at most 50ms", "timeout"),
            ("no limit", "acquired"),
        ]);
        assert!(spans.iter().all(|span| span.of("server") == server_name(server.kind)));
        // It names nobody if the manager did not come to ask in time.
        assert_eq!(messages(&told(&shown)), ["gave up waiting"]);
        locks.close().await;
    }
}

#[both]
on_every_network_server! {
    async fn a_lock_whose_session_was_ended_is_told<C: Lockable>(server: &Server) {
        watch();
        let (asked, released) = (unique_key("trace_asked"), unique_key("trace_released"));
        let listed = unique_key("trace_listed");
        let mut observer = C::observer(server);
        for key in [&asked, &listed, &released] {
            let mut conn = C::open(server).await;
            let id = conn.backend_id().await;
            let mut lock = conn.advisory_lock(key).acquire().await.expect("a free lock");
            assert!(told(&shown(key)).is_empty(), "all is well");
            observer.kill(id);
            wait_for("the end of the session", || !observer.is_connected(id));
            if key == &asked {
                lock.is_held().await.expect_err("the session is gone");
                let told = told(&shown(key));
                assert_eq!(messages(&told), [LOST]);
                assert_eq!(told[0].level, Level::WARN);
            } else if key == &listed {
                let error = lock.holders().await.expect_err("the session is gone");
                assert!(matches!(error, Error::Lost { .. }), "{error:?}");
                assert_eq!(messages(&told(&shown(key))), [LOST]);
            } else {
                lock.release().await.map(drop).expect_err("the session is gone");
                let told = told(&shown(key));
                assert!(messages(&told).contains(&LOST), "{told:?}");
                let span = told[0].span.as_ref().expect("it is in a span");
                assert_eq!(span.name, "dlock.release");
            }
        }
    }

    async fn a_managed_lock_that_is_lost_is_told<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_managed_lost");
        let mut observer = C::observer(server);
        let locks = manager::<C>(server).build();
        let held = locks.lock(&key).acquire().await.expect("a free lock");
        let shown = shown(&key);
        assert!(told(&shown).is_empty(), "all is well");
        let id = dlock_diesel::AdvisoryLockExt::advisory_lock(&mut observer, &key).holders().expect("the holder")[0].backend_id;
        observer.kill(id);
        wait_for("the loss to be told", || !told(&shown).is_empty());
        let told = told(&shown);
        assert_eq!((messages(&told), told[0].level), (vec![LOST], Level::WARN));
        held.release().await.expect_err("it is lost");
        locks.close().await;
    }

    async fn what_was_released_behind_the_guard_is_told_with_what_became_of_the_connection<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_not_held");
        let mut conn = C::open(server).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let release_all = match server.kind {
            Kind::Postgres => "SELECT pg_advisory_unlock_all()",
            _ => "DO RELEASE_ALL_LOCKS()",
        };
        lock.execute_sql(release_all).await;
        let released = lock.release().await.map(drop);
        assert!(matches!(released, Err(Error::NotHeld { .. })), "{released:?}");
        let told = told(&shown(&key));
        assert_eq!(messages(&told), ["connection marked broken", LOST]);
        assert!(told.iter().all(|told| told.level == Level::WARN));
    }
}

#[both]
on_postgres! {
    async fn locks_of_a_transaction_and_shared_ones_are_spans(server: &Server) {
        watch();
        let key = unique_key("trace_xact");
        let mut conn = PgConnection::open(server).await;
        conn.transaction(async |conn| {
            conn.advisory_xact_lock(&key).shared().acquire().await?;
            conn.advisory_xact_lock(&key).shared().try_acquire().await.map(drop)
        }).await.expect("a free lock");
        // Refused before anything is sent.
        conn.advisory_xact_lock(&key).acquire().await.expect_err("no transaction is open");
        let spans = spans("dlock.acquire", &shown(&key));
        let seen: Vec<_> = spans.iter().map(|span| (span.of("mode"), span.of("outcome"))).collect();
        assert_eq!(seen, [("shared", "acquired"), ("shared", "acquired"), ("exclusive", "refused")]);
        assert!(spans[2].of("error").contains("none is open"), "{spans:?}");
    }
}

#[both]
on_every_server! {
    async fn the_span_of_a_long_wait_names_who_has_the_lock<C: Lockable>(server: &Server) {
        watch();
        let mut holder = C::open(server).await;
        // Elsewhere several locks would be given back for the question.
        let ways = match server.kind {
            Kind::Postgres => &["lock", "transaction", "semaphore", "several"][..],
            _ => &["lock", "transaction", "semaphore"],
        };
        for way in ways.iter().copied() {
            let key = unique_key("trace_held_by");
            // In the order of every server another lock comes first now and then, and now and then not.
            let others = [unique_key("trace_held_by"), unique_key("trace_held_by")];
            let keys = [&others[0], &key, &others[1]];
            let mut conn = C::open(server).await;
            let held = match way {
                "semaphore" => Ok(holder.advisory_semaphore(&key, 1).acquire().await.expect("a free slot")),
                _ => Err(holder.advisory_lock(&key).acquire().await.expect("a free lock")),
            };
            let holders = match way {
                "semaphore" => conn.advisory_semaphore(&key, 1).holders().await,
                _ => conn.advisory_lock(&key).holders().await,
            };
            let id = holders.expect("the holder")[0].backend_id.to_string();
            let waiter = start({
                let (key, keys) = (key.clone(), keys.map(Clone::clone));
                async move || match way {
                    "lock" => conn.advisory_lock(&key).acquire().await.expect("the lock").release().await.map(drop),
                    "transaction" => conn.advisory_lock(&key).transaction(async |_conn| Ok::<(), Error>(())).await,
                    "several" => conn.advisory_locks(&keys).acquire().await.expect("the locks").release().await.map(drop),
                    _ => conn.advisory_semaphore(&key, 1).acquire().await.expect("a slot").release().await.map(drop),
                }
            });
            let shown = match way {
                "several" => keys.map(|key| shown(key)).join(", "),
                _ => shown(&key),
            };
            let held_by = || spans("dlock.acquire", &shown).last().map(|span| span.of("held_by").to_owned());
            wait_for(format!("{way}: {id} to be named"), || held_by().is_some_and(|held_by| held_by.contains(&id)));
            match held {
                Ok(permit) => permit.release().await.map(drop).expect("a release"),
                Err(lock) => lock.release().await.map(drop).expect("a release"),
            }
            waiter.join().await.expect("the lock");
            let messages = all_told(&shown);
            assert!(messages.iter().all(|told| told.message() == SLOW), "{way}: {messages:?}");
        }
    }

    async fn the_span_of_a_long_wait_for_a_managed_lock_names_who_has_it<C: Lockable>(server: &Server) {
        watch();
        let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
        let key = unique_key("trace_managed_by");
        let locks = manager::<C>(server).build();
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().await.expect("the holder");
        let id = holders[0].backend_id.to_string();
        let waiter = start({
            let (locks, key) = (locks.clone(), key.clone());
            async move || locks.lock(key).acquire().await.expect("a free lock").release().await.expect("a release")
        });
        let shown = shown(&key);
        let held_by = || spans("dlock.acquire", &shown).last().map(|span| span.of("held_by").to_owned());
        wait_for(format!("{id} to be named"), || held_by().is_some_and(|held_by| held_by.contains(&id)));
        held.release().await.expect("a release");
        waiter.join().await;
        locks.close().await;
    }
}

#[both]
on_postgres! {
    async fn a_session_that_dlock_has_ended_is_told(server: &Server) {
        watch();
        let key = unique_key("trace_ended");
        let mut conn = PgConnection::open(server).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        // Diesel does not know of it, and an aborted transaction refuses the release.
        lock.execute_sql("BEGIN").await;
        lock.batch_execute("SELECT 1 / 0").await.expect_err("division by zero");
        lock.release().await.map(drop).expect_err("it is refused");
        let told = told(&shown(&key));
        assert!(messages(&told).iter().any(|told| told.starts_with("session ended")), "{told:?}");
    }

    async fn a_transaction_that_cannot_be_rolled_back_tells_which_lock_it_was_under(server: &Server) {
        watch();
        let key = unique_key("trace_rollback");
        let mut conn = PgConnection::open(server).await;
        let end = format!("SELECT pg_terminate_backend({})", conn.backend_id().await);
        let mut other = PgConnection::open(server).await;
        let body = async |_conn: &mut PgConnection| {
            other.execute_sql(&end).await;
            Err::<(), _>(diesel::result::Error::NotFound)
        };
        conn.advisory_lock(&key).transaction(body).await.expect_err("the body's error");
        let told = told(&shown(&key));
        assert!(messages(&told).iter().any(|told| told.starts_with("session ended")), "{told:?}");
    }
}

#[both]
on_postgres! {
    async fn migrations_that_wait_tell_who_migrates(server: &Server) {
        watch();
        let key = unique_key("trace_migrations");
        let (mut holder, conn) = (PgConnection::open(server).await, PgConnection::open(server).await);
        let id = holder.backend_id().await;
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let folder = tempfile::tempdir().expect("a folder");
        let none = FileBasedMigrations::from_path(folder.path()).expect("an empty folder");
        let migrating = start({
            let key = key.clone();
            async move || {
                let lock = AdvisoryLock::new(Box::new(conn), key);
                lock.run_pending_migrations(none).await.map(drop)
            }
        });
        let shown = shown(&key);
        wait_for("the wait to be told", || !told(&shown).is_empty());
        held.release().await.expect("a release");
        migrating.join().await.expect("none to apply");
        let told = told(&shown);
        let start = format!("waiting to migrate: lock {shown} was not free within ");
        let (notice, named) = (told[0].message(), format!("s: held by {id}"));
        assert!(notice.starts_with(&start) && notice.contains(&named), "{notice}");
        assert_eq!(told[0].level, Level::WARN);
        let spans = spans("dlock.acquire", &shown);
        assert_eq!((spans.len(), spans[1].of("outcome")), (2, "acquired"), "one span, however often it asks");
    }
}
