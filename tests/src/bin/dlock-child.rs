//! What tests do in a process of its own: one subcommand for each role.
//!
//! A role prints what it has reached, a line at a time, and goes on at a line from standard input. At the end of standard
//! input it ends, so that none outlives the tests.

use std::io::{self, BufRead};
use std::process::exit;

use clap::{Parser, Subcommand};
use diesel::{MysqlConnection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLockExt, LockConnection};
use dlock_tests::TestConnection;

#[derive(Parser)]
struct Arguments {
    /// The server to connect to.
    #[arg(long)]
    url: String,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Connects, prints `connected` and the backend's id, and keeps the connection until it is told to go on.
    Connect,
    /// Connects, prints `connected` and the backend's id, acquires the lock, prints `acquired`, and when it is told to go
    /// on, releases it and prints `released`.
    Hold { key: String },
    /// As `hold`, but ends the process in place of releasing.
    Exit { key: String },
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
}

fn main() {
    let arguments = Arguments::parse();
    if arguments.url.starts_with("postgres") {
        play::<PgConnection>(&arguments);
    } else {
        play::<MysqlConnection>(&arguments);
    }
}

fn play<C: TestConnection + LockConnection>(arguments: &Arguments) {
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
