//! While a guard lives, the connection is reachable only through it.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = PgConnection::establish("").expect("a server");
    let lock = conn.advisory_lock("report").acquire()?;
    diesel::sql_query("SELECT 1").execute(&mut conn)?;
    lock.release()?;
    Ok(())
}
