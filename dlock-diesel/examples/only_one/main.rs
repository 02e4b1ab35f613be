//! `only_one KEY -- COMMAND ..` runs a command on one host of many, as flock(1) does on one machine.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use dlock_diesel::{AdvisoryLockExt, Error, LockConnection};

mod command;
#[path = "../support/mod.rs"]
mod support;

/// Runs COMMAND while holding lock KEY of the server in DATABASE_URL
///
/// Exits as COMMAND does, with 128 + n if signal n ended it, with 126 or 127 if it could not be started, and with 125
/// if the lock could not be asked for or was lost. If this program is killed with SIGKILL, the lock is free although
/// COMMAND goes on.
#[derive(Parser)]
struct Arguments {
    /// Wait at most that long, fractions allowed [default: as long as it takes]
    #[arg(long, value_name = "SECONDS", value_parser = command::seconds)]
    timeout: Option<Duration>,
    /// Do not wait: the same as --timeout 0
    #[arg(long, conflicts_with = "timeout")]
    no_wait: bool,
    /// Exit with that if somebody else has the lock
    #[arg(short = 'E', value_name = "STATUS", default_value_t = 1)]
    conflict_exit_code: u8,
    key: String,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    support::exit_code(support::on_database!(only_one, &arguments), 125)
}

fn only_one<C: LockConnection>(url: &str, arguments: &Arguments) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    let mut lock = conn.advisory_lock(&arguments.key);
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
    lock.release()
        .map_err(|error| format!("COMMAND exited with {status}, but: {error}"))?;
    Ok(status.into())
}
