//! What runs under a lock, and may be dropped in the middle of a statement.

use diesel::result::Error as DieselError;
use dlock_core::proto::{Ask, Hold};

use crate::backend::{AsyncFunc, Cancel, KeyOf, LockConnection};
use crate::cancel::OnDrop;
use crate::{AdvisoryLockGuard, acquire};

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
    let mut guard = lock(conn, ask, cancel).await?;
    let result = f(&mut *guard).await;
    release_after(guard, result).await
}

/// Takes the lock for a body.
pub(crate) async fn lock<C: LockConnection>(
    conn: &mut C,
    ask: Ask,
    mut cancel: Option<Cancel>,
) -> Result<AdvisoryLockGuard<&mut C>, DieselError> {
    let hold = acquire::lock(conn, &ask, &mut cancel).await?;
    Ok(guard(conn, ask, hold, cancel))
}

/// The guard of a body. It cancels the statement during which the body is dropped.
pub(crate) fn guard<C: LockConnection>(
    conn: &mut C,
    ask: Ask,
    hold: Option<Hold<KeyOf<C>>>,
    cancel: Option<Cancel>,
) -> AdvisoryLockGuard<&mut C> {
    let hold = hold.expect("BUG: a limit that passes is an error");
    let mut guard = AdvisoryLockGuard::new(conn, ask, hold);
    guard.cancel = cancel.map(OnDrop::new);
    guard
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
