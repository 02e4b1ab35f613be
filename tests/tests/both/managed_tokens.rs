//! Fencing tokens of managed locks.

use std::time::Duration;

use dlock_core::LockKey;
use dlock_tests::{PATIENCE, Proxy, Server, unique_key};

use crate::flavor::*;
use crate::managed::*;
use crate::support::*;

#[both]
on_every_server! {
    async fn tokens_of_managed_locks_rise_with_those_of_other_locks<C: LockTest>(server: &Server) {
        let key = unique_key("managed_fence");
        let managers = [manager::<C>(&server.url).build(), manager::<C>(&server.url).build()];
        let mut conn = C::open(server).await;
        let mut drawn = Vec::new();
        for round in 0..12 {
            match managers.get(round % 3) {
                Some(locks) => {
                    let held = locks.lock(&key).acquire().await.expect("a free lock");
                    for _ in 0..2 {
                        drawn.push(held.fencing_token().await.expect("a token"));
                    }
                    held.release().await.expect("a release");
                }
                None => {
                    let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
                    drawn.push(lock.fencing_token().await.expect("a token"));
                    lock.release().await.expect("a release");
                }
            }
        }
        assert!(drawn.is_sorted_by(|one, next| one < next), "{drawn:?}");
        for locks in managers {
            locks.close().await;
        }
    }

    async fn holders_of_one_process_draw_rising_tokens_in_their_turns<C: LockTest>(server: &Server) {
        let key = unique_key("turns");
        let locks = manager::<C>(&server.url).build();
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let (locks, key) = (locks.clone(), key.clone());
                start(async move || {
                    let mut drawn = Vec::new();
                    for turn in 0..10 {
                        let held = locks.lock(&key).acquire().await.expect("the lock");
                        // Nobody else writes into the row of this turn.
                        drawn.push((held.fencing_token().await.expect("a token"), turn));
                        held.release().await.expect("a release");
                    }
                    drawn
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in tasks {
            let drawn = task.join().await;
            assert!(drawn.is_sorted_by(|one, next| one.0 < next.0), "{drawn:?}");
            all.extend(drawn.into_iter().map(|(token, _)| token));
        }
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 80, "two were told the same");
        locks.close().await;
    }

    async fn a_lock_that_is_lost_gives_no_token<C: LockTest>(server: &Server) {
        let locks = manager::<C>(&server.url).build();
        let held = locks.lock(unique_key("no_token")).acquire().await.expect("a free lock");
        locks.close().await;
        let refused = held.fencing_token().await;
        assert!(matches!(refused, Err(Error::Lost { .. })), "{refused:?}");
    }
}

#[both]
on_every_network_server! {
    async fn a_session_that_was_ended_gives_no_token<C: LockTest>(server: &Server) {
        let mut observer = C::observer(server);
        let locks = manager::<C>(&server.url).build();
        let key = unique_key("ended");
        // The first has prepared its statement, the second has not.
        for before in [false, true] {
            let held = locks.lock(&key).acquire().await.expect("a free lock");
            if before {
                held.fencing_token().await.expect("a token");
            }
            let id = holders(&mut observer, LockKey::from(&key))[0];
            observer.kill(id);
            // Before anybody could notice.
            let refused = held.fencing_token().await;
            assert!(matches!(refused, Err(Error::Lost { .. })), "{refused:?}");
            assert!(held.is_lost() && lost_within(&held, Duration::ZERO).await);
        }
        locks.close().await;
    }

    async fn a_silent_network_gives_no_token<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).lease(Duration::from_secs(5)).build();
        let key = unique_key("silent");
        // A machine that is very busy may lose a lease.
        let held = loop {
            if let Ok(held) = locks.lock(&key).acquire().await {
                break held;
            }
        };
        proxy.silence();
        let refused = held.fencing_token().await;
        assert!(matches!(refused, Err(Error::Lost { .. })), "{refused:?}");
        assert!(lost_within(&held, PATIENCE).await);
    }

    async fn a_token_takes_one_round_trip<C: LockTest>(server: &Server) {
        let proxy = Proxy::start(server);
        let locks = manager::<C>(proxy.url()).build();
        let held = locks.lock(unique_key("trips")).acquire().await.expect("a free lock");
        held.fencing_token().await.expect("a token");
        let mut fewest = u64::MAX;
        // The question whether the session is there may come in between.
        for _ in 0..5 {
            proxy.reset();
            held.fencing_token().await.expect("a token");
            fewest = fewest.min(proxy.round_trips());
        }
        assert_eq!(fewest, 1);
        locks.close().await;
    }
}

#[both]
on_postgres! {
    async fn readers_of_a_manager_draw_tokens_at_once(server: &Server) {
        let locks = manager::<PgConnection>(&server.url).build();
        let key = unique_key("readers");
        // More than one hold serves, so that readers move to another connection while they draw.
        let readers: Vec<_> = (0..150)
            .map(|_| {
                let (locks, key) = (locks.clone(), key.clone());
                start(async move || {
                    let held = locks.lock(&key).shared().acquire().await.expect("a shared lock");
                    let one = held.fencing_token().await.expect("a token");
                    let two = held.fencing_token().await.expect("a token");
                    assert!(one < two);
                    held.release().await.expect("a release");
                })
            })
            .collect();
        for reader in readers {
            reader.join().await;
        }
        locks.close().await;
    }
}
