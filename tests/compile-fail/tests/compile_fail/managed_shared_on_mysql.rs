//! MySQL's locks are exclusive, managed ones as well.
use diesel::MysqlConnection;
use dlock_diesel::LockManager;

fn read(locks: &LockManager<MysqlConnection>) {
    let _lock = locks.lock("cache").shared();
}

fn main() {}
