//! Managers on sync connections, and threads that use them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::{Connection, ConnectionError, PgConnection};
use dlock_diesel::{LockManager, LockManagerBuilder, ManagedLockGuard};

use crate::both::manager::end_of_session;
use crate::support::*;

/// A manager of a server's locks.
pub(crate) fn manager<C: LockTest>(url: &str) -> LockManagerBuilder<C> {
    let url = url.to_owned();
    LockManager::builder(move || Ok::<_, ConnectionError>(C::open_url(&url)))
}

/// Runs in the background.
pub(crate) fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Started<T> {
    Started(thread::spawn(work))
}

pub(crate) struct Started<T>(JoinHandle<T>);

impl<T> Started<T> {
    pub(crate) fn join(self) -> T {
        self.0.join().expect("no panic")
    }
}

/// Whether it is lost within so long.
pub(crate) fn lost_within<C: LockTest>(held: &ManagedLockGuard<C>, limit: Duration) -> bool {
    held.wait_lost(limit)
}

pub(crate) fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// It cannot connect while `refuses` is not 0.
pub(crate) fn refusing_manager<C: LockTest>(
    url: &str,
    refuses: Arc<AtomicU64>,
) -> LockManagerBuilder<C> {
    let url = url.to_owned();
    LockManager::builder(move || match refuses.load(Ordering::SeqCst) {
        0 => C::establish(&url),
        _ => Err(ConnectionError::BadConnection("refused".into())),
    })
}

/// It takes so long to open a connection.
pub(crate) fn slow_manager<C: LockTest>(url: &str, delay: Duration) -> LockManagerBuilder<C> {
    let url = url.to_owned();
    LockManager::builder(move || {
        thread::sleep(delay);
        C::establish(&url)
    })
}

/// The server has ended its sessions before it gets them.
pub(crate) fn manager_of_ended_sessions<C: LockTest>(url: &str) -> LockManagerBuilder<C> {
    let url = url.to_owned();
    LockManager::builder(move || {
        let mut conn = C::establish(&url)?;
        conn.batch_execute(end_of_session(C::KIND))
            .expect_err("the session has ended");
        Ok::<_, ConnectionError>(conn)
    })
}

/// Its sessions have been another manager's, as behind a pooler.
pub(crate) fn shared_session_manager(url: &str) -> LockManagerBuilder<PgConnection> {
    let url = url.to_owned();
    LockManager::builder(move || {
        let mut conn = PgConnection::establish(&url)?;
        let set = conn.batch_execute("SET dlock.session = '1'");
        set.map_err(ConnectionError::CouldntSetupConfiguration)?;
        Ok::<_, ConnectionError>(conn)
    })
}
