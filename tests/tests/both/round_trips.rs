//! The round trips that the documentation states, counted on the wire.
//!
//! The first use of a statement prepares it, so everything is done once before it is counted. Nothing that is counted
//! has statements that are not cached: tokio-postgres closes those in a pipeline, in one round trip or two.

use std::thread;
use std::time::Duration;

use dlock_tests::{Kind, Proxy, Server, unique_key, wait_for};

use crate::flavor::*;
use crate::round_trips::plain_transaction;
use crate::support::*;

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(60);

/// A connection through a proxy that counts.
pub(crate) struct Counted<C> {
    pub(crate) conn: C,
    pub(crate) proxy: Proxy,
}

#[both]
impl<C: LockTest> Counted<C> {
    pub(crate) async fn open(server: &Server) -> Self {
        let (conn, proxy) = open_counted(server).await;
        Self { conn, proxy }
    }

    /// The round trips of `act` once all its statements are prepared: the first number that comes twice.
    pub(crate) async fn count(&mut self, mut act: impl AsyncFnMut(&mut C)) -> u64 {
        // It prepares.
        act(&mut self.conn).await;
        let mut counts = Vec::new();
        // On a busy machine, a limit may pass before it was waited for, and the message by which diesel-async has the
        // server forget a statement may be counted with the next one or by itself.
        for _ in 0..8 {
            self.proxy.reset();
            act(&mut self.conn).await;
            let count = self.proxy.round_trips();
            if counts.contains(&count) {
                return count;
            }
            counts.push(count);
        }
        panic!("never the same: {counts:?}");
    }

    /// [`count`](Self::count) of what waits for a lock that is taken, and then released.
    pub(crate) async fn count_wait(
        &mut self,
        server: &Server,
        mut act: impl AsyncFnMut(&mut C, &str) -> Result<(), Error>,
    ) -> u64 {
        let key = unique_key("trips_wait");
        let id = self.conn.backend_id().await;
        let mut observer = C::observer(server);
        let mut trips = 0;
        for _ in 0..2 {
            assert!(try_lock(&mut observer, &key));
            self.proxy.reset();
            let holder = thread::spawn({
                let key = key.clone();
                move || {
                    wait_for("the wait", || observer.is_waiting(id));
                    unlock(&mut observer, &key);
                    observer
                }
            });
            act(&mut self.conn, &key).await.expect("the lock");
            trips = self.proxy.round_trips();
            observer = holder.join().expect("the holder's assertions");
        }
        trips
    }
}

#[both]
pub(crate) async fn acquire_and_release<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    let lock = conn.advisory_lock(key).acquire().await?;
    lock.release().await?;
    Ok(())
}

#[both]
async fn transaction<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).transaction(async |_| Ok(())).await
}

#[both]
on_every_network_server! {
    async fn a_free_lock_takes_one_and_its_release_one<C: LockTest>(server: &Server) {
        let key = unique_key("trips_free");
        let Counted { conn, proxy } = Counted::<C>::open(server).await;
        let mut conn = Box::new(conn);
        for prepared in [false, true] {
            proxy.reset();
            let lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
            let acquired = proxy.round_trips();
            proxy.reset();
            conn = lock.release().await.expect("a release");
            if prepared {
                assert_eq!((acquired, proxy.round_trips()), (1, 1));
            }
        }
        let mut counted = Counted { conn: *conn, proxy };
        let tried = counted.count(async |conn| {
            let lock = conn.advisory_lock(&key).try_acquire().await.expect("a try").expect("a free lock");
            lock.release().await.expect("a release");
        });
        assert_eq!(tried.await, 2);
        let limited = counted.count(async |conn| {
            let lock = conn.advisory_lock(&key).timeout(LONG).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        });
        assert_eq!(limited.await, 2);
        let polled = counted.count(async |conn| {
            let lock = conn.advisory_lock(&key).poll_every(LONG).acquire().await.expect("a free lock");
            lock.release().await.expect("a release");
        });
        assert_eq!(polled.await, 2);
        let run = counted.count(async |conn| {
            conn.advisory_lock(&key).run(async |_| Ok::<_, Error>(())).await.expect("a free lock");
        });
        assert_eq!(run.await, 2);
    }

    async fn a_lock_that_is_not_acquired_takes_none<C: LockTest>(server: &Server) {
        let mut counted = Counted::<C>::open(server).await;
        let key = unique_key("trips_none");
        assert_eq!(counted.count(async |conn| drop(conn.advisory_lock(&key).timeout(LONG))).await, 0);
    }

    async fn is_held_takes_one<C: LockTest>(server: &Server) {
        let Counted { conn, proxy } = Counted::<C>::open(server).await;
        let lock = AdvisoryLock::new(Box::new(conn), unique_key("trips_is_held"));
        let mut lock = lock.acquire().await.expect("a free lock");
        for prepared in [false, true] {
            proxy.reset();
            assert!(lock.is_held().await.expect("an answer"));
            assert!(!prepared || proxy.round_trips() == 1);
        }
    }

    async fn holders_takes_one_or_on_mysql_two_or_four<C: LockTest>(server: &Server) {
        let key = unique_key("trips_holders");
        let mut counted = Counted::<C>::open(server).await;
        let free = counted.count(async |conn| drop(conn.advisory_lock(&key).holders().await.expect("holders"))).await;
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &key));
        let held = counted.count(async |conn| drop(conn.advisory_lock(&key).holders().await.expect("holders"))).await;
        unlock(&mut observer, &key);
        match C::KIND {
            Kind::Postgres => assert_eq!((free, held), (1, 1)),
            // Each of its two questions takes two, and the second is asked where the first has no answer.
            Kind::Mysql => assert!(free == 4 && [2, 4].contains(&held), "{free}, {held}"),
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
        }
    }

    async fn a_lock_that_is_taken_takes_one_to_try_and_each_poll_one<C: LockTest>(server: &Server) {
        let key = unique_key("trips_taken");
        let mut counted = Counted::<C>::open(server).await;
        let mut observer = C::observer(server);
        assert!(try_lock(&mut observer, &key));
        let tried = counted.count(async |conn| {
            assert!(conn.advisory_lock(&key).try_acquire().await.expect("a try").is_none());
        });
        assert_eq!(tried.await, 1);
        // One at first, and one at the end: the interval is longer than the limit.
        let polls = counted.count(async |conn| {
            let lock = conn.advisory_lock(&key).timeout(SHORT).poll_every(LONG);
            assert!(lock.try_acquire().await.expect("a try").is_none());
        });
        assert_eq!(polls.await, 2);
    }

    async fn a_wait_takes_one_with_and_without_a_limit<C: LockTest>(server: &Server) {
        const RELEASE: u64 = 1;
        let mut counted = Counted::<C>::open(server).await;
        let unlimited = counted.count_wait(server, acquire_and_release).await;
        let limited = counted.count_wait(server, async |conn, key| {
            conn.advisory_lock(key).timeout(LONG).acquire().await?.release().await?;
            Ok(())
        });
        assert_eq!([unlimited, limited.await], [1 + RELEASE; 2]);
    }

    async fn a_transaction_under_a_free_lock<C: LockTest>(server: &Server) {
        let key = unique_key("trips_transaction");
        let mut counted = Counted::<C>::open(server).await;
        let plain = counted.count(async |conn| {
            conn.transaction(async |_| Ok::<_, Error>(())).await.expect("a transaction");
        });
        assert_eq!(plain.await, plain_transaction(C::KIND));
        let locked = counted.count(async |conn| transaction(conn, &key).await.expect("a free lock")).await;
        match C::KIND {
            Kind::Postgres => assert_eq!(locked, plain_transaction(C::KIND)),
            Kind::Mysql => assert_eq!(locked, plain_transaction(C::KIND) + 2),
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
        }
    }

    async fn a_transaction_under_a_lock_that_is_taken<C: LockTest>(server: &Server) {
        let expected = match C::KIND {
            Kind::Postgres => plain_transaction(C::KIND),
            Kind::Mysql => 1 + plain_transaction(C::KIND) + 1,
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
        };
        let mut counted = Counted::<C>::open(server).await;
        assert_eq!(counted.count_wait(server, transaction).await, expected);
    }
}

/// The round trips of a wait that times out, in `acquire` (which tells the holders) and in `try_acquire`.
#[both]
pub(crate) async fn timeouts<C: LockTest>(server: &Server, prepare: &str) -> [u64; 2] {
    let key = unique_key("trips_timeout");
    let mut counted = Counted::<C>::open(server).await;
    if !prepare.is_empty() {
        counted.conn.execute_sql(prepare).await;
    }
    let mut observer = C::observer(server);
    assert!(try_lock(&mut observer, &key));
    let time_out = async |conn: &mut C| {
        let lock = conn.advisory_lock(&key).timeout(SHORT);
        let error = lock.acquire().await.map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
    };
    let acquire = counted.count(time_out).await;
    let try_in_vain = async |conn: &mut C| {
        let lock = conn.advisory_lock(&key).timeout(SHORT);
        assert!(lock.try_acquire().await.expect("a try").is_none());
    };
    [acquire, counted.count(try_in_vain).await]
}

#[both]
on_postgres! {
    /// One waits, one rolls back, and one asks who has the lock.
    async fn a_transaction_that_is_not_granted_its_lock_takes_three(server: &Server) {
        let key = unique_key("trips_transaction_timeout");
        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let mut counted = Counted::<PgConnection>::open(server).await;
        for limit in [Duration::ZERO, SHORT] {
            let timed_out = counted.count(async |conn| {
                let lock = conn.advisory_lock(&key).timeout(limit);
                let error = lock.transaction(async |_| Ok::<(), Error>(())).await;
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
            });
            assert_eq!(timed_out.await, 3);
        }
    }

    /// One finds the level, one locks and begins again, one commits.
    async fn at_repeatable_read_a_transaction_takes_three_whether_the_lock_is_free_or_taken(server: &Server) {
        const REPEATABLE: &str = "SET default_transaction_isolation = 'repeatable read'";
        let key = unique_key("trips_repeatable");
        let mut counted = Counted::<PgConnection>::open(server).await;
        counted.conn.execute_sql(REPEATABLE).await;
        assert_eq!(counted.count(async |conn| transaction(conn, &key).await.expect("a free lock")).await, 3);
        assert_eq!(counted.count_wait(server, transaction).await, 3);
    }

    /// A wait takes one more: one finds that this limit is set, and one lifts it and waits. A transaction also rolls back
    /// in between. PostgreSQL 16 and older do not have the limit.
    async fn under_transaction_timeout_a_wait_takes_one_more_and_that_of_a_transaction_two(server: &Server) {
        const RELEASE: u64 = 1;
        const SET: &str = "SELECT set_config(name, '1h', false) FROM pg_settings WHERE name = 'transaction_timeout'";
        const IS_SET: &str = "SELECT current_setting('transaction_timeout', true) = '1h'";
        let mut counted = Counted::<PgConnection>::open(server).await;
        counted.conn.execute_sql(SET).await;
        let more = u64::from(counted.conn.number(IS_SET).await == Some(1));
        let key = unique_key("trips_under_transaction_timeout");
        let free = counted.count(async |conn| acquire_and_release(conn, &key).await.expect("a free lock"));
        assert_eq!(free.await, 1 + RELEASE);
        let waited = counted.count_wait(server, acquire_and_release).await;
        assert_eq!(waited, 1 + more + RELEASE);
        let begun = counted.count_wait(server, transaction).await;
        assert_eq!(begun, plain_transaction(Kind::Postgres) + 2 * more);
    }

    async fn a_transactions_lock_takes_one_and_two_if_it_is_taken(server: &Server) {
        let key = unique_key("trips_xact");
        let plain = plain_transaction(Kind::Postgres);
        let mut counted = Counted::<PgConnection>::open(server).await;
        let acquired = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).acquire().await);
            transaction.await.expect("a transaction");
        });
        assert_eq!(acquired.await, plain + 1);
        let tried = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).try_acquire().await);
            assert!(transaction.await.expect("a transaction"));
        });
        assert_eq!(tried.await, plain + 1);
        let asked = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).holders().await);
            transaction.await.expect("a transaction");
        });
        assert_eq!(asked.await, plain + 1);
        // SAVEPOINT, lock, RELEASE SAVEPOINT.
        let nested = counted.count(async |conn| {
            let outer = conn.transaction(async |conn| {
                conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await
            });
            outer.await.expect("a transaction");
        });
        assert_eq!(nested.await, plain + 3);

        let mut observer = PgConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let taken = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).try_acquire().await);
            assert!(!transaction.await.expect("a transaction"));
        });
        assert_eq!(taken.await, plain + 1);
        let timed_out = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| {
                let error = conn.advisory_xact_lock(&key).timeout(SHORT).acquire().await;
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                Ok::<_, Error>(())
            });
            transaction.await.expect("a transaction");
        });
        // Of which one asks who has the lock, and one undoes what the wait did.
        assert_eq!(timed_out.await, plain + 4);
        unlock(&mut observer, &key);
        let waited = counted.count_wait(server, async |conn, key| {
            conn.transaction(async |conn| conn.advisory_xact_lock(key).acquire().await).await
        });
        assert_eq!(waited.await, plain + 2);
    }
}
