//! How a wait ends that is not granted: by a deadlock, by a cancel, by the end of the session; and what is left after it.

use std::sync::mpsc::channel;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_tests::{PATIENCE, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

#[both]
on_every_server! {
    async fn one_of_two_in_a_deadlock_is_told_and_keeps_its_lock_and_the_other_goes_on<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        // A limit makes another statement of it, on some servers.
        for limit in [None, Some(LONG)] {
            let keys = [unique_key("deadlock_a"), unique_key("deadlock_b")];
            let (told, who_was_told) = channel();
            let mut actors = Vec::new();
            for index in [0, 1] {
                let (own, other) = (keys[index].clone(), keys[1 - index].clone());
                let told = told.clone();
                let actor = in_background(server, async move |mut conn: C, stage: Stage| {
                    let mut lock = conn.advisory_lock(&own).acquire().await.expect("a free lock");
                    stage.pause().await;
                    let second = lock.advisory_lock(&other);
                    let second = match limit {
                        Some(limit) => second.timeout(limit),
                        None => second,
                    };
                    let won = match second.acquire().await {
                        Ok(second) => {
                            told.send(index).expect("the test listens");
                            stage.pause().await;
                            second.release().await.expect("a release");
                            true
                        }
                        Err(Error::Deadlock { key, .. }) => {
                            told.send(index).expect("the test listens");
                            stage.pause().await;
                            assert_eq!(key, LockKey::from(&other));
                            false
                        }
                        Err(error) => panic!("{error:?}"),
                    };
                    lock.release().await.expect("its own lock is held");
                    won
                });
                actors.push(actor.await);
            }
            for (actor, key) in actors.iter().zip(&keys) {
                actor.holds(&mut observer, key);
            }
            // One after the other: of two that ask at the same moment, MySQL and MariaDB tell both.
            actors[0].go_on();
            actors[0].waits(&mut observer);
            actors[1].go_on();
            // The other one is told nothing before this one releases.
            let victim = who_was_told.recv_timeout(PATIENCE).expect("a victim");
            let winner = 1 - victim;
            actors[winner].waits(&mut observer);
            for (actor, key) in actors.iter().zip(&keys) {
                assert_held_by(&mut observer, key, actor.id);
            }
            actors[victim].go_on();
            assert_eq!(who_was_told.recv_timeout(PATIENCE), Ok(winner));
            for key in &keys {
                assert_held_by(&mut observer, key, actors[winner].id);
            }
            actors[winner].go_on();
            for (index, actor) in actors.into_iter().enumerate() {
                assert_eq!(actor.join().await, index == winner);
            }
            for key in &keys {
                assert_free(&mut observer, key);
            }
        }
    }

    async fn a_healthy_connection_does_not_count_as_broken_after_an_error<C: LockTest>(server: &Server) {
        let key = unique_key("healthy");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        assert!(try_lock(&mut observer, &key));
        let error = conn.advisory_lock(&key).timeout(SHORT).acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        assert!(conn.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        let error = conn.advisory_lock("").acquire().await.map(drop);
        assert!(matches!(error, Err(Error::InvalidKey(_))), "{error:?}");
        unlock(&mut observer, &key);
        assert_clean(&mut conn, &mut observer).await;
    }
}

#[both]
on_every_network_server! {
    /// Some clients never come back from a prepared statement that has failed before, so it is cancelled twice.
    async fn a_cancelled_wait_is_interrupted_and_leaves_nothing<C: LockTest>(server: &Server) {
        let (outer, key) = (unique_key("cancel_outer"), unique_key("cancel"));
        let mut observer = C::observer(server);
        for limit in [None, Some(LONG)] {
            assert!(try_lock(&mut observer, &key));
            let waiter = in_background(server, {
                let (outer, key) = (outer.clone(), key.clone());
                async move |mut conn: C, stage: Stage| {
                    let mut outer = conn.advisory_lock(&outer).acquire().await.expect("a free lock");
                    for cancelled in [true, true, false] {
                        let lock = outer.advisory_lock(&key);
                        let lock = match limit {
                            Some(limit) => lock.timeout(limit),
                            None => lock,
                        };
                        match lock.acquire().await {
                            Err(Error::Interrupted { key: interrupted, .. }) if cancelled => {
                                assert_eq!(interrupted, LockKey::from(&key));
                            }
                            Ok(lock) if !cancelled => drop(lock.release().await.expect("a release")),
                            other => panic!("{other:?}"),
                        }
                        assert_eq!(outer.number("SELECT 1").await, Some(1));
                        stage.say(if cancelled { "cancelled" } else { "granted" });
                        stage.pause().await;
                    }
                    outer.release().await.expect("the outer lock is held");
                }
            })
            .await;
            for _ in 0..2 {
                waiter.waits(&mut observer);
                observer.cancel(waiter.id);
                waiter.says("cancelled");
                assert!(!observer.is_waiting(waiter.id));
                assert_held_by(&mut observer, &outer, waiter.id);
                unlock(&mut observer, &key);
                assert_free(&mut observer, &key);
                assert!(try_lock(&mut observer, &key));
                waiter.go_on();
            }
            waiter.waits(&mut observer);
            unlock(&mut observer, &key);
            waiter.says("granted");
            assert_held_by(&mut observer, &outer, waiter.id);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &key);
            assert_free(&mut observer, &outer);
        }
    }

    async fn a_cancelled_wait_inside_a_transaction_leaves_it_open<C: LockTest>(server: &Server) {
        let (outer, key) = (unique_key("cancel_inside_outer"), unique_key("cancel_inside"));
        let table = Table::new(server);
        let mut observer = C::observer(server);
        for under_another in [false, true] {
            assert!(try_lock(&mut observer, &key));
            let waiter = in_background(server, {
                let (outer, key, table) = (outer.clone(), key.clone(), table.clone());
                async move |mut conn: C, stage: Stage| {
                    let transaction = conn.transaction(async |conn| {
                        conn.batch_execute(&table.insert(1)).await?;
                        if under_another {
                            let mut lock = conn.advisory_lock(&outer).inside_transaction().acquire().await?;
                            let error = lock.advisory_lock(&key).inside_transaction().acquire().await.map(drop);
                            assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                            assert_eq!(lock.number("SELECT 1").await, Some(1));
                            stage.say("cancelled");
                            stage.pause().await;
                            lock.release().await?;
                        } else {
                            let error = conn.advisory_lock(&key).inside_transaction().acquire().await.map(drop);
                            assert!(matches!(error, Err(Error::Interrupted { .. })), "{error:?}");
                            stage.say("cancelled");
                            stage.pause().await;
                        }
                        conn.batch_execute(&table.insert(2)).await
                    });
                    transaction.await.expect("a commit");
                    assert_eq!(conn.number("SELECT 1").await, Some(1));
                }
            })
            .await;
            waiter.waits(&mut observer);
            observer.cancel(waiter.id);
            waiter.says("cancelled");
            if under_another {
                assert_held_by(&mut observer, &outer, waiter.id);
            }
            unlock(&mut observer, &key);
            assert_free(&mut observer, &key);
            waiter.go_on();
            waiter.join().await;
            assert_free(&mut observer, &outer);
            assert_free(&mut observer, &key);
            assert_eq!(table.rows(&mut observer), 2);
            observer.execute_sql(&format!("DELETE FROM {}", table.name()));
        }
    }

    async fn a_waiter_whose_session_is_ended_has_a_broken_connection<C: LockTest>(server: &Server) {
        let key = unique_key("kill");
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &key));
        let waiter = in_background(server, {
            let key = key.clone();
            async move |mut conn: C, _| {
                let error = conn.advisory_lock(&key).acquire().await.map(drop);
                assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
                assert!(is_broken(&mut conn), "a pool would hand it out again");
            }
        })
        .await;
        waiter.waits(&mut observer);
        let id = waiter.id;
        observer.kill(id);
        waiter.join().await;
        // MariaDB closes the connection first.
        wait_for("the end of the session", || !observer.is_connected(id));
        unlock(&mut observer, &key);
        assert_free(&mut observer, &key);
    }
}

#[both]
on_postgres! {
    async fn of_two_upgrades_one_is_a_deadlock_and_keeps_its_shared_lock(server: &Server) {
        let key = unique_key("two_upgrades");
        let mut observer = PgConnection::observer(server);
        let (told, who_was_told) = channel();
        let mut actors = Vec::new();
        for index in [0, 1] {
            let (key, told) = (key.clone(), told.clone());
            let actor = in_background(server, async move |mut conn: PgConnection, stage: Stage| {
                let mut shared = conn.advisory_lock(&key).shared().acquire().await.expect("a shared lock");
                stage.pause().await;
                let upgraded = match shared.advisory_lock(&key).acquire().await {
                    Ok(exclusive) => {
                        told.send(index).expect("the test listens");
                        stage.pause().await;
                        exclusive.release().await.expect("a release");
                        true
                    }
                    Err(Error::Deadlock { .. }) => {
                        told.send(index).expect("the test listens");
                        stage.pause().await;
                        false
                    }
                    Err(error) => panic!("{error:?}"),
                };
                assert!(shared.is_held().await.expect("an answer"));
                shared.release().await.expect("a release");
                upgraded
            });
            actors.push(actor.await);
        }
        let mut ids = [actors[0].id, actors[1].id];
        ids.sort_unstable();
        wait_for("two readers", || holders(&mut observer, &key) == ids);
        for actor in &actors {
            actor.go_on();
        }
        let victim = who_was_told.recv_timeout(PATIENCE).expect("a victim");
        assert_eq!(holders(&mut observer, &key), ids);
        actors[victim].go_on();
        let winner = 1 - victim;
        assert_eq!(who_was_told.recv_timeout(PATIENCE), Ok(winner));
        assert_held_by(&mut observer, &key, actors[winner].id);
        actors[winner].go_on();
        for (index, actor) in actors.into_iter().enumerate() {
            assert_eq!(actor.join().await, index == winner);
        }
        assert_free(&mut observer, &key);
    }
}
