//! Sync connections.

use std::thread::{self, JoinHandle};

pub(crate) use diesel::connection::SimpleConnection;
pub(crate) use diesel::{Connection, PgConnection};
pub(crate) use dlock_diesel::{
    AdvisoryLock, AdvisoryLockExt, Error, LockManager, LockManagerBuilder,
};
pub(crate) use dlock_sync_or_async::without_await as both;
pub(crate) use dlock_tests::{on_every_network_server, on_every_server, on_postgres};

use dlock_core::proto::Dialect;
use dlock_diesel::{LockBackend, LockConnection};
use dlock_tests::{Server, TestConnection};

#[path = "cases.rs"]
mod cases;

pub(crate) trait Lockable:
    TestConnection + LockConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>>
{
    fn observer(server: &Server) -> Self {
        Self::open(server)
    }
}

impl<C> Lockable for C where
    C: TestConnection + LockConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>>
{
}

pub(crate) fn manager<C: Lockable>(server: &Server) -> LockManagerBuilder<C> {
    let url = server.url.clone();
    LockManager::builder(move || Ok::<_, diesel::ConnectionError>(C::open_url(&url)))
}

pub(crate) struct Started<T>(JoinHandle<T>);

pub(crate) fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Started<T> {
    Started(thread::spawn(work))
}

impl<T> Started<T> {
    pub(crate) fn join(self) -> T {
        self.0.join().expect("no panic")
    }
}
