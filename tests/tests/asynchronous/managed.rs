//! Managers on async connections, and tasks that use them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diesel::ConnectionError;
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use dlock_diesel_async::{LockManager, LockManagerBuilder, ManagedLockGuard};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::both::manager::end_of_session;
use crate::support::*;

/// A manager of a server's locks.
pub(crate) fn manager<C: LockTest>(url: &str) -> LockManagerBuilder<C> {
    let url = url.to_owned();
    LockManager::builder(move || {
        let url = url.clone();
        async move { Ok::<_, ConnectionError>(C::open_url(&url).await) }
    })
}

/// Runs in the background.
pub(crate) fn start<T, F>(work: impl FnOnce() -> F) -> Started<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    Started(tokio::spawn(work()))
}

pub(crate) struct Started<T>(JoinHandle<T>);

impl<T> Started<T> {
    pub(crate) async fn join(self) -> T {
        self.0.await.expect("no panic")
    }
}

/// Whether it is lost within so long.
pub(crate) async fn lost_within<C: LockTest>(held: &ManagedLockGuard<C>, limit: Duration) -> bool {
    timeout(limit, held.lost()).await.is_ok()
}

pub(crate) async fn pause(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// It cannot connect while `refuses` is not 0.
pub(crate) fn refusing_manager<C: LockTest>(
    url: &str,
    refuses: Arc<AtomicU64>,
) -> LockManagerBuilder<C> {
    let url = C::direct_url(url);
    LockManager::builder(move || {
        let (url, refuses) = (url.clone(), refuses.load(Ordering::SeqCst));
        async move {
            match refuses {
                0 => C::establish(&url).await,
                _ => Err(ConnectionError::BadConnection("refused".into())),
            }
        }
    })
}

/// It takes so long to open a connection.
pub(crate) fn slow_manager<C: LockTest>(url: &str, delay: Duration) -> LockManagerBuilder<C> {
    let url = C::direct_url(url);
    LockManager::builder(move || {
        let url = url.clone();
        async move {
            tokio::time::sleep(delay).await;
            C::establish(&url).await
        }
    })
}

/// The server has ended its sessions before it gets them.
pub(crate) fn manager_of_ended_sessions<C: LockTest>(url: &str) -> LockManagerBuilder<C> {
    let url = C::direct_url(url);
    LockManager::builder(move || {
        let url = url.clone();
        async move {
            let mut conn = C::establish(&url).await?;
            let ended = conn.batch_execute(end_of_session(C::KIND)).await;
            ended.expect_err("the session has ended");
            Ok::<_, ConnectionError>(conn)
        }
    })
}

/// Its sessions have been another manager's, as behind a pooler.
pub(crate) fn shared_session_manager(url: &str) -> LockManagerBuilder<AsyncPgConnection> {
    let url = url.to_owned();
    LockManager::builder(move || {
        let url = url.clone();
        async move {
            let mut conn = AsyncPgConnection::establish(&url).await?;
            let set = conn.batch_execute("SET dlock.session = '1'").await;
            set.map_err(ConnectionError::CouldntSetupConfiguration)?;
            Ok::<_, ConnectionError>(conn)
        }
    })
}
