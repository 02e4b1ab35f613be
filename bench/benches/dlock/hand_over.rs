use std::cell::RefCell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use diesel::{MysqlConnection, PgConnection};
use dlock_tests::{Kind, Server, TestConnection, unique_key};
use hdrhistogram::Histogram;

use crate::duel::{Spread, record, times};
use crate::plot::{self, Bar};
use crate::processor::OneProcessor;
use crate::report::{Section, ratio, spread, time};
use crate::session::{Api, How, Locker};
use crate::{Bench, raw, slug};

/// One who holds a lock, and one, in a thread of its own, who waits for it.
pub(crate) struct HandOver {
    holder: Box<dyn Locker>,
    waiter_id: i64,
    asks: Sender<How>,
    /// When it had the lock.
    acquired: Receiver<Instant>,
    released: Receiver<()>,
    is_waiting: Box<dyn FnMut(i64) -> bool>,
    turn: u32,
}

impl HandOver {
    pub(crate) fn new(
        server: &'static Server,
        holder: Box<dyn Locker>,
        mut waiter: Box<dyn Locker>,
    ) -> Self {
        let is_waiting: Box<dyn FnMut(i64) -> bool> = match server.kind {
            Kind::Postgres => {
                let mut observer = PgConnection::open(server);
                Box::new(move |id| observer.is_waiting(id))
            }
            Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
            Kind::Mysql => {
                let mut observer = MysqlConnection::open(server);
                Box::new(move |id| observer.is_waiting(id))
            }
        };
        let waiter_id = waiter.id();
        let (asks, asked) = channel();
        let (tell_acquired, acquired) = channel();
        let (tell_released, released) = channel();
        thread::spawn(move || {
            for how in asked {
                waiter.acquire(how);
                let now = Instant::now();
                tell_acquired.send(now).expect("the measurement goes on");
                waiter.release();
                tell_released.send(()).expect("the measurement goes on");
            }
        });
        Self {
            holder,
            waiter_id,
            asks,
            acquired,
            released,
            is_waiting,
            turn: 0,
        }
    }

    /// The time from just before the release is sent to when the waiter has the lock, and the part of it after the release
    /// has returned.
    pub(crate) fn pass(&mut self, holder: How, waiter: How) -> (Duration, Duration) {
        self.holder.acquire(holder);
        self.asks.send(waiter).expect("BUG: the waiter is there");
        match waiter {
            How::Dlock {
                poll: Some(interval),
                ..
            } => thread::sleep(Duration::from_millis(5) + interval.mul_f64(self.phase())),
            _ => {
                while !(self.is_waiting)(self.waiter_id) {
                    thread::yield_now();
                }
                // The waiter and its server's process fall asleep.
                thread::sleep(Duration::from_millis(1));
            }
        }
        let begin = Instant::now();
        self.holder.release();
        let returned = Instant::now();
        let acquired = self.acquired.recv().expect("the waiter gets the lock");
        self.released.recv().expect("the waiter releases the lock");
        (
            acquired.saturating_duration_since(begin),
            acquired.saturating_duration_since(returned),
        )
    }

    /// Where in the pause of one who polls the release falls: everywhere alike.
    fn phase(&mut self) -> f64 {
        const GOLDEN: f64 = 0.618_033_988_749_895;
        self.turn += 1;
        (f64::from(self.turn) * GOLDEN).fract()
    }
}

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(1);

pub(crate) fn run(bench: &mut Bench) -> Section {
    let mut section = Section::new("3. Hand-over: a lock that somebody waits for");
    section.paragraph(
        "From just before `release` is sent on one connection to when `acquire` has returned on another, in a thread of \
         its own; before that, the server's tables show that it waits. In parentheses behind: from when `release` has \
         returned. Compared with",
    );
    section.items(&[
        format!("raw on PostgreSQL: {}", raw::wait_text(Kind::Postgres)),
        format!("raw on MySQL and MariaDB: {}", raw::wait_text(Kind::Mysql)),
        "polling: `poll_every(..)`, which asks and sleeps, as other libraries do".into(),
    ]);
    let mut processor = OneProcessor::enter();
    let mut rows = Vec::new();
    let mut bars = Vec::new();
    for server in bench.servers.clone() {
        for api in Api::BOTH {
            let key = unique_key("bench/hand-over");
            let hand_over = RefCell::new(HandOver::new(
                server,
                processor.open(api, server, &key),
                processor.open(api, server, &key),
            ));
            let after_return = RefCell::new(times());
            let dlock = |how| {
                let (time, rest) = hand_over.borrow_mut().pass(How::DLOCK, how);
                record(&mut after_return.borrow_mut(), rest);
                time
            };
            let group = format!("{} {api}", server.name);
            let mut first = true;
            for (ours, theirs, name, other) in [
                (How::DLOCK, How::RawWait, "no limit", "raw".to_owned()),
                (How::LIMITED, How::RawWait, "limit of 60 s", "raw".into()),
                (
                    How::DLOCK,
                    How::poll_every(SHORT),
                    "no limit",
                    polling(SHORT),
                ),
                (How::DLOCK, How::poll_every(LONG), "no limit", polling(LONG)),
            ] {
                after_return.replace(times());
                let (pace, by) = match theirs {
                    How::Dlock { poll, .. } => (bench.pace(poll.unwrap_or_default()), How::DLOCK),
                    _ => (bench.pace(Duration::ZERO), How::RawTry),
                };
                let outcome = bench.duels.fight(
                    &slug(&format!("3 {group} {name} {other}")),
                    pace,
                    &mut || dlock(ours),
                    &mut || hand_over.borrow_mut().pass(by, theirs).0,
                );
                let bar = if theirs == How::RawWait {
                    let what = format!("{group}: hand-over, {name}, against raw");
                    section.at_most(what, outcome.ratio.median, 1.1, "×")
                } else {
                    String::new()
                };
                rows.push(vec![
                    server.name.clone(),
                    api.to_string(),
                    name.into(),
                    with_rest(&outcome.ours, &after_return.borrow()),
                    other.clone(),
                    spread(&outcome.theirs),
                    ratio(&outcome.ratio),
                    bar,
                ]);
                if first {
                    bars.push(Bar::time(&group, "dlock", outcome.ours.median));
                    first = false;
                }
                if ours == How::DLOCK {
                    bars.push(Bar::time(&group, &other, outcome.theirs.median));
                }
            }
        }
    }
    processor.tell(&mut section);
    section.table(
        &[
            "server",
            "API",
            "dlock with",
            "dlock",
            "against",
            "the other",
            "ratio",
            "bar",
        ],
        &rows,
    );
    section.if_missed(
        "PostgreSQL",
        "PostgreSQL: after the grant the server has to leave the statement in the statement that waited, and to put the \
         limits of the wait back, which raw has not.",
    );
    plot::bars(
        &bench.pictures.join("hand-over.svg"),
        "from release here to acquire there (each line is ten times the one before)",
        &bars,
        plot::Scale::Logarithmic,
    );
    section.picture("hand-over.svg", "Times of hand-over on a logarithmic scale");
    section
}

fn polling(interval: Duration) -> String {
    format!("polling each {} ms", interval.as_millis())
}

fn with_rest(times: &Spread, rest: &Histogram<u64>) -> String {
    format!("{}, ({})", spread(times), time(Spread::of(rest).median))
}
