//! One operation: written once, for sync and async connections.

use dlock_diesel::Error;

use super::flavor::{both, *};
use crate::proof::clock::now;
use crate::proof::worker::log::{Log, look};
use crate::proof::worker::task::{Form, PANIC, Task, Wait};
use crate::proof::world::SEMAPHORE;

/// On a connection of the pool.
#[both]
pub(super) async fn on_connection<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    match task.form {
        Form::Guard => guard(conn, task, log).await,
        Form::Run => run(conn, task, log).await,
        Form::Transaction => transaction(conn, task, log).await,
        Form::Several => several(conn, task, log).await,
        Form::Transfer => transfer(conn, task, log).await,
        Form::Semaphore => semaphore(conn, task, log).await,
        Form::SemaphoreTransaction => semaphore_transaction(conn, task, log).await,
        Form::Managed | Form::ManagedRun => unreachable!("BUG: it has no connection of its own"),
    }
}

/// The lock as the task wants it, or the operation ends as busy.
#[both]
macro_rules! acquired {
    ($lock:expr, $task:expr) => {{
        let lock = $lock;
        match $task.wait {
            Wait::Forever => lock.acquire().await?,
            Wait::Limit(limit) => lock.timeout(limit).acquire().await?,
            Wait::Try => match lock.try_acquire().await? {
                Some(guard) => guard,
                None => return Ok("busy"),
            },
        }
    }};
}

/// `run` and `transaction` have no try.
macro_rules! limited {
    ($lock:expr, $task:expr) => {{
        let lock = $lock;
        match $task.wait {
            Wait::Limit(limit) => lock.timeout(limit),
            _ => lock,
        }
    }};
}

#[both]
async fn guard<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let mut lock = with_cancel(conn.advisory_lock(task.keys[0].clone()), cancel);
    if task.shared {
        lock = C::shared(lock);
    }
    let mut guard = acquired!(lock, task);
    let inside = log.entered(None);
    let key = task.names[0];
    if task.draws {
        let token = i64::from(guard.fencing_token().await?);
        log.token(token);
        if !task.shared {
            pause(task.pause).await;
            let from = now();
            let write =
                format!("UPDATE resource SET n = {token} WHERE id = '{key}' AND n < {token}");
            let changed = guard.change(&write).await?;
            log.wrote(key, from, token, changed);
        }
    }
    if !task.shared {
        let value = count(&mut *guard, task, log).await?;
        log.added(key, value);
    }
    if task.panics {
        panic!("{PANIC}");
    }
    drop(inside);
    match task.drops {
        true => drop(guard),
        false => drop(guard.release().await?),
    }
    Ok("ok")
}

#[both]
async fn run<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let lock = with_cancel(conn.advisory_lock(task.keys[0].clone()), cancel);
    let body = async |conn: &mut C| -> Result<(), Error> {
        let _inside = log.entered(None);
        let value = count(conn, task, log).await?;
        log.added(task.names[0], value);
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(())
    };
    limited!(lock, task).run(body).await?;
    Ok("ok")
}

#[both]
async fn transaction<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let lock = with_cancel(conn.advisory_lock(task.keys[0].clone()), cancel);
    let body = async |conn: &mut C| -> Result<i64, Error> {
        let _inside = log.entered(None);
        let value = count(conn, task, log).await?;
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(value)
    };
    let value = limited!(lock, task).transaction(body).await?;
    log.added(task.names[0], value);
    Ok("ok")
}

#[both]
async fn several<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let lock = with_cancel(conn.advisory_locks(task.keys.clone()), cancel);
    let guard = acquired!(lock, task);
    let inside = log.entered(None);
    pause(task.pause).await;
    if task.panics {
        panic!("{PANIC}");
    }
    drop(inside);
    match task.drops {
        true => drop(guard),
        false => drop(guard.release().await?),
    }
    Ok("ok")
}

#[both]
async fn transfer<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let lock = with_cancel(conn.advisory_locks(task.keys.clone()), cancel);
    let body = async |conn: &mut C| -> Result<(), Error> {
        let _inside = log.entered(None);
        for (account, amount) in [(task.names[0], -task.amount), (task.names[1], task.amount)] {
            let balance = conn
                .try_number(&format!("SELECT n FROM account WHERE id = '{account}'"))
                .await?;
            pause(task.pause / 2).await;
            conn.change(&format!(
                "UPDATE account SET n = {} WHERE id = '{account}'",
                balance + amount
            ))
            .await?;
        }
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(())
    };
    limited!(lock, task).transaction(body).await?;
    Ok("ok")
}

#[both]
async fn semaphore<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let semaphore = semaphore_with_cancel(
        conn.advisory_semaphore(task.keys[0].clone(), SEMAPHORE.1),
        cancel,
    );
    let guard = acquired!(semaphore, task);
    let inside = log.entered(Some(guard.slot()));
    pause(task.pause).await;
    if task.panics {
        panic!("{PANIC}");
    }
    drop(inside);
    match task.drops {
        true => drop(guard),
        false => drop(guard.release().await?),
    }
    Ok("ok")
}

/// Which slot it has is told by a guard only, so what is in the history is the time of a guard around a transaction.
#[both]
async fn semaphore_transaction<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let cancel = cancellation(conn, task);
    let semaphore = semaphore_with_cancel(
        conn.advisory_semaphore(task.keys[0].clone(), SEMAPHORE.1),
        cancel,
    );
    let mut guard = acquired!(semaphore, task);
    let inside = log.entered(Some(guard.slot()));
    let body = async |conn: &mut C| -> Result<(), Error> {
        conn.try_number("SELECT MAX(n) FROM counter").await?;
        pause(task.pause).await;
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(())
    };
    in_transaction(&mut *guard, body).await?;
    drop(inside);
    guard.release().await?;
    Ok("ok")
}

/// Reads, waits, and writes one more: what nothing but the lock protects.
#[both]
async fn count<C: ProofConnection>(conn: &mut C, task: &Task, log: &Log) -> Result<i64, Error> {
    let key = task.names[0];
    let value = 1 + conn
        .try_number(&format!("SELECT n FROM counter WHERE id = '{key}'"))
        .await?;
    pause(task.pause).await;
    log.adding(key, value);
    conn.change(&format!(
        "UPDATE counter SET n = {value} WHERE id = '{key}'"
    ))
    .await?;
    Ok(value)
}

/// A managed lock, which is looked at again and again.
#[both]
pub(super) async fn managed<C: ProofConnection>(
    locks: &LockManager<C>,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let mut lock = locks.lock(task.keys[0].clone());
    if task.shared {
        lock = C::shared_managed(lock);
    }
    if task.form == Form::ManagedRun {
        let body = async |held: &ManagedLockGuard<C>| -> Result<(), Error> {
            hold(held, task, log).await;
            Ok(())
        };
        let lock = limited!(lock, task);
        return match lock.run(body).await {
            Ok(()) => Ok("ok"),
            Err(error) => Err(error),
        };
    }
    let held = acquired!(lock, task);
    hold(&held, task, log).await;
    match task.drops {
        true => drop(held),
        false => held.release().await?,
    }
    Ok("ok")
}

#[both]
async fn hold<C: ProofConnection>(held: &ManagedLockGuard<C>, task: &Task, log: &Log) {
    let Some(entered) = look(|| held.is_lost()) else {
        return;
    };
    let inside = log.entered_at(entered);
    let until = entered + task.pause.as_nanos() as u64;
    while let Some(looked) = look(|| held.is_lost()) {
        inside.look(looked);
        if looked >= until {
            break;
        }
        pause(std::time::Duration::from_millis(2)).await;
    }
    if task.panics {
        panic!("{PANIC}");
    }
}
