//! MySQL's locks are exclusive, managed ones as well.
use diesel_async::AsyncMysqlConnection;
use dlock_diesel_async::LockManager;

fn read(locks: &LockManager<AsyncMysqlConnection>) {
    let _lock = locks.lock("cache").shared();
}

fn main() {}
