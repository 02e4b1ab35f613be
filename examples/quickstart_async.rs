//! Two connections and a task want the same lock: `DATABASE_URL=.. cargo run --example quickstart_async`

use std::process::{self, ExitCode};
use std::time::{Duration, Instant};

use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, LockConnection};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

mod support;

const LIMIT: Duration = Duration::from_millis(250);

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(support::on_server_async!(quickstart), 1)
}

async fn quickstart<C: LockConnection + 'static>(url: &str) -> support::Result<ExitCode> {
    let mut first = support::connect_async::<C>(url).await?;
    let mut second = support::connect_async::<C>(url).await?;
    let key = format!("quickstart_async/{}", process::id());

    let lock = first.advisory_lock(&key).acquire().await?;
    println!("1. The first connection acquires lock {key:?}.");
    if second.advisory_lock(&key).try_acquire().await?.is_none() {
        println!("2. The second connection asks for it, and does not get it.");
    }
    let limited = second.advisory_lock(&key).timeout(LIMIT).acquire().await;
    if let Err(error) = limited.map(drop) {
        println!("3. It waits for {LIMIT:?}, and gives up: {error}.");
    }
    let dropped = timeout(LIMIT, second.advisory_lock(&key).acquire()).await;
    if dropped.map(drop).is_err() {
        println!("4. It waits once more, and a timer drops its future after {LIMIT:?}.");
    }
    drop(second); // With its connection closed, that wait leaves the server's queue.

    let third = support::connect_async::<C>(url).await?;
    let waiting = AdvisoryLock::new(Box::new(third), &key).acquire();
    let (acquired, acquires) = oneshot::channel();
    let task = tokio::spawn(async move {
        let begin = Instant::now();
        let lock = waiting.await;
        let _ = acquired.send(lock.as_ref().is_ok().then(|| begin.elapsed()));
        sleep(Duration::MAX).await; // works under the lock
    });
    println!("5. A task with a connection of its own waits for it.");
    sleep(2 * LIMIT).await;
    lock.release().await?;
    println!("6. The first connection releases it.");
    let waited = acquires.await?.ok_or("the task failed")?;
    println!("7. The task acquires it, after {} ms.", waited.as_millis());
    task.abort();
    let _lock = first.advisory_lock(&key).acquire().await?;
    println!("8. The task is aborted: the lock is free for the first connection.");
    Ok(ExitCode::SUCCESS)
}
