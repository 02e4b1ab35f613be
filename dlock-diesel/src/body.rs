//! What runs under a lock.

use diesel::result::Error as DieselError;
use dlock_core::proto::Ask;

use crate::backend::LockConnection;
use crate::{AdvisoryLockGuard, acquire};

pub(crate) fn run<C, T, E>(
    conn: &mut C,
    ask: Ask,
    f: impl FnOnce(&mut C) -> Result<T, E>,
) -> Result<T, E>
where
    C: LockConnection,
    E: From<DieselError>,
{
    let hold = acquire::lock(conn, &ask).map_err(DieselError::from)?;
    let hold = hold.expect("BUG: a limit that passes is an error");
    let mut guard = AdvisoryLockGuard::new(conn, ask, hold);
    let value = f(&mut guard)?; // an error drops the guard, which releases
    guard.release().map_err(DieselError::from)?;
    Ok(value)
}
