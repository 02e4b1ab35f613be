use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{LockConnection, LockManager};
use dlock_tests::{Kind, Proxy, Server, unique_key};
use tokio::runtime::{Builder, Runtime};

use crate::Bench;
use crate::duel::{Spread, record, times};
use crate::growth::{Clients, While, open};
use crate::report::{Section, time};
use crate::session::{Api, How};

/// Tasks that use one manager.
struct Managed<C: LockConnection + 'static> {
    runtime: Runtime,
    locks: LockManager<C>,
    keys: Vec<String>,
}

impl<C: LockConnection + 'static> Managed<C> {
    fn open(server: &Server, keys: &[String]) -> Box<dyn Clients> {
        Box::new(Self {
            runtime: Builder::new_multi_thread()
                .enable_all()
                .build()
                .expect("a runtime"),
            locks: LockManager::at(&server.url).connections(4).build(),
            keys: keys.to_vec(),
        })
    }
}

impl<C: LockConnection + 'static> Clients for Managed<C> {
    fn work(&mut self, clients: usize, _how: How, length: Duration) -> While {
        let begin = Instant::now();
        let barrier = Arc::new(tokio::sync::Barrier::new(clients));
        let mut all = While::none();
        self.runtime.block_on(async {
            let tasks: Vec<_> = self.keys[..clients]
                .iter()
                .map(|key| {
                    let (locks, key, barrier) =
                        (self.locks.clone(), key.clone(), Arc::clone(&barrier));
                    tokio::spawn(async move {
                        let mut waits = times();
                        barrier.wait().await;
                        while begin.elapsed() < length {
                            let asked = Instant::now();
                            let held = locks.lock(&key).acquire().await.expect("a lock");
                            record(&mut waits, asked.elapsed());
                            held.release().await.expect("a release");
                        }
                        waits
                    })
                })
                .collect();
            for task in tasks {
                let waits = task.await.expect("a client that ends");
                all.waits
                    .add(waits)
                    .expect("BUG: their bounds are the same");
            }
        });
        all.length = begin.elapsed();
        all
    }
}

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("9. Managed locks");
    section.paragraph(
        "Tasks of one process that acquire and release as fast as they can. Managed: over at most 4 connections of one \
         `LockManager`. Raw and dlock: each task has a connection of its own, as in section 4. In each cell: locks in a \
         second; the median and the 99th percentile of waiting for one. The last column: managed to raw, in locks a \
         second.",
    );
    let slice = Duration::from_millis(if bench.quick { 200 } else { 1000 });
    let slices = if bench.quick { 1 } else { 4 };
    let mut rows = Vec::new();
    for (what, count, one_key) in [
        ("one task, a free lock", 1, true),
        ("64 tasks, one key", 64, true),
        ("64 tasks, 64 keys", 64, false),
    ] {
        for server in bench.servers.clone() {
            let shared = unique_key("bench/managed");
            let keys: Vec<String> = (0..count)
                .map(|_| match one_key {
                    true => shared.clone(),
                    false => unique_key("bench/managed"),
                })
                .collect();
            let mut raw = open(Api::Async, server, &keys);
            let mut managed = match server.kind {
                Kind::Postgres => Managed::<AsyncPgConnection>::open(server, &keys),
                Kind::Mysql => Managed::<AsyncMysqlConnection>::open(server, &keys),
                Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
            };
            let mut sums = [While::none(), While::none(), While::none()];
            for _ in 0..slices {
                sums[0].add(managed.work(count, How::DLOCK, slice));
                sums[1].add(raw.work(count, How::DLOCK, slice));
                sums[2].add(raw.work(count, How::RawWait, slice));
            }
            let mut row = vec![what.to_owned(), server.name.clone()];
            row.extend(sums.iter().map(|sum| {
                let waits = Spread::of(&sum.waits);
                format!(
                    "{:.0}; {}; {}",
                    sum.per_second(),
                    time(waits.median),
                    time(waits.p99)
                )
            }));
            row.push(format!(
                "{:.1} ×",
                sums[0].per_second() / sums[2].per_second()
            ));
            rows.push(row);
        }
    }
    section.table(
        &["", "server", "managed", "dlock", "raw", "managed to raw"],
        &rows,
    );
    section.paragraph(
        "Connections, with 64 tasks of one process. Managed: counted, with one `LockManager` of at most 4. A connection \
         each: what raw statements and `conn.advisory_lock` need. The third is the rule of DistributedLock (.NET), worked \
         out and not measured: it tries on a connection that all locks share, and a lock that is taken gets a connection \
         of its own to wait on.",
    );
    let mut rows = Vec::new();
    for (what, tasks, multiplexed) in [
        ("64 free locks are held", Tasks::Hold, 1),
        ("64 tasks wait for one lock", Tasks::WaitForOne, 65),
        ("64 tasks wait for 64 locks", Tasks::WaitForEach, 65),
    ] {
        for server in bench.servers.clone() {
            let managed = match server.kind {
                Kind::Postgres => connections::<AsyncPgConnection>(server, tasks),
                Kind::Mysql => connections::<AsyncMysqlConnection>(server, tasks),
                Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
            };
            let numbers = [managed, 64, multiplexed].map(|number| number.to_string());
            rows.push(
                [what.to_owned(), server.name.clone()]
                    .into_iter()
                    .chain(numbers)
                    .collect(),
            );
        }
    }
    section.table(
        &[
            "",
            "server",
            "managed",
            "a connection each",
            "as DistributedLock",
        ],
        &rows,
    );
    section
}

/// What 64 tasks do while somebody counts their connections.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tasks {
    Hold,
    WaitForOne,
    WaitForEach,
}

/// The connections of a manager.
fn connections<C: LockConnection + 'static>(server: &Server, tasks: Tasks) -> usize {
    let proxy = Proxy::start(server);
    let keys: Vec<String> = (0..64).map(|_| unique_key("bench/connections")).collect();
    let key = |number: usize| match tasks {
        Tasks::WaitForOne => keys[0].clone(),
        Tasks::Hold | Tasks::WaitForEach => keys[number].clone(),
    };
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let others: LockManager<C> = LockManager::at(&server.url).build();
        let mut taken = Vec::new();
        if tasks != Tasks::Hold {
            for key in &keys {
                taken.push(others.lock(key).acquire().await.expect("a free lock"));
            }
        }
        let locks: LockManager<C> = LockManager::at(proxy.url()).connections(4).build();
        let release = Arc::new(tokio::sync::Notify::new());
        let waiting: Vec<_> = (0..keys.len())
            .map(|number| {
                let (locks, key) = (locks.clone(), key(number));
                let release = Arc::clone(&release);
                tokio::spawn(async move {
                    let held = locks.lock(key).acquire().await.expect("a lock");
                    if tasks == Tasks::Hold {
                        release.notified().await;
                    }
                    drop(held);
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let connections = proxy.open();
        drop(taken);
        release.notify_waiters();
        for waiting in waiting {
            waiting.await.expect("no panic");
        }
        locks.close().await;
        others.close().await;
        connections
    })
}
