//! Another session, which holds the lock.

use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

use dlock_core::proto::Dialect;
use dlock_diesel::{AdvisoryLock, AdvisoryLockGuard, LockBackend, LockConnection};
use dlock_tests::{Server, TestConnection};

use crate::plan::{Call, Holder};

/// A connection whose guards can go to another thread.
pub(crate) trait LockTest:
    TestConnection + LockConnection<Backend: LockBackend<Dialect: Dialect<Key: Send>>>
{
}

impl LockTest for diesel::PgConnection {}
impl LockTest for diesel::MysqlConnection {}

pub(crate) enum Other<C: LockTest> {
    Idle(Box<C>),
    Holds(AdvisoryLockGuard<Box<C>>),
    Releases(JoinHandle<Box<C>>),
}

impl<C: LockTest> Other<C> {
    pub(crate) fn open(server: &Server) -> Self {
        Self::Idle(Box::new(C::open(server)))
    }

    /// Takes the lock, and releases it after some time if the call says so.
    pub(crate) fn hold(self, call: &Call, some_time: Duration) -> Self {
        let Self::Idle(conn) = self else {
            panic!("it holds a lock");
        };
        if call.holder == Holder::Nobody {
            return Self::Idle(conn);
        }
        let guard = AdvisoryLock::new(conn, &call.key).acquire();
        let guard = guard.expect("a free lock");
        if call.holder == Holder::Stays {
            return Self::Holds(guard);
        }
        Self::Releases(thread::spawn(move || {
            sleep(some_time);
            guard.release().expect("a release")
        }))
    }

    pub(crate) fn release(self) -> Self {
        Self::Idle(match self {
            Self::Idle(conn) => conn,
            Self::Holds(guard) => guard.release().expect("a release"),
            Self::Releases(thread) => thread.join().expect("a release"),
        })
    }
}

/// Makes the calls one after the other.
pub(crate) fn make<C: LockTest>(
    server: &Server,
    calls: impl Iterator<Item = Call>,
    some_time: Duration,
    ask: impl Fn(&mut C, &Call),
) {
    let (mut other, mut conn) = (Other::<C>::open(server), C::open(server));
    for call in calls {
        other = other.hold(&call, some_time);
        ask(&mut conn, &call);
        other = other.release();
    }
}

/// The same with an async connection.
pub(crate) async fn make_async<C: dlock_tests::AsyncTestConnection<Observer: LockTest>>(
    server: &Server,
    calls: impl Iterator<Item = Call>,
    some_time: Duration,
    ask: impl AsyncFn(&mut C, &Call),
) {
    let mut other = Other::<C::Observer>::open(server);
    let mut conn = C::open(server).await;
    for call in calls {
        other = other.hold(&call, some_time);
        ask(&mut conn, &call).await;
        other = other.release();
    }
}
