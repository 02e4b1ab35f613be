//! A lock that nobody acquires protects nothing.
#![deny(unused_must_use)]
use diesel::prelude::*;
use dlock_diesel::AdvisoryLockExt;

fn main() {
    let mut conn = PgConnection::establish("").expect("a server");
    conn.advisory_lock("report");
    conn.advisory_xact_lock("account/1");
}
