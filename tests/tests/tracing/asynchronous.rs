//! Async connections, and what only they do: their futures can be dropped.

use std::time::Duration;

pub(crate) use diesel_async::{
    AsyncConnection as Connection, AsyncPgConnection as PgConnection,
    SimpleAsyncConnection as SimpleConnection,
};
pub(crate) use dlock_diesel_async::{
    AdvisoryLock, AdvisoryLockExt, Error, LockManager, LockManagerBuilder,
};
pub(crate) use dlock_sync_or_async::with_await as both;
pub(crate) use dlock_tests::{
    on_every_network_server_async as on_every_network_server,
    on_every_server_async as on_every_server, on_postgres_async as on_postgres,
};

use dlock_diesel_async::LockConnection;
use dlock_tests::{AsyncTestConnection, Server, TestConnection, unique_key};
use tokio::task::JoinHandle;

use crate::collect::{shown, spans, told, watch};

#[path = "cases.rs"]
mod cases;

pub(crate) trait Lockable:
    AsyncTestConnection<Observer: dlock_diesel::LockConnection> + LockConnection
{
    fn observer(server: &Server) -> Self::Observer {
        Self::Observer::open(server)
    }
}

impl<C> Lockable for C where
    C: AsyncTestConnection<Observer: dlock_diesel::LockConnection> + LockConnection
{
}

pub(crate) fn manager<C: Lockable>(server: &Server) -> LockManagerBuilder<C> {
    let url = server.url.clone();
    LockManager::builder(move || {
        let url = url.clone();
        async move { Ok::<_, diesel::ConnectionError>(C::open_url(&url).await) }
    })
}

pub(crate) struct Started<T>(JoinHandle<T>);

pub(crate) fn start<T, F>(work: impl FnOnce() -> F) -> Started<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    Started(tokio::spawn(work()))
}

impl<T> Started<T> {
    pub(crate) async fn join(self) -> T {
        self.0.await.expect("no panic")
    }
}

on_every_network_server! {
    async fn a_dropped_wait_is_told_and_so_is_its_broken_connection<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_dropped");
        let mut holder = C::open(server).await;
        let mut conn = C::open(server).await;
        let held = holder.advisory_lock(&key).acquire().await.expect("a free lock");
        let wait = conn.advisory_lock(&key).acquire();
        // However slow the machine is: nobody releases the lock.
        let dropped = tokio::time::timeout(Duration::from_millis(200), wait).await;
        assert!(dropped.is_err());
        let key = shown(&key);
        assert_eq!(spans("dlock.acquire", &key)[1].of("outcome"), "dropped");
        let told = told(&key);
        assert!(told.iter().any(|told| told.message() == "connection marked broken"), "{told:?}");
        drop(held);
    }

    async fn a_dropped_transaction_tells_which_lock_it_was_under<C: Lockable>(server: &Server) {
        watch();
        let key = unique_key("trace_dropped_body");
        let mut conn = C::open(server).await;
        let (enter, entered) = tokio::sync::oneshot::channel();
        let work = conn.advisory_lock(&key).transaction(async move |_conn: &mut C| {
            enter.send(()).expect("the test is there");
            std::future::pending::<Result<(), Error>>().await
        });
        tokio::select! {
            result = work => panic!("it goes on for ever: {result:?}"),
            entered = entered => entered.expect("the body runs"),
        }
        let told = told(&shown(&key));
        assert!(told.iter().any(|told| told.message() == "connection marked broken"), "{told:?}");
    }
}
