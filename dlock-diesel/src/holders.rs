//! Who holds a lock, or waits for it.

use std::iter::once;

use dlock_core::proto::Dialect;
use dlock_core::{Holder, LockKey};

use crate::Error;
use crate::backend::{DialectOf, LockConnection};
use crate::run::{refused, run};

/// Of locks that are taken together, one after the other.
pub(crate) fn of_locks<C: LockConnection>(
    conn: &mut C,
    key: &LockKey,
    more: &[LockKey],
) -> Result<Vec<Holder>, Error> {
    let mut holders = Vec::new();
    for key in once(key).chain(more) {
        let machine = DialectOf::<C>::holders(key).map_err(|failure| refused(failure, key))?;
        holders.append(&mut run(conn, machine, key)?);
    }
    Ok(holders)
}

/// Of its slots, and of its gate, at which they wait.
pub(crate) fn of_semaphore<C: LockConnection>(
    conn: &mut C,
    key: &LockKey,
    permits: u32,
) -> Result<Vec<Holder>, Error> {
    let machine =
        DialectOf::<C>::slot_holders(key, permits).map_err(|failure| refused(failure, key))?;
    run(conn, machine, key)
}
