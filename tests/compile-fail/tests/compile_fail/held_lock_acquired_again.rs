//! A guard cannot be acquired: it is.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    let lock = conn.advisory_lock("report").acquire()?;
    lock.acquire()?;
    Ok(())
}
