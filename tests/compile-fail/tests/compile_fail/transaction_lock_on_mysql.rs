//! MySQL's locks do not end with a transaction: the message says what to use.
use diesel::prelude::*;
use dlock_diesel::AdvisoryLockExt;

fn in_transaction(conn: &mut MysqlConnection) {
    let _lock = conn.advisory_xact_lock("account/1");
}

fn main() {}
