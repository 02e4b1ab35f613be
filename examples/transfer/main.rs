//! Four processes pay into one account, first without a lock, then under the locks of both accounts:
//! `DATABASE_URL=.. cargo run --example transfer`

use std::process::{Command, ExitCode};
use std::{env, thread, time::Duration};

use bank::Bank;
use diesel::QueryResult;
use dlock_diesel::AdvisoryLockExt;

mod bank;
#[path = "../support/mod.rs"]
mod support;

fn main() -> ExitCode {
    support::exit_code(
        support::on_server!(support::Database::from_env(), transfer),
        1,
    )
}

fn transfer<C: Bank>(url: &str) -> support::Result<ExitCode> {
    let mut conn = support::connect::<C>(url)?;
    // The processes that pay are this program, with arguments.
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [account, lock] = &arguments[..] {
        conn.set_read_committed()?;
        for _ in 0..50 {
            pay(&mut conn, account.parse()?, lock == "with")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    for lock in ["without", "with"] {
        conn.open()?;
        let before = conn.total()?;
        let mut processes = Vec::new();
        for account in ["1", "2", "3", "4"] {
            let mut this = Command::new(env::current_exe()?);
            processes.push(this.args([account, lock]).spawn()?);
        }
        for mut process in processes {
            assert!(process.wait()?.success(), "a process failed");
        }
        let lost = before - conn.total()?;
        println!("{lock} the lock: {lost} of {before} lost");
    }
    conn.close()?;
    Ok(ExitCode::SUCCESS)
}

fn pay<C: Bank>(conn: &mut C, from: i32, lock: bool) -> QueryResult<()> {
    let payment = |conn: &mut C| {
        let (own, common) = (conn.balance(from)?, conn.balance(0)?);
        thread::sleep(Duration::from_millis(1)); // another process may write in the meantime
        conn.set_balance(from, own - 1)?;
        conn.set_balance(0, common + 1)
    };
    if lock {
        // In whatever order: two payments never wait for each other.
        let accounts = [("account", from), ("account", 0)];
        conn.advisory_locks(accounts).transaction(payment)
    } else {
        conn.transaction(payment)
    }
}
