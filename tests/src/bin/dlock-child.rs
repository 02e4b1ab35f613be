//! What tests do in a process of its own: one subcommand for each role.
//!
//! A role prints what it has reached, a line at a time, and goes on at a line from standard input. At the end of standard
//! input it ends, so that none outlives the tests.

use std::fs;
use std::io::{self, BufRead};
use std::path::PathBuf;
use std::process::{self, exit};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, Subcommand};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error, FencingToken, LockConnection};
use dlock_tests::{TestConnection, with_causes};

#[derive(Parser)]
struct Arguments {
    /// The server to connect to.
    #[arg(long)]
    url: String,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Connects, prints `connected` and the backend's id, and keeps the connection until it is told to go on.
    Connect,
    /// Connects, prints `connected` and the backend's id, acquires the lock, prints `acquired`, and when it is told to go
    /// on, releases it and prints `released`.
    Hold { key: String },
    /// As `hold`, but also draws a fencing token before it prints `acquired` and the token. When it is told to go on, it
    /// writes to the table `fenced` on another connection and prints `changed` and how many rows; then it draws another
    /// token and prints the kind of error, or `drawn`.
    Fence { key: String },
    /// As `hold`, but ends the process in place of releasing.
    Exit { key: String },
    /// As `hold`, but shared, and on SQLite.
    HoldShared { key: String },
    /// On SQLite. Prints what comes of a write.
    Write,
    /// On SQLite. As `hold`, but acquires it shared, prints `shared`, and when it is told to go on, prints `upgrading` and
    /// acquires it exclusively, too.
    Upgrade { key: String },
    /// On SQLite. Prints `connected` and the backend's id, acquires the lock shared, prints `reading`, and releases it after
    /// that time and acquires it anew, until it is told to go on; then prints `read` and how often.
    Read {
        key: String,
        #[arg(long)]
        millis: u64,
    },
    /// On SQLite. Prints `connected` and the backend's id, and the error of the lock.
    Fail { key: String },
    /// On SQLite. Prints `connected` and the backend's id, acquires the lock, prints `acquired` and the nanoseconds since
    /// the Unix epoch, and when it is told to go on, releases it and prints `released` and when it began to. And so on
    /// again and again.
    Stamp { key: String },
    /// On SQLite. Prints `connected` and the backend's id, and when it is told to go on, adds one to the number in one of
    /// the folder's files `0`, `1` and so on, under the lock of that name, again and again for some time; then prints
    /// `counted` and how often for each file.
    CountInFiles {
        folder: PathBuf,
        #[arg(long)]
        files: usize,
        #[arg(long)]
        millis: u64,
    },
    /// Prints `connected` and the backend's id, and when it is told to go on, adds one to the only row's `n` of a table
    /// again and again, by reading it and then writing it; then prints `counted`.
    Count {
        table: String,
        /// The lock to do so under; none, without it.
        #[arg(long)]
        key: Option<String>,
        #[arg(long)]
        rounds: u32,
    },
    /// Prints `connected` and the backend's id, and when it is told to go on, works with a permit of a semaphore again and
    /// again, in threads with a connection each, for some time; then prints `inside`, the worker, the slot and from when
    /// to when, in nanoseconds since the Unix epoch, for each time, and `done`.
    Work {
        key: String,
        #[arg(long)]
        permits: u32,
        #[arg(long)]
        workers: usize,
        /// How long a worker is inside.
        #[arg(long)]
        work: u64,
        #[arg(long)]
        millis: u64,
    },
}

diesel::table! {
    /// Rows that remember the token of the last write.
    fenced (id) {
        /// One of the test's rows.
        id -> Integer,
        /// What was written.
        value -> BigInt,
        /// The token of the last write.
        fence -> BigInt,
    }
}

/// The recipe of the guide.
trait Fenced {
    fn write(&mut self, token: FencingToken, to: i64) -> QueryResult<usize>;
}

macro_rules! fenced {
    ($($Conn:ty)*) => {$(
        impl Fenced for $Conn {
            fn write(&mut self, token: FencingToken, to: i64) -> QueryResult<usize> {
                let token = i64::from(token);
                diesel::update(fenced::table.find(1).filter(fenced::fence.lt(token)))
                    .set((fenced::value.eq(to), fenced::fence.eq(token)))
                    .execute(self)
            }
        }
    )*};
}

fenced! { PgConnection MysqlConnection SqliteConnection }

fn main() {
    let arguments = Arguments::parse();
    if matches!(
        arguments.role,
        Role::HoldShared { .. }
            | Role::Upgrade { .. }
            | Role::Read { .. }
            | Role::Fail { .. }
            | Role::Write
            | Role::Stamp { .. }
            | Role::CountInFiles { .. }
    ) {
        play_on_sqlite(&arguments);
    } else if arguments.url.starts_with("postgres") {
        play::<PgConnection>(&arguments);
    } else if arguments.url.starts_with("mysql") {
        play::<MysqlConnection>(&arguments);
    } else {
        play::<SqliteConnection>(&arguments);
    }
}

fn play<C: TestConnection + LockConnection + Fenced>(arguments: &Arguments) {
    let mut conn = C::open_url(&arguments.url);
    println!("connected {}", conn.backend_id());
    match &arguments.role {
        Role::Connect => pause(),
        Role::Hold { key } => {
            let guard = conn.advisory_lock(key).acquire().expect("the lock");
            println!("acquired");
            pause();
            guard.release().expect("the lock is held");
            println!("released");
        }
        Role::Fence { key } => {
            let mut guard = conn.advisory_lock(key).acquire().expect("the lock");
            let token = guard.fencing_token().expect("a token");
            println!("acquired {token}");
            pause();
            let changed = C::open_url(&arguments.url).write(token, 1);
            println!("changed {}", changed.expect("a statement"));
            println!("{}", kind(guard.fencing_token()));
        }
        Role::Exit { key } => {
            let _guard = conn.advisory_lock(key).acquire().expect("the lock");
            println!("acquired");
            pause();
            exit(0); // runs no destructor
        }
        Role::Count { table, key, rounds } => {
            pause();
            for _ in 0..*rounds {
                match key {
                    Some(key) => conn.advisory_lock(key).run(|conn| add_one(conn, table)),
                    None => add_one(&mut conn, table),
                }
                .expect("the lock, and an update");
            }
            println!("counted");
        }
        Role::Work {
            key,
            permits,
            workers,
            work,
            millis,
        } => {
            let more = (1..*workers).map(|_| C::open_url(&arguments.url));
            let conns: Vec<C> = std::iter::once(conn).chain(more).collect();
            println!("ready");
            pause();
            let (work, millis) = (Duration::from_millis(*work), Duration::from_millis(*millis));
            let inside = thread::scope(|scope| {
                let workers = conns.into_iter().map(|mut conn| {
                    scope.spawn(move || work_inside(&mut conn, key, *permits, work, millis))
                });
                let workers: Vec<_> = workers.collect();
                let join =
                    |worker: thread::ScopedJoinHandle<'_, _>| worker.join().expect("no panic");
                workers.into_iter().map(join).collect::<Vec<_>>()
            });
            for (worker, times) in inside.iter().enumerate() {
                for (slot, from, to) in times {
                    println!("inside {worker} {slot} {from} {to}");
                }
            }
            println!("done");
        }
        role => panic!("{role:?} is for SQLite"),
    }
}

fn kind_of(error: &Error) -> String {
    let kind = format!("{error:?}");
    kind.split([' ', '(']).next().unwrap_or_default().to_owned()
}

fn kind(drawn: Result<FencingToken, Error>) -> String {
    drawn.map_or_else(|error| kind_of(&error), |_| "drawn".into())
}

/// The slots that it had, and from when to when.
fn work_inside<C: TestConnection + LockConnection>(
    conn: &mut C,
    key: &str,
    permits: u32,
    work: Duration,
    millis: Duration,
) -> Vec<(u32, u128, u128)> {
    let (begin, mut inside) = (Instant::now(), Vec::new());
    loop {
        let guard = conn
            .advisory_semaphore(key, permits)
            .acquire()
            .expect("a slot");
        let from = now();
        thread::sleep(work);
        inside.push((guard.slot(), from, now()));
        guard.release().expect("the slot is held");
        if begin.elapsed() >= millis {
            return inside;
        }
    }
}

fn now() -> u128 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.expect("after 1970").as_nanos()
}

fn play_on_sqlite(arguments: &Arguments) {
    let mut conn = SqliteConnection::open_url(&arguments.url);
    println!("connected {}", conn.backend_id());
    if matches!(arguments.role, Role::Write) {
        // Somebody may have a transaction open for ever.
        let written = conn.batch_execute("PRAGMA busy_timeout = 0; INSERT INTO t VALUES (2)");
        return println!("{written:?}");
    }
    match &arguments.role {
        Role::HoldShared { key } => {
            let guard = conn
                .advisory_lock(key)
                .shared()
                .acquire()
                .expect("the lock");
            println!("acquired");
            pause();
            guard.release().expect("the lock is held");
            println!("released");
        }
        Role::Upgrade { key } => {
            let mut shared = conn
                .advisory_lock(key)
                .shared()
                .acquire()
                .expect("the lock");
            println!("shared");
            pause();
            println!("upgrading");
            let guard = shared.advisory_lock(key).acquire().expect("the lock");
            println!("acquired");
            pause();
            guard.release().expect("the lock is held");
        }
        Role::Fail { key } => {
            let error = conn.advisory_lock(key).acquire().expect_err("an error");
            println!("{}: {}", kind_of(&error), with_causes(&error));
        }
        Role::Stamp { key } => loop {
            let guard = conn.advisory_lock(key).acquire().expect("the lock");
            println!("acquired {}", now());
            pause();
            let released = now();
            guard.release().expect("the lock is held");
            println!("released {released}");
            pause();
        },
        Role::Read { key, millis } => {
            let (tell, told) = channel();
            let mut rounds = 0u64;
            while told.try_recv().is_err() {
                let guard = conn
                    .advisory_lock(key)
                    .shared()
                    .acquire()
                    .expect("the lock");
                if rounds == 0 {
                    println!("reading");
                    let tell = tell.clone();
                    thread::spawn(move || {
                        pause();
                        tell.send(())
                    });
                }
                thread::sleep(Duration::from_millis(*millis));
                guard.release().expect("the lock is held");
                rounds += 1;
            }
            println!("read {rounds}");
        }
        Role::CountInFiles {
            folder,
            files,
            millis,
        } => {
            pause();
            let begin = Instant::now();
            let mut counts = vec![0u64; *files];
            for round in process::id() as usize.. {
                if begin.elapsed() > Duration::from_millis(*millis) {
                    break;
                }
                let file = round % files;
                let path = folder.join(file.to_string());
                let guard = conn
                    .advisory_lock(file.to_string())
                    .acquire()
                    .expect("the lock");
                let number: u64 = fs::read_to_string(&path)
                    .expect("the file")
                    .parse()
                    .expect("a number");
                fs::write(&path, (number + 1).to_string()).expect("the file");
                guard.release().expect("the lock is held");
                counts[file] += 1;
            }
            let counts: Vec<String> = counts.iter().map(u64::to_string).collect();
            println!("counted {}", counts.join(" "));
        }
        _ => unreachable!("BUG: played on every server"),
    }
}

fn add_one<C: TestConnection>(conn: &mut C, table: &str) -> QueryResult<()> {
    let n = conn
        .number(&format!("SELECT n FROM {table}"))
        .expect("a row");
    conn.batch_execute(&format!("UPDATE {table} SET n = {}", n + 1))
}

/// Waits for a line from the test.
fn pause() {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .expect("standard input can be read");
}
