//! MySQL's locks are exclusive: the message says what to do.
use diesel::prelude::*;
use dlock_diesel::AdvisoryLockExt;

fn read(conn: &mut MysqlConnection) {
    let _lock = conn.advisory_lock("cache").shared();
}

fn main() {}
