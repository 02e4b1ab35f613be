//! `only_one KEY -- COMMAND ..` runs a command while it holds a lock, so that runs on many hosts do not overlap. With
//! `--file`, runs on this host do not overlap, as with flock(1).

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use dlock_diesel::{AdvisoryLockExt, Error, Holder};
use support::{Connect, Database};

mod command;
#[path = "../support/mod.rs"]
mod support;

/// Runs COMMAND while holding lock KEY of the server in DATABASE_URL, or of FILE
///
/// Runs with the same KEY do not overlap. But each run that gets the lock runs COMMAND: a host that asks after another
/// one has finished runs it again. To run a job once a night, see the example `once_a_night`.
///
/// Exit status: that of COMMAND; 128 + n if signal n ended COMMAND; 126 or 127 if COMMAND could not be started; 125 if
/// the lock could not be asked for, or was lost. If SIGKILL ends this program, the lock is free although COMMAND goes
/// on.
#[derive(Parser)]
struct Arguments {
    /// Use a lock of this file, without a server. Creates FILE and FILE-dlock if they are missing
    #[arg(long)]
    file: Option<PathBuf>,
    /// Wait at most this many seconds, such as 0.5 [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Do not wait. The same as --timeout 0
    #[arg(long, conflicts_with = "timeout")]
    no_wait: bool,
    /// Exit with STATUS if another process has the lock
    #[arg(short = 'E', value_name = "STATUS", default_value_t = 1)]
    conflict_exit_code: u8,
    /// Run nothing, but say who holds the lock, who waits for it, and how to end that
    #[arg(long, conflicts_with_all = ["timeout", "no_wait", "command"])]
    who: bool,
    key: String,
    #[arg(last = true, required_unless_present = "who")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let database = arguments
        .file
        .as_deref()
        .map_or_else(Database::from_env, Database::sqlite);
    support::exit_code(support::on_database!(database, only_one, &arguments), 125)
}

fn only_one<C: Connect>(url: &str, arguments: &Arguments) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    let mut lock = conn.advisory_lock(&arguments.key);
    if arguments.who {
        who(&lock.holders()?);
        return Ok(ExitCode::SUCCESS);
    }
    let no_wait = arguments.no_wait.then_some(Duration::ZERO);
    if let Some(limit) = arguments.timeout.or(no_wait) {
        lock = lock.timeout(limit);
    }
    let lock = match lock.acquire() {
        Err(busy @ Error::Timeout { .. }) => {
            return Ok(support::exit_code(
                Err(busy.into()),
                arguments.conflict_exit_code,
            ));
        }
        result => result?,
    };
    let status = command::run(&arguments.command);
    let lost = |error| format!("COMMAND exited with {status}, but: {error}");
    lock.release().map_err(lost)?;
    Ok(status.into())
}

/// Prints the sessions that the server shows to this user.
fn who(sessions: &[Holder]) {
    if !sessions.iter().any(|session| session.granted) {
        println!("no holder is seen");
    }
    for session in sessions {
        let has = if session.granted {
            "held"
        } else {
            "waited for"
        };
        print!("{has} by {session}");
        // Of the server's clock, which may be ahead.
        let since = session.since.and_then(|since| since.elapsed().ok());
        if let Some(since) = since {
            let what = if session.granted {
                "busy or idle"
            } else {
                "waiting"
            };
            print!(", {what} for {} s", since.as_secs());
        }
        match session.how_to_end() {
            Some(how) => println!("; to end that session: {how}"),
            None => println!(),
        }
    }
}

/// Parses a number of seconds from the command line.
fn seconds(text: &str) -> support::Result<Duration> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}
