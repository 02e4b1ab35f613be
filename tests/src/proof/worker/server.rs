//! What is the same for sync and async connections to one kind of server.

/// What a connection is asked.
pub(crate) struct Asks {
    /// Its session.
    pub(crate) session: &'static str,
    /// How many locks it has.
    pub(crate) held: &'static str,
}

pub(crate) const POSTGRES: Asks = Asks {
    session: "SELECT pg_backend_pid()::bigint",
    held: "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
};
pub(crate) const MYSQL: Asks = Asks {
    session: "SELECT CAST(CONNECTION_ID() AS SIGNED)",
    held: "SELECT CAST(RELEASE_ALL_LOCKS() AS SIGNED)",
};
pub(crate) const SQLITE: Asks = Asks {
    session: "SELECT dlock_session()",
    held: "SELECT 0",
};

macro_rules! has_shared_locks {
    () => {
        fn shared(lock: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self> {
            lock.shared()
        }

        fn shared_managed(lock: ManagedLock<Self>) -> ManagedLock<Self> {
            lock.shared()
        }
    };
}

macro_rules! has_no_shared_locks {
    () => {
        fn shared(_: AdvisoryLock<&mut Self>) -> AdvisoryLock<&mut Self> {
            unreachable!("BUG: no task is shared there")
        }

        fn shared_managed(_: ManagedLock<Self>) -> ManagedLock<Self> {
            unreachable!("BUG: no task is shared there")
        }
    };
}

pub(crate) use {has_no_shared_locks, has_shared_locks};
