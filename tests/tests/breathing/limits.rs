//! A limit is exact, whether it ends within the first turn or in a later one.

use std::thread::sleep;
use std::time::{Duration, Instant};

use dlock_diesel::Error;
use dlock_tests::{PATIENCE, Server, unique_key};

use crate::support::*;

const EXACT: Duration = Duration::from_millis(5);

/// How much longer than the limit waits take, each on a connection of its own, the shortest first. That one shows what
/// dlock adds; what others add is the machine's, which does other things as well.
fn lateness(server: &Server, way: Way, key: &str, limit: Duration) -> Vec<Duration> {
    let waits: Vec<_> = (0..6)
        .map(|_| {
            // They do not end at the same time.
            sleep(Duration::from_millis(60));
            let key = key.to_owned();
            in_background(way.open(server), move |mut conn| {
                let started = Instant::now();
                let result = way.with(&mut conn, &key, Some(limit), |_| ());
                let passed = started.elapsed();
                let Err(Error::Timeout { waited, .. }) = result else {
                    panic!("{result:?}");
                };
                assert!(
                    limit <= waited && waited <= passed,
                    "{limit:?}: {waited:?}, {passed:?}"
                );
                waited - limit
            })
        })
        .collect();
    let mut late: Vec<_> = waits.into_iter().map(Session::join).collect();
    late.sort_unstable();
    late
}

#[test]
fn a_limit_is_exact_to_5_milliseconds_also_across_turns() {
    const WAYS: [Way; 4] = [
        Way::Acquire,
        Way::Transaction,
        Way::InTransaction,
        Way::InsideTransaction,
    ];
    let _running = Running::begin(35);
    for server in all_servers() {
        for_each_way(server, &WAYS, |server, way| {
            let key = unique_key("limits");
            let _holder = holder(server, &key);
            for limit in [100, 2_500].map(Duration::from_millis) {
                let (started, mut rounds) = (Instant::now(), Vec::new());
                loop {
                    let late = lateness(server, way, &key, limit);
                    let shortest = late[0];
                    rounds.push(late);
                    if shortest <= EXACT {
                        break;
                    }
                    let patience = started.elapsed() < PATIENCE;
                    assert!(patience, "{limit:?} took longer by {rounds:.1?}");
                }
                eprintln!(
                    "{}: {way:?}: {limit:?} took longer by {rounds:.1?}",
                    server.name
                );
            }
        });
    }
}
