//! A guard borrows the connection.
use diesel::prelude::*;
use dlock_diesel::{AdvisoryLockExt, Error};

fn main() -> Result<(), Error> {
    let mut conn = MysqlConnection::establish("").expect("a server");
    let lock = conn.advisory_lock("report").acquire()?;
    drop(conn);
    lock.release()?;
    Ok(())
}
