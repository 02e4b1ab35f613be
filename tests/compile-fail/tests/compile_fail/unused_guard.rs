//! A guard that nobody keeps protects nothing.
#![deny(unused_must_use)]
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    conn.advisory_lock("report").acquire()?;
    Ok(())
}
