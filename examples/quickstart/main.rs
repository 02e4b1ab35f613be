//! Two connections and a second process want the same lock: `cargo run -p quickstart`
//!
//! The feature `servers` adds PostgreSQL, MySQL and MariaDB: `DATABASE_URL=.. cargo run -p quickstart --features servers`

use std::io::{self, BufRead, BufReader};
use std::process::{self, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use database::{Connect, Database, Result};
use diesel::SqliteConnection;
use dlock_diesel::AdvisoryLockExt;

#[path = "../support/database.rs"]
#[allow(dead_code, reason = "other examples use the rest of it")]
mod database;
#[cfg(feature = "servers")]
#[path = "../support/servers.rs"]
#[allow(dead_code, reason = "other examples use the rest of it")]
mod servers;

const LIMIT: Duration = Duration::from_millis(250);

fn main() -> ExitCode {
    database::exit_code(Database::from_env_or_sqlite().and_then(on), 1)
}

fn on(database: Database) -> Result<ExitCode> {
    match &database {
        Database::Sqlite(path, _) => quickstart::<SqliteConnection>(path),
        #[cfg(feature = "servers")]
        Database::Postgres(url) => quickstart::<servers::PgConnection>(url),
        #[cfg(feature = "servers")]
        Database::Mysql(url) => quickstart::<servers::MysqlConnection>(url),
        #[cfg(not(feature = "servers"))]
        Database::Postgres(_) | Database::Mysql(_) => Err(
            "this program was built without servers: cargo run -p quickstart --features servers"
                .into(),
        ),
    }
}

fn quickstart<C: Connect>(url: &str) -> Result<ExitCode> {
    let mut first = database::connect::<C>(url)?;
    // The second process is this program, with the key as its argument.
    if let Some(key) = env::args().nth(1) {
        println!("waits for it");
        let begin = Instant::now();
        let _lock = first.advisory_lock(key).acquire()?;
        println!("acquires it, after {} ms", begin.elapsed().as_millis());
        io::stdin().read_line(&mut String::new())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut second = database::connect::<C>(url)?;
    let key = format!("quickstart/{}", process::id());

    let lock = first.advisory_lock(&key).acquire()?;
    println!("1. The first connection acquires lock {key:?}.");
    if second.advisory_lock(&key).try_acquire()?.is_none() {
        println!("2. The second connection asks for it, and does not get it.");
    }
    if let Err(error) = second.advisory_lock(&key).timeout(LIMIT).acquire() {
        println!("3. It waits for {LIMIT:?}, and gives up: {error}.");
    }
    let mut process = Command::new(env::current_exe()?)
        .arg(&key)
        .env("DATABASE_URL", C::PREFIX.to_owned() + url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
    let mut says = || lines.next().ok_or("the second process failed");
    println!("4. A second process {}.", says()??);
    thread::sleep(Duration::from_millis(500));
    lock.release()?;
    println!("5. The first connection releases it.");
    println!("6. The second process {}.", says()??);
    process.kill()?;
    let _lock = first.advisory_lock(&key).acquire()?;
    println!("7. The second process is killed, which frees it: the first connection acquires it.");
    process.wait()?;
    Ok(ExitCode::SUCCESS)
}
