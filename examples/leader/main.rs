//! Three tasks compete to lead, each with a lock manager, as if they were three processes. The leader is killed twice.
//! Each time the next task takes over, and the one whose session has ended stops its work:
//! `DATABASE_URL=.. cargo run --example leader`
//!
//! A leader has to notice a dead network. On PostgreSQL, end the URL with
//! `?tcp_user_timeout=10&keepalives_idle=10&keepalives_interval=5&keepalives_retries=3`.

use std::time::{Duration, Instant};
use std::{env, process::ExitCode};

use dlock_diesel_async::{AdvisoryLockExt, Error, LockManager};
use killable::Killable;
use tokio::{sync::mpsc, time::sleep};

mod killable;
#[path = "../support/mod.rs"]
mod support;

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(support::on_server_async!(compete), 1)
}

async fn compete<C: Killable>(url: &str) -> support::Result<ExitCode> {
    let key = env::args().nth(1).unwrap_or("leader".into());
    let mut admin = support::connect_async::<C>(url).await?;
    let (elected, mut elections) = mpsc::channel(1);
    let mut tasks = Vec::new();
    for number in 1..=3 {
        let locks = LockManager::<C>::at(url).build();
        tasks.push(tokio::spawn(lead(
            locks,
            key.clone(),
            number,
            elected.clone(),
        )));
    }
    drop(elected);
    let (mut leader, _) = elections.recv().await.ok_or("all tasks failed")?;
    println!("Task {leader} leads.");
    for kill in ["its task is aborted", "its session is ended"] {
        sleep(Duration::from_millis(500)).await; // the other tasks wait in the server's queue
        let holders = admin.advisory_lock(&key).holders().await?;
        let leaders = holders.iter().filter(|holder| holder.granted).count();
        println!("The server knows {leaders} leader.");
        let killed = Instant::now();
        if kill.contains("task") {
            tasks[leader - 1].abort();
        } else {
            admin.batch_execute(&C::kill(holders[0].backend_id)).await?;
        }
        let (next, since) = elections.recv().await.ok_or("all tasks failed")?;
        let hand_over = since.duration_since(killed).as_secs_f64() * 1000.0;
        println!("Task {leader} is killed: {kill}. Task {next} leads, {hand_over:.1} ms later.");
        if kill.contains("session") {
            let stopped = (&mut tasks[leader - 1]).await?;
            let after = killed.elapsed().as_secs_f64() * 1000.0;
            match stopped {
                Err(Error::Lost { .. }) => {
                    println!("Task {leader} stopped {after:.0} ms after its session had ended.")
                }
                other => println!("Task {leader} did not notice: {other:?}"),
            }
        }
        leader = next;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for the lock, then leads until it is lost: then the work is dropped, wherever it stands.
///
/// A network that fails, or a host, is noticed before another process can lead. A session that an administrator ends is
/// noticed within a second.
async fn lead<C: Killable>(
    locks: LockManager<C>,
    key: String,
    number: usize,
    elected: mpsc::Sender<(usize, Instant)>,
) -> Result<(), Error> {
    let work = async |_held: &_| {
        let _ = elected.send((number, Instant::now())).await;
        std::future::pending::<Result<(), Error>>().await
    };
    locks.lock(key).run(work).await
}
