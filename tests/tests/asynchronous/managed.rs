//! Managers on async connections, and tasks that use them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diesel::ConnectionError;
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use dlock_diesel_async::{LockManager, LockManagerBuilder, ManagedLockGuard};
use tokio::task::JoinHandle;
use tokio::time::timeout;

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
