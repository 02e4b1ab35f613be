//! A writer gives up its place in the queue after each turn, and readers come in. So its turns grow behind readers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use diesel::PgConnection;
use dlock_diesel::AdvisoryLockExt;
use dlock_tests::{Server, TestConnection, unique_key, wait_for};

use crate::support::*;

/// Longer than the first turns.
const READ: Duration = Duration::from_secs(3);

/// Readers that overlap: without a writer, the lock is never free.
fn reader(server: &Server, key: &str, ended: &Arc<AtomicBool>) -> Session<()> {
    let (key, ended) = (key.to_owned(), Arc::clone(ended));
    in_background(PgConnection::open(server), move |mut conn| {
        while !ended.load(Ordering::Relaxed) {
            let lock = conn.advisory_lock(&key).shared().acquire();
            let lock = lock.expect("a reader gets in");
            sleep(READ);
            lock.release().expect("a release");
        }
    })
}

#[test]
fn a_writer_gets_in_behind_overlapping_readers_that_hold_longer_than_a_turn() {
    on_each_server(25, |server| {
        let ways = [Way::Acquire, Way::Transaction, Way::InTransaction];
        for_each_way(server, &ways, |server, way| {
            let key = unique_key("readers");
            let mut observer = PgConnection::open(server);
            let ended = Arc::new(AtomicBool::new(false));
            let mut readers = Vec::new();
            for _ in 0..3 {
                let reader = reader(server, &key, &ended);
                wait_for("a reader", || locks_of(&mut observer, reader.id) == 1);
                readers.push(reader);
                sleep(READ / 3);
            }
            let started = Instant::now();
            let writer = wait_in_background(server, way, &key, None);
            // The turns are of 0.9, 1.8 and 3.6 seconds.
            while !writer.is_finished() {
                let passed = started.elapsed();
                assert!(
                    passed < Duration::from_secs(10),
                    "still waiting after {passed:?}"
                );
                sleep(Duration::from_millis(20));
            }
            eprintln!(
                "{}: {way:?}: a writer got in after {:.1?}",
                server.name,
                started.elapsed()
            );
            writer.join().expect("the lock");
            ended.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join();
            }
        });
    });
}
