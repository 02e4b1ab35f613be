//! The round trips that the documentation states, counted on the wire.
//!
//! The first use of a statement prepares it, so everything is done once before it is counted. Nothing that is counted
//! has statements that are not cached: tokio-postgres closes those in a pipeline, in one round trip or two.

use std::thread;
use std::time::Duration;

use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, Kind, Proxy, Server, TestConnection, on_every_network_server_async,
    on_mysql_async, on_postgres_async, unique_key, wait_for,
};

use crate::support::*;

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(60);

/// BEGIN and COMMIT.
const PLAIN_TRANSACTION: u64 = 2;

/// A connection through a proxy that counts.
struct Counted<C> {
    conn: C,
    proxy: Proxy,
}

impl<C: LockTest> Counted<C> {
    async fn open(server: &Server) -> Self {
        let (conn, proxy) = open_counted(server).await;
        Self { conn, proxy }
    }

    /// The round trips of `act` once all its statements are prepared: the same twice in a row.
    async fn count(&mut self, mut act: impl AsyncFnMut(&mut C)) -> u64 {
        let mut last = None;
        // The first prepares. On a machine that stands still, a limit may pass before it was waited for.
        for _ in 0..8 {
            self.proxy.reset();
            act(&mut self.conn).await;
            let count = Some(self.proxy.round_trips());
            if count == last {
                break;
            }
            last = count;
        }
        last.expect("it was counted")
    }

    /// [`count`](Self::count) of what waits for a lock that is taken, and then released.
    async fn count_wait(
        &mut self,
        server: &Server,
        mut act: impl AsyncFnMut(&mut C, &str) -> Result<(), Error>,
    ) -> u64 {
        let key = unique_key("async_trips_wait");
        let id = self.conn.backend_id().await;
        let mut observer = C::Observer::open(server);
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

async fn acquire_and_release<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).acquire().await?.release().await?;
    Ok(())
}

async fn transaction<C: LockTest>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).transaction(async |_| Ok(())).await
}

on_every_network_server_async! {
    async fn a_free_lock_takes_one_and_its_release_one<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_free");
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
        let key = unique_key("async_trips_none");
        assert_eq!(counted.count(async |conn| drop(conn.advisory_lock(&key).timeout(LONG).acquire())).await, 0);
    }

    async fn is_held_takes_one<C: LockTest>(server: &Server) {
        let Counted { conn, proxy } = Counted::<C>::open(server).await;
        let lock = AdvisoryLock::new(Box::new(conn), unique_key("async_trips_is_held"));
        let mut lock = lock.acquire().await.expect("a free lock");
        for prepared in [false, true] {
            proxy.reset();
            assert!(lock.is_held().await.expect("an answer"));
            assert!(!prepared || proxy.round_trips() == 1);
        }
    }

    async fn holders_takes_one_or_on_mysql_two<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_holders");
        let mut counted = Counted::<C>::open(server).await;
        let free = counted.count(async |conn| drop(conn.advisory_lock(&key).holders().await.expect("holders"))).await;
        let mut observer = C::Observer::open(server);
        assert!(try_lock(&mut observer, &key));
        let held = counted.count(async |conn| drop(conn.advisory_lock(&key).holders().await.expect("holders"))).await;
        unlock(&mut observer, &key);
        match C::KIND {
            Kind::Postgres => assert_eq!((free, held), (1, 1)),
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => assert!(free == 2 && held <= 2, "{free}, {held}"),
        }
    }

    async fn a_lock_that_is_taken_takes_one_to_try_and_each_poll_one<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_taken");
        let mut counted = Counted::<C>::open(server).await;
        let mut observer = C::Observer::open(server);
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

    async fn a_wait_takes_two_on_postgres_and_three_on_mysql<C: LockTest>(server: &Server) {
        const RELEASE: u64 = 1;
        let mut counted = Counted::<C>::open(server).await;
        let unlimited = counted.count_wait(server, acquire_and_release).await;
        let limited = counted.count_wait(server, async |conn, key| {
            conn.advisory_lock(key).timeout(LONG).acquire().await?.release().await?;
            Ok(())
        });
        let expected = match C::KIND {
            Kind::Postgres => 2,
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => 3,
        };
        assert_eq!([unlimited, limited.await], [expected + RELEASE; 2]);
    }

    async fn a_transaction_under_a_free_lock<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_transaction");
        let mut counted = Counted::<C>::open(server).await;
        let plain = counted.count(async |conn| {
            conn.transaction(async |_| Ok::<_, Error>(())).await.expect("a transaction");
        });
        assert_eq!(plain.await, PLAIN_TRANSACTION);
        let locked = counted.count(async |conn| transaction(conn, &key).await.expect("a free lock")).await;
        match C::KIND {
            Kind::Postgres => assert_eq!(locked, PLAIN_TRANSACTION),
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => assert_eq!(locked, PLAIN_TRANSACTION + 2),
        }
    }

    async fn a_transaction_under_a_lock_that_is_taken<C: LockTest>(server: &Server) {
        let expected = match C::KIND {
            Kind::Postgres => 3,
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => 3 + PLAIN_TRANSACTION + 1,
        };
        let mut counted = Counted::<C>::open(server).await;
        assert_eq!(counted.count_wait(server, transaction).await, expected);
    }

    async fn inside_a_transaction_a_lock_takes_two_and_so_does_its_release_on_postgres<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_inside");
        let mut counted = Counted::<C>::open(server).await;
        let both = match C::KIND {
            Kind::Postgres => 2 + 2,
            Kind::Sqlite => unreachable!("tested in asynchronous_sqlite.rs"),
            Kind::Mysql => 1 + 1,
        };
        let free = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| {
                conn.advisory_lock(&key).inside_transaction().acquire().await?.release().await?;
                Ok::<_, Error>(())
            });
            transaction.await.expect("a free lock");
        });
        assert_eq!(free.await, PLAIN_TRANSACTION + both);
    }
}

/// The round trips of a wait that times out, in `acquire` (which tells the holders) and in `try_acquire`.
async fn timeouts<C: LockTest>(server: &Server, prepare: &str) -> [u64; 2] {
    let key = unique_key("async_trips_timeout");
    let mut counted = Counted::<C>::open(server).await;
    if !prepare.is_empty() {
        counted.conn.execute_sql(prepare).await;
    }
    let mut observer = C::Observer::open(server);
    assert!(try_lock(&mut observer, &key));
    let acquire = counted.count(async |conn| {
        let error = conn
            .advisory_lock(&key)
            .timeout(SHORT)
            .acquire()
            .await
            .map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
    });
    let acquire = acquire.await;
    let try_acquire = counted.count(async |conn| {
        let lock = conn.advisory_lock(&key).timeout(SHORT);
        assert!(lock.try_acquire().await.expect("a try").is_none());
    });
    [acquire, try_acquire.await]
}

on_postgres_async! {
    async fn a_timeout_takes_one_more_on_postgres(server: &Server) {
        assert_eq!(timeouts::<AsyncPgConnection>(server, "").await, [3, 2]);
    }

    async fn at_repeatable_read_a_transaction_takes_six_and_seven_if_the_lock_is_taken(server: &Server) {
        const REPEATABLE: &str = "SET default_transaction_isolation = 'repeatable read'";
        let key = unique_key("async_trips_repeatable");
        let mut counted = Counted::<AsyncPgConnection>::open(server).await;
        counted.conn.execute_sql(REPEATABLE).await;
        assert_eq!(counted.count(async |conn| transaction(conn, &key).await.expect("a free lock")).await, 6);
        assert_eq!(counted.count_wait(server, transaction).await, 7);
    }

    async fn a_transactions_lock_takes_one_and_two_if_it_is_taken(server: &Server) {
        let key = unique_key("async_trips_xact");
        let mut counted = Counted::<AsyncPgConnection>::open(server).await;
        let acquired = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).acquire().await);
            transaction.await.expect("a transaction");
        });
        assert_eq!(acquired.await, PLAIN_TRANSACTION + 1);
        let tried = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).try_acquire().await);
            assert!(transaction.await.expect("a transaction"));
        });
        assert_eq!(tried.await, PLAIN_TRANSACTION + 1);
        let asked = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).holders().await);
            transaction.await.expect("a transaction");
        });
        assert_eq!(asked.await, PLAIN_TRANSACTION + 1);
        // SAVEPOINT, lock, RELEASE SAVEPOINT.
        let nested = counted.count(async |conn| {
            let outer = conn.transaction(async |conn| {
                conn.advisory_lock(&key).transaction(async |_| Ok::<_, Error>(())).await
            });
            outer.await.expect("a transaction");
        });
        assert_eq!(nested.await, PLAIN_TRANSACTION + 3);

        let mut observer = diesel::PgConnection::open(server);
        assert!(try_lock(&mut observer, &key));
        let taken = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| conn.advisory_xact_lock(&key).try_acquire().await);
            assert!(!transaction.await.expect("a transaction"));
        });
        assert_eq!(taken.await, PLAIN_TRANSACTION + 1);
        let timed_out = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| {
                let error = conn.advisory_xact_lock(&key).timeout(SHORT).acquire().await;
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                Ok::<_, Error>(())
            });
            transaction.await.expect("a transaction");
        });
        // Of which one asks who has the lock, and one undoes what the wait did.
        assert_eq!(timed_out.await, PLAIN_TRANSACTION + 4);
        unlock(&mut observer, &key);
        let waited = counted.count_wait(server, async |conn, key| {
            conn.transaction(async |conn| conn.advisory_xact_lock(key).acquire().await).await
        });
        assert_eq!(waited.await, PLAIN_TRANSACTION + 2);
    }

    async fn a_wait_inside_a_transaction_takes_two(server: &Server) {
        let mut counted = Counted::<AsyncPgConnection>::open(server).await;
        let waited = counted.count_wait(server, async |conn, key| {
            conn.transaction(async |conn| {
                conn.advisory_lock(key).inside_transaction().acquire().await?.release().await?;
                Ok(())
            })
            .await
        });
        assert_eq!(waited.await, PLAIN_TRANSACTION + 2 + 2);
    }
}

on_mysql_async! {
    /// MySQL's timeout is an error, whose number has to be asked for.
    async fn a_timeout_takes_one_or_two_more_and_on_mysql_three_before_that(server: &Server) {
        let [acquire, try_acquire] = timeouts::<AsyncMysqlConnection>(server, "").await;
        let limited = if server.is_mariadb() { 3 } else { 3 + 3 };
        assert_eq!(try_acquire, limited);
        // Who has the lock is asked for in one way or in two.
        assert!((limited + 1..=limited + 2).contains(&acquire), "{acquire}");
    }

    async fn lifting_mariadbs_cap_takes_two(server: &Server) {
        let cap = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";
        let [_, plain] = timeouts::<AsyncMysqlConnection>(server, "").await;
        let [_, capped] = timeouts::<AsyncMysqlConnection>(server, cap).await;
        let more = if server.is_mariadb() { 2 } else { 0 };
        assert_eq!(capped, plain + more);
        let mut counted = Counted::<AsyncMysqlConnection>::open(server).await;
        counted.conn.execute_sql(cap).await;
        let waited = counted.count_wait(server, acquire_and_release).await;
        assert_eq!(waited, 3 + more + 1);
    }
}
