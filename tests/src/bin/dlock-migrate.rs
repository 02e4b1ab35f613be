//! Runs the migrations of a folder under a lock, in a process of its own.
//!
//! It prints `ready` once it is connected, begins at a line from standard input, and prints the versions that it
//! applied, or `error:` and the error.

use std::io;
use std::path::PathBuf;

use clap::Parser;
use diesel::{Connection, MysqlConnection, PgConnection, SqliteConnection};
use diesel_migrations::{FileBasedMigrations, MigrationHarness};
use dlock_diesel::{AdvisoryLockExt, LockConnection};
use dlock_tests::TestConnection;

#[derive(Parser)]
struct Arguments {
    /// The server to connect to.
    #[arg(long)]
    url: String,
    /// The lock's key.
    #[arg(long)]
    key: String,
    /// The folder with the migrations.
    folder: PathBuf,
}

fn main() {
    let arguments = Arguments::parse();
    if arguments.url.starts_with("postgres") {
        migrate::<PgConnection>(&arguments);
    } else if arguments.url.starts_with("mysql") {
        migrate::<MysqlConnection>(&arguments);
    } else {
        migrate::<SqliteConnection>(&arguments);
    }
}

fn migrate<C>(arguments: &Arguments)
where
    C: TestConnection + LockConnection + MigrationHarness<<C as Connection>::Backend>,
{
    let mut conn = C::open_url(&arguments.url);
    let migrations = FileBasedMigrations::from_path(&arguments.folder).expect("the folder");
    println!("ready");
    io::stdin()
        .read_line(&mut String::new())
        .expect("standard input can be read");
    let lock = conn.advisory_lock(&arguments.key);
    match lock.run_pending_migrations(migrations) {
        Ok(versions) => {
            let versions: Vec<String> = versions.iter().map(ToString::to_string).collect();
            println!("applied: {}", versions.join(" "));
        }
        Err(error) => println!("error: {error}"),
    }
}
