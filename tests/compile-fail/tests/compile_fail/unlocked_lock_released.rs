//! What is not held cannot be released.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    let lock = conn.advisory_lock("report");
    lock.release()?;
    Ok(())
}
