//! What tests do in a process of its own: one subcommand for each role.
//!
//! A role prints what it has reached, a line at a time, and goes on at a line from standard input. At the end of standard
//! input it ends, so that none outlives the tests.

use std::io::{self, BufRead};

use clap::{Parser, Subcommand};
use diesel::{MysqlConnection, PgConnection};
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
}

fn main() {
    let arguments = Arguments::parse();
    if arguments.url.starts_with("postgres") {
        play::<PgConnection>(&arguments);
    } else {
        play::<MysqlConnection>(&arguments);
    }
}

fn play<C: TestConnection>(arguments: &Arguments) {
    let mut conn = C::open_url(&arguments.url);
    match arguments.role {
        Role::Connect => {
            println!("connected {}", conn.backend_id());
            pause();
        }
    }
}

/// Waits for a line from the test.
fn pause() {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .expect("standard input can be read");
}
