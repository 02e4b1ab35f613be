//! Six processes share the two slots of a semaphore: `cargo run --example few_at_once`

use std::io::{BufRead, BufReader};
use std::process::{self, Child, Command, ExitCode, Stdio};
use std::time::Duration;
use std::{env, thread};

use dlock_diesel::AdvisoryLockExt;
use support::{Connect, Database};

mod support;

/// How many may be inside at once.
const PERMITS: u32 = 2;

/// How long a process is inside. The first one stays until it is killed.
const WORK: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let database = Database::from_env_or_sqlite();
    support::exit_code(support::on_database!(database, few_at_once), 1)
}

fn few_at_once<C: Connect>(url: &str) -> support::Result<ExitCode> {
    // The other processes are this program, with the key and a number as its arguments.
    if let (Some(key), Some(number)) = (env::args().nth(1), env::args().nth(2)) {
        return work::<C>(url, &key, &number);
    }
    let key = format!("few_at_once/{}", process::id());
    let start = |number: u32| {
        Command::new(env::current_exe()?)
            .args([&key, &number.to_string()])
            .env("DATABASE_URL", C::PREFIX.to_owned() + url)
            .stdout(Stdio::piped())
            .spawn()
    };
    let mut first = start(1)?;
    println!("{}", line(&mut first)?);
    let others = (2..=6).map(start).collect::<Result<Vec<Child>, _>>()?;
    for mut other in others {
        println!("{}", line(&mut other)?);
        if !other.wait()?.success() {
            return Err("a process failed".into());
        }
    }
    first.kill()?;
    first.wait()?;
    let (mut one, mut other) = (support::connect::<C>(url)?, support::connect::<C>(url)?);
    let _one = one.advisory_semaphore(&key, PERMITS).acquire()?;
    let _other = other.advisory_semaphore(&key, PERMITS).acquire()?;
    println!("Process 1 is killed, which frees its slot: both are free again.");
    Ok(ExitCode::SUCCESS)
}

fn work<C: Connect>(url: &str, key: &str, number: &str) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    let mut inside = conn.advisory_semaphore(key, PERMITS).acquire()?;
    let holders = inside.holders()?;
    let count = holders.iter().filter(|holder| holder.granted).count();
    println!(
        "Process {number} has slot {}: {count} inside.",
        inside.slot()
    );
    thread::sleep(if number == "1" { Duration::MAX } else { WORK });
    inside.release()?;
    Ok(ExitCode::SUCCESS)
}

/// The next line of a process.
fn line(process: &mut Child) -> support::Result<String> {
    let output = process.stdout.as_mut().expect("it is piped");
    let lines = BufReader::new(output).lines().next();
    Ok(lines.ok_or("a process failed")??)
}
