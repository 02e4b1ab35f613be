//! An acquisition consumes the unlocked lock.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    let lock = conn.advisory_lock("report");
    let first = lock.acquire()?;
    let second = lock.acquire()?;
    drop((first, second));
    Ok(())
}
