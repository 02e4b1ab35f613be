//! A server that is killed and started again: nobody holds anything there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dlock_core::LockKey;
use dlock_tests::proof::kill_server;
use dlock_tests::{
    Kind, PATIENCE, Server, TestConnection, start_lasting_mysql, start_lasting_postgres,
    unique_key, wait_for,
};

use crate::flavor::*;
use crate::managed::*;
use crate::support::*;

fn lasting(kind: Kind) -> Server {
    let started = match kind {
        Kind::Postgres => start_lasting_postgres(),
        Kind::Mysql => start_lasting_mysql(),
        Kind::Sqlite => unreachable!("BUG: it is no server"),
    };
    started.expect("a server")
}

/// Nobody else uses the server.
fn somebody_waits<O: TestConnection>(observer: &mut O) -> bool {
    let sql = match O::KIND {
        Kind::Postgres => {
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        }
        Kind::Mysql => {
            "SELECT COUNT(*) FROM information_schema.processlist WHERE state = 'User lock'"
        }
        Kind::Sqlite => unreachable!("BUG: it is no server"),
    };
    observer.number(sql) != Some(0)
}

#[both]
on_every_network_server! {
    async fn holders_are_told_when_the_server_is_killed_and_get_locks_when_it_is_back<C: LockTest>(server: &Server) {
        let server = lasting(server.kind);
        let locks = refusing_manager::<C>(&server.url, Arc::default()).build();
        let key = unique_key("restarted");
        let mut held = Vec::new();
        for number in 0..3 {
            held.push(locks.lock((&key[..], number)).acquire().await.expect("a free lock"));
        }
        let taken = unique_key("restarted_taken");
        let mut other = C::open(&server).await;
        let theirs = other.advisory_lock(&taken).acquire().await.expect("a free lock");
        let waiter = start({
            let (locks, taken) = (locks.clone(), taken.clone());
            async move || locks.lock(&taken).acquire().await.map(drop)
        });
        let mut observer = C::observer(&server);
        wait_for("somebody in the queue", || somebody_waits(&mut observer));

        let killed = Instant::now();
        kill_server(&server).expect("it is killed");
        for held in &held {
            assert!(lost_within(held, PATIENCE).await);
        }
        let told = killed.elapsed();
        eprintln!("{server}: told after {told:?}");
        assert!(told < Duration::from_secs(10), "the end of the lease told it: {told:?}");
        for (held, number) in held.into_iter().zip(0..) {
            match held.release().await {
                Err(Error::Lost { key: lost, .. }) => assert_eq!(lost, LockKey::from((&key[..], number))),
                other => panic!("{other:?}"),
            }
        }
        let released = theirs.release().await.map(drop);
        assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
        // It waits on a new connection, if there is one.
        let waited = waiter.join().await;
        assert!(matches!(waited, Ok(()) | Err(Error::NotConnected { .. })), "{waited:?}");

        let again = loop {
            match locks.lock((&key[..], 0)).acquire().await {
                Ok(held) => break held,
                Err(Error::NotConnected { .. }) => pause(Duration::from_millis(20)).await,
                Err(error) => panic!("{error:?}"),
            }
            assert!(killed.elapsed() < PATIENCE, "the server is back");
        };
        eprintln!("{server}: a new lock after {:?}", killed.elapsed());
        assert!(!again.is_lost());
        let mut other = C::open(&server).await;
        let taken = other.advisory_lock((&key[..], 0)).try_acquire().await.expect("an answer");
        assert!(taken.is_none());
        again.release().await.expect("a release");
        locks.close().await;
    }
}
