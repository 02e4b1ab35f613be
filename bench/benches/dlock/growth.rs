use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use diesel::{Connection, PgConnection};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::AdvisoryLockExt;
use dlock_tests::{Kind, Server, TestConnection, unique_key};
use hdrhistogram::Histogram;

use crate::duel::{Spread, record, times};
use crate::plot::{self, Axis, Line};
use crate::raw::{AsyncRaw, RawKey};
use crate::report::{Section, time};
use crate::session::{Api, How, Session};
use crate::{Bench, slug};

const CLIENTS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const LOCKS: i64 = 10_000;

/// What some clients did in a while: how long they waited for each lock, and how long the while was.
pub(crate) struct While {
    pub(crate) waits: Histogram<u64>,
    pub(crate) length: Duration,
}

impl While {
    pub(crate) fn none() -> Self {
        Self {
            waits: times(),
            length: Duration::ZERO,
        }
    }

    pub(crate) fn add(&mut self, other: While) {
        self.waits
            .add(&other.waits)
            .expect("BUG: their bounds are the same");
        self.length += other.length;
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.waits.len() as f64 / self.length.as_secs_f64()
    }
}

/// Clients that take locks as fast as they can.
pub(crate) trait Clients {
    fn work(&mut self, clients: usize, how: How, length: Duration) -> While;
}

struct Threads(Vec<Box<dyn Session>>);

impl Clients for Threads {
    fn work(&mut self, clients: usize, how: How, length: Duration) -> While {
        let begin = Instant::now();
        let barrier = Barrier::new(clients);
        let mut all = While::none();
        thread::scope(|scope| {
            let threads: Vec<_> = self.0[..clients]
                .iter_mut()
                .map(|session| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let mut waits = times();
                        barrier.wait();
                        while begin.elapsed() < length {
                            let asked = Instant::now();
                            session.acquire(how);
                            record(&mut waits, asked.elapsed());
                            session.release();
                        }
                        waits
                    })
                })
                .collect();
            for thread in threads {
                all.waits
                    .add(thread.join().expect("a client that ends"))
                    .expect("BUG: their bounds are the same");
            }
        });
        all.length = begin.elapsed();
        all
    }
}

/// Tasks of one runtime, with as many threads as there are cores.
struct Tasks<C> {
    runtime: tokio::runtime::Runtime,
    clients: Vec<(Option<Box<C>>, String)>,
}

impl<C: AsyncRaw> Tasks<C> {
    fn open(server: &Server, keys: &[String]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let clients = keys
            .iter()
            .map(|key| {
                let conn = runtime.block_on(C::open(server));
                (Some(Box::new(conn)), key.clone())
            })
            .collect();
        Self { runtime, clients }
    }
}

impl<C: AsyncRaw> Clients for Tasks<C> {
    fn work(&mut self, clients: usize, how: How, length: Duration) -> While {
        let begin = Instant::now();
        let barrier = Arc::new(tokio::sync::Barrier::new(clients));
        let mut all = While::none();
        self.runtime.block_on(async {
            let tasks: Vec<_> = self.clients[..clients]
                .iter_mut()
                .map(|(conn, key)| {
                    let mut conn = conn.take().expect("BUG: it is given back");
                    let (key, barrier) = (key.clone(), Arc::clone(&barrier));
                    tokio::spawn(async move {
                        let raw_key = RawKey::new(&key);
                        let mut waits = times();
                        barrier.wait().await;
                        while begin.elapsed() < length {
                            let asked = Instant::now();
                            if how == How::RawWait {
                                conn.raw_wait(&raw_key).await.expect("a lock");
                                record(&mut waits, asked.elapsed());
                                conn.raw_release(&raw_key).await.expect("a release");
                            } else {
                                let mut lock = conn.advisory_lock(key.as_str());
                                if how == How::Cancellable {
                                    lock = lock.cancel_with(std::future::ready(()));
                                }
                                let lock = lock.acquire().await;
                                record(&mut waits, asked.elapsed());
                                let lock = lock.expect("a lock");
                                lock.release().await.expect("a release");
                            }
                        }
                        (conn, waits)
                    })
                })
                .collect();
            for (task, (conn, _)) in tasks.into_iter().zip(&mut self.clients) {
                let (back, waits) = task.await.expect("a client that ends");
                *conn = Some(back);
                all.waits
                    .add(waits)
                    .expect("BUG: their bounds are the same");
            }
        });
        all.length = begin.elapsed();
        all
    }
}

pub(crate) fn open(api: Api, server: &Server, keys: &[String]) -> Box<dyn Clients> {
    match (api, server.kind) {
        (Api::Sync, _) => Box::new(Threads(
            keys.iter().map(|key| api.open(server, key)).collect(),
        )),
        (Api::Async, Kind::Postgres) => Box::new(Tasks::<AsyncPgConnection>::open(server, keys)),
        (_, Kind::Sqlite) => unreachable!("BUG: SQLite is no server to measure"),
        (Api::Async, Kind::Mysql) => Box::new(Tasks::<AsyncMysqlConnection>::open(server, keys)),
    }
}

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("4. Growth");
    section.paragraph(
        "So many connections, each in a thread (sync) or a task (async) of its own, that acquire and release as fast as \
         they can; on as few cores as there are here, the servers and the clients share them. In each cell: locks in a \
         second; the median and the 99th percentile of waiting for one. Raw waits as in section 3. In the bars, the least \
         ratio of dlock to raw in locks a second, from 4 connections on; async once more with `cancel_with`.",
    );
    let slice = Duration::from_millis(if bench.quick { 50 } else { 500 });
    let slices = if bench.quick { 1 } else { 4 };
    for (title, one_key) in [("On one key", true), ("On as many keys", false)] {
        section.heading(title);
        let mut rows = Vec::new();
        let mut lines = Vec::new();
        for server in bench.servers.clone() {
            for api in Api::BOTH {
                let shared = unique_key("bench/growth");
                let keys: Vec<String> = (0..64)
                    .map(|_| match one_key {
                        true => shared.clone(),
                        false => unique_key("bench/growth"),
                    })
                    .collect();
                let mut clients = open(api, server, &keys);
                let mut ways = vec![("dlock", How::DLOCK), ("raw", How::RawWait)];
                if one_key && api == Api::Async {
                    ways.push(("dlock, `cancel_with`", How::Cancellable));
                }
                let mut cells: Vec<_> = ways
                    .iter()
                    .map(|(name, _)| vec![server.name.clone(), api.to_string(), (*name).to_owned()])
                    .collect();
                let mut points = vec![Vec::new(); ways.len()];
                for count in CLIENTS {
                    let mut sums: Vec<_> = ways.iter().map(|_| While::none()).collect();
                    for _ in 0..slices {
                        for ((_, how), sum) in ways.iter().copied().zip(&mut sums) {
                            sum.add(clients.work(count, how, slice));
                        }
                    }
                    for ((cells, points), sum) in cells.iter_mut().zip(&mut points).zip(&sums) {
                        let waits = Spread::of(&sum.waits);
                        cells.push(format!(
                            "{:.0}; {}; {}",
                            sum.per_second(),
                            time(waits.median),
                            time(waits.p99)
                        ));
                        points.push((count as f64, sum.per_second()));
                    }
                }
                rows.extend(cells);
                if one_key {
                    bars(&mut section, server, api, &ways, &points);
                }
                for ((name, _), points) in ways.into_iter().zip(points) {
                    lines.push(Line::new(format!("{} {api}, {name}", server.name), points));
                }
            }
        }
        let clients = CLIENTS.map(|count| count.to_string());
        let mut header = vec!["server", "API", "by"];
        header.extend(clients.iter().map(String::as_str));
        section.table(&header, &rows);
        let file = format!("growth-{}.svg", slug(title));
        plot::lines(
            &bench.pictures.join(&file),
            &format!("{}: locks in a second", title.to_lowercase()),
            "connections",
            Axis::Powers(2.0),
            &lines,
        );
        section.picture(
            &file,
            &format!("{title}: locks in a second, by connections"),
        );
    }
    held(bench, &mut section);
    section
}

/// What waits for one key is to keep up with raw.
fn bars(
    section: &mut Section,
    server: &Server,
    api: Api,
    ways: &[(&str, How)],
    points: &[Vec<(f64, f64)>],
) {
    let raw = ways
        .iter()
        .position(|(_, how)| *how == How::RawWait)
        .expect("BUG: raw is one of the ways");
    for ((name, how), points_of) in ways.iter().zip(points) {
        if *how == How::RawWait {
            continue;
        }
        let least = points_of
            .iter()
            .zip(&points[raw])
            .filter(|((count, _), _)| *count >= 4.0)
            .map(|((_, ours), (_, theirs))| ours / theirs)
            .fold(f64::INFINITY, f64::min);
        let limit = match (server.kind, api, *how) {
            (Kind::Postgres, Api::Async, How::DLOCK) => 0.6,
            _ => 0.85,
        };
        let what = format!(
            "{} {api}: locks a second on one key, {name}, against raw",
            server.name
        );
        section.at_least(what, least, limit);
    }
}

/// The time of each lock as more and more are held.
fn held(bench: &mut Bench, section: &mut Section) {
    section.heading("Locks held by one connection");
    let mut rows = Vec::new();
    let mut lines = Vec::new();
    let mut notes = Vec::new();
    // Keys of their own for each session: the server frees those of one that has ended a moment later.
    let mut first_key = i64::MIN;
    for server in bench.servers.clone() {
        let wanted = if bench.quick { 500 } else { LOCKS };
        let most = room(server).map_or(wanted, |room| wanted.min(room));
        if most < wanted {
            notes.push(format!("{}: stopped at {most} locks", server.name));
        }
        for api in Api::BOTH {
            for by in ["dlock", "raw"] {
                let mut session = api.open(server, &unique_key("bench/held"));
                let mut points = Vec::new();
                let mut row = vec![server.name.clone(), api.to_string(), by.to_owned()];
                let part = (most / 10).max(1);
                let mut waits = times();
                for number in 1..=most {
                    // Negative numbers, far from those that an application would use.
                    let number_of_key = first_key + number;
                    let raw_key = RawKey::numbered(number_of_key);
                    let begin = Instant::now();
                    let acquired = match by {
                        "dlock" => session.hold(number_of_key),
                        _ => {
                            session.hold_raw(&raw_key);
                            true
                        }
                    };
                    record(&mut waits, begin.elapsed());
                    if !acquired {
                        notes.push(format!(
                            "{} {api}: no room after {number} locks",
                            server.name
                        ));
                        break;
                    }
                    if number % part == 0 {
                        let spread = Spread::of(&waits);
                        waits.reset();
                        points.push((number as f64, spread.median.as_secs_f64() * 1e6));
                        row.push(time(spread.median));
                    }
                }
                first_key += LOCKS;
                drop(session);
                thread::sleep(Duration::from_secs(1));
                rows.push(row);
                lines.push(Line::new(format!("{} {api}, {by}", server.name), points));
            }
        }
    }
    section.paragraph(
        "The median time to acquire one more lock, in each tenth of those that one connection takes and keeps (10,000, \
         if not stated otherwise). Raw as in section 1.",
    );
    let tenths: Vec<String> = (1..=10).map(|tenth| format!("{tenth}/10")).collect();
    let mut header = vec!["server", "API", "by"];
    header.extend(tenths.iter().map(String::as_str));
    section.table(&header, &rows);
    if !notes.is_empty() {
        notes.push(
            "PostgreSQL has room for about `max_locks_per_transaction * max_connections` locks of all sessions. When \
             there is none left, everybody's fail, so this stops before"
                .into(),
        );
        section.items(&notes);
    }
    plot::lines(
        &bench.pictures.join("held.svg"),
        "one more lock, µs",
        "locks held",
        Axis::Linear,
        &lines,
    );
    section.picture("held.svg", "The time of one more lock, by locks held");
}

/// How many locks a PostgreSQL has room for, with a tenth to spare for others.
fn room(server: &Server) -> Option<i64> {
    if server.kind != Kind::Postgres {
        return None;
    }
    let mut conn = PgConnection::establish(&server.url).expect("a connection");
    let room = conn.number(
        "SELECT current_setting('max_locks_per_transaction')::bigint * (current_setting('max_connections')::bigint \
         + current_setting('max_prepared_transactions')::bigint)",
    );
    room.map(|room| room * 9 / 10)
}
