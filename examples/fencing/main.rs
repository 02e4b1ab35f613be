//! A process is stopped while it holds a lock, and loses its session. When it goes on, its write changes nothing:
//! `DATABASE_URL=.. cargo run --example fencing`

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, process};

use diesel::QueryResult;
use dlock_diesel::{AdvisoryLockExt, FencingToken};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reports::Reports;

mod reports;
#[path = "../support/mod.rs"]
mod support;

fn main() -> ExitCode {
    support::exit_code(
        support::on_server!(support::Database::from_env(), compete),
        1,
    )
}

fn compete<C: Reports>(url: &str) -> support::Result<ExitCode> {
    // The other process is this program, with the key as its argument.
    if let Some(key) = env::args().nth(1) {
        return first::<C>(url, &key);
    }
    let key = format!("fencing/{}", process::id());
    let mut conn = support::connect::<C>(url)?;
    conn.open()?;
    let mut other = Command::new(env::current_exe()?);
    let other = other.arg(&key).stdin(Stdio::piped());
    let mut other = other.stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(other.stdout.take().ok_or("no output")?).lines();
    let mut line = || lines.next().ok_or("the process has ended");
    println!("Process 1 holds the lock. Its token is {}.", line()??);

    signal(&other, Signal::SIGSTOP)?;
    let holders = conn.advisory_lock(&key).holders()?;
    conn.end_session(holders.first().ok_or("nobody holds it")?.backend_id)?;
    println!("It is stopped. Then its session is ended, so the lock is free.");

    let (token, changed) = second(&mut conn, &key)?;
    println!("Process 2 acquires the lock. Its token is {token}. It changes {changed} row.");

    signal(&other, Signal::SIGCONT)?;
    writeln!(other.stdin.take().ok_or("no input")?, "go on")?;
    println!(
        "Process 1 goes on, and does not know. It changes {} rows.",
        line()??
    );
    println!("The report is by {}.", conn.author()?);
    other.wait()?;
    conn.close()?;
    Ok(ExitCode::SUCCESS)
}

fn first<C: Reports>(url: &str, key: &str) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    let mut lock = conn.advisory_lock(key).acquire()?;
    let token = lock.fencing_token()?;
    println!("{token}");
    // Here it is stopped. What it then writes goes another way than the connection that holds the lock.
    io::stdin().read_line(&mut String::new())?;
    let changed = support::connect::<C>(url)?.write(token, "process 1")?;
    println!("{changed}");
    Ok(ExitCode::SUCCESS)
}

fn second<C: Reports>(conn: &mut C, key: &str) -> QueryResult<(FencingToken, usize)> {
    let mut lock = conn.advisory_lock(key).acquire()?;
    let token = lock.fencing_token()?;
    let changed = lock.write(token, "process 2")?;
    lock.release()?;
    Ok((token, changed))
}

fn signal(process: &Child, signal: Signal) -> support::Result<()> {
    Ok(kill(Pid::from_raw(process.id().try_into()?), signal)?)
}
