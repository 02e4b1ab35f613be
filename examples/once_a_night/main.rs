//! `once_a_night JOB PERIOD -- COMMAND ..` runs a command once for each period, over all hosts. A lock alone cannot do
//! that: it keeps runs from overlapping, and not from following each other. So a row remembers each run that succeeded.

use std::process::ExitCode;

use clap::Parser;
use dlock_diesel::AdvisoryLockExt;
use runs::Runs;
use support::Database;

#[path = "../only_one/command.rs"]
mod command;
mod runs;
#[path = "../support/mod.rs"]
mod support;

/// Runs COMMAND, unless JOB has run for PERIOD before, on whatever host
///
/// Start it on several hosts at the same time, for example with cron: `once_a_night report $(date +%F) -- ./report.sh`.
/// One of them runs COMMAND. The others wait until it has ended, and find that it is done. If COMMAND fails, or its host
/// dies, the next one runs it again.
///
/// It creates the table dlock_job_runs in the database that DATABASE_URL names, and keeps a row for each period there.
///
/// Exit status: 0 if JOB has run for PERIOD; otherwise that of COMMAND, as of `only_one`; 125 if the database failed.
#[derive(Parser)]
struct Arguments {
    /// The name of the job
    job: String,
    /// The period that the schedule means, such as 2026-01-31. Not the time: the clocks of hosts differ
    period: String,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let database = Database::from_env();
    support::exit_code(support::on_database!(database, once, &arguments), 125)
}

fn once<C: Runs>(url: &str, arguments: &Arguments) -> support::Result<ExitCode> {
    let Arguments {
        job,
        period,
        command,
    } = arguments;
    let mut conn = support::connect::<C>(url)?;
    // Two sessions that create a table at once can fail, although it says IF NOT EXISTS.
    let setup = conn.advisory_lock(("once_a_night", "table"));
    setup.run(|conn| conn.create_table())?;

    let mut lock = conn.advisory_lock(("once_a_night job", &**job)).acquire()?;
    // Asked under the lock, so that nobody runs the job between the question and the run.
    let status = if lock.has_run(job, period)? {
        eprintln!("{job} has run for {period}");
        0
    } else {
        let status = command::run(command);
        if status == 0 {
            let ran = |error| format!("{job} has run for {period}, and will run again: {error}");
            lock.record(job, period).map_err(ran)?;
        }
        status
    };
    lock.release()?;
    Ok(status.into())
}
