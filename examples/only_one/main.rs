//! `only_one KEY -- COMMAND ..` runs a command on one host of many, or with `--file` once on this host, as flock(1) does.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use dlock_diesel::{AdvisoryLockExt, Error};
use support::{Connect, Database};

mod command;
#[path = "../support/mod.rs"]
mod support;

/// Runs COMMAND while holding lock KEY of the server in DATABASE_URL, or of FILE
///
/// Exits as COMMAND does, with 128 + n if signal n ended it, with 126 or 127 if it could not be started, and with 125
/// if the lock could not be asked for or was lost. If this program is killed with SIGKILL, the lock is free although
/// COMMAND goes on.
#[derive(Parser)]
struct Arguments {
    /// Take the lock of this file, which is made if need be, as is FILE-dlock: no server is asked
    #[arg(long)]
    file: Option<PathBuf>,
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
    let database = arguments
        .file
        .as_deref()
        .map_or_else(Database::from_env, Database::sqlite);
    support::exit_code(support::on_database!(database, only_one, &arguments), 125)
}

fn only_one<C: Connect>(url: &str, arguments: &Arguments) -> support::Result<ExitCode> {
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
    let lost = |error| format!("COMMAND exited with {status}, but: {error}");
    lock.release().map_err(lost)?;
    Ok(status.into())
}
