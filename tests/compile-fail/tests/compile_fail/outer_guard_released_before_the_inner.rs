//! Locks on one connection stack.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    let mut outer = conn.advisory_lock("outer").acquire()?;
    let inner = outer.advisory_lock("inner").acquire()?;
    drop(outer);
    inner.release()?;
    Ok(())
}
