//! One operation: written once, for sync and async connections.

use dlock_diesel::{Error, TransactionLocks};

use super::flavor::{both, *};
use crate::proof::clock::now;
use crate::proof::worker::log::{Log, Looking, look};
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
        Form::Xact => xact(conn, task, log).await,
        Form::Inside => {
            in_transaction(conn, async |conn: &mut C| inside(conn, task, log).await).await
        }
        Form::Managed | Form::ManagedRun | Form::ManagedSeveral | Form::ManagedSemaphore => {
            unreachable!("BUG: it has no connection of its own")
        }
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

/// What is asked for on a connection: one lock or several.
fn lock<'a, C: ProofConnection>(conn: &'a mut C, task: &Task) -> AdvisoryLock<&'a mut C> {
    let cancel = cancellation(conn, task);
    let lock = match task.keys.as_slice() {
        [key] => conn.advisory_lock(key.clone()),
        keys => conn.advisory_locks(keys.to_vec()),
    };
    let mut lock = with_cancel(lock, cancel);
    if task.shared {
        lock = C::shared(lock);
    }
    match task.poll_every {
        Some(interval) => lock.poll_every(interval),
        None => lock,
    }
}

#[both]
async fn guard<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let mut guard = acquired!(lock(conn, task), task);
    let inside = log.entered(None);
    let key = task.names[0];
    if task.draws {
        let token = i64::from(guard.fencing_token().await?);
        log.token(token);
        if task.is_fenced() {
            pause(task.pause).await;
            fenced_write(&mut *guard, key, token, log).await?;
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
    let body = async |conn: &mut C| -> Result<(), Error> {
        let _inside = log.entered(None);
        let value = count(conn, task, log).await?;
        log.added(task.names[0], value);
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(())
    };
    limited!(lock(conn, task), task).run(body).await?;
    Ok("ok")
}

#[both]
async fn transaction<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let body = async |conn: &mut C| -> Result<i64, Error> {
        let _inside = log.entered(None);
        let value = count(conn, task, log).await?;
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(value)
    };
    let value = limited!(lock(conn, task), task).transaction(body).await?;
    log.added(task.names[0], value);
    Ok("ok")
}

#[both]
async fn several<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let guard = acquired!(lock(conn, task), task);
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
    limited!(lock(conn, task), task).transaction(body).await?;
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

/// A write that a token guards.
#[both]
async fn fenced_write<C: ProofConnection>(
    conn: &mut C,
    key: &str,
    token: i64,
    log: &Log,
) -> Result<(), Error> {
    let from = now();
    let write = format!("UPDATE resource SET n = {token} WHERE id = '{key}' AND n < {token}");
    let changed = conn.change(&write).await?;
    log.wrote(key, from, token, changed);
    Ok(())
}

/// A lock that ends with its transaction, and a counter that it protects.
#[both]
async fn xact<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let body = async |conn: &mut C| -> Result<Option<i64>, Error> {
        if !conn.xact_lock(task).await? {
            return Ok(None);
        }
        let _inside = log.entered(None);
        let value = count(conn, task, log).await?;
        if task.panics {
            panic!("{PANIC}");
        }
        Ok(Some(value))
    };
    match in_transaction(conn, body).await? {
        Some(value) => log.added(task.names[0], value),
        None => return Ok("busy"),
    }
    Ok("ok")
}

/// `ProofConnection::xact_lock`, where there are such locks.
#[both]
macro_rules! has_xact_locks {
    () => {
        async fn xact_lock(&mut self, task: &Task) -> Result<bool, Error> {
            xact_acquired(self, task).await
        }
    };
}

#[both]
macro_rules! has_no_xact_locks {
    () => {
        async fn xact_lock(&mut self, _: &Task) -> Result<bool, Error> {
            unreachable!("BUG: no task is of that form there")
        }
    };
}

pub(super) use {has_no_xact_locks, has_xact_locks};

#[both]
pub(super) async fn xact_acquired<C: ProofConnection<Backend: TransactionLocks>>(
    conn: &mut C,
    task: &Task,
) -> Result<bool, Error> {
    let cancel = cancellation(conn, task);
    let mut lock = xact_with_cancel(conn.advisory_xact_lock(task.keys[0].clone()), cancel);
    if let Some(interval) = task.poll_every {
        lock = lock.poll_every(interval);
    }
    match task.wait {
        Wait::Forever => lock.acquire().await?,
        Wait::Limit(limit) => lock.timeout(limit).acquire().await?,
        Wait::Try => return lock.try_acquire().await,
    }
    Ok(true)
}

/// A lock of the session, within its transaction. It is free before COMMIT, so nothing is written under it.
#[both]
async fn inside<C: ProofConnection>(
    conn: &mut C,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    let mut guard = acquired!(lock(conn, task).inside_transaction(), task);
    let inside = log.entered(None);
    guard.try_number("SELECT MAX(n) FROM counter").await?;
    pause(task.pause).await;
    if task.panics {
        panic!("{PANIC}");
    }
    drop(inside);
    // An async guard that is dropped here breaks the connection, as its documentation says.
    guard.release().await?;
    Ok("ok")
}

/// A managed lock, which is looked at again and again.
#[both]
pub(super) async fn managed<C: ProofConnection>(
    locks: &LockManager<C>,
    conn: Option<&mut C>,
    task: &Task,
    log: &Log,
) -> Result<&'static str, Error> {
    if task.form == Form::ManagedSemaphore {
        let held = acquired!(locks.semaphore(task.keys[0].clone(), SEMAPHORE.1), task);
        drop(hold(&held, task, log, Some(held.slot())).await);
        match task.drops {
            true => drop(held),
            false => held.release().await?,
        }
        return Ok("ok");
    }
    let mut lock = locks.locks(task.keys.clone());
    if task.shared {
        lock = C::shared_managed(lock);
    }
    if task.form == Form::ManagedRun {
        let body = async |held: &ManagedLockGuard<C>| -> Result<(), Error> {
            drop(hold(held, task, log, None).await);
            Ok(())
        };
        return match limited!(lock, task).run(body).await {
            Ok(()) => Ok("ok"),
            Err(error) => Err(error),
        };
    }
    let held = acquired!(lock, task);
    let mut token = None;
    if task.draws && task.form == Form::Managed {
        let drawn = i64::from(held.fencing_token().await?);
        log.token(drawn);
        token = Some(drawn);
    }
    let inside = hold(&held, task, log, None).await;
    if let (Some(token), Some(inside)) = (token, &inside) {
        if let Some(conn) = conn {
            // Also if it is lost: the token must protect the row then.
            fenced_write(conn, task.names[0], token, log).await?;
            if let Some(looked) = look(|| held.is_lost()) {
                inside.look(looked);
            }
        }
    }
    drop(inside);
    match task.drops {
        true => drop(held),
        false => held.release().await?,
    }
    Ok("ok")
}

/// Holds it for a while, or until it is lost.
#[both]
async fn hold<C: ProofConnection>(
    held: &ManagedLockGuard<C>,
    task: &Task,
    log: &Log,
    slot: Option<u32>,
) -> Option<Looking> {
    let entered = look(|| held.is_lost())?;
    let inside = log.entered_at(entered, slot);
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
    Some(inside)
}
