//! What runs under a lock, and may be dropped in the middle of a statement.

use diesel::result::Error as DieselError;
use dlock_core::proto::Ask;
use tokio::runtime::Handle;

use crate::backend::{AsyncFunc, Cancel, LockConnection};
use crate::run::spawn;
use crate::{AdvisoryLock, AdvisoryLockGuard};

/// What cancels the statement that runs on a connection, if the body that sent it is dropped.
pub(crate) struct OnDrop {
    cancel: Option<Cancel>,
    /// The body may be dropped outside of its runtime.
    runtime: Option<Handle>,
}

impl OnDrop {
    pub(crate) fn new(cancel: Cancel) -> Self {
        Self {
            cancel: Some(cancel),
            runtime: Handle::try_current().ok(),
        }
    }

    /// The body was dropped. The connection is no longer fit for others: a late cancel hits what it is asked next.
    pub(crate) fn cancel(&mut self) {
        spawn(self.runtime.as_ref(), self.cancel.take());
    }
}

pub(crate) async fn run<'a, C, F, T, E>(
    conn: &mut C,
    ask: Ask,
    cancel: Option<Cancel>,
    f: F,
) -> Result<T, E>
where
    C: LockConnection,
    for<'r> F: AsyncFnOnce(&'r mut C) -> Result<T, E>
        + AsyncFunc<&'r mut C, Result<T, E>, Fut: Send>
        + Send
        + 'a,
    T: Send + 'a,
    E: From<DieselError> + Send + 'a,
{
    let lock = AdvisoryLock::asking(conn, ask, cancel);
    let mut guard = lock.acquire_for_body().await.map_err(DieselError::from)?;
    let result = f(&mut *guard).await;
    release_after(guard, result).await
}

/// Releases the lock when the body has ended. An error of the release does not hide one of the body.
pub(crate) async fn release_after<C, T, E>(
    mut guard: AdvisoryLockGuard<&mut C>,
    result: Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    match (result, guard.undo().await) {
        (Ok(_), Err(error)) => Err(DieselError::from(error).into()),
        (result, _) => result,
    }
}
